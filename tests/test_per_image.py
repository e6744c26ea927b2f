"""Counts image by image, and what resampling says of differences."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mini import mini_config

from concat_cli.core.checkpoint import load_weights
from concat_cli.core.data.dataset import PanopticDataset, read_dataset_info
from concat_cli.core.evaluate.per_image import (
    harmonic_pq,
    mean_pq,
    paired_difference,
    per_image_counts,
    resample,
)
from concat_cli.core.evaluate.run import evaluate_model
from concat_cli.core.infer.predictor import Predictor


def test_counts_of_images_add_up_to_the_report(mini_run):
    info = read_dataset_info(Path(mini_run.cfg.data.root))
    weights = load_weights(mini_run.run.weights_of("finetune"))
    key = "segmentor.classifier.no_object"
    weights = replace(weights, tensors=weights.tensors | {key: 0 * weights.tensors[key]})
    infer = mini_config(info.root, "infer.min_score=0", "infer.min_mask=0", "infer.overlap=0").infer
    predictor = Predictor.load(weights, info.vocabulary, "cpu", infer=infer)
    dataset = PanopticDataset(info.part("val"), info.vocabulary, keep_crowd=True)
    counts = per_image_counts(predictor, dataset)
    report = evaluate_model(predictor, dataset, with_semantic=False)
    assert counts.shape == (12, 4, 48) and counts[:, 2].sum() > 0
    rows = {row.name: row for row in report.per_class}
    total = counts.sum(0)
    for index, name in enumerate(info.vocabulary.names):
        if name in rows:
            row = rows[name]
            assert (row.tp, row.fp, row.fn) == tuple(total[1:, index].astype(int))
    for group, members in (
        ("seen", info.vocabulary.seen_indices), ("unseen", info.vocabulary.unseen_indices)
    ):  # fmt: skip
        assert mean_pq(total, members) == pytest.approx(report.panoptic[group].pq)


def made_up(quality: float, images: int = 60, seed: int = 0) -> np.ndarray:
    """Counts (M, 4, 4) in which a share `quality` of the segments is found, at IoU 0.8."""
    rng = np.random.default_rng(seed)
    there = rng.random((images, 4)) < 0.5
    found = there & (rng.random((images, 4)) < quality)
    return np.stack([0.8 * found, found, 0 * found, there & ~found], 1).astype(float)


def test_paired_differences():
    seen, unseen = (0, 1), (2, 3)
    base = [made_up(0.5, seed=s) for s in (0, 1)]
    same = paired_difference(base, base, [(seen, unseen)] * 2, repeats=200)
    assert same.value == same.low == same.high == 0
    better = [made_up(0.9, seed=s) for s in (0, 1)]
    gain = paired_difference(better, base, [(seen, unseen)] * 2, repeats=200)
    assert 0 < gain.low < gain.value < gain.high
    loss = paired_difference(base, better, [(seen, unseen)] * 2, repeats=200)
    assert loss.value == pytest.approx(-gain.value)
    expected = [
        harmonic_pq(a.sum(0), seen, unseen) - harmonic_pq(b.sum(0), seen, unseen)
        for a, b in zip(better, base, strict=True)
    ]
    assert gain.value == pytest.approx(np.mean(expected))


def test_means_of_pq():
    counts = np.zeros((4, 3))  # class 0: one hit, one miss; class 1: a false alarm; class 2: absent
    counts[:, 0], counts[:, 1] = (0.8, 1, 0, 1), (0, 0, 1, 0)
    assert mean_pq(counts, [0]) == pytest.approx(0.8 / 1.5) and mean_pq(counts, [2]) == 0
    assert mean_pq(counts, [0, 1, 2]) == pytest.approx(0.8 / 1.5 / 2)
    assert harmonic_pq(counts, [0], [1]) == 0
    again = resample(np.stack([counts] * 5), 7, seed=0)
    assert again.shape == (7, 4, 3)
    np.testing.assert_allclose(again, np.broadcast_to(5 * counts, again.shape))
