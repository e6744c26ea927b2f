"""The figures of maps, streaming: every image adds to counts, and those of several processes add
up.

PQ: Kirillov et al., "Panoptic Segmentation" (CVPR 2019), with the rules for void and crowd of the
official panopticapi (`pq_compute_single_core`). IoU: from a confusion matrix of pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from concat_cli.core.vocabulary import Vocabulary

if TYPE_CHECKING:  # the scoring of files starts without torch
    from torch import Tensor

    from concat_cli.core.infer.postprocess import Size

IntArray = NDArray[np.integer]
BoolArray = NDArray[np.bool_]
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
    """Per class (K,): matches, false alarms, misses; PQ, SQ and RQ, 0 where there is nothing."""

    tp: FloatArray
    fp: FloatArray
    fn: FloatArray
    pq: FloatArray
    sq: FloatArray
    rq: FloatArray

    def mean(self, classes: Sequence[int]) -> Quality | None:
        """Plain mean over those of the classes that occur (TP + FP + FN > 0); None if none does."""
        chosen = [c for c in classes if self.tp[c] + self.fp[c] + self.fn[c] > 0]
        if not chosen:
            return None
        means = (float(values[chosen].mean()) for values in (self.pq, self.sq, self.rq))
        return Quality(*means, n=len(chosen))


class PanopticScore:
    """Adds up IoU, TP, FP, FN of K classes; `counts` (4, K) float64 is the whole state."""

    def __init__(self, classes: int) -> None:
        self.counts: FloatArray = np.zeros((4, classes))

    def add(
        self,
        pred_map: IntArray,
        pred_labels: IntArray,
        truth_map: IntArray,
        truth_labels: IntArray,
        truth_crowd: BoolArray | None = None,
        truth_areas: FloatArray | None = None,
    ) -> FloatArray:
        """One image. Maps (H, W): 0 = void, i+1 = segment i; labels: class index per segment.

        truth_areas: in pixels, other than the map's, for a union as panopticapi takes it; a true
        segment of label -1 that is a crowd stands for pixels of no segment that are not void.
        Returns the image's own counts (4, K).
        """
        shared = overlaps(truth_map, pred_map, len(truth_labels), len(pred_labels))
        return self.add_shared(shared, pred_labels, truth_labels, truth_crowd, truth_areas)

    def add_shared(
        self,
        shared: NDArray[np.int64],
        pred_labels: IntArray,
        truth_labels: IntArray,
        truth_crowd: BoolArray | None = None,
        truth_areas: FloatArray | None = None,
    ) -> FloatArray:
        """`add` of an image by its `overlaps`."""
        crowd = np.zeros(len(truth_labels), bool) if truth_crowd is None else truth_crowd
        found = matching(shared, pred_labels, truth_labels, crowd, truth_areas)
        rows, classes = found.pairs[0], self.counts.shape[1]
        own = np.zeros_like(self.counts)
        own[0] = np.bincount(truth_labels[rows], found.iou[found.pairs], classes)
        own[1] = np.bincount(truth_labels[rows], minlength=classes)
        own[2] = np.bincount(pred_labels[found.alarms], minlength=classes)
        own[3] = np.bincount(truth_labels[found.missed], minlength=classes)
        self.counts += own
        return own

    def result(self) -> ClassQualities:
        """Qualities of every class so far."""
        iou, tp, fp, fn = (self.counts[row].copy() for row in range(4))
        whole = tp + 0.5 * fp + 0.5 * fn
        whole: FloatArray = np.where(whole > 0, whole, 1.0)
        return ClassQualities(tp, fp, fn, iou / whole, iou / np.maximum(tp, 1.0), tp / whole)


@dataclass(frozen=True)
class Matching:
    """What PQ makes of an image's N true and M predicted segments.

    iou (N, M), also of unlike classes and of crowds. pairs: rows and columns of the true positives.
    alarms (M,): the false positives; missed (N,): the false negatives.
    """

    iou: FloatArray
    pairs: tuple[NDArray[np.intp], NDArray[np.intp]]
    alarms: BoolArray
    missed: BoolArray


def matching(
    shared: NDArray[np.int64],
    pred_labels: IntArray,
    truth_labels: IntArray,
    crowd: BoolArray,
    truth_areas: FloatArray | None = None,
) -> Matching:
    """Matches an image's segments by its `overlaps`; arguments as of `PanopticScore.add`."""
    pred_areas = shared[:, 1:].sum(0)
    areas = shared[1:].sum(1) if truth_areas is None else truth_areas
    same = truth_labels[:, None] == pred_labels[None, :]  # (N, M)
    union = areas[:, None] + pred_areas[None, :] - shared[1:, 1:] - shared[:1, 1:]
    iou = np.where(union > 0, shared[1:, 1:] / np.where(union > 0, union, 1), 0.0)
    rows, columns = np.nonzero(same & ~crowd[:, None] & (iou > 0.5))
    missed = ~crowd
    missed[rows] = False
    # A prediction lying mostly on void, or on the crowd region of its class, is no false alarm.
    alarms = shared[0, 1:] + _on_crowd(shared, same, crowd) <= 0.5 * pred_areas
    alarms[columns] = False
    return Matching(iou, (rows, columns), alarms, missed)


def _on_crowd(shared: NDArray[np.int64], same: BoolArray, crowd: BoolArray) -> NDArray[np.int64]:
    """(M,) pixels of each prediction on the crowd region of its class; of several, the last one,
    as panopticapi does."""
    mine = same & crowd[:, None]  # (N, M)
    if not mine.any():
        return np.zeros_like(shared[0, 1:])
    last: NDArray[np.int64] = len(crowd) - 1 - mine[::-1].argmax(0)  # (M,)
    found: NDArray[np.int64] = shared[1 + last, 1 + np.arange(same.shape[1])]
    found[~mine.any(0)] = 0
    return found


def class_map(segment_map: IntArray, labels: IntArray) -> NDArray[np.int64]:
    """(H, W) class indices, -1 = void, from a map of segments (0 = void, i+1 = segment i)."""
    named: NDArray[np.int64] = np.concatenate([[-1], labels]).astype(np.int64)[segment_map]
    return named


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

    def add_shared(
        self, shared: NDArray[np.int64], pred_labels: IntArray, truth_labels: IntArray
    ) -> NDArray[np.int64]:
        """`add` of an image by the `overlaps` of its segments; labels -1 as in class maps."""
        real = truth_labels >= 0
        named = np.concatenate([[-1], pred_labels])  # -1 is the last column
        matrix = np.zeros_like(self.matrix)
        np.add.at(matrix, (truth_labels[real][:, None], named[None]), shared[1:][real])
        self.matrix += matrix
        return _by_class(matrix)

    def iou(self) -> FloatArray:
        """(K,) intersection over union; nan where the truth never holds the class."""
        hits, truth, named = _by_class(self.matrix).astype(np.float64)
        return np.where(truth > 0, hits / np.maximum(truth + named - hits, 1), np.nan)

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


def _by_class(matrix: NDArray[np.int64]) -> NDArray[np.int64]:
    """(3, K): right pixels, true pixels, pixels named so (void left out)."""
    return np.stack([np.diagonal(matrix), matrix.sum(1), matrix[:, :-1].sum(0)])


def mask_ious(
    mask_logits: Tensor, segment_map: IntArray, segments: int, valid: Size
) -> NDArray[np.float32]:
    """(N, Q) IoU of truth segments and query masks (probability >= 0.5), void left out.

    mask_logits (Q, h, w) at stride 4 of the padded input; segment_map (H, W): 0 = void, i+1 =
    segment i of N.
    """
    import torch
    from torch.nn import functional as F

    from concat_cli.core.infer.postprocess import resized_strips

    truth_map = torch.as_tensor(np.ascontiguousarray(segment_map)).to(mask_logits.device)
    shared = torch.zeros(len(mask_logits), segments + 1, device=mask_logits.device)
    top, size = 0, (truth_map.shape[0], truth_map.shape[1])
    width = len(mask_logits) + segments + 1
    for strip in resized_strips(mask_logits[None], size, valid, width):
        rows = strip.shape[2]
        truth = F.one_hot(truth_map[top : top + rows].long().flatten(), segments + 1).float()
        shared += (strip[0].flatten(1) >= 0).float() @ truth  # (Q, P) @ (P, N+1)
        top += rows
    areas = torch.bincount(truth_map.flatten().long(), minlength=segments + 1)[1:]  # (N,)
    inner = shared[:, 1:]  # (Q, N)
    union = inner.sum(1, keepdim=True) + areas - inner
    return (inner / union.clamp(min=1)).T.cpu().numpy()


class MaskScore:
    """What limits a score: masks that miss their segment, or classes of masks that fit. Measured on
    the queries before panoptic merging, so that thresholds play no part.

    Counts truth segments per class; `counts` (3, K) is the whole state: all, those that some
    query's mask fits (IoU > 0.5), those whose best-fitting query also has the right class.
    """

    def __init__(self, classes: int) -> None:
        self.counts: FloatArray = np.zeros((3, classes))

    def add(
        self, ious: NDArray[np.floating], named: IntArray, labels: IntArray, crowd: BoolArray
    ) -> None:
        """One image: IoUs (N, Q), class index each query would name (Q,) where no_object does not
        compete, labels (N,), crowd (N,)."""
        if not len(labels):
            return
        query = ious.argmax(1)
        fits = (ious.max(1) > 0.5) & ~crowd
        classes = self.counts.shape[1]
        for row, chosen in enumerate((~crowd, fits, fits & (named[query] == labels))):
            self.counts[row] += np.bincount(labels[chosen], minlength=classes)

    def result(self, vocabulary: Vocabulary) -> dict[str, float | None]:
        """Recall of masks and accuracy of the fitting ones, for all, seen and unseen classes."""
        found: dict[str, float | None] = {}
        for name, classes in groups(vocabulary).items():
            suffix = "" if name == "all" else f"_{name}"
            segments, fits, right = (float(row[list(classes)].sum()) for row in self.counts)
            found[f"mask_recall{suffix}"] = fits / segments if segments else None
            found[f"matched_accuracy{suffix}"] = right / fits if fits else None
        return found


def groups(vocabulary: Vocabulary) -> dict[str, Sequence[int]]:
    """Class indices of the groups that every task has: all, seen, unseen."""
    return {
        "all": range(len(vocabulary)),
        "seen": vocabulary.seen_indices,
        "unseen": vocabulary.unseen_indices,
    }
