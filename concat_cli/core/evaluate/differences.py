"""Paired differences: two models on the same images, and the same images drawn again for both."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from concat_cli.core.evaluate.bootstrap import harmonic_means, percentiles
from concat_cli.core.evaluate.counts import FloatArray
from concat_cli.core.evaluate.per_image import Interval, resample

GROUPS: tuple[str, ...] = ("seen", "unseen", "harmonic")
Mean = Callable[[FloatArray, Sequence[int]], FloatArray]  # `bootstrap.mean_pq` or `mean_iou`
ClassSplit = tuple[Sequence[int], Sequence[int]]  # class indices: seen, unseen


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
    values, draws = [], []
    for number, (a, b, split) in enumerate(zip(ours, theirs, splits, strict=True)):
        assert a.shape == b.shape, (a.shape, b.shape)
        values.append([group_means(x.sum(0), mean, split) for x in (a, b)])
        draws.append([group_means(resample(x, repeats, number), mean, split) for x in (a, b)])
    found: dict[str, Interval | None] = {}
    for group in GROUPS:
        value = float(np.mean([one[group] - other[group] for one, other in values]))
        borders = percentiles(np.mean([one[group] - other[group] for one, other in draws], axis=0))
        found[group] = None if np.isnan(value) or borders is None else Interval(value, *borders)
    return found
