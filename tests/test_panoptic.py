"""Panoptic quality against the official figures and against a plain loop over segments."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from concat_cli.core.evaluate.files import evaluate_files
from concat_cli.core.evaluate.quality import PanopticScore, overlaps

GOLDEN = Path(__file__).parent / "golden" / "pq"
CLASSES = 4


def naive_counts(pred_map, pred_labels, truth_map, truth_labels, truth_crowd):
    """(4, K) summed IoU, TP, FP, FN, written down as the definition says, segment by segment."""
    counts = np.zeros((4, CLASSES))
    matched_truths, matched_preds = set(), set()
    for t, truth_label in enumerate(truth_labels):
        for p, pred_label in enumerate(pred_labels):
            if truth_label != pred_label or truth_crowd[t]:
                continue
            truth, pred = truth_map == t + 1, pred_map == p + 1
            both = (truth & pred).sum()
            either = (truth | (pred & (truth_map != 0))).sum()
            if both / either > 0.5:
                counts[0, truth_label] += both / either
                counts[1, truth_label] += 1
                matched_truths.add(t)
                matched_preds.add(p)
    for t, label in enumerate(truth_labels):
        if t not in matched_truths and not truth_crowd[t]:
            counts[3, label] += 1
    for p, label in enumerate(pred_labels):
        pred = pred_map == p + 1
        excuse = truth_map == 0
        crowds = [t for t, c in enumerate(truth_labels) if c == label and truth_crowd[t]]
        if crowds:
            excuse = excuse | (truth_map == crowds[-1] + 1)
        if p not in matched_preds and not (pred & excuse).sum() / pred.sum() > 0.5:
            counts[2, label] += 1
    return counts


def random_segments(rng, shape, segments, blocky):
    """A map of up to `segments` segments (those that got a pixel) and void, with labels."""
    raw = rng.integers(0, segments + 1, shape)
    if blocky:
        raw = np.kron(raw[: (shape[0] + 3) // 4, : (shape[1] + 3) // 4], np.ones((4, 4), int))
        raw = raw[: shape[0], : shape[1]]
    present = np.unique(raw[raw > 0])
    lut = np.zeros(segments + 1, np.int32)
    lut[present] = np.arange(1, len(present) + 1)
    return lut[raw], rng.integers(0, CLASSES, len(present))


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(1, 12), st.integers(0, 4), st.booleans())
def test_equals_a_loop_over_segments(seed, side, segments, noisy):
    rng = np.random.default_rng(seed)
    score, expected = PanopticScore(CLASSES), np.zeros((4, CLASSES))
    for _ in range(3):
        truth_map, truth_labels = random_segments(rng, (side, side + 2), segments, True)
        if noisy:  # near the truth, so that matches around IoU 0.5 happen
            pred_map, pred_labels = truth_map.copy(), truth_labels.copy()
            flips = rng.random(pred_map.shape) < 0.3
            pred_map[flips] = 0
        else:
            pred_map, pred_labels = random_segments(rng, truth_map.shape, segments, False)
        kept = np.isin(np.arange(1, len(pred_labels) + 1), pred_map)
        pred_map = np.concatenate([[0], np.cumsum(kept) * kept])[pred_map]
        pred_labels = pred_labels[kept]
        crowd = rng.random(len(truth_labels)) < 0.3
        score.add(pred_map, pred_labels, truth_map, truth_labels, crowd)
        expected += naive_counts(pred_map, pred_labels, truth_map, truth_labels, crowd)
    np.testing.assert_allclose(score.counts, expected, atol=1e-12)


def test_golden_files_give_the_official_figures():
    expected = json.loads((GOLDEN / "expected.json").read_text())
    report = evaluate_files(GOLDEN / "pred.json", GOLDEN / "gt.json").to_json()
    for ours, official in (("all", "All"), ("things", "Things"), ("stuff", "Stuff")):
        for key, value in expected[official].items():
            assert report["panoptic"][ours][key] == pytest.approx(value, abs=1e-9), (ours, key)
    rows = {str(row["id"]): row for row in report["per_class"]}
    assert rows.keys() == expected["per_class"].keys()
    for category, values in expected["per_class"].items():
        for key, value in values.items():
            ours = rows[category][key]
            if ours is None:  # of a class that neither has: panopticapi says 0, we say null
                assert value == 0 and not any(rows[category][n] for n in ("tp", "fp", "fn"))
            else:
                assert ours == pytest.approx(value, abs=1e-9), (category, key)


def test_perfect_prediction_scores_one_and_absent_classes_are_left_out():
    truth_map = np.array([[1, 1, 2], [0, 2, 2]])
    labels = np.array([2, 0])
    score = PanopticScore(CLASSES)
    score.add(truth_map, labels, truth_map, labels)
    result = score.result()
    occurs = result.tp + result.fp + result.fn > 0
    assert occurs.tolist() == [True, False, True, False]
    mean = result.mean(range(CLASSES))
    assert mean is not None and (mean.pq, mean.sq, mean.rq, mean.n) == (1.0, 1.0, 1.0, 2)
    assert result.mean([1, 3]) is None


def test_half_an_overlap_is_no_match():
    truth_map, pred_map = np.array([[1, 1, 0, 0]]), np.array([[1, 0, 0, 0]])
    score = PanopticScore(1)
    score.add(pred_map, np.array([0]), truth_map, np.array([0]))
    assert score.counts[:, 0].tolist() == [0, 0, 1, 1]


def test_void_is_taken_out_of_the_union_and_excuses_false_alarms():
    truth_map = np.array([[1, 1, 0, 0, 0, 0]])
    pred_map = np.array([[1, 1, 1, 1, 2, 2]])
    score = PanopticScore(1)
    score.add(pred_map, np.array([0, 0]), truth_map, np.array([0]))
    assert score.counts[:, 0].tolist() == [1, 1, 0, 0]


def test_parts_add_up_to_the_whole():
    rng = np.random.default_rng(3)
    whole, first, second = PanopticScore(CLASSES), PanopticScore(CLASSES), PanopticScore(CLASSES)
    for i in range(6):
        truth = random_segments(rng, (8, 8), 3, True)
        pred = random_segments(rng, (8, 8), 3, True)
        for score in (whole, first if i % 2 else second):
            score.add(*pred, *truth)
    np.testing.assert_allclose(first.counts + second.counts, whole.counts, atol=1e-12)


def test_a_map_with_more_segments_than_told_is_refused():
    with pytest.raises(ValueError, match="reshape"):
        overlaps(np.array([[3]]), np.array([[0]]), 1, 1)
