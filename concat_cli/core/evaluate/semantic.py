"""Mean IoU from a streaming confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.integer]


def class_map(segment_map: IntArray, labels: IntArray) -> NDArray[np.int64]:
    """(H, W) class indices, -1 = void, from a map of segments (0 = void, i+1 = segment i)."""
    return np.concatenate([[-1], labels]).astype(np.int64)[segment_map]


class SemanticScore:
    """Counts pixels by true and predicted class; `matrix` (K, K+1) int64 is the whole state.

    The last column holds pixels without a prediction. Void truth is ignored.
    """

    def __init__(self, classes: int) -> None:
        self.matrix: NDArray[np.int64] = np.zeros((classes, classes + 1), np.int64)

    def add(self, pred: IntArray, truth: IntArray) -> None:
        """One image: (H, W) class indices; -1 is "no class" in `pred` and void in `truth`."""
        classes = self.matrix.shape[0]
        real = truth >= 0
        chosen = pred[real].astype(np.int64)
        chosen[chosen < 0] = classes
        pairs = truth[real].astype(np.int64) * (classes + 1) + chosen
        self.matrix += np.bincount(pairs, minlength=self.matrix.size).reshape(self.matrix.shape)

    def merge(self, other: SemanticScore) -> None:
        """Adds the counts of another part of the images."""
        self.matrix += other.matrix

    def iou(self) -> NDArray[np.float64]:
        """(K,) intersection over union; nan where the truth never holds the class."""
        hits = np.diagonal(self.matrix).astype(np.float64)
        truth = self.matrix.sum(1)
        union = truth + self.matrix[:, :-1].sum(0) - hits
        return np.where(truth > 0, hits / np.maximum(union, 1), np.nan)

    def mean(self, classes: Sequence[int]) -> float | None:
        """Mean IoU over those of the classes that occur in the truth; None if none does."""
        values = self.iou()[list(classes)]
        values = values[~np.isnan(values)]
        return float(values.mean()) if len(values) else None

    def absent(self) -> list[int]:
        """Classes that the truth never holds: left out of means."""
        return np.flatnonzero(self.matrix.sum(1) == 0).tolist()
