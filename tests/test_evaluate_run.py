"""Scoring a predictor on a data set; a stand-in segmentor reads the truth off the image."""

from __future__ import annotations

import json
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from data_helpers import CATEGORIES, VOCABULARY, simple_part, write_part
from jsonschema import Draft202012Validator
from oracle import CFG, SCENES, Oracle, predictor, told_world

from concat_cli.core.data.dataset import PanopticDataset
from concat_cli.core.device import Share
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.files import evaluate_files
from concat_cli.core.evaluate.quality import mask_ious
from concat_cli.core.evaluate.report import load_schema
from concat_cli.core.evaluate.run import evaluate_model
from concat_cli.core.evaluate.scores import Scoring
from concat_cli.core.infer.predictor import Predictor


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return told_world(tmp_path_factory.mktemp("world"))


def test_a_perfect_predictor(dataset):
    report = evaluate_model(predictor(dataset), dataset, Scoring(diagnostics=True))
    for name, n in (("all", 4), ("seen", 2), ("unseen", 2), ("things", 2), ("stuff", 2)):
        group = report.panoptic[name]
        assert group is not None and group.rq == 1 and group.sq > 0.93 and group.n == n
    assert report.semantic["all"].miou > 0.8  # it names void pixels too, which do not count
    assert report.diagnostics == {
        f"{figure}{group}": 1.0
        for figure in ("mask_recall", "matched_accuracy")
        for group in ("", "_seen", "_unseen")
    }
    assert report.images == 5 and report.protocol["setting"] == "generalised"
    assert report.seconds.keys() == {"load", "model", "post", "total"}
    Draft202012Validator(load_schema()).validate(json.loads(json.dumps(report.to_json())))


def test_wrong_classes_of_right_masks(dataset):
    report = evaluate_model(predictor(dataset, swap={7: 3}), dataset, Scoring(diagnostics=True))
    rows = {row.name: row for row in report.per_class}
    assert (rows["cow"].tp, rows["cow"].fn) == (0, 2) and rows["cat"].fp == 2
    assert report.diagnostics["mask_recall_unseen"] == 1
    assert report.diagnostics["matched_accuracy_unseen"] == pytest.approx(0.5)
    assert report.diagnostics["matched_accuracy_seen"] == 1


def test_candidates_may_be_some_of_the_classes(dataset):
    """As on dev during training: the others are found by nobody."""
    seen = dataset.vocabulary.seen_only()

    class SeenOracle(Oracle):
        def forward(self, images, padding, text, last_only):
            found = super().forward(images, padding, torch.eye(4), last_only)
            keep = [*dataset.vocabulary.seen_indices, 4]
            return SimpleNamespace(
                class_logits=found.class_logits[..., keep], mask_logits=found.mask_logits
            )

    candidate = Predictor(SeenOracle(SCENES), torch.eye(len(seen)), seen, CFG)
    report = evaluate_model(candidate, dataset)
    assert report.panoptic["seen"].rq == 1 and report.panoptic["unseen"].pq == 0
    assert report.protocol["candidates"] == 2


def test_without_semantic_and_with_a_limit(dataset):
    report = evaluate_model(predictor(dataset), dataset, Scoring(tasks="panoptic", limit=2))
    assert report.images == 2 and set(report.semantic.values()) == {None}
    assert "semantic_from" not in report.protocol and not report.diagnostics


def test_threads_that_decode_ahead_change_nothing(dataset):
    alone = evaluate_model(predictor(dataset), dataset)
    ahead = evaluate_model(predictor(dataset), dataset, workers=2)
    assert ahead.panoptic == alone.panoptic and ahead.semantic == alone.semantic


def test_processes_share_the_images(dataset, tmp_path):
    """Two threads stand in for two processes; a barrier stands in for their gather."""
    parts, reports, barrier = [None, None], [None, None], threading.Barrier(2)

    def work(rank: int) -> None:
        def gather(value):
            parts[rank] = value
            barrier.wait()
            return list(parts)

        reports[rank] = evaluate_model(
            predictor(dataset),
            dataset,
            Scoring(diagnostics=True, save=tmp_path / "two"),
            share=Share(rank, 2, gather),
        )

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    expected = evaluate_model(
        predictor(dataset), dataset, Scoring(diagnostics=True, save=tmp_path / "one")
    )
    for report in reports:
        assert report.per_class == expected.per_class and report.images == 5
        assert report.diagnostics == expected.diagnostics
    written = [json.loads((tmp_path / n / "panoptic.json").read_text()) for n in ("one", "two")]
    assert written[0] == written[1]


def test_saved_predictions_score_the_same(dataset, tmp_path):
    report = evaluate_model(predictor(dataset, swap={7: 3}), dataset, Scoring(save=tmp_path))
    again = evaluate_files(tmp_path / "panoptic.json", dataset.part.index, unseen=["cow", "wall"])
    assert again.panoptic == report.panoptic
    content = json.loads((tmp_path / "panoptic.json").read_text())
    assert content["categories"] == CATEGORIES and len(content["annotations"]) == 5


def test_mask_ious_leave_void_out():
    mask_logits = torch.full((1, 2, 2), -9.0)
    mask_logits[0, :, 0] = 9.0
    segment_map = np.zeros((8, 8), np.int32)
    segment_map[:4, :4] = 1
    assert mask_ious(mask_logits, segment_map, 1, (8, 8)).tolist() == [[1.0]]


def test_a_bad_image_is_named(dataset, tmp_path):
    part = write_part(simple_part(tmp_path), {1: [3], 2: [20]})
    (part.images / "000000000002.png").write_bytes(b"no image")
    broken = PanopticDataset(part, VOCABULARY)
    for workers in (0, 2):
        with pytest.raises(UserError, match="000000000002"):
            evaluate_model(predictor(broken), broken, workers=workers)
