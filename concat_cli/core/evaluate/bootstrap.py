"""Intervals by drawing the images again: a matrix product of how often each was drawn and its
counts.

The bootstrap of Efron (1979) over images, with percentiles: it says how much a figure hangs on
which images were there, and nothing of other training runs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from concat_cli.core.evaluate.counts import FloatArray, ImageCounts, SparseCounts
from concat_cli.core.vocabulary import Vocabulary

LEVEL = 0.95
DRAWS = 128  # how often images were drawn is held for so many draws at once


@dataclass(frozen=True)
class Intervals:
    """95% intervals (low, high) in 0-1 of all, seen, unseen, harmonic; None where no class of the
    group occurs."""

    repeats: int
    level: float
    pq: dict[str, tuple[float, float] | None]
    miou: dict[str, tuple[float, float] | None]


def draws(images: int, repeats: int, seed: int) -> Iterator[FloatArray]:
    """(R, M) how often each of M images was drawn, a block of `DRAWS` rows at a time."""
    rng = np.random.Generator(np.random.PCG64(seed))
    share = np.full(images, 1 / images)
    for done in range(0, repeats, DRAWS):
        rows = min(DRAWS, repeats - done)
        yield rng.multinomial(images, share, size=rows).astype(np.float64)


def resampled(counts: SparseCounts, images: int, repeats: int, seed: int) -> FloatArray:
    """(repeats, columns, K): the summed counts of `repeats` sets of images drawn again."""
    matrix = counts.matrix(images)  # (columns * K, M)
    blocks = [(matrix @ weights.T).T for weights in draws(images, repeats, seed)]
    return np.concatenate(blocks).reshape(repeats, counts.columns, counts.classes)


def mean_pq(counts: FloatArray, classes: Sequence[int]) -> FloatArray:
    """PQ averaged over those of the classes that occur, nan if none does; (..., 4, K) -> (...)."""
    iou, tp, fp, fn = np.moveaxis(counts[..., list(classes)], -2, 0)
    total = tp + 0.5 * fp + 0.5 * fn
    return _mean(iou, total)


def mean_iou(counts: FloatArray, classes: Sequence[int]) -> FloatArray:
    """IoU averaged over those of the classes that the truth holds, nan where it holds none;
    counts (..., 3, K) of right, true and named pixels -> (...)."""
    hits, truth, named = np.moveaxis(counts[..., list(classes)], -2, 0)
    return _mean(hits, np.where(truth > 0, truth + named - hits, 0))


def _mean(part: FloatArray, whole: FloatArray) -> FloatArray:
    there = whole > 0
    number = there.sum(-1)
    share = np.where(there, part / np.where(there, whole, 1.0), 0.0).sum(-1)
    return np.where(number > 0, share / np.maximum(number, 1), np.nan)


def harmonic_means(seen: FloatArray, unseen: FloatArray) -> FloatArray:
    """2su / (s + u); 0 where both are 0, nan where one is missing."""
    return 2 * seen * unseen / np.maximum(seen + unseen, 1e-12)


def bootstrap(
    counts: ImageCounts, vocabulary: Vocabulary, repeats: int, seed: int = 0
) -> Intervals:
    """Intervals of PQ and mIoU; both from the same draws of images.

    A draw without any class of a group is left out of that group's interval.
    """
    return Intervals(
        repeats,
        LEVEL,
        _groups(counts.panoptic, counts.images, mean_pq, vocabulary, repeats, seed),
        _groups(counts.semantic, counts.images, mean_iou, vocabulary, repeats, seed),
    )


def _groups(
    counts: SparseCounts | None,
    images: int,
    mean: Callable[[FloatArray, Sequence[int]], FloatArray],
    vocabulary: Vocabulary,
    repeats: int,
    seed: int,
) -> dict[str, tuple[float, float] | None]:
    if counts is None:
        return dict.fromkeys(("all", "seen", "unseen", "harmonic"))
    again = resampled(counts, images, repeats, seed)
    found = {
        "all": mean(again, range(len(vocabulary))),
        "seen": mean(again, vocabulary.seen_indices),
        "unseen": mean(again, vocabulary.unseen_indices),
    }
    found["harmonic"] = harmonic_means(found["seen"], found["unseen"])
    return {name: percentiles(values) for name, values in found.items()}


def percentiles(values: FloatArray) -> tuple[float, float] | None:
    """The borders of the middle 95%; None where there is no value."""
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)
