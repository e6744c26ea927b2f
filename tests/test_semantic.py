"""Mean IoU against its definition."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from concat_cli.core.evaluate.quality import SemanticScore, class_map


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 3))
def test_equals_the_definition(seed, classes, images):
    rng = np.random.default_rng(seed)
    score, pairs = SemanticScore(classes), []
    for _ in range(images):
        truth, pred = rng.integers(-1, classes, (2, 5, 6))
        score.add(pred, truth)
        pairs.append((truth.ravel(), pred.ravel()))
    truth, pred = (np.concatenate(parts) for parts in zip(*pairs, strict=True))
    for c in range(classes):
        real, said = truth == c, (pred == c) & (truth >= 0)
        expected = (real & said).sum() / (real | said).sum() if real.any() else np.nan
        np.testing.assert_allclose(score.iou()[c], expected)


def test_absent_classes_are_counted_and_left_out_of_the_mean():
    score = SemanticScore(3)
    score.add(np.array([[0, 2, 0]]), np.array([[0, 0, -1]]))
    found = score.quality(range(3))
    assert found is not None and found.absent == 2  # class 2 is only predicted
    assert found.miou == pytest.approx(0.5)
    assert score.quality([1, 2]) is None


def test_parts_add_up_to_the_whole():
    rng = np.random.default_rng(0)
    whole, parts = SemanticScore(4), [SemanticScore(4), SemanticScore(4)]
    for i in range(4):
        pred, truth = rng.integers(-1, 4, (2, 3, 3))
        whole.add(pred, truth)
        parts[i % 2].add(pred, truth)
    assert (
        parts[0].matrix + parts[1].matrix == whole.matrix
    ).all() and whole.matrix.dtype == np.int64


def test_classes_of_a_segment_map():
    segment_map, labels = np.array([[0, 1], [2, 2]]), np.array([5, 3])
    assert class_map(segment_map, labels).tolist() == [[-1, 5], [3, 3]]


def drawn(seed: int, classes: int, void: bool = True) -> tuple[np.ndarray, np.ndarray]:
    """Predicted and true class maps of two images; prediction may be -1 where `void`."""
    rng = np.random.default_rng(seed)
    low = -1 if void else 0
    return rng.integers(low, classes, (2, 9, 11)), rng.integers(low, classes, (2, 9, 11))


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 6), st.integers(1, 63))
def test_all_figures_equal_a_confusion_matrix_filled_pixel_by_pixel(seed, classes, members):
    pred, truth = drawn(seed, classes)
    score = SemanticScore(classes)
    for one, real in zip(pred, truth, strict=True):
        score.add(one, real)
    matrix = np.zeros((classes, classes + 1))  # the last column: no prediction
    for p, t in zip(pred.ravel(), truth.ravel(), strict=True):
        if t >= 0:
            matrix[t, p] += 1
    group = [c for c in range(classes) if members >> c & 1]
    there = [c for c in group if matrix[c].sum() > 0]
    found = score.quality(group)
    if not there:
        assert found is None
        return
    iou = [matrix[c, c] / (matrix[c].sum() + matrix[:, c].sum() - matrix[c, c]) for c in there]
    true = [matrix[c].sum() for c in there]
    right = [matrix[c, c] for c in there]
    assert found.miou == pytest.approx(sum(iou) / len(there), abs=1e-12)
    weighted = sum(n * value for n, value in zip(true, iou, strict=True))
    assert found.fwiou == pytest.approx(weighted / sum(true), abs=1e-12)
    each = [r / n for r, n in zip(right, true, strict=True)]
    assert found.macc == pytest.approx(sum(each) / len(there), abs=1e-12)
    assert found.pacc == pytest.approx(sum(right) / sum(true), abs=1e-12)
    assert (found.n, found.absent) == (len(there), len(group) - len(there))


def test_figures_equal_those_of_torchmetrics():
    metrics = pytest.importorskip("torchmetrics.classification", reason="torchmetrics is missing")
    classes = 7
    pred, truth = drawn(3, classes, void=False)
    truth[0, :2] = -1  # void
    score = SemanticScore(classes)
    for one, real in zip(pred, truth, strict=True):
        score.add(one, real)
    found = score.quality(range(classes))
    for name, kind, average in (
        ("miou", metrics.MulticlassJaccardIndex, "macro"),
        ("fwiou", metrics.MulticlassJaccardIndex, "weighted"),
        ("macc", metrics.MulticlassAccuracy, "macro"),
        ("pacc", metrics.MulticlassAccuracy, "micro"),
    ):
        theirs = kind(num_classes=classes, average=average, ignore_index=-1)
        expected = float(theirs(torch.from_numpy(pred), torch.from_numpy(truth)))
        assert getattr(found, name) == pytest.approx(expected, abs=1e-6), name


def test_an_image_s_own_counts_add_up_to_the_matrix():
    pred, truth = drawn(5, 4)
    score = SemanticScore(4)
    own = sum(score.add(one, real) for one, real in zip(pred, truth, strict=True))
    assert (own[0] == np.diagonal(score.matrix)).all() and (own[1] == score.matrix.sum(1)).all()
    assert (own[2] == score.matrix[:, :4].sum(0)).all()
