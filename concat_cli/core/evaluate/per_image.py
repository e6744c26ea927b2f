"""Panoptic counts of single images, and what resampling images says of means and differences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from concat_cli.core.data.dataset import PanopticDataset
from concat_cli.core.evaluate import bootstrap
from concat_cli.core.evaluate.counts import FloatArray
from concat_cli.core.evaluate.run import evaluate_model
from concat_cli.core.infer.predictor import Predictor


def per_image_counts(predictor: Predictor, dataset: PanopticDataset) -> FloatArray:
    """Summed IoU, TP, FP, FN of each image and class of the data set: (M, 4, K)."""
    report = evaluate_model(predictor, dataset, with_semantic=False, with_counts=True)
    assert report.counts is not None
    return report.counts.dense_panoptic()


def mean_pq(counts: FloatArray, classes: Sequence[int]) -> FloatArray:
    """PQ averaged over those of the classes that occur, 0 if none does; (..., 4, K) -> (...)."""
    return np.nan_to_num(bootstrap.mean_pq(counts, classes))


def harmonic_pq(counts: FloatArray, seen: Sequence[int], unseen: Sequence[int]) -> FloatArray:
    """The harmonic mean of seen and unseen PQ."""
    return bootstrap.harmonic_means(mean_pq(counts, seen), mean_pq(counts, unseen))


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95% bootstrap interval."""

    value: float
    low: float
    high: float


def resample(counts: FloatArray, repeats: int, seed: int) -> FloatArray:
    """Counts of `repeats` sets of M images drawn with replacement: (M, 4, K) -> (repeats, 4, K)."""
    flat = counts.reshape(len(counts), -1)
    blocks = [weights @ flat for weights in bootstrap.draws(len(counts), repeats, seed)]
    return np.concatenate(blocks).reshape(repeats, *counts.shape[1:])


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
