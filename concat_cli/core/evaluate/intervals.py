"""Intervals by drawing the images again, of the figures of one model or of what two differ by.

The bootstrap of Efron (1979) over images, with percentiles: it says how much a figure hangs on
which images were there, and nothing of other training runs. It is a matrix product of how often
each image was drawn and its counts, which are kept small: only classes that occur in an image.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import csr_array

from concat_cli.core.evaluate.quality import FloatArray
from concat_cli.core.vocabulary import Vocabulary

LEVEL = 0.95
DRAWS = 128  # how often images were drawn is held for so many draws at once
GROUPS: tuple[str, ...] = ("seen", "unseen", "harmonic")
Mean = Callable[[FloatArray, Sequence[int]], FloatArray]  # `mean_pq` or `mean_iou`
ClassSplit = tuple[Sequence[int], Sequence[int]]  # class indices: seen, unseen
Borders = tuple[float, float]


class SparseCounts:
    """`columns` figures for each image and class; about 35 bytes for a class in an image."""

    def __init__(self, columns: int, classes: int) -> None:
        self.columns, self.classes = columns, classes
        self._where = array("q")  # image number * classes + class
        self._values = array("d")  # `columns` of them for each of `_where`

    def add(self, image: int, counts: NDArray[np.number]) -> None:
        """The figures (columns, K) of an image, by its number."""
        found = np.flatnonzero(counts.any(0))
        self._where.frombytes((image * self.classes + found).astype(np.int64).tobytes())
        held: FloatArray = np.ascontiguousarray(counts[:, found].T, np.float64)
        self._values.frombytes(held.tobytes())

    def merge(self, other: SparseCounts) -> None:
        """Adds the images of another process."""
        assert (self.columns, self.classes) == (other.columns, other.classes)
        self._where.extend(other._where)
        self._values.extend(other._values)

    def matrix(self, images: int) -> Any:
        """The figures of M images, a sparse (columns * K, M) `csr_array`."""
        where, values = np.frombuffer(self._where, np.int64), np.frombuffer(self._values)
        number, classes = np.divmod(where, self.classes)
        rows = np.arange(self.columns) * self.classes + classes[:, None]  # (n, columns)
        place = (rows.ravel(), number.repeat(self.columns))
        return csr_array((values, place), shape=(self.columns * self.classes, images))

    def dense(self, images: int) -> FloatArray:
        """(M, columns, K)."""
        found: FloatArray = np.ascontiguousarray(self.matrix(images).toarray().T)
        return found.reshape(images, self.columns, self.classes)

    def nbytes(self) -> int:
        """Bytes of memory."""
        return len(self._where) * self._where.itemsize + len(self._values) * self._values.itemsize


@dataclass
class ImageCounts:
    """Counts of every image by class; None where they are not kept.

    panoptic: summed IoU, TP, FP, FN. semantic: right, true and named pixels.
    """

    images: int
    panoptic: SparseCounts | None = None
    semantic: SparseCounts | None = None

    def merge(self, other: ImageCounts) -> None:
        """Adds the images of another process, of which the same is kept."""
        for mine, theirs in ((self.panoptic, other.panoptic), (self.semantic, other.semantic)):
            if mine is not None and theirs is not None:
                mine.merge(theirs)

    def dense_panoptic(self) -> FloatArray:
        """(M, 4, K), what differences are computed with."""
        assert self.panoptic is not None, "panoptic quality was not scored"
        return self.panoptic.dense(self.images)


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
    blocks: list[FloatArray] = [(matrix @ weights.T).T for weights in draws(images, repeats, seed)]
    return np.concatenate(blocks).reshape(repeats, counts.columns, counts.classes)


def resample(counts: FloatArray, repeats: int, seed: int) -> FloatArray:
    """The same of dense counts: (M, C, K) -> (repeats, C, K)."""
    flat = counts.reshape(len(counts), -1)
    blocks = [weights @ flat for weights in draws(len(counts), repeats, seed)]
    return np.concatenate(blocks).reshape(repeats, *counts.shape[1:])


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

    def of(kept: SparseCounts | None, mean: Mean) -> dict[str, Borders | None]:
        if kept is None:
            return dict.fromkeys(("all", *GROUPS))
        again = resampled(kept, counts.images, repeats, seed)
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
        again.append(gaps(resample(a, repeats, number), resample(b, repeats, number), split))
    found: dict[str, Interval | None] = {}
    for group in GROUPS:
        value = float(np.mean([one[group] for one in values]))
        borders = percentiles(np.mean([one[group] for one in again], axis=0))
        found[group] = None if np.isnan(value) or borders is None else Interval(value, *borders)
    return found
