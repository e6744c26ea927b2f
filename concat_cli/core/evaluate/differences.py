"""Paired differences: two models on the same images, and the same images drawn again for both."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from concat_cli.core.evaluate.bootstrap import draws, harmonic_means, percentiles
from concat_cli.core.evaluate.counts import FloatArray

GROUPS: tuple[str, ...] = ("seen", "unseen", "harmonic")
Mean = Callable[[FloatArray, Sequence[int]], FloatArray]  # `bootstrap.mean_pq` or `mean_iou`
ClassSplit = tuple[Sequence[int], Sequence[int]]  # class indices: seen, unseen


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% bootstrap interval."""

    value: float
    low: float
    high: float


def resample(counts: FloatArray, repeats: int, seed: int) -> FloatArray:
    """Counts of `repeats` sets of M images drawn with replacement: (M, C, K) -> (repeats, C, K)."""
    flat = counts.reshape(len(counts), -1)
    blocks = [weights @ flat for weights in draws(len(counts), repeats, seed)]
    return np.concatenate(blocks).reshape(repeats, *counts.shape[1:])


def group_means(counts: FloatArray, mean: Mean, split: ClassSplit) -> dict[str, FloatArray]:
    """The figure of seen and of unseen classes and their harmonic mean: (..., C, K) -> (...)."""
    seen, unseen = (mean(counts, classes) for classes in split)
    return {"seen": seen, "unseen": unseen, "harmonic": harmonic_means(seen, unseen)}


def paired_differences(
    ours: Sequence[FloatArray],
    theirs: Sequence[FloatArray],
    mean: Mean,
    splits: Sequence[ClassSplit],
    repeats: int,
) -> dict[str, Interval | None]:
    """By group, the mean over class splits of ours - theirs, with its 95% interval over the images.

    ours, theirs: counts (M, C, K) of each split, of the same M images. None where a split has no
    class of the group; draws without one are left out of the interval.
    """
    values, again = [], []
    for number, (a, b, split) in enumerate(zip(ours, theirs, splits, strict=True)):
        assert a.shape == b.shape, (a.shape, b.shape)
        values.append([group_means(x.sum(0), mean, split) for x in (a, b)])
        again.append([group_means(resample(x, repeats, number), mean, split) for x in (a, b)])
    found: dict[str, Interval | None] = {}
    for group in GROUPS:
        value = float(np.mean([one[group] - other[group] for one, other in values]))
        borders = percentiles(np.mean([one[group] - other[group] for one, other in again], axis=0))
        found[group] = None if np.isnan(value) or borders is None else Interval(value, *borders)
    return found
