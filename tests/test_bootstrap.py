"""Intervals from a matrix product, against a loop that sums the drawn images one by one."""

from __future__ import annotations

import numpy as np
import pytest

from concat_cli.core.evaluate.intervals import (
    ImageCounts,
    Interval,
    bootstrap,
    draws,
    mean_iou,
    mean_pq,
)
from concat_cli.core.vocabulary import ClassEntry, Vocabulary

CLASSES = 6
VOCABULARY = Vocabulary(tuple(ClassEntry(f"c{i}", i, seen=i < 4) for i in range(CLASSES)))


def made_up(images: int, seed: int = 0) -> ImageCounts:
    """Counts of images; class 3 never occurs, class 5 in one image only."""
    rng = np.random.default_rng(seed)
    there = rng.random((images, 1, CLASSES)) < 0.4
    there[:, :, 3], there[1:, :, 5], there[0, :, 5] = False, False, True
    panoptic = rng.integers(0, 3, (images, 4, CLASSES)) * there
    panoptic = panoptic.astype(float)
    panoptic[:, 0] = 0.7 * panoptic[:, 1]
    truth = rng.integers(1, 900, (images, 1, CLASSES)) * there
    semantic = np.concatenate([truth // 3, truth, truth // 2], 1).astype(float)
    return ImageCounts(images, panoptic, semantic)


def naive_pq(total: np.ndarray, classes) -> float:
    values = []
    for c in classes:
        iou, tp, fp, fn = total[:, c]
        if tp + fp + fn:
            values.append(iou / (tp + fp / 2 + fn / 2))
    return sum(values) / len(values) if values else float("nan")


def naive_iou(total: np.ndarray, classes) -> float:
    values = [
        total[0, c] / (total[1, c] + total[2, c] - total[0, c]) for c in classes if total[1, c]
    ]
    return sum(values) / len(values) if values else float("nan")


def test_intervals_equal_those_of_a_naive_loop_over_the_same_draws():
    images, repeats = 17, 150
    counts = made_up(images)
    found = bootstrap(counts, VOCABULARY, repeats, seed=4)
    weights = np.concatenate(list(draws(images, repeats, 4)))
    assert weights.shape == (repeats, images) and (weights.sum(1) == images).all()
    seen, unseen = VOCABULARY.seen_indices, VOCABULARY.unseen_indices
    for dense, naive, intervals in (
        (counts.panoptic, naive_pq, found.pq), (counts.semantic, naive_iou, found.miou)
    ):  # fmt: skip
        rows = []
        for row in weights:
            total = np.zeros(dense.shape[1:])
            for image, times in enumerate(row):
                for _ in range(int(times)):
                    total += dense[image]
            s, u = naive(total, seen), naive(total, unseen)
            rows.append((naive(total, range(CLASSES)), s, u, 2 * s * u / (s + u) if s + u else 0))
        for name, values in zip(
            ("all", "seen", "unseen", "harmonic"), np.array(rows).T, strict=True
        ):
            expected = np.nanpercentile(values, [2.5, 97.5])
            assert intervals[name] == pytest.approx(expected, abs=1e-12), name


def test_more_draws_than_are_held_at_once_continue_the_same_stream():
    one = np.random.Generator(np.random.PCG64(9)).multinomial(5, [0.2] * 5, size=300)
    assert (np.concatenate(list(draws(5, 300, 9))) == one).all()


def test_groups_that_never_occur_have_no_interval():
    counts = made_up(6)
    none = VOCABULARY.with_unseen({"c3"})
    found = bootstrap(counts, none, 20)
    assert found.pq["unseen"] is None and found.pq["harmonic"] is None
    assert found.pq["seen"] == found.pq["all"] is not None
    alone = bootstrap(ImageCounts(6, counts.panoptic, None), none, 20)
    assert alone.pq == found.pq and set(alone.miou.values()) == {None}


def test_identical_images_leave_no_doubt():
    panoptic = made_up(1).panoptic
    same = ImageCounts(8, panoptic.repeat(8, 0))
    low, high = bootstrap(same, VOCABULARY, 30).pq["all"]
    assert low == pytest.approx(high) == pytest.approx(naive_pq(panoptic[0], range(CLASSES)))


def test_means_leave_out_what_does_not_occur():
    counts = np.zeros((4, 3))
    counts[:, 0] = 0.8, 1, 0, 1
    assert mean_pq(counts, [0, 2]) == pytest.approx(0.8 / 1.5) and np.isnan(mean_pq(counts, [2]))
    pixels = np.array([[5, 0, 0], [10, 0, 4], [5, 7, 0]], float)  # class 1 is named, never true
    assert mean_iou(pixels, [0, 1]) == pytest.approx(0.5)
    assert mean_iou(pixels, [0, 1, 2]) == pytest.approx(0.25) and np.isnan(mean_iou(pixels, [1]))


def test_percent_has_no_negative_zero() -> None:
    assert Interval(0.48, 0.461, 0.502).percent() == "48.0 [46.1, 50.2]"
    assert Interval(-0.0001, -0.012, 0.0).percent("+") == "+0.0 [-1.2, 0.0]"
    assert Interval(0.0126, -0.0004, 0.0251).percent("+", "\n") == "+1.3\n[0.0, 2.5]"
