"""Rows on disk that are written over hours: a killed pass goes on, and what was changed is found.

FOLDER/NAME.npy       a column, which has its ending `.part` until all rows are there
FOLDER/bank.json      what the rows are of, and the end and a digest of each block that is on disk

Plain writes: of a file that is mapped into memory, a full disk is told by a signal that ends the
process.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Generator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from concat_cli.core.files import write_error, write_json

BANK = "bank.json"
Columns = Mapping[str, tuple[type[np.generic], tuple[int, ...]]]  # name -> type, shape of a row


@dataclass
class Column:
    """A column of rows, and the file that is open while it is written."""

    path: Path
    kind: np.dtype[Any]
    shape: tuple[int, ...]  # of all rows
    file: BinaryIO | None = None

    @property
    def part(self) -> Path:
        """Where it is until all rows are there."""
        return self.path.with_name(f"{self.path.name}.part")

    @property
    def row(self) -> int:
        """Bytes of a row."""
        return self.kind.itemsize * int(np.prod(self.shape[1:]))

    def header(self) -> bytes:
        """What the file begins with."""
        buffer, formats = io.BytesIO(), np.lib.format
        facts = {"descr": formats.dtype_to_descr(self.kind), "fortran_order": False}
        formats.write_array_header_1_0(buffer, facts | {"shape": self.shape})
        return buffer.getvalue()

    def rows(self, start: int, end: int) -> bytes:
        """The header and the bytes of rows as they are on disk; fewer where it holds fewer."""
        with (self.path if self.path.exists() else self.part).open("rb") as file:
            header = file.read(len(self.header()))
            file.seek(len(header) + start * self.row)
            return header + file.read((end - start) * self.row)

    def open(self, rows: int) -> BinaryIO:
        """The part after so many rows; what follows them is cut off. No link is followed."""
        if rows:
            if self.path.exists():
                os.replace(self.path, self.part)
            flags = os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
            file = os.fdopen(os.open(self.part, flags), "r+b")
        else:
            for path in (self.path, self.part):
                path.unlink(missing_ok=True)
            file = self.part.open("xb")
            file.write(self.header())
        file.truncate(file.seek(len(self.header()) + rows * self.row))
        return file


class BankFiles:
    """The rows of a folder. facts: JSON that tells what they are of; other rows are dropped."""

    def __init__(self, folder: Path, facts: dict[str, Any], columns: Columns, rows: int) -> None:
        self.folder, self.facts, self.rows = folder, facts, rows
        self.columns = {
            name: Column(folder / f"{name}.npy", np.dtype(kind), (rows, *shape))
            for name, (kind, shape) in columns.items()
        }
        self.blocks = self._listed()  # where each ends, and its digest

    @property
    def done(self) -> int:
        """Rows that are on disk."""
        return self.blocks[-1][0] if self.blocks else 0

    @property
    def finished(self) -> bool:
        """Whether all are, and can be read."""
        return self.done == self.rows and all(c.path.exists() for c in self.columns.values())

    def check(self) -> int:
        """Reads all that is on disk and forgets it from the first block on that is not what was
        written; returns how many rows that are."""
        before, start = self.done, 0
        for number, (end, digest) in enumerate(self.blocks):
            if self._digest(start, end) != digest:
                self.blocks = self.blocks[:number]
                break
            start = end
        return before - self.done

    @contextmanager
    def appending(self) -> Generator[None]:
        """For `append` and `flush`; at the end, if all rows are there, the columns get their names.
        UserError where the system refuses to write."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not self.done:  # what is about to go must not be taken for what is listed
                (self.folder / BANK).unlink(missing_ok=True)
            with ExitStack() as stack:
                for column in self.columns.values():
                    column.file = stack.enter_context(column.open(self.done))
                yield
            if self.done == self.rows:
                for column in self.columns.values():
                    os.replace(column.part, column.path)
        except OSError as error:
            raise write_error(self.folder, error) from error

    def append(self, values: Mapping[str, NDArray[Any]]) -> None:
        """Rows of every column, by name."""
        for name, column in self.columns.items():
            assert column.file is not None, "only while appending"
            column.file.write(values[name].astype(column.kind).tobytes())

    def flush(self, end: int) -> None:
        """Makes a block of the rows up to here: from now on a killed pass goes on after them."""
        for column in self.columns.values():
            assert column.file is not None, "only while appending"
            column.file.flush()
            os.fsync(column.file.fileno())
        digest = self._digest(self.done, end)
        self.blocks.append((end, digest))
        write_json(self.folder / BANK, self.facts | {"blocks": self.blocks})

    def read(self, name: str) -> NDArray[Any]:
        """A column (M, ...) of finished rows, mapped into memory."""
        return np.load(self.columns[name].path, mmap_mode="r")

    def _digest(self, start: int, end: int) -> str:
        """Of rows and of what makes them readable; "" where a file cannot be read."""
        digest = hashlib.blake2b(digest_size=16)
        try:
            for column in self.columns.values():
                digest.update(column.rows(start, end))
        except OSError:
            return ""
        return digest.hexdigest()

    def _listed(self) -> list[tuple[int, str]]:
        """The blocks that a former pass with the same facts has written."""
        try:
            found = json.loads((self.folder / BANK).read_text(encoding="utf-8"))
            blocks = [(int(end), str(digest)) for end, digest in found.pop("blocks")]
        except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
            return []
        ends = [0, *(end for end, _ in blocks)]
        in_order = ends == sorted(set(ends)) and ends[-1] <= self.rows
        return blocks if in_order and found == self.facts else []
