"""What training and dev may see of unseen classes: nothing, in one of two ways; and what each part
then holds.

drop: an image with any unseen segment, crowd or not, leaves training (PADing, get_zsp_json.py).
void: every image stays, unseen segments are void (as SPNet does). The index lists none of them.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from concat_cli.core.data.index import Row
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.labels import INSTANCE
from concat_cli.core.prepare.source import UnseenPixels
from concat_cli.core.progress import Progress
from concat_cli.core.vocabulary import Vocabulary


@dataclass
class Taken:
    """What a protocol took away from the training images.

    images_by_class: unseen class name -> images that hold it.
    """

    unseen_pixels: UnseenPixels
    images_listed: int = 0
    pixels_listed: int = 0
    images_dropped: int = 0
    segments_dropped: int = 0
    pixels_dropped: int = 0
    segments_void: int = 0
    pixels_void: int = 0
    images_by_class: dict[str, int] = field(default_factory=dict[str, int])


def keep_seen(
    rows: Iterable[Row], vocabulary: Vocabulary, unseen_pixels: UnseenPixels
) -> tuple[list[Row], Taken]:
    """The rows that training and dev may have; none of them lists an unseen segment."""
    unseen = {entry.id: entry.name for entry in vocabulary.entries if not entry.seen}
    taken = Taken(unseen_pixels, images_by_class=dict.fromkeys(unseen.values(), 0))
    kept: list[Row] = []
    for row in rows:
        taken.images_listed += 1
        taken.pixels_listed += row.height * row.width
        here = unseen.keys() & set(row.categories)
        for category in here:
            taken.images_by_class[unseen[category]] += 1
        if not here:
            kept.append(row)
        elif unseen_pixels == "drop":
            taken.images_dropped += 1
            taken.segments_dropped += len(row.ids)
            taken.pixels_dropped += row.height * row.width
        else:
            hidden = [i for i, category in enumerate(row.categories) if category in here]
            taken.segments_void += len(hidden)
            taken.pixels_void += sum(row.areas[i] for i in hidden)
            kept.append(hide(row, hidden))
    return kept, taken


def hide(row: Row, places: Sequence[int]) -> Row:
    """The row without the segments at these places: their pixels become void."""
    gone = set(places)

    def rest(values: list[int]) -> list[int]:
        return [value for place, value in enumerate(values) if place not in gone]

    return replace(
        row,
        ids=rest(row.ids),
        categories=rest(row.categories),
        crowd=rest(row.crowd),
        areas=rest(row.areas),
        hidden=row.hidden + len(gone),
    )


def cut_dev(
    kept: list[Row], share: float, count: int | None, progress: Progress
) -> tuple[list[Row], list[Row]]:
    """train and dev, split by a hash of the image id: the same on every machine."""
    if count is None and len(kept) < 10:
        progress.say(f"Only {len(kept)} training images: dev is a copy of train.")
        return kept, kept
    number = max(1, round(len(kept) * share)) if count is None else count
    if not 1 <= number < len(kept):
        raise UserError(
            f"dev cannot take {number} of {len(kept)} training images.",
            f"Choose between 1 and {len(kept) - 1}.",
        )
    ranked = sorted(kept, key=lambda row: hashlib.sha256(str(row.id).encode()).digest())
    chosen = {row.id for row in ranked[:number]}
    return [row for row in kept if row.id not in chosen], [row for row in kept if row.id in chosen]


def refuse_empty(kept: Sequence[Row], taken: Taken, where: str) -> None:
    """UserError where nothing is left to train on, saying what took it away."""
    if taken.images_listed == 0:
        raise UserError(f"{where} lists no annotated image.", "Check the file.")
    if any(row.ids for row in kept) or (kept and not taken.segments_void):
        return
    names = ", ".join(f"{name} ({n})" for name, n in taken.images_by_class.items() if n)
    what = "image" if taken.unseen_pixels == "drop" else "segment"
    void = " or `--unseen-pixels void` to keep the images," if what == "image" else ""
    raise UserError(
        f"No training {what} is left: each of the {taken.images_listed} images of {where} has "
        f"segments of unseen classes{' alone' if what == 'segment' else ''}: {names}.",
        f"Give more images,{void} or use `--class-split all_seen` to train on every class.",
    )


def to_json(taken: Taken) -> dict[str, Any]:
    """Plain values for `dataset.json` and reports."""
    values = dict(vars(taken))
    values["images_by_class"] = {k: n for k, n in taken.images_by_class.items() if n}
    return values


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
    """What a part holds; segments, those that are crowds, images with several, and pixels, each by
    class index."""

    totals: Totals
    segments: tuple[int, ...]
    crowds: tuple[int, ...]
    several: tuple[int, ...]
    pixels: tuple[int, ...]


def census(rows: Iterable[Row], vocabulary: Vocabulary) -> Census:
    """Counts the rows of a part."""
    segments, crowds, several, pixels = ([0] * len(vocabulary) for _ in range(4))
    index = vocabulary.index_of_id
    images = total = 0
    for row in rows:
        images += 1
        total += row.height * row.width
        for category, crowd, area in zip(row.categories, row.crowd, row.areas, strict=True):
            segments[index[category]] += 1
            crowds[index[category]] += crowd
            pixels[index[category]] += area
        for category, count in Counter(row.categories).items():
            several[index[category]] += count > 1
    totals = Totals(images, sum(segments), sum(crowds), total, total - sum(pixels))
    return Census(totals, *map(tuple, (segments, crowds, several, pixels)))


@dataclass(frozen=True)
class Annotations:
    """What became of the annotations of a part whose masks may overlap.

    hidden: entirely under others. double: of these, with the very mask of another. empty: without
    pixels.
    """

    listed: int
    kept: int
    hidden: int
    double: int
    empty: int


def annotation_counts(rows: Iterable[Row]) -> Annotations:
    """Counts the annotations of instances, as whose ids those of segments are known."""
    kept = hidden = double = empty = 0
    for row in rows:
        kept += sum(number > INSTANCE for number in row.ids)
        if row.lost:
            empty += row.lost[0]
            hidden += row.lost[1]
            double += row.lost[2]
    return Annotations(kept + hidden + empty, kept, hidden, double, empty)
