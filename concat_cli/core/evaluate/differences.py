"""What two reports on the same images differ by: in their means, in each class, in each image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from concat_cli.core.evaluate.intervals import (
    GROUPS,
    Borders,
    Interval,
    Mean,
    group_differences,
    mean_iou,
    mean_pq,
    paired_differences,
)
from concat_cli.core.evaluate.quality import FloatArray
from concat_cli.core.evaluate.report import ClassReport, Report

Figures = dict[str, Interval | None]  # in 0-1 by group: all, seen, unseen, harmonic
MOST_IMAGES = 20  # of those that differ most


@dataclass(frozen=True)
class ClassDifference:
    """A class in two reports: PQ, where segments were scored, else IoU; None where it has none.
    `seen` is None where classes are not divided."""

    name: str
    seen: bool | None
    thing: bool
    ours: float | None
    theirs: float | None
    difference: Interval | None


@dataclass(frozen=True)
class ImageDifference:
    """An image in two reports: the mean of the same figure over the classes that it holds."""

    image: str
    ours: float
    theirs: float

    @property
    def gap(self) -> float:
        """Ours less theirs."""
        return self.ours - self.theirs


@dataclass(frozen=True)
class Difference:
    """A report minus the first one, the same images drawn again for both.

    classes: all of them, those that lost most first. images: those that differ most.
    """

    label: str
    minus: str
    pq: Figures
    miou: Figures
    classes: tuple[ClassDifference, ...]
    images: tuple[ImageDifference, ...]


def figures(report: Report) -> tuple[Figures, Figures]:
    """PQ and mIoU of a report with their intervals."""
    drawn = report.intervals
    assert drawn is not None

    def of(found: dict[str, Any], key: str, borders: dict[str, Borders | None]) -> Figures:
        values = {one: (getattr(found[one], key, None), borders[one]) for one in ("all", *GROUPS)}
        return {
            name: None if value is None or around is None else Interval(value, *around)
            for name, (value, around) in values.items()
        }

    return of(report.panoptic, "pq", drawn.pq), of(report.semantic, "miou", drawn.miou)


def difference(label: str, report: Report, minus: str, first: Report) -> Difference:
    """`report` minus `first`; both hold counts and intervals of the same images and classes."""
    assert report.intervals and report.counts and first.counts
    a, b, repeats = report.counts, first.counts, report.intervals.repeats
    pq = _means(report.per_class, a.panoptic, b.panoptic, mean_pq, repeats)
    miou = _means(report.per_class, a.semantic, b.semantic, mean_iou, repeats)
    ours, theirs, mean = a.panoptic, b.panoptic, mean_pq
    if ours is None or theirs is None:
        ours, theirs, mean = a.semantic, b.semantic, mean_iou
    if ours is None or theirs is None:  # one tells segments alone, the other pixels
        return Difference(label, minus, pq, miou, (), ())
    classes = _classes(report.per_class, ours, theirs, mean, repeats)
    images = _images(a.names, ours, theirs, mean)
    return Difference(label, minus, pq, miou, classes, images)


def _means(
    rows: Sequence[ClassReport],
    ours: FloatArray | None,
    theirs: FloatArray | None,
    mean: Mean,
    repeats: int,
) -> Figures:
    if ours is None or theirs is None:
        return dict.fromkeys(("all", *GROUPS))
    seen, unseen = ([i for i, row in enumerate(rows) if row.seen is x] for x in (True, False))
    every = {"all": range(len(rows))}
    found = group_differences(ours, theirs, mean, every, repeats)
    return found | paired_differences([ours], [theirs], mean, [(seen, unseen)], repeats)


def _classes(
    rows: Sequence[ClassReport], ours: FloatArray, theirs: FloatArray, mean: Mean, repeats: int
) -> tuple[ClassDifference, ...]:
    each = {row.name: [place] for place, row in enumerate(rows)}
    gaps = group_differences(ours, theirs, mean, each, repeats)

    def value(counts: FloatArray, name: str) -> float | None:
        found = float(mean(counts.sum(0), each[name]))
        return None if np.isnan(found) else found

    found = [
        ClassDifference(
            row.name, row.seen, row.thing, value(ours, row.name), value(theirs, row.name),
            gaps[row.name],
        )
        for row in rows
    ]  # fmt: skip
    lost = [(one.difference is None, one.difference and one.difference.value) for one in found]
    order = sorted(range(len(found)), key=lambda place: (lost[place][0], lost[place][1] or 0.0))
    return tuple(found[place] for place in order)


def _images(
    names: Sequence[str], ours: FloatArray, theirs: FloatArray, mean: Mean
) -> tuple[ImageDifference, ...]:
    """Images with a figure in both that is not the same."""
    classes = range(ours.shape[-1])
    pairs = zip(names, mean(ours, classes).tolist(), mean(theirs, classes).tolist(), strict=True)
    found = [ImageDifference(*one) for one in pairs]
    found = [one for one in found if abs(one.gap) > 0]  # not so of nan
    return tuple(sorted(found, key=lambda one: -abs(one.gap))[:MOST_IMAGES])
