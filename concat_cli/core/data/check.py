"""One image and its label, checked against each other and against what lists them -> its row."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from concat_cli.core.data.coco_json import check_categories, listed_row
from concat_cli.core.data.image_io import check_image, read_image
from concat_cli.core.data.index import Row
from concat_cli.core.data.labels import INSTANCE, LabelReader, runs, wrong_size
from concat_cli.core.data.rle import encode_rle, rle_area
from concat_cli.core.data.source import Item, Segment, SourcePart
from concat_cli.core.data.store import File, Store, open_store
from concat_cli.core.errors import UserError
from concat_cli.core.vocabulary import Vocabulary


@dataclass(frozen=True)
class Checker:
    """Checks the images of one part; can be handed to other processes.

    decode: decode every image in full, which finds truncated ones; else only its header is read.
    """

    images: str
    reader: LabelReader
    listed_in: str
    vocabulary: Vocabulary
    decode: bool = False

    @cached_property
    def _store(self) -> Store:
        return open_store(self.images)

    @cached_property
    def _things(self) -> frozenset[int]:
        return frozenset(e.id for e in self.vocabulary.entries if e.kind == "thing")

    def row(self, item: Item) -> Row:
        """The row of an image that is as it should be; UserError naming what is not."""
        file = self._store.file(item.image)
        size = _decoded_size(file) if self.decode else check_image(file)
        if item.size is not None and size != item.size:
            raise wrong_size(file, size, item.size, f"{self.listed_in} says")
        if self.reader.format.kind == "panoptic":
            return self._panoptic(item, size)
        row = Row(item.image_id, item.image, item.label, *size, label2=item.second_label)
        number_of: dict[int, Segment] = {}
        if self.reader.format.kind.startswith("instances"):
            check_categories(item, self.vocabulary.index_of_id.keys(), self.listed_in)
            _check_annotations(item, self.listed_in)
            number_of = {INSTANCE + i: s for i, s in enumerate(item.segments or (), 1)}
            row = replace(row, rles=_painted(item, number_of, size, self.listed_in))
        return self._found(row, number_of, str(file))

    def stamps(self, item: Item) -> list[tuple[int, int] | None]:
        """What changes when one of the image's files does; None where one is missing."""
        labels = self.reader.stamps(item.label, item.second_label)
        return [self._store.stamp(item.image), *labels]

    def names(self, item: Item) -> list[str]:
        """The image's files, in the order of `stamps`."""
        labels = self.reader.names(item.label, item.second_label)
        return [str(self._store.file(item.image)), *labels]

    def _panoptic(self, item: Item, size: tuple[int, int]) -> Row:
        row = listed_row(item, size, self.vocabulary.index_of_id.keys(), self.listed_in)
        numbers, lengths = self.reader.segment_runs(row.record(self.vocabulary), self.listed_in)
        areas = np.bincount(numbers, lengths, len(row.ids) + 1)[1:]
        return replace(row, areas=areas.astype(int).tolist())

    def _found(self, row: Row, number_of: dict[int, Segment], image: str) -> Row:
        """The row with the segments that are found in the pixels of its label."""
        size = (row.height, row.width)
        ids = self.reader.id_map(row.label, row.label2, size, tuple(row.rles))
        if ids.shape != size:
            raise wrong_size(self.reader.file(row.label), ids.shape, size, f"{image} is")
        values, lengths = runs(ids)
        found, places = np.unique(values, return_inverse=True)
        areas = np.bincount(places, lengths)
        for number, area in zip(found.tolist(), areas.astype(int).tolist(), strict=True):
            if number == 0:
                continue
            if number in number_of:
                segment = number_of[number]
                category, crowd = segment.category_id, segment.crowd
            else:
                category, crowd = self.reader.segment_of(number, self._things)
            row.ids.append(number)
            row.categories.append(category)
            row.crowd.append(int(crowd))
            row.areas.append(area)
        covered = number_of.keys() - set(row.ids)  # wholly, by smaller instances
        return replace(row, rles=[pair for pair in row.rles if pair[0] not in covered])


def _decoded_size(file: File) -> tuple[int, int]:
    height, width, _ = read_image(file).shape
    return height, width


def checker_of(part: SourcePart, vocabulary: Vocabulary, decode: bool) -> Checker:
    """The checker of a part as a recipe found it."""
    reader = LabelReader(part.format, part.labels, part.second_labels)
    return Checker(part.images, reader, part.listed_in or part.labels, vocabulary, decode)


def _check_annotations(item: Item, where: str) -> None:
    """UserError where an annotation is there twice."""
    ids = [segment.id for segment in item.segments or ()]
    if len(set(ids)) < len(ids):
        twice = next(number for number in ids if ids.count(number) > 1)
        raise UserError(
            f"{where}: image {item.image_id} has several annotations of the id {twice}.",
            "Each annotation needs an id of its own.",
        )


def _painted(
    item: Item, number_of: dict[int, Segment], size: tuple[int, int], where: str
) -> list[tuple[int, str]]:
    """Ids and run lengths in the order of painting: crowds, then the larger before the smaller."""
    painted = []
    for number, segment in number_of.items():
        try:
            counts = encode_rle(segment.rle, size)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"{where}: the mask of annotation {segment.id} of image {item.image_id} cannot be "
                f"read ({error}).",
                "Write the JSON again.",
            ) from error
        painted.append((not segment.crowd, -rle_area(counts, size), number, counts))
    return [(number, counts) for _, _, number, counts in sorted(painted)]
