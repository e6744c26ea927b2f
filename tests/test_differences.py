"""Counts image by image, and what resampling says of the differences of two models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from mini import mini_config

from concat_cli.core.checkpoint import load_weights
from concat_cli.core.data.dataset import PanopticDataset, read_dataset_info
from concat_cli.core.evaluate.intervals import (
    Interval,
    draws,
    group_means,
    mean_iou,
    mean_pq,
    paired_differences,
    resample,
)
from concat_cli.core.evaluate.run import evaluate_model
from concat_cli.core.evaluate.scores import Scoring
from concat_cli.core.infer.predictor import Predictor


def test_counts_of_images_add_up_to_the_report(mini_run):
    info = read_dataset_info(Path(mini_run.cfg.data.root))
    weights = load_weights(mini_run.run.weights_of("finetune"))
    key = "segmentor.classifier.no_object"
    weights = replace(weights, tensors=weights.tensors | {key: 0 * weights.tensors[key]})
    cfg = mini_config(info.root, "infer.min_score=0", "infer.min_mask=0", "infer.overlap=0")
    predictor = Predictor.load(weights, info.vocabulary, "cpu", overrides=cfg)
    dataset = PanopticDataset(info.part("val"), info.vocabulary, keep_crowd=True)
    report = evaluate_model(predictor, dataset, Scoring(tasks="panoptic", counts=True))
    assert report.counts is not None
    counts = report.counts.panoptic
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


def made_up(columns: int, images: int = 30, classes: int = 6, seed: int = 0) -> np.ndarray:
    """Plausible counts: hits (or IoU), and more of everything else; class 5 only in one image."""
    rng = np.random.default_rng(seed)
    there = rng.random((images, 1, classes)) < 0.5
    there[:, :, 5] = np.arange(images)[:, None] == 3
    counts = rng.integers(1, 9, (images, columns, classes)) * there
    counts[:, 1:] += counts[:, :1]
    return counts.astype(float)


@pytest.mark.parametrize(("columns", "mean"), [(4, mean_pq), (3, mean_iou)])
def test_paired_differences_against_a_loop(columns: int, mean) -> None:
    ours = [made_up(columns, seed=s) for s in (1, 2)]
    theirs = [made_up(columns, seed=s) for s in (3, 4)]
    splits = [((0, 1, 2), (3, 4)), ((2, 3, 4), (0, 1, 5))]
    found = paired_differences(ours, theirs, mean, splits, repeats=60)

    def groups(counts: np.ndarray, split) -> dict[str, float]:
        seen, unseen = (float(mean(counts, classes)) for classes in split)
        return {"seen": seen, "unseen": unseen, "harmonic": 2 * seen * unseen / (seen + unseen)}

    def weighted(counts: np.ndarray, weights: np.ndarray) -> np.ndarray:
        return sum(w * image for w, image in zip(weights, counts, strict=True))

    for name, interval in found.items():
        whole = [
            groups(a.sum(0), split)[name] - groups(b.sum(0), split)[name]
            for a, b, split in zip(ours, theirs, splits, strict=True)
        ]
        again = []
        for number, (a, b, split) in enumerate(zip(ours, theirs, splits, strict=True)):
            drawn = np.concatenate(list(draws(30, 60, number)))
            pairs = [(weighted(a, row), weighted(b, row)) for row in drawn]
            again.append([groups(x, split)[name] - groups(y, split)[name] for x, y in pairs])
        low, high = np.percentile(np.mean(again, 0), [2.5, 97.5])
        assert interval == Interval(
            pytest.approx(np.mean(whole)), pytest.approx(low), pytest.approx(high)
        )


def test_no_difference_to_oneself_and_none_without_a_class() -> None:
    counts = [made_up(3)]
    same = paired_differences(counts, counts, mean_iou, [((0, 1), (2, 3))], 50)
    assert set(same.values()) == {Interval(0.0, 0.0, 0.0)}
    lacking = paired_differences(counts, counts, mean_iou, [((0, 1), ())], 50)
    assert lacking["seen"] is not None and lacking["unseen"] is lacking["harmonic"] is None


def test_better_is_better_and_the_sign_is_ours_minus_theirs() -> None:
    better, worse = [made_up(4, seed=1)], [made_up(4, seed=1)]
    worse[0][:, :2] *= 0.5  # half of the hits, and of what they overlap
    split = [((0, 1), (2, 3))]
    gain = paired_differences(better, worse, mean_pq, split, 200)["harmonic"]
    loss = paired_differences(worse, better, mean_pq, split, 200)["harmonic"]
    assert gain is not None and loss is not None
    assert 0 < gain.low < gain.value < gain.high and loss.value == pytest.approx(-gain.value)


def test_means_of_groups() -> None:
    counts = np.zeros((4, 3))  # class 0: one hit, one miss; class 1: a false alarm; class 2: absent
    counts[:, 0], counts[:, 1] = (0.8, 1, 0, 1), (0, 0, 1, 0)
    found = group_means(counts, mean_pq, ([0, 2], [1]))
    assert found["seen"] == pytest.approx(0.8 / 1.5)
    assert found["unseen"] == found["harmonic"] == 0
    (again,) = resample(7, 0, np.stack([counts] * 5))
    assert again.shape == (7, 4, 3)
    np.testing.assert_allclose(again, np.broadcast_to(5 * counts, again.shape))
