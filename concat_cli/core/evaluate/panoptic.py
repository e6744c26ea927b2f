"""Panoptic quality, streaming: every image adds to counts, which give PQ, SQ and RQ.

Definition: Kirillov et al., "Panoptic Segmentation" (CVPR 2019), with the rules for void and crowd
of the official panopticapi (`pq_compute_single_core`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

IntArray = NDArray[np.integer]
FloatArray = NDArray[np.float64]


def overlaps(truth_map: IntArray, pred_map: IntArray, truths: int, preds: int) -> NDArray[np.int64]:
    """Pixels shared by each truth and each predicted segment.

    Maps are (H, W) with 0 = void and i+1 = segment i. Returns (truths+1, preds+1), void first.
    """
    assert truth_map.shape == pred_map.shape, (truth_map.shape, pred_map.shape)
    pairs = truth_map.astype(np.int64).ravel() * (preds + 1) + pred_map.ravel()
    counts = np.bincount(pairs, minlength=(truths + 1) * (preds + 1))
    return counts.reshape(truths + 1, preds + 1)  # a map holding more segments than told fails here


@dataclass(frozen=True)
class Quality:
    """PQ, SQ, RQ in 0-1, averaged over the `n` classes that occur."""

    pq: float
    sq: float
    rq: float
    n: int


@dataclass(frozen=True)
class ClassQualities:
    """Per class (K,): summed IoU of matches, matches, false alarms, misses; and what follows."""

    iou: FloatArray
    tp: FloatArray
    fp: FloatArray
    fn: FloatArray

    @property
    def occurs(self) -> NDArray[np.bool_]:
        """(K,) True where TP + FP + FN > 0; the other classes are left out of means."""
        return (self.tp + self.fp + self.fn) > 0

    @property
    def rq(self) -> FloatArray:
        """(K,) recognition quality; 0 where a class does not occur."""
        return self.tp / np.where(self.occurs, self.tp + 0.5 * self.fp + 0.5 * self.fn, 1.0)

    @property
    def sq(self) -> FloatArray:
        """(K,) segmentation quality; 0 where nothing matched."""
        return self.iou / np.maximum(self.tp, 1.0)

    @property
    def pq(self) -> FloatArray:
        """(K,) panoptic quality; 0 where a class does not occur."""
        return self.iou / np.where(self.occurs, self.tp + 0.5 * self.fp + 0.5 * self.fn, 1.0)

    def mean(self, classes: Sequence[int]) -> Quality | None:
        """Plain mean over those of the classes that occur; None if none does."""
        chosen = [c for c in classes if self.occurs[c]]
        if not chosen:
            return None
        means = (float(values[chosen].mean()) for values in (self.pq, self.sq, self.rq))
        return Quality(*means, n=len(chosen))


class PanopticScore:
    """Adds up IoU, TP, FP, FN of K classes over images.

    `counts` (4, K) float64 is the whole state: those of several processes may be summed.
    """

    def __init__(self, classes: int) -> None:
        self.counts: FloatArray = np.zeros((4, classes))

    def add(
        self,
        pred_map: IntArray,
        pred_labels: IntArray,
        truth_map: IntArray,
        truth_labels: IntArray,
        truth_crowd: NDArray[np.bool_] | None = None,
    ) -> None:
        """One image. Maps (H, W): 0 = void, i+1 = segment i; labels: class index per segment."""
        shared = overlaps(truth_map, pred_map, len(truth_labels), len(pred_labels))
        crowd = np.zeros(len(truth_labels), bool) if truth_crowd is None else truth_crowd
        truth_areas, pred_areas = shared[1:].sum(1), shared[:, 1:].sum(0)
        same = truth_labels[:, None] == pred_labels[None, :]  # (N, M)
        union = truth_areas[:, None] + pred_areas[None, :] - shared[1:, 1:] - shared[:1, 1:]
        iou = shared[1:, 1:] / np.maximum(union, 1)
        rows, columns = np.nonzero(same & ~crowd[:, None] & (iou > 0.5))
        classes = self.counts.shape[1]
        self.counts[0] += np.bincount(truth_labels[rows], iou[rows, columns], classes)
        self.counts[1] += np.bincount(truth_labels[rows], minlength=classes)
        missed = ~crowd
        missed[rows] = False
        self.counts[3] += np.bincount(truth_labels[missed], minlength=classes)
        # A prediction lying mostly on void, or on the crowd region of its class, is no false alarm.
        excused = shared[0, 1:] + _on_crowd(shared, same, crowd)
        alarm = excused <= 0.5 * pred_areas
        alarm[columns] = False
        self.counts[2] += np.bincount(pred_labels[alarm], minlength=classes)

    def merge(self, other: PanopticScore) -> None:
        """Adds the counts of another part of the images."""
        self.counts += other.counts

    def result(self) -> ClassQualities:
        """Qualities of every class so far."""
        return ClassQualities(*self.counts.copy())


def _on_crowd(
    shared: NDArray[np.int64], same: NDArray[np.bool_], crowd: NDArray[np.bool_]
) -> NDArray[np.int64]:
    """(M,) pixels of each prediction on the crowd region of its class; of several, the last one,
    as panopticapi does."""
    mine = same & crowd[:, None]  # (N, M)
    if not mine.any():
        return np.zeros(same.shape[1], np.int64)
    last = len(crowd) - 1 - mine[::-1].argmax(0)  # (M,)
    return np.where(mine.any(0), shared[1 + last, 1 + np.arange(same.shape[1])], 0)
