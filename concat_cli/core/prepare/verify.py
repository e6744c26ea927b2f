"""Every image of a part checked before anyone trains: in parallel, once, also after a kill.

What has been checked is kept from run to run, a line an image, so that a killed run loses none.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from concat_cli.core import files
from concat_cli.core.data.coco import Item, Segment
from concat_cli.core.data.image_io import (
    SWAPPED,
    WrongSize,
    brightest,
    read_header,
    read_image,
    runs,
    segment_runs,
    write_id_png,
    wrong_size,
)
from concat_cli.core.data.index import (
    STORED,
    TURNED,
    WHITE,
    Row,
    check_categories,
    listed_row,
    row_of,
)
from concat_cli.core.data.store import File, Store, open_store
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.labels import INSTANCE, LabelReader, painted
from concat_cli.core.prepare.pool import mapper, processes_for
from concat_cli.core.prepare.source import Exif, LabelFormat
from concat_cli.core.progress import Progress
from concat_cli.core.vocabulary import Vocabulary

CHUNK = 64  # images that a process checks at a time
SHOWN = 10  # faulty images that an error names
_VERSION = 4  # raised when a row or an id map would come out otherwise
_HINT = "Mend or replace them, or leave them out with --skip-bad."
Stamp = tuple[int, int] | None  # changes when a file does; None where it is missing
Key = list[Any]  # [digest of the item, stamps of its files]


@dataclass(frozen=True)
class Checker:
    """Checks the images of one part against their labels, which it writes as id maps where they are
    none; can be handed to other processes.

    places: locations of images, labels and maps of things; "" where there are none.
    listed_in: what lists them, as errors name it.
    maps: the folder of the id maps that are written.
    decode: decode every image in full, which finds truncated ones; else only its header is read.
    exif: which pixels the labels of images are of that EXIF turns; white: as of `read_image`.
    """

    places: tuple[str, str, str]
    format: LabelFormat
    listed_in: str
    vocabulary: Vocabulary
    maps: Path
    decode: bool = False
    exif: Exif = ""
    white: int = WHITE

    @cached_property
    def _stores(self) -> list[Store | None]:
        return [open_store(place) if place else None for place in self.places]

    @cached_property
    def _reader(self) -> LabelReader:
        return LabelReader(self.format)

    @cached_property
    def _things(self) -> frozenset[int]:
        return frozenset(e.id for e in self.vocabulary.entries if e.kind == "thing")

    def row(self, item: Item) -> Row:
        """The row of an image that is as it should be; UserError naming what is not."""
        image, *labels = self.files(item)
        header = read_header(image)
        if self.decode:
            read_image(image)
        read_as = "" if header.orientation == 1 else STORED if self.exif == "stored" else TURNED
        try:
            row = self._labelled(item, header.shown(read_as != STORED), header.size, labels)
        except WrongSize as error:
            if header.orientation < SWAPPED or not error.swapped:
                raise
            raise UserError(
                f"{error.what} Its EXIF orientation turns it. Were the labels drawn on the pixels "
                "as they are stored, say --exif stored; on the upright image, --exif turn.",
                error.hint,
            ) from error
        most = brightest(image) if header.wide else 0
        return replace(row, exif=read_as, white=self.white, brightest=most)

    def _labelled(
        self, item: Item, size: tuple[int, int], stored: tuple[int, int], labels: list[File]
    ) -> Row:
        """The row of an image whose size as it is read, and as stored, is known."""
        known = (size, stored) if self.exif == "turn" else (size,)
        if item.size is not None and item.size not in known:
            file = self.files(item)[0]
            raise wrong_size(file, size, item.size, f"{self.listed_in} says")
        if self.format.kind == "panoptic":
            row = listed_row(item, size, self.vocabulary.index_of_id, self.listed_in)
            record = row.record(self.vocabulary)
            numbers, lengths = segment_runs(labels[0], record, self.listed_in)
            areas = np.bincount(numbers, lengths, len(row.ids) + 1)[1:]
            return replace(row, areas=areas.astype(int).tolist())
        segments: dict[int, Segment] = {}
        if self.format.kind.startswith("instances"):
            check_categories(item, self.vocabulary.index_of_id, self.listed_in)
            _check_annotations(item, self.listed_in)
            segments = {INSTANCE + i: s for i, s in enumerate(item.segments or (), 1)}
        masks = painted(segments, size, item.image_id, self.listed_in)
        ids = self._reader.id_map(labels, size, masks)
        row = Row(item.image_id, item.image, self.map_of(item).name, *size)
        self._add_found(row, ids, segments)
        kept = sum(number in segments for number in row.ids)
        if kept < len(segments):
            doubles = len(masks) - len({counts for _, counts in masks})
            row = replace(row, lost=(len(segments) - len(masks), len(masks) - kept, doubles))
        write_id_png(self.map_of(item), ids)
        return row

    def files(self, item: Item) -> list[File]:
        """The image and its labels."""
        return [store.file(name) for store, name in self._named(item)]

    def stamps(self, item: Item) -> list[Stamp]:
        """What changes when one of `files` does."""
        return [store.stamp(name) for store, name in self._named(item)]

    def _named(self, item: Item) -> list[tuple[Store, str]]:
        names = item.image, item.label, item.second_label
        stores = zip(self._stores, names, strict=True)
        return [(store, name) for store, name in stores if store is not None and name]

    def map_of(self, item: Item) -> Path:
        """The id map that is written for an image."""
        return self.maps / f"{item.image_id:012d}.png"

    def key(self, item: Item, stamps: Sequence[Stamp]) -> Key:
        """What a row is made from: the item as listed, and sizes and times of its files; and those
        of the id map that was made with it."""
        digest = hashlib.blake2b(repr(item).encode(), digest_size=8).hexdigest()
        made: list[Stamp] = []
        if self.format.kind != "panoptic":
            path = self.map_of(item)
            found = path.stat() if path.is_file() else None
            made = [None if found is None else (found.st_size, found.st_mtime_ns)]
        return [digest, [stamp and list(stamp) for stamp in (*stamps, *made)]]

    def facts(self) -> str:
        """A digest of what all rows depend on."""
        classes = [(entry.id, entry.kind) for entry in self.vocabulary.entries]
        facts = repr((_VERSION, self.format, classes, self.exif, self.white)).encode()
        return hashlib.blake2b(facts, digest_size=8).hexdigest()

    def _add_found(self, row: Row, ids: np.ndarray, segments: dict[int, Segment]) -> None:
        """Adds the segments that are found in the pixels of an id map."""
        values, lengths = runs(ids)
        found, places = np.unique(values, return_inverse=True)
        areas = np.bincount(places, lengths).astype(int)
        for number, area in zip(found.tolist(), areas.tolist(), strict=True):
            if number == 0:
                continue
            segment = segments.get(number)
            category, crowd = (
                self._reader.segment_of(number, self._things)
                if segment is None
                else (segment.category_id, segment.crowd)
            )
            row.ids.append(number)
            row.categories.append(category)
            row.crowd.append(int(crowd))
            row.areas.append(area)


def _check_annotations(item: Item, where: str) -> None:
    """UserError where an annotation is there twice."""
    for number, count in Counter(segment.id for segment in item.segments or ()).most_common(1):
        if count > 1:
            raise UserError(
                f"{where}: image {item.image_id} has several annotations of the id {number}.",
                "Each annotation needs an id of its own.",
            )


@dataclass(frozen=True)
class Bad:
    """An image that cannot be used, and why."""

    image_id: int
    image: str
    reason: str


def verify(
    part: str,
    checker: Checker,
    items: Sequence[Item],
    ledger: Path,
    progress: Progress,
    skip_bad: bool = False,
    processes: int | None = None,
) -> tuple[list[Row], list[Bad]]:
    """Checks each image that the ledger, a file, does not know as it is now; the rows of the good
    images in the order of the items, and the bad ones.

    UserError naming the first faulty images unless they are to be skipped.
    """
    stamps = [checker.stamps(item) for item in items]
    if not skip_bad:
        _refuse_missing(checker, items, stamps)
    keys = [checker.key(item, stamp) for item, stamp in zip(items, stamps, strict=True)]
    known = {row.id: (key, row) for key, row in _checked_before(ledger, checker)}
    rows: list[Row | None] = [None] * len(items)
    for place, (item, key) in enumerate(zip(items, keys, strict=True)):
        before, row = known.get(item.image_id, (None, None))
        rows[place] = row if before == key else None
    todo = [place for place, row in enumerate(rows) if row is None]
    if 0 < len(todo) < len(items):
        before = len(items) - len(todo)
        progress.say(f"{part}: {before} of {len(items)} images were checked before")
    bad: list[Bad] = []
    if todo:
        count = processes_for(len(todo) // (2 * CHUNK), processes, progress)
        lines = [_line(key, row) for key, row in zip(keys, rows, strict=True) if row is not None]
        header = json.dumps({"facts": checker.facts(), "decode": checker.decode}) + "\n"
        files.write_text(ledger, "".join([header, *lines]))
        with (
            mapper(partial(_check, checker), count, chunk=CHUNK) as check,
            _appending(ledger) as file,
        ):
            results = zip(todo, check([items[place] for place in todo]), strict=True)
            for place, result in progress.track(results, f"checking {part}", len(todo)):
                if isinstance(result, Bad):
                    bad.append(result)
                else:
                    rows[place] = result
                    file.write(_line(checker.key(items[place], stamps[place]), result))
    if bad and not skip_bad:
        raise _faulty(bad, len(items))
    return [row for row in rows if row is not None], bad


def _check(checker: Checker, item: Item) -> Row | Bad:
    try:
        return checker.row(item)
    except UserError as error:
        return Bad(item.image_id, item.image, error.what)


def _refuse_missing(
    checker: Checker, items: Sequence[Item], stamps: Sequence[Sequence[Stamp]]
) -> None:
    """UserError where files are missing: found in seconds, before the long work."""
    missing = [
        file
        for item, found in zip(items, stamps, strict=True)
        if None in found
        for file, stamp in zip(checker.files(item), found, strict=True)
        if stamp is None
    ]
    if missing:
        more = f" and {len(missing) - 1} more files" if len(missing) > 1 else ""
        raise UserError(
            f"Missing: {missing[0]}{more}.",
            "Check the folder and the names, finish copying or unpacking, or leave these images "
            "out with --skip-bad.",
        )


def _faulty(bad: list[Bad], total: int) -> UserError:
    if len(bad) == 1:
        return UserError(f"1 of {total} images is faulty: {bad[0].reason}", _HINT)
    lines = [f"  {entry.image}: {entry.reason}" for entry in bad[:SHOWN]]
    more = [f"  and {len(bad) - SHOWN} more"] if len(bad) > SHOWN else []
    return UserError("\n".join([f"{len(bad)} of {total} images are faulty:", *lines, *more]), _HINT)


@contextmanager
def _appending(ledger: Path) -> Generator[TextIO]:
    try:
        with ledger.open("a", encoding="utf-8", newline="\n", buffering=1) as file:
            yield file
    except OSError as error:
        raise files.write_error(ledger, error) from error


def _checked_before(ledger: Path, checker: Checker) -> Iterator[tuple[Key, Row]]:
    """The whole lines of a ledger, each with what its row was made from; none of one of another
    format, or of a check that did not decode the images."""
    try:
        with ledger.open("rb") as file:
            header = json.loads(file.readline())
            if header["facts"] != checker.facts() or checker.decode > header["decode"]:
                return
            for line in file:
                if line.endswith(b"\n"):
                    value = json.loads(line)
                    row = row_of(value["row"])
                    if value["sum"] != _sum(row.line(whole=True)):
                        raise ValueError("a line was changed")
                    yield value["key"], row
    except FileNotFoundError:
        return
    except (ValueError, KeyError, TypeError, RecursionError):
        return  # damaged: what was read is right, the rest is checked again
    except OSError as error:
        raise UserError(f"Cannot read {ledger}: {error.strerror}.", "Check its rights.") from error


def _line(key: Key, row: Row) -> str:
    line = row.line(whole=True)
    return f'{{"key": {json.dumps(key)}, "sum": {_sum(line)}, "row": {line}}}\n'


def _sum(line: str) -> int:
    return zlib.crc32(line.encode())
