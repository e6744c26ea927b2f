"""What has been checked, kept from run to run: a line an image, so that a killed run loses none."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from concat_cli.core.data.check import Checker
from concat_cli.core.data.index import Row, row_of
from concat_cli.core.data.source import Item
from concat_cli.core.errors import UserError
from concat_cli.core.files import write_error

_VERSION = 2  # raised when a row would come out otherwise
Key = list[Any]  # [digest of the item, stamps of its files]


class Ledger:
    """The rows that a checker has made, each with what it was made from.

    A ledger of another format, or of a check that did not decode the images, counts as empty.
    """

    def __init__(self, path: Path, checker: Checker) -> None:
        self.path = path
        self._facts, self._decode = _facts(checker), checker.decode
        self._file: TextIO | None = None
        self._usable = False

    def read(self, items: Sequence[Item], keys: Sequence[Key]) -> list[Row | None]:
        """The rows of items whose key is as it was; None for others."""
        known: dict[int, tuple[Key, Row]] = {}
        for key, row in self._lines():
            known[row.id] = (key, row)
        found = [known.get(item.image_id) for item in items]
        return [
            entry[1] if entry is not None and entry[0] == key else None
            for entry, key in zip(found, keys, strict=True)
        ]

    @contextmanager
    def open(self) -> Iterator[Ledger]:
        """Ready to `add`; what a killed run left of a line is cut off. Call after `read`."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            if self._usable:
                _cut_torn_line(self.path)
            mode = "a" if self._usable else "w"
            with self.path.open(mode, encoding="utf-8", newline="\n", buffering=1) as file:
                if not self._usable:
                    file.write(json.dumps({"facts": self._facts, "decode": self._decode}) + "\n")
                self._file = file
                yield self
        except OSError as error:
            raise write_error(self.path, error) from error

    def add(self, key: Key, row: Row) -> None:
        """Keeps a row."""
        assert self._file is not None, "open it first"
        line = row.line()
        self._file.write(f'{{"key": {json.dumps(key)}, "sum": {_sum(line)}, "row": {line}}}\n')

    def _lines(self) -> Iterator[tuple[Key, Row]]:
        """The whole lines after the first, if that is one of the same check."""
        try:
            with self.path.open("rb") as file:
                header = json.loads(file.readline())
                deep_enough = header["decode"] or not self._decode
                if header["facts"] != self._facts or not deep_enough:
                    return
                self._usable = True
                for line in file:
                    if line.endswith(b"\n"):
                        value = json.loads(line)
                        row = row_of(value["row"])
                        if value["sum"] != _sum(row.line()):
                            raise ValueError("a line was changed")
                        yield value["key"], row
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError, RecursionError):
            self._usable = False  # damaged: what was read is right, the rest is checked again
        except OSError as error:
            raise UserError(
                f"Cannot read {self.path}: {error.strerror}.", "Check its rights."
            ) from error


def key_of(item: Item, stamps: list[tuple[int, int] | None]) -> Key:
    """What a row is made from: the item as listed, and sizes and times of its files."""
    digest = hashlib.blake2b(repr(item).encode(), digest_size=8).hexdigest()
    return [digest, [None if stamp is None else list(stamp) for stamp in stamps]]


def _facts(checker: Checker) -> str:
    """A digest of what all rows depend on."""
    classes = [(entry.id, entry.kind) for entry in checker.vocabulary.entries]
    return hashlib.blake2b(
        repr((_VERSION, checker.reader.format, classes)).encode(), digest_size=8
    ).hexdigest()


def _sum(line: str) -> int:
    return zlib.crc32(line.encode())


def _cut_torn_line(path: Path) -> None:
    with path.open("rb+") as file:
        data = file.read()
        file.truncate(data.rfind(b"\n") + 1)
