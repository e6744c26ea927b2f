"""Panoptic counts of single images, and what resampling images says of means and differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from concat_cli.core.data.dataset import PanopticDataset
from concat_cli.core.evaluate.panoptic import PanopticScore
from concat_cli.core.infer.predictor import Predictor

FloatArray = NDArray[np.float64]


def per_image_counts(predictor: Predictor, dataset: PanopticDataset) -> FloatArray:
    """Summed IoU, TP, FP, FN of each image and class: (M, 4, K)."""
    rows = []
    size = predictor.cfg.batch
    for start in range(0, len(dataset), size):
        samples = [dataset[i] for i in range(start, min(start + size, len(dataset)))]
        found = predictor.predict_batch([sample.image for sample in samples])
        for sample, one in zip(samples, found, strict=True):
            score = PanopticScore(len(predictor.vocabulary))
            labels = np.array([s.class_index for s in one.segments], np.int64)
            score.add(one.panoptic_map, labels, sample.segment_map, sample.labels, sample.crowd)
            rows.append(score.counts)
    return np.stack(rows)


def mean_pq(counts: FloatArray, classes: Sequence[int]) -> FloatArray:
    """PQ averaged over those of the classes that occur; counts (..., 4, K) -> (...)."""
    iou, tp, fp, fn = np.moveaxis(counts[..., list(classes)], -2, 0)
    total = tp + 0.5 * fp + 0.5 * fn
    occurs = total > 0
    pq = iou / np.where(occurs, total, 1.0)
    return pq.sum(-1) / np.maximum(occurs.sum(-1), 1)


def harmonic_pq(counts: FloatArray, seen: Sequence[int], unseen: Sequence[int]) -> FloatArray:
    """The harmonic mean of seen and unseen PQ."""
    a, b = mean_pq(counts, seen), mean_pq(counts, unseen)
    return 2 * a * b / np.maximum(a + b, 1e-12)


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% bootstrap interval."""

    value: float
    low: float
    high: float


def resample(counts: FloatArray, repeats: int, seed: int) -> FloatArray:
    """Counts of `repeats` sets of M images drawn with replacement: (M, 4, K) -> (repeats, 4, K)."""
    images = len(counts)
    rng = np.random.Generator(np.random.PCG64(seed))
    weights = rng.multinomial(images, np.full(images, 1 / images), size=repeats)  # (R, M)
    return np.einsum("rm,mck->rck", weights.astype(np.float64), counts, optimize=True)


def paired_difference(
    ours: Sequence[FloatArray],
    theirs: Sequence[FloatArray],
    splits: Sequence[tuple[Sequence[int], Sequence[int]]],
    repeats: int = 1000,
) -> Interval:
    """Mean over splits of hPQ(ours) - hPQ(theirs); the same images are drawn for both.

    ours, theirs: counts (M, 4, K) of each split; splits: (seen, unseen) class indices of each.
    """
    values, draws = [], []
    for number, (a, b, (seen, unseen)) in enumerate(zip(ours, theirs, splits, strict=True)):
        values.append(harmonic_pq(a.sum(0), seen, unseen) - harmonic_pq(b.sum(0), seen, unseen))
        again = [harmonic_pq(resample(x, repeats, number), seen, unseen) for x in (a, b)]
        draws.append(again[0] - again[1])
    low, high = np.percentile(np.mean(draws, 0), [2.5, 97.5])
    return Interval(float(np.mean(values)), float(low), float(high))
