"""How many images, segments and pixels of each class a part holds."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from concat_cli.core.data.index import Row
from concat_cli.core.vocabulary import Vocabulary


@dataclass(frozen=True)
class Totals:
    """Sums over a part. crowd: segments that are groups. void: pixels without truth."""

    images: int
    segments: int
    crowd: int
    pixels: int
    void: int


@dataclass(frozen=True)
class Census:
    """What a part holds; segments and pixels by class index."""

    totals: Totals
    segments: tuple[int, ...]
    pixels: tuple[int, ...]


def census(rows: Iterable[Row], vocabulary: Vocabulary) -> Census:
    """Counts the rows of a part."""
    segments, pixels = [0] * len(vocabulary), [0] * len(vocabulary)
    index = vocabulary.index_of_id
    images = crowd = total = 0
    for row in rows:
        images += 1
        crowd += sum(row.crowd)
        total += row.height * row.width
        for category, area in zip(row.categories, row.areas, strict=True):
            segments[index[category]] += 1
            pixels[index[category]] += area
    totals = Totals(images, sum(segments), crowd, total, total - sum(pixels))
    return Census(totals, tuple(segments), tuple(pixels))
