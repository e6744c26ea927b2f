"""What became of each segment of an image: found, named wrongly, merged, split, missed, made up.

Segments are compared by what they share, whatever their classes, as PQ does it: of void nothing
counts, and crowds match nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from concat_cli.core.evaluate.quality import BoolArray, FloatArray, IntArray, matching

FITS, TOUCHES, MOSTLY = 0.5, 0.1, 0.5  # IoU of a match, and of one that is loose; share of an area
OUTCOMES = ("right", "misnamed", "merged", "split", "loose", "missed", "hallucinated", "ignored")
MEANING = {  # of true segments, the first that holds; the last two of predicted ones
    "right": "a predicted segment has an IoU above 0.5 with it, and its class",
    "misnamed": "a predicted segment has an IoU above 0.5 with it, and another class",
    "merged": "one predicted segment covers more than half of it, and of another true segment too",
    "split": "several predicted segments lie mostly inside of it and cover more than half of it",
    "loose": "the best predicted segment has an IoU between 0.1 and 0.5 with it",
    "missed": "no predicted segment has an IoU of 0.1 with it",
    "hallucinated": "a predicted segment that is none of the above for any true one, and lies "
    "mostly on what has a truth",
    "ignored": "a predicted segment that lies mostly on void or crowds: no mistake",
}
RIGHT, MISNAMED, MERGED, SPLIT, LOOSE, MISSED, HALLUCINATED, IGNORED = range(len(OUTCOMES))


@dataclass(frozen=True)
class Overlap:
    """An image's segments by the pixels that they share.

    shared: (N+1, M+1) as `quality.overlaps`. labels (N,), crowd (N,): of the true ones; named (M,):
    labels of the predicted ones. areas (N,): of the true ones, where the map's do not count.
    """

    shared: NDArray[np.int64]
    labels: IntArray
    crowd: BoolArray
    named: IntArray
    areas: FloatArray | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of an image's segments.

    true (N,), found (M,): indices into OUTCOMES; -1: a crowd. iou (N, M): 0 for crowds. matches:
    rows and columns of what PQ counts as true positives; alarms (M,): as false ones; misses (N,):
    as false negatives.
    """

    true: NDArray[np.int64]
    found: NDArray[np.int64]
    iou: FloatArray
    matches: tuple[NDArray[np.intp], NDArray[np.intp]]
    alarms: BoolArray
    misses: BoolArray

    @property
    def score(self) -> float | None:
        """PQ over all segments of the image at once, in 0-1; None where there is none to score."""
        matches = len(self.matches[0])
        whole = matches + 0.5 * int(self.alarms.sum()) + 0.5 * int(self.misses.sum())
        return float(self.iou[self.matches].sum()) / whole if whole else None


def regions(named: IntArray) -> tuple[IntArray, IntArray]:
    """A class map (H, W), -1 = none, as a map of segments, one for each class, and their labels."""
    labels, places = np.unique(named, return_inverse=True)
    places = places.reshape(named.shape)  # flat in NumPy 1 and 2.1 on
    none = int(labels[:1].tolist() == [-1])
    return places + 1 - none, labels[none:]


def outcome_of(image: Overlap) -> Outcome:
    """What became of the segments of an image."""
    shared, crowd = image.shared, image.crowd
    inner, void, sizes = shared[1:, 1:].astype(float), shared[0, 1:], shared[:, 1:].sum(0)
    areas = shared[1:].sum(1).astype(float) if image.areas is None else image.areas
    same = image.labels[:, None] == image.named[None]  # (N, M)
    scored = matching(shared, image.named, image.labels, crowd, image.areas)
    iou = np.where(crowd[:, None], 0.0, scored.iou)
    inner[crowd] = 0

    fits, best = iou > FITS, iou > TOUCHES
    pieces = (inner > MOSTLY * np.maximum(sizes - void, 1)) & ~fits.any(0)  # lie mostly inside of
    swallowed = inner > MOSTLY * areas[:, None]
    merger = swallowed.sum(0) > 1  # (M,)
    split = (pieces.sum(1) > 1) & ((inner * pieces).sum(1) > MOSTLY * areas)
    right, named_else = fits & same, fits & ~same

    true = np.full(len(areas), MISSED)
    for value, where in (
        (LOOSE, best.any(1)),
        (SPLIT, split),
        (MERGED, (swallowed & merger).any(1)),
        (MISNAMED, named_else.any(1)),
        (RIGHT, right.any(1)),
        (-1, crowd),
    ):
        true[where] = value
    off = void + shared[1:, 1:][crowd].sum(0) > 0.5 * sizes  # on void, or a crowd of any class
    found = np.full(len(sizes), HALLUCINATED)
    for value, where in (
        (IGNORED, off),
        (LOOSE, best.any(0)),
        (SPLIT, (pieces & split[:, None]).any(0)),
        (MERGED, merger),
        (MISNAMED, named_else.any(0)),
        (RIGHT, right.any(0)),
    ):
        found[where] = value
    return Outcome(true, found, iou, scored.pairs, scored.alarms, scored.missed)
