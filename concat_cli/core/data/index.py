"""The index of a part: one image a line, parsed when it is asked for.

JSON lines, as they can be read and searched by eye, need no further package, and a killed run goes
on where the last line ended. Opening only finds the ends of lines.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np

from concat_cli.core import files
from concat_cli.core.errors import UserError
from concat_cli.core.vocabulary import Vocabulary

_CATEGORIES = re.compile(rb'"categories": \[([\d, ]*)\]')
_AGAIN = "Prepare the data set again with `concat prepare-data`."


@dataclass(frozen=True)
class Record:
    """One image: ids (N,) int64 sorted, labels (N,) int64 class indices, crowd (N,) bool.

    rles: (id, run lengths) of instances in the order of painting; id 0 is void.
    hidden: how many segments of the label file are void here, as their classes are unseen.
    """

    image_id: int
    file_name: str
    label_name: str
    height: int
    width: int
    ids: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    second_name: str = ""
    rles: tuple[tuple[int, str], ...] = ()
    hidden: int = 0


@dataclass(frozen=True, slots=True)
class Row:
    """A line of an index; ids, categories (the data's ids), crowd and areas are of its segments."""

    id: int
    image: str
    label: str
    height: int
    width: int
    ids: list[int] = field(default_factory=list)
    categories: list[int] = field(default_factory=list)
    crowd: list[int] = field(default_factory=list)
    areas: list[int] = field(default_factory=list)
    label2: str = ""
    rles: list[tuple[int, str]] = field(default_factory=list)
    hidden: int = 0

    def line(self) -> str:
        """The row as JSON, without what is empty at the end."""
        values = {name: getattr(self, name) for name in self.__slots__}
        for name in ("label2", "rles", "hidden"):
            if not values[name]:
                del values[name]
        return json.dumps(values, ensure_ascii=False)

    def record(self, vocabulary: Vocabulary) -> Record:
        """The row with class indices; KeyError where the vocabulary lacks a category."""
        index = vocabulary.index_of_id
        return Record(
            self.id,
            self.image,
            self.label,
            self.height,
            self.width,
            np.array(self.ids, np.int64),
            np.array([index[category] for category in self.categories], np.int64),
            np.array(self.crowd, bool),
            self.label2,
            tuple((number, counts) for number, counts in self.rles),
            self.hidden,
        )


class Lines(Sequence[Row]):
    """The rows of an index file, memory-mapped; can be handed to other processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = _map(path)
        ends = np.flatnonzero(np.frombuffer(self._bytes, np.uint8) == 10) + 1
        if len(self._bytes) and (not len(ends) or ends[-1] != len(self._bytes)):
            raise UserError(f"{path} ends within a line.", _AGAIN)
        self._starts = np.concatenate([[0], ends])

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...
    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        line = self._bytes[self._starts[place] : self._starts[place + 1]]
        return parse_row(line, f"{self.path}:{place + 1}")

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    def categories(self) -> tuple[np.ndarray, np.ndarray]:
        """The data's category ids of all segments, (S,), and of how many each image has, (M,);
        found without parsing the lines."""
        found = _CATEGORIES.findall(self._bytes)
        counts = np.array([part.count(b",") + bool(part) for part in found], np.int64)
        joined = b",".join(part for part in found if part)
        return np.array(joined.split(b",") if joined else [], dtype=np.int64), counts

    def digest(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self._bytes).hexdigest()


class Records(Sequence[Record]):
    """The records of an index, each parsed when it is asked for."""

    def __init__(self, path: Path, vocabulary: Vocabulary) -> None:
        self.lines, self._vocabulary = Lines(path), vocabulary

    def __len__(self) -> int:
        return len(self.lines)

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> list[Record]: ...
    def __getitem__(self, index: int | slice) -> Record | list[Record]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        row = self.lines[index]
        try:
            return row.record(self._vocabulary)
        except KeyError as error:
            what = f"{self.lines.path}: image {row.id} has a segment of unknown category {error}."
            raise UserError(what, _AGAIN) from error


def parse_row(line: bytes, where: str) -> Row:
    """A line of an index; UserError saying `where` it is damaged."""
    try:
        return row_of(json.loads(line))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where} is damaged ({error}).", _AGAIN) from error


def row_of(values: dict[str, Any]) -> Row:
    """A row from the values of its line; ValueError or TypeError where one is of another kind."""
    row = Row(**values)
    lists = row.ids, row.categories, row.crowd, row.areas
    if not len(row.ids) == len(row.categories) == len(row.crowd) == len(row.areas):
        raise ValueError("its lists differ in length")
    numbers = [row.id, row.height, row.width, row.hidden, *(v for one in lists for v in one)]
    numbers += [number for number, _ in row.rles]
    if not all(type(value) is int and abs(value) < 1 << 63 for value in numbers):
        raise ValueError("a number is no integer of 64 bits")
    texts = row.image, row.label, row.label2, *(counts for _, counts in row.rles)
    if not all(isinstance(text, str) for text in texts):
        raise ValueError("a name is no text")
    return row


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes an index atomically."""
    with files.atomic_path(path) as temp, temp.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(_lines(rows))


def _lines(rows: Iterable[Row]) -> Iterator[str]:
    for row in rows:
        yield row.line() + "\n"


def _map(path: Path) -> bytes | mmap.mmap:
    try:
        with path.open("rb") as file:
            empty = file.seek(0, 2) == 0  # which cannot be mapped
            return b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except FileNotFoundError as error:
        raise UserError(f"No index {path}.", _AGAIN) from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.", "Check its rights.") from error
