"""The index of a part: one image a line, parsed when it is asked for.

JSON lines, as they can be read and searched by eye, need no further package, and a killed run goes
on where the last line ended. Opening only finds the ends of lines.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Collection, Iterable, Iterator
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from concat_cli.core import files
from concat_cli.core.data.coco import Item, read_coco
from concat_cli.core.errors import UserError
from concat_cli.core.vocabulary import Vocabulary

TURNED, STORED = "turned", "stored"
WHITE = 65535  # the value of white in greyscale of 16 bits
AGAIN = "Prepare the data set again with `concat prepare-data`."


@dataclass(frozen=True)
class Record:
    """One image: ids (N,) int64 sorted, labels (N,) int64 class indices, crowd (N,) bool.

    hidden: how many segments of the label file are void here, as their classes are unseen.
    upright, white: how its image is read, see `read_image`.
    """

    image_id: int
    file_name: str
    label_name: str
    height: int
    width: int
    ids: np.ndarray
    labels: np.ndarray
    crowd: np.ndarray
    hidden: int = 0
    upright: bool = True
    white: int = WHITE


@dataclass(frozen=True, slots=True)
class Row:
    """A line of an index; ids, categories (the data's ids), crowd and areas are of its segments.

    lost: how many annotations left no segment, which is told while a data set is prepared and is in
        no index: [without pixels, entirely under others, of these with the mask of another].
    exif: TURNED where the image's EXIF turns it, STORED where that is left aside. white: as of
    `read_image`; brightest: the largest value of a grey image of 16 bits.
    """

    id: int
    image: str
    label: str
    height: int
    width: int
    ids: list[int] = field(default_factory=list[int])
    categories: list[int] = field(default_factory=list[int])
    crowd: list[int] = field(default_factory=list[int])
    areas: list[int] = field(default_factory=list[int])
    hidden: int = 0
    lost: tuple[int, ...] = ()
    exif: str = ""
    white: int = WHITE
    brightest: int = 0

    def line(self, whole: bool = False) -> str:
        """The row as JSON. whole: with `lost`."""
        usual = {one.name: one.default for one in fields(self) if one.default is not MISSING}
        values = {
            name: value
            for name in self.__slots__
            if (value := getattr(self, name)) != usual.get(name, MISSING)
            and (whole or name != "lost")
        }
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
            self.hidden,
            self.exif != STORED,
            self.white,
        )


class Lines:
    """The rows of an index file, memory-mapped; can be handed to other processes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._bytes = _map(path)
        ends = np.flatnonzero(np.frombuffer(self._bytes, np.uint8) == 10) + 1
        if len(self._bytes) and (not len(ends) or ends[-1] != len(self._bytes)):
            raise UserError(f"{path} ends within a line.", AGAIN)
        self._starts = np.concatenate([[0], ends])

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, index: int) -> Row:
        place = range(len(self))[index]
        line = self._bytes[self._starts[place] : self._starts[place + 1]]
        try:
            return row_of(json.loads(line))
        except (ValueError, TypeError, RecursionError) as error:
            raise UserError(f"{self.path}:{place + 1} is damaged ({error}).", AGAIN) from error

    def __iter__(self) -> Iterator[Row]:
        return (self[place] for place in range(len(self)))

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path,)

    def digest(self) -> str:
        """SHA-256 of the file."""
        return hashlib.sha256(self._bytes).hexdigest()


class Records:
    """The records of an index, each made when it is asked for."""

    def __init__(self, rows: Lines | list[Row], vocabulary: Vocabulary, path: Path) -> None:
        self._rows, self._vocabulary, self._path = rows, vocabulary, path

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Record:
        row = self._rows[index]
        try:
            return row.record(self._vocabulary)
        except KeyError as error:
            what = f"{self._path}: image {row.id} has a segment of unknown category {error}."
            raise UserError(what, AGAIN) from error

    def __iter__(self) -> Iterator[Record]:
        return (self[place] for place in range(len(self)))

    def digest(self) -> str:
        """A digest of what the index says: files, segment ids and labels."""
        if isinstance(self._rows, Lines):
            return self._rows.digest()
        digest = hashlib.sha256()
        for record in self:
            digest.update(record.file_name.encode())
            digest.update(record.ids.tobytes() + record.labels.tobytes())
        return digest.hexdigest()


def read_records(path: Path, vocabulary: Vocabulary) -> Records:
    """The images of an index of JSON lines, or of a COCO panoptic JSON (.json), in its order;
    UserError where it is missing or damaged."""
    if not path.is_file():
        raise UserError(f"No annotation file {path}.", AGAIN)
    if path.suffix != ".json":
        return Records(Lines(path), vocabulary, path)
    rows: list[Row] = []
    for item in read_coco(path, "panoptic").items:
        if item.size is None:
            what = f"{path} does not give height and width of image {item.image_id}."
            raise UserError(what, "Write the JSON again.")
        rows.append(listed_row(item, item.size, vocabulary.index_of_id, str(path)))
    return Records(rows, vocabulary, path)


def listed_row(item: Item, size: tuple[int, int], known: Collection[int], where: str) -> Row:
    """The row of an image whose segments are listed, sorted by id, areas still 0; UserError where
    an id or a category cannot be."""
    segments = sorted(item.segments or (), key=lambda segment: int(segment.id))
    ids = [int(segment.id) for segment in segments]
    if ids and (ids[0] < 1 or ids[-1] >= 1 << 24 or len(set(ids)) < len(ids)):
        raise UserError(
            f"{where}: image {item.image_id} has segment ids that are repeated or outside "
            "1..2^24-1.",
            "0 is void in a panoptic PNG; each other id stands for one segment.",
        )
    check_categories(item, known, where)
    categories = [segment.category_id for segment in segments]
    crowd = [int(segment.crowd) for segment in segments]
    areas = [0] * len(ids)
    return Row(item.image_id, item.image, item.label, *size, ids, categories, crowd, areas)


def check_categories(item: Item, known: Collection[int], where: str) -> None:
    """UserError where a segment of the image has a category that the data set lacks."""
    unknown = {segment.category_id for segment in item.segments or ()} - set(known)
    if unknown:
        raise UserError(
            f"{where}: image {item.image_id} has segments of unknown category {sorted(unknown)}.",
            "Every category_id must be among the JSON's categories.",
        )


def row_of(values: dict[str, Any]) -> Row:
    """A row from the values of its line; ValueError or TypeError where one is of another kind."""
    row = Row(**values)
    lists = row.ids, row.categories, row.crowd, row.areas
    if len(set(map(len, lists))) > 1:
        raise ValueError("its lists differ in length")
    numbers = [row.id, row.height, row.width, row.hidden, row.white, row.brightest, *row.lost]
    numbers += [value for one in lists for value in one]
    if not all(type(value) is int and abs(value) < 1 << 63 for value in numbers):
        raise ValueError("a number is no integer of 64 bits")
    if {type(row.image), type(row.label), type(row.exif)} != {str}:
        raise ValueError("a name is no text")
    return row


def write_rows(path: Path, rows: Iterable[Row]) -> None:
    """Writes an index atomically."""
    with files.atomic_path(path) as temp, temp.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(row.line() + "\n" for row in rows)


def _map(path: Path) -> bytes | mmap.mmap:
    try:
        with path.open("rb") as file:
            empty = file.seek(0, 2) == 0  # which cannot be mapped
            return b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.", AGAIN) from error
