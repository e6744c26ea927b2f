"""Mean IoU against its definition."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from concat_cli.core.evaluate.semantic import SemanticScore, class_map


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
    assert score.absent() == [1, 2]  # class 2 is only predicted
    assert score.mean(range(3)) == pytest.approx(0.5)
    assert score.mean([1, 2]) is None


def test_parts_add_up_to_the_whole():
    rng = np.random.default_rng(0)
    whole, parts = SemanticScore(4), [SemanticScore(4), SemanticScore(4)]
    for i in range(4):
        pred, truth = rng.integers(-1, 4, (2, 3, 3))
        whole.add(pred, truth)
        parts[i % 2].add(pred, truth)
    parts[0].merge(parts[1])
    assert (parts[0].matrix == whole.matrix).all() and whole.matrix.dtype == np.int64


def test_classes_of_a_segment_map():
    segment_map, labels = np.array([[0, 1], [2, 2]]), np.array([5, 3])
    assert class_map(segment_map, labels).tolist() == [[-1, 5], [3, 3]]
