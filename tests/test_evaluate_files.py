"""Scoring existing COCO panoptic files: the right figures, and what is said of wrong files."""

from __future__ import annotations

import json
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
from data_helpers import PHOTOS
from jsonschema import Draft202012Validator

from concat_cli.core.data.image_io import read_id_png, write_id_png
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.files import PanopticFiles, evaluate_files
from concat_cli.core.evaluate.official import ask_official
from concat_cli.core.evaluate.report import load_schema
from concat_cli.core.evaluate.scores import Scoring
from concat_cli.core.progress import Silent

GOLDEN = Path(__file__).parent / "golden" / "pq"


@pytest.fixture
def golden(tmp_path):
    """A copy of the golden files that a test may spoil."""
    shutil.copytree(GOLDEN, tmp_path / "pq")
    return tmp_path / "pq"


def change(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def refused(folder: Path, match: str, **arguments) -> UserError:
    with pytest.raises(UserError, match=match) as caught:
        evaluate_files(folder / "pred.json", folder / "gt.json", **arguments)
    assert caught.value.hint
    return caught.value


def test_seen_and_unseen_by_name(golden):
    content = json.loads((golden / "gt.json").read_text())
    names = [c["name"] for c in content["categories"] if c["id"] in (1, 36)]
    found = evaluate_files(golden / "pred.json", golden / "gt.json", unseen=names).to_json()
    assert found["panoptic"]["unseen"]["n"] == 2 and found["panoptic"]["seen"]["n"] == 8
    pq = {r["id"]: r["pq"] for r in found["per_class"]}
    assert found["panoptic"]["unseen"]["pq"] == pytest.approx((pq[1] + pq[36]) / 2)
    Draft202012Validator(load_schema()).validate(json.loads(json.dumps(found)))


def test_a_truth_scored_against_itself_is_perfect(golden):
    plain = evaluate_files(golden / "gt.json", golden / "gt.json").to_json()
    assert plain["panoptic"]["all"]["pq"] == pytest.approx(1)
    assert plain["semantic"]["all"]["miou"] == pytest.approx(1)


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the sample photos are not here")
def test_real_photos_scored_against_themselves_are_perfect():
    truth = PHOTOS / "panoptic.json"
    groups = evaluate_files(truth, truth).to_json()["panoptic"]
    for name in ("all", "things", "stuff"):
        assert groups[name]["pq"] == groups[name]["rq"] == 1.0


def test_folders_may_be_named(golden):
    expected = evaluate_files(golden / "pred.json", golden / "gt.json").panoptic
    (golden / "pred").rename(golden / "elsewhere")
    refused(golden, "no folder")
    found = evaluate_files(
        PanopticFiles(golden / "pred.json", golden / "elsewhere"), golden / "gt.json"
    )
    assert found.panoptic == expected


def test_missing_files(golden):
    (golden / "pred" / "000000000003.png").unlink()
    refused(golden, "000000000003.png")
    (golden / "pred.json").unlink()
    refused(golden, "no file")


def test_not_json_and_not_panoptic(golden):
    (golden / "pred.json").write_text("{")
    refused(golden, "Invalid JSON")
    (golden / "pred.json").write_text("[]")
    refused(golden, "is no COCO panoptic JSON")
    (golden / "pred.json").write_text('{"annotations": [{"image_id": 0}]}')
    refused(golden, r"annotations\.0\.segments_info: Field required")


def test_unknown_category(golden):
    change(
        golden / "pred.json",
        lambda c: c["annotations"][0]["segments_info"][0].update(category_id=999),
    )
    refused(golden, "such as 999")


def test_no_category_matches(golden):
    def shift(content):
        for annotation in content["annotations"]:
            for segment in annotation["segments_info"]:
                segment["category_id"] += 1000

    change(golden / "pred.json", shift)
    assert "class indices" in refused(golden, "category ids .* are not among").hint


def test_known_categories_that_never_occur(golden):
    def unused(content):
        for annotation in content["annotations"]:
            for segment in annotation["segments_info"]:
                segment["category_id"] = 71  # known, but in no truth

    change(golden / "pred.json", unused)
    refused(golden, "PQ would be 0")
    change(golden / "pred.json", lambda c: c.update(categories=[{"id": 71, "name": "class 10"}]))
    names = {c["id"]: c["name"] for c in json.loads((golden / "gt.json").read_text())["categories"]}
    change(golden / "pred.json", lambda c: c["categories"][0].update(name=names[71]))
    report = evaluate_files(golden / "pred.json", golden / "gt.json")  # then it is meant so
    assert report.to_json()["panoptic"]["all"]["pq"] == 0


def test_categories_of_another_meaning(golden):
    change(golden / "pred.json", lambda c: c.update(categories=[{"id": 1, "name": "zebra"}]))
    refused(golden, "'zebra'")


def test_a_truth_without_segments(golden):
    def empty(content):
        for annotation in content["annotations"]:
            annotation["segments_info"] = []

    change(golden / "gt.json", empty)
    refused(golden, "None of the images .* has a segment")


def test_intervals_of_files(golden):
    plain = evaluate_files(
        golden / "pred.json", golden / "gt.json", Scoring(bootstraps=50)
    ).to_json()
    for task, key in (("panoptic", "pq"), ("semantic", "miou")):
        low, high = plain["intervals"][key]["all"]
        assert low < plain[task]["all"][key] < high and high - low < 0.5
    assert {plain["intervals"]["pq"][g] for g in ("seen", "unseen", "harmonic")} == {None}


def test_id_in_json_but_not_in_png(golden):
    change(
        golden / "pred.json",
        lambda c: c["annotations"][0]["segments_info"].append({"id": 77, "category_id": 1}),
    )
    refused(golden, "77 is not in the PNG")


def test_id_in_png_but_not_in_json(golden):
    path = golden / "pred" / "000000000000.png"
    ids = read_id_png(path)
    ids[0, 0] = 88
    write_id_png(path, ids)
    refused(golden, "88 is not in the JSON")


def test_repeated_id_and_id_zero(golden):
    segments = json.loads((golden / "pred.json").read_text())["annotations"][0]["segments_info"]
    change(golden / "pred.json", lambda c: c["annotations"][0]["segments_info"].append(segments[0]))
    refused(golden, "repeated")


def test_missing_predictions(golden):
    change(golden / "pred.json", lambda c: c["annotations"].pop())
    refused(golden, "no prediction for 1 of the 16 images")


class Lines(Silent):
    """Keeps what is said."""

    def __init__(self):
        self.lines = []

    def say(self, message):
        self.lines.append(message)


def test_predictions_without_truth_are_counted(golden):
    change(golden / "gt.json", lambda content: content["annotations"].pop())
    lines = Lines()
    report = evaluate_files(golden / "pred.json", golden / "gt.json", progress=lines)
    assert report.protocol["not_scored"] == 1 and report.images == 15
    assert "1 of 16 predictions have no truth and were not scored" in lines.lines[-1]


def test_classes_are_divided_only_where_it_is_known_how(golden):
    report = evaluate_files(golden / "pred.json", golden / "gt.json").to_json()
    assert not list(Draft202012Validator(load_schema()).iter_errors(json.loads(json.dumps(report))))
    assert {row["seen"] for row in report["per_class"]} == {None}
    for groups in (report["panoptic"], report["semantic"]):
        assert [groups[name] for name in ("seen", "unseen", "harmonic")] == [None] * 3
    whole = evaluate_files(golden / "pred.json", golden / "gt.json", unseen=()).to_json()
    assert whole["panoptic"]["seen"] == whole["panoptic"]["all"] == report["panoptic"]["all"]
    refused(golden, "which classes are seen", scoring=Scoring(split="seen"))


def test_png_of_another_size(golden):
    write_id_png(golden / "pred" / "000000000000.png", np.ones((9, 9), np.int64))
    refused(golden, "9 x 9")


def test_unknown_unseen_class(golden):
    refused(golden, "'dragon'", unseen=["dragon"])


def test_images_without_segments_are_valid(golden):
    def empty(content):
        content["annotations"][0]["segments_info"] = []

    change(golden / "pred.json", empty)
    path = golden / "pred" / "000000000000.png"
    write_id_png(path, np.zeros_like(read_id_png(path)))
    assert evaluate_files(golden / "pred.json", golden / "gt.json").images == 16


def test_official_says_how_to_install(golden, monkeypatch):
    monkeypatch.setitem(sys.modules, "panopticapi", None)
    with pytest.raises(UserError) as caught:
        evaluate_files(golden / "pred.json", golden / "gt.json", Scoring(official=True))
    assert "panopticapi-lite" in caught.value.hint


def official_stand_in(monkeypatch, scores: dict) -> None:
    package = types.ModuleType("panopticapi")
    module = types.ModuleType("panopticapi.evaluation")
    module.pq_compute = lambda truth, pred, gt_folder, pred_folder: scores
    monkeypatch.setitem(sys.modules, "panopticapi", package)
    monkeypatch.setitem(sys.modules, "panopticapi.evaluation", module)


def test_official_figures_are_compared(golden, monkeypatch):
    expected = json.loads((GOLDEN / "expected.json").read_text())
    expected["per_class"] = {int(k): v for k, v in expected["per_class"].items()}
    official_stand_in(monkeypatch, expected)
    report = evaluate_files(golden / "pred.json", golden / "gt.json")
    files = [PanopticFiles(golden / name) for name in ("pred.json", "gt.json")]
    said = ask_official(report, *files)
    assert float(said.split()[-1]) < 1e-9 and f"PQ {100 * expected['All']['pq']:.4f}" in said
    expected["Things"]["sq"] += 1e-6
    with pytest.raises(UserError, match="things sq"):
        ask_official(report, *files)
