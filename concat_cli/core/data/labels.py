"""Label files of every kind -> a map of segment ids, remapped on the fly.

Whatever the kind, a label becomes ids: 0 is void, each other id is one segment.

- panoptic: the ids of the PNG.
- semantic: category id + 1, one segment a class (some data sets have a category 0).
- cityscapes: the value of the PNG (26007 is the 8th car, 26 a group of cars, 7 the road).
- instances, and things that lie over semantic maps: INSTANCE + a number. Instances may overlap:
  crowds are painted first, then the larger before the smaller, then by annotation id, so that a
  pixel belongs to the smallest instance that covers it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from concat_cli.core.data.image_io import read_id_png
from concat_cli.core.data.index import Record
from concat_cli.core.data.label_pixels import read_raw, read_things
from concat_cli.core.data.rle import decode_rle
from concat_cli.core.data.source import LabelFormat
from concat_cli.core.data.store import File, Store, open_store
from concat_cli.core.errors import UserError

INSTANCE = 1 << 16  # ids from here on are instances; categories of semantic maps lie below
GROUP = 1000  # of Cityscapes: values below have no instance
TOGETHER = "JSON, labels and images must belong together: download or write them again."
Rles = tuple[tuple[int, str], ...]  # (id, run lengths) in the order of painting; id 0 is void


@dataclass(frozen=True)
class LabelReader:
    """Reads the labels of one part; can be handed to other processes.

    labels, second_labels: locations of stores; "" where the kind needs none.
    """

    format: LabelFormat
    labels: str
    second_labels: str = ""

    @cached_property
    def _store(self) -> Store:
        return open_store(self.labels)

    @cached_property
    def _second(self) -> Store:
        return open_store(self.second_labels)

    @cached_property
    def _lookup(self) -> np.ndarray:
        """Raw value -> category id + 1; 0 = void, -1 = unknown, which the last entry is."""
        fmt = self.format
        table = np.full(max((*fmt.table, *fmt.void), default=0) + 2, -1, np.int32)
        table[list(fmt.void)] = 0
        over = set(fmt.things.values()) if "over" in fmt.kind else set()
        for raw, category in fmt.table.items():
            assert 0 <= category < INSTANCE - 1, "category ids of semantic maps are below 65535"
            table[raw] = 0 if category in over else category + 1
        return table

    def file(self, label: str) -> File:
        """The label file of that name."""
        return self._store.file(label)

    def stamps(self, label: str, second_label: str) -> list[tuple[int, int] | None]:
        """What changes when a label file does; None where one is missing."""
        stores = [(self._store, label)] if label else []
        stores += [(self._second, second_label)] if second_label else []
        return [store.stamp(name) for store, name in stores]

    def names(self, label: str, second_label: str) -> list[str]:
        """The label files, in the order of `stamps`."""
        names = [str(self._store.file(label))] if label else []
        return names + ([str(self._second.file(second_label))] if second_label else [])

    def id_map(
        self, label: str, second_label: str, size: tuple[int, int], rles: Rles
    ) -> np.ndarray:
        """(H, W) int32 segment ids; UserError naming a file that is damaged or has strange values.

        size: of the image, (height, width); a map of another size is returned `unread`.
        """
        kind = self.format.kind
        if kind == "panoptic":
            return read_id_png(self.file(label), size)
        if kind == "instances":
            ids = np.zeros(size, np.int32)
        else:
            raw = read_raw(self.file(label), self.format.pixels, size)
            if raw.shape != size:
                return raw
            if kind == "cityscapes":
                return self._cityscapes(raw, self.file(label))
            ids = self._categories(raw, self.file(label))
        if kind == "things_over_stuff":
            self._paint_things(ids, label, second_label)
        for number, counts in rles:
            ids[decode_rle(counts, size)] = number
        return ids

    def segment_of(self, number: int, things: frozenset[int]) -> tuple[int, bool]:
        """(category id, crowd) of an id that was found in pixels. things: countable categories."""
        if self.format.kind == "cityscapes":
            category = self.format.table[number // GROUP if number >= GROUP else number]
            return category, number < GROUP and category in things
        if number >= INSTANCE:
            return self.format.things[(number - INSTANCE) >> 8], False
        return number - 1, False

    def segment_map(self, record: Record, listed_in: Path | str) -> np.ndarray:
        """(H, W) int32: 0 = void, i + 1 = the record's segment i; errors as `segment_runs`."""
        numbers, lengths = self.segment_runs(record, listed_in)
        return np.repeat(numbers, lengths).reshape(record.height, record.width)

    def segment_runs(self, record: Record, listed_in: Path | str) -> tuple[np.ndarray, np.ndarray]:
        """Values and lengths of the runs of a segment map.

        UserError naming the label if it is missing, damaged, of another size, or its ids are not
        those of the record, which `listed_in` holds.
        """
        size = (record.height, record.width)
        ids = self.id_map(record.label_name, record.second_name, size, record.rles)
        if ids.shape != size:
            says, image = f"{listed_in} says", record.image_id
            raise wrong_size(self.file(record.label_name), ids.shape, size, says, image)
        values, lengths = runs(ids)
        known = np.concatenate([[0], record.ids]).astype(np.int32)
        numbers = np.searchsorted(known, values).clip(max=len(known) - 1).astype(np.int32)
        astray = known[numbers] != values
        strange = np.unique(values[astray])
        if len(strange) and len(strange) == record.hidden:  # unseen classes: void, no mistake
            numbers[astray] = 0
            strange = strange[:0]
        unused = record.ids[np.bincount(numbers, lengths, len(known))[1:] == 0]
        if len(strange) or len(unused):
            side, which = ("JSON", strange[0]) if len(strange) else ("PNG", unused[0])
            label = self.file(record.label_name) if record.label_name else record.file_name
            raise UserError(
                f"{label} and {listed_in} disagree on image {record.image_id}: "
                f"segment id {which} is not in the {side}.",
                TOGETHER,
            )
        return numbers, lengths

    def _categories(self, raw: np.ndarray, file: File) -> np.ndarray:
        """(H, W) raw values -> int32 category id + 1, 0 = void."""
        table = self._lookup
        last = len(table) - 1
        small = raw.dtype.kind == "u" and np.iinfo(raw.dtype).max < last
        inside = raw if small else np.clip(raw, -1, last)
        found = table[inside]
        if (found < 0).any():
            value = raw[found < 0].flat[0]
            raise UserError(
                f"{file} has the value {value}, which is neither a class nor void.",
                "Its values do not fit this layout: check which labels these are.",
            )
        return found

    def _cityscapes(self, raw: np.ndarray, file: File) -> np.ndarray:
        raw = raw.astype(np.int32)
        classes = np.where(raw >= GROUP, raw // GROUP, raw)
        return np.where(self._categories(classes, file) > 0, raw, 0)

    def _paint_things(self, ids: np.ndarray, label: str, second_label: str) -> None:
        file = self._second.file(second_label)
        things = read_things(file, ids.shape)
        if things.shape != ids.shape:
            raise wrong_size(file, things.shape, ids.shape, f"{self.file(label)} is")
        there = things > 0
        unknown = set(np.unique(things[there] >> 8).tolist()) - self.format.things.keys()
        if unknown:
            raise UserError(
                f"{file} has things of class {min(unknown)}, which is unknown.",
                "Its values do not fit this layout: check which labels these are.",
            )
        ids[there] = things[there] + INSTANCE


def wrong_size(
    file: object,
    found: tuple[int, ...],
    wanted: tuple[int, ...],
    other: str,
    image_id: int | None = None,
) -> UserError:
    """Of a file whose (height, width) is not what `other` ("x.json says") has."""
    image = "" if image_id is None else f" for image {image_id}"
    return UserError(
        f"{file} is {found[1]} x {found[0]} pixels, but {other} {wanted[1]} x {wanted[0]}{image}.",
        TOGETHER,
    )


def runs(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Values and lengths of the runs of equal neighbours, row by row: far fewer than pixels."""
    flat = ids.ravel()
    starts = np.concatenate([[0], np.flatnonzero(flat[1:] != flat[:-1]) + 1])[: flat.size]
    return flat[starts], np.diff(np.append(starts, flat.size))
