"""Intervals by drawing the images again, of the figures of one model or of what two differ by.

The bootstrap of Efron (1979) over images, with percentiles: it says how much a figure hangs on
which images were there, and nothing of other training runs. It is a matrix product of how often
each image was drawn and its counts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from concat_cli.core.evaluate.quality import FloatArray
from concat_cli.core.vocabulary import Vocabulary

LEVEL = 0.95
DRAWS = 128  # how often images were drawn is held for so many draws at once
GROUPS: tuple[str, ...] = ("seen", "unseen", "harmonic")
Mean = Callable[[FloatArray, Sequence[int]], FloatArray]  # `mean_pq` or `mean_iou`
ClassSplit = tuple[Sequence[int], Sequence[int]]  # class indices: seen, unseen
Borders = tuple[float, float]


@dataclass
class ImageCounts:
    """What each of M images adds to the counts of K classes, None where it is not kept.

    panoptic (M, 4, K): IoU, TP, FP, FN; semantic (M, 3, K): right, true and named pixels.
    """

    images: int
    panoptic: FloatArray | None = None
    semantic: FloatArray | None = None
    names: tuple[str, ...] = ()  # of the images' files

    def merge(self, other: ImageCounts) -> None:
        """Adds the images of another process, of which the same is kept."""
        for mine, theirs in ((self.panoptic, other.panoptic), (self.semantic, other.semantic)):
            if mine is not None and theirs is not None:
                mine += theirs


@dataclass(frozen=True)
class Intervals:
    """95% intervals (low, high) in 0-1 of all, seen, unseen, harmonic; None where no class of the
    group occurs."""

    repeats: int
    level: float
    pq: dict[str, Borders | None]
    miou: dict[str, Borders | None]


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% bootstrap interval."""

    value: float
    low: float
    high: float

    def percent(self, sign: str = "", between: str = " ") -> str:
        """`48.0 [46.1, 50.2]`; sign: "+" for a difference. Nothing is `-0.0`."""
        parts = (self.value, self.low, self.high)
        value, low, high = (round(100 * part, 1) + 0.0 for part in parts)
        return f"{value:{sign}.1f}{between}[{low:.1f}, {high:.1f}]"


def draws(images: int, repeats: int, seed: int) -> Iterator[FloatArray]:
    """(R, M) how often each of M images was drawn, a block of `DRAWS` rows at a time."""
    rng = np.random.Generator(np.random.PCG64(seed))
    share = np.full(images, 1 / images)
    for done in range(0, repeats, DRAWS):
        rows = min(DRAWS, repeats - done)
        yield rng.multinomial(images, share, size=rows).astype(np.float64)


def resample(repeats: int, seed: int, *counts: FloatArray) -> list[FloatArray]:
    """The summed counts of `repeats` sets of images drawn again, of each array of them from the
    same draws: (M, C, K) -> (repeats, C, K)."""
    images = len(counts[0])
    sums = [np.empty((repeats, *one.shape[1:])) for one in counts]
    done = 0
    for weights in draws(images, repeats, seed):
        rows = slice(done, done := done + len(weights))
        for one, total in zip(counts, sums, strict=True):
            total[rows] = (weights @ one.reshape(images, -1)).reshape(len(weights), *one.shape[1:])
    return sums


def mean_pq(counts: FloatArray, classes: Sequence[int]) -> FloatArray:
    """PQ averaged over those of the classes that occur, nan if none does; (..., 4, K) -> (...)."""
    iou, tp, fp, fn = np.moveaxis(counts[..., list(classes)], -2, 0)
    return _mean(iou, tp + 0.5 * fp + 0.5 * fn)


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


def harmonic(seen: FloatArray | float, unseen: FloatArray | float) -> FloatArray:
    """2su / (s + u) of figures in 0-1; 0 where both are 0, nan where one is missing (nan)."""
    return 2 * seen * unseen / np.maximum(seen + unseen, 1e-12)


def group_means(counts: FloatArray, mean: Mean, split: ClassSplit) -> dict[str, FloatArray]:
    """The figure of seen and of unseen classes and their harmonic mean: (..., C, K) -> (...)."""
    seen, unseen = (mean(counts, classes) for classes in split)
    return {"seen": seen, "unseen": unseen, "harmonic": harmonic(seen, unseen)}


def bootstrap(
    counts: ImageCounts, vocabulary: Vocabulary, repeats: int, seed: int = 0
) -> Intervals:
    """Intervals of PQ and mIoU; both from the same draws of images.

    A draw without any class of a group is left out of that group's interval.
    """
    split = vocabulary.seen_indices, vocabulary.unseen_indices

    kept = [one for one in (counts.panoptic, counts.semantic) if one is not None]
    sums = iter(resample(repeats, seed, *kept) if kept else ())

    def of(kept: FloatArray | None, mean: Mean) -> dict[str, Borders | None]:
        if kept is None:
            return dict.fromkeys(("all", *GROUPS))
        again = next(sums)
        means = {"all": mean(again, range(len(vocabulary))), **group_means(again, mean, split)}
        return {name: percentiles(values) for name, values in means.items()}

    return Intervals(repeats, LEVEL, of(counts.panoptic, mean_pq), of(counts.semantic, mean_iou))


def percentiles(values: FloatArray) -> Borders | None:
    """The borders of the middle 95%; None where there is no value."""
    values = values[~np.isnan(values)]
    if not len(values):
        return None
    low, high = np.percentile(values, [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return float(low), float(high)


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

    def gaps(a: FloatArray, b: FloatArray, split: ClassSplit) -> dict[str, FloatArray]:
        one, other = group_means(a, mean, split), group_means(b, mean, split)
        return {group: one[group] - other[group] for group in GROUPS}

    values: list[dict[str, FloatArray]] = []
    again: list[dict[str, FloatArray]] = []
    for number, (a, b, split) in enumerate(zip(ours, theirs, splits, strict=True)):
        assert a.shape == b.shape, (a.shape, b.shape)
        values.append(gaps(a.sum(0), b.sum(0), split))
        one, other = resample(repeats, number, a, b)
        again.append(gaps(one, other, split))
    found: dict[str, Interval | None] = {}
    for group in GROUPS:
        value = float(np.mean([one[group] for one in values]))
        borders = percentiles(np.mean([one[group] for one in again], axis=0))
        found[group] = None if np.isnan(value) or borders is None else Interval(value, *borders)
    return found


def group_differences(
    ours: FloatArray,
    theirs: FloatArray,
    mean: Mean,
    groups: Mapping[str, Sequence[int]],
    repeats: int,
) -> dict[str, Interval | None]:
    """By group of class indices, ours - theirs as in `paired_differences`, from the same draws."""
    a, b = resample(repeats, 0, ours, theirs)
    found: dict[str, Interval | None] = {}
    for name, classes in groups.items():
        value = float(mean(ours.sum(0), classes) - mean(theirs.sum(0), classes))
        borders = percentiles(mean(a, classes) - mean(b, classes))
        found[name] = None if np.isnan(value) or borders is None else Interval(value, *borders)
    return found
