"""Semantic figures from a streaming confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.integer]


def class_map(segment_map: IntArray, labels: IntArray) -> NDArray[np.int64]:
    """(H, W) class indices, -1 = void, from a map of segments (0 = void, i+1 = segment i)."""
    return np.concatenate([[-1], labels]).astype(np.int64)[segment_map]


@dataclass(frozen=True)
class SemanticQuality:
    """Figures in 0-1 of a group of classes.

    miou: mean IoU. fwiou: IoU weighted by the share of true pixels. macc: mean recall of pixels.
    pacc: recall of all pixels of these classes. All of them over the `n` classes that the truth
    holds; `absent` others of the group are in no figure.
    """

    miou: float
    fwiou: float
    macc: float
    pacc: float
    n: int
    absent: int


class SemanticScore:
    """Counts pixels by true and predicted class; `matrix` (K, K+1) int64 is the whole state.

    The last column holds pixels without a prediction. Void truth is ignored.
    """

    def __init__(self, classes: int) -> None:
        self.matrix: NDArray[np.int64] = np.zeros((classes, classes + 1), np.int64)

    def add(self, pred: IntArray, truth: IntArray) -> NDArray[np.int64]:
        """One image: (H, W) class indices; -1 is "no class" in `pred` and void in `truth`.

        Returns the image's own counts by class (3, K): right pixels, true pixels, pixels named so.
        """
        classes = self.matrix.shape[0]
        real = truth >= 0
        chosen = pred[real].astype(np.int64)
        chosen[chosen < 0] = classes
        pairs = truth[real].astype(np.int64) * (classes + 1) + chosen
        matrix = np.bincount(pairs, minlength=self.matrix.size).reshape(self.matrix.shape)
        self.matrix += matrix
        return _by_class(matrix)

    def merge(self, other: SemanticScore) -> None:
        """Adds the counts of another part of the images."""
        self.matrix += other.matrix

    def iou(self) -> NDArray[np.float64]:
        """(K,) intersection over union; nan where the truth never holds the class."""
        hits, truth, named = _by_class(self.matrix).astype(np.float64)
        return np.where(truth > 0, hits / np.maximum(truth + named - hits, 1), np.nan)

    def mean(self, classes: Sequence[int]) -> float | None:
        """Mean IoU over those of the classes that occur in the truth; None if none does."""
        found = self.quality(classes)
        return None if found is None else found.miou

    def quality(self, classes: Sequence[int]) -> SemanticQuality | None:
        """The figures of a group of classes; None if the truth holds none of them."""
        chosen = [c for c in classes if self.matrix[c].any()]
        if not chosen:
            return None
        hits, truth, _ = _by_class(self.matrix)[:, chosen].astype(np.float64)
        iou = self.iou()[chosen]
        return SemanticQuality(
            miou=float(iou.mean()),
            fwiou=float((truth * iou).sum() / truth.sum()),
            macc=float((hits / truth).mean()),
            pacc=float(hits.sum() / truth.sum()),
            n=len(chosen),
            absent=len(classes) - len(chosen),
        )

    def absent(self) -> list[int]:
        """Classes that the truth never holds: left out of means."""
        return np.flatnonzero(self.matrix.sum(1) == 0).tolist()


def _by_class(matrix: NDArray[np.int64]) -> NDArray[np.int64]:
    """(3, K): right pixels, true pixels, pixels named so (void left out)."""
    return np.stack([np.diagonal(matrix), matrix.sum(1), matrix[:, :-1].sum(0)])
