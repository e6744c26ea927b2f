"""A long JSON list that is never in memory: entries wait in a temporary file for their order."""

from __future__ import annotations

import json
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from concat_cli.core.files import write_error


@dataclass(frozen=True)
class Spooled:
    """What one process has written: a file of UTF-8, and (image id, start, end) of each value."""

    path: Path
    entries: bytes


class Spool:
    """JSON values by image id in a hidden file, until `in_order` reads those of all processes.

    A value takes 24 bytes of memory.
    """

    def __init__(self, folder: Path, name: str, rank: int = 0) -> None:
        self.path = folder / f".{name}.{rank}.tmp"
        self._entries = array("q")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("wb")
        except OSError as error:
            raise write_error(self.path, error) from error

    def add(self, image_id: int, value: Any) -> None:
        """Writes one value; UserError where the disk is full."""
        data = json.dumps(value, ensure_ascii=False).encode("utf-8")
        start = self._file.tell()
        try:
            self._file.write(data)
        except OSError as error:
            raise write_error(self.path, error) from error
        self._entries.extend((image_id, start, start + len(data)))

    def spooled(self) -> Spooled:
        """What the other processes need to know; nothing is added any more."""
        try:
            self._file.close()
        except OSError as error:
            raise write_error(self.path, error) from error
        return Spooled(self.path, self._entries.tobytes())

    def remove(self) -> None:
        """Deletes the file."""
        self._file.close()
        self.path.unlink(missing_ok=True)


def in_order(parts: Sequence[Spooled]) -> Iterator[str]:
    """The JSON texts of all processes by image id."""
    tables = [np.frombuffer(part.entries, np.int64).reshape(-1, 3) for part in parts]
    table = np.concatenate(tables)
    which = np.repeat(np.arange(len(parts)), [len(one) for one in tables])
    with ExitStack() as stack:
        opened = [stack.enter_context(part.path.open("rb")) for part in parts]
        for row in np.argsort(table[:, 0], kind="stable"):
            file, (_, start, end) = opened[which[row]], table[row].tolist()
            file.seek(start)
            yield file.read(end - start).decode("utf-8")


def joined(texts: Iterator[str]) -> Iterator[str]:
    """The pieces of a JSON list of these values."""
    yield "["
    for number, text in enumerate(texts):
        yield f", {text}" if number else text
    yield "]"
