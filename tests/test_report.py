"""The report's groups, and its JSON against the schema that ships with the package."""

from __future__ import annotations

import json

import numpy as np
import pytest
from jsonschema import Draft202012Validator, ValidationError

from concat_cli.core.evaluate.intervals import harmonic
from concat_cli.core.evaluate.quality import class_map
from concat_cli.core.evaluate.report import Report, load_schema, make_report
from concat_cli.core.evaluate.scores import Scoring, Split, Tally
from concat_cli.core.vocabulary import ClassEntry, Vocabulary

VOCABULARY = Vocabulary(
    (
        ClassEntry("cat", 3),
        ClassEntry("cow", 7, seen=False),
        ClassEntry("sky", 20, kind="stuff"),
        ClassEntry("wall", 21, kind="stuff", seen=False),  # in no image
    )
)
PROTOCOL = {"setting": "generalised", "mode": "transductive", "semantic_from": "panoptic"}


def report_of(vocabulary: Vocabulary = VOCABULARY, split: Split = "all") -> Report:
    """A perfect sky, a cat of IoU 0.75, and a missed cow."""
    truth = np.array([[1, 1, 1, 1, 2, 2, 3, 3]])
    pred = np.array([[1, 1, 1, 0, 2, 2, 0, 0]])
    labels = np.array([0, 2, 1])
    tasks = ("panoptic", "semantic")
    tally = Tally(len(vocabulary), 1, tasks)
    tally.panoptic.add(pred, labels[:2], truth, labels)
    tally.semantic.add(class_map(pred, labels[:2]), class_map(truth, labels))
    scoring, seconds = Scoring(split=split), {"total": 0.25}
    return make_report(tally, vocabulary, scoring, tasks, protocol=PROTOCOL, seconds=seconds)


def validate(plain: dict) -> None:
    Draft202012Validator(load_schema()).validate(json.loads(json.dumps(plain)))


def test_the_schema_itself_is_valid():
    Draft202012Validator.check_schema(load_schema())


@pytest.mark.parametrize("split", ["all", "seen", "unseen"])
def test_json_follows_the_schema(split):
    validate(report_of(split=split).to_json())


def test_the_schema_refuses_other_shapes():
    plain = report_of().to_json()
    for spoil in (
        lambda p: p.pop("semantic"),
        lambda p: p["panoptic"]["all"].update(pq=75.0),
        lambda p: p["per_class"][0].update(extra=1),
        lambda p: p["panoptic"].pop("harmonic"),
    ):
        broken = json.loads(json.dumps(plain))
        spoil(broken)
        with pytest.raises(ValidationError):
            validate(broken)


def test_values_of_every_group():
    plain = report_of().to_json()
    assert list(plain) == [
        "protocol", "panoptic", "semantic", "per_class", "images", "seconds", "instance", "absent",
        "intervals", "calibration", "diagnostics",
    ]  # fmt: skip
    groups = plain["panoptic"]
    assert groups["all"] == {
        "pq": pytest.approx((0.75 + 0 + 1) / 3), "sq": pytest.approx(1.75 / 3),
        "rq": pytest.approx(2 / 3), "n": 3,
    }  # fmt: skip
    assert groups["seen"] == {"pq": 0.875, "sq": 0.875, "rq": 1.0, "n": 2}
    assert groups["unseen"] == {"pq": 0.0, "sq": 0.0, "rq": 0.0, "n": 1}
    assert (groups["things"]["n"], groups["stuff"]["n"]) == (2, 1)
    assert groups["harmonic"] == {"pq": 0.0, "sq": 0.0, "rq": 0.0}
    assert plain["semantic"]["all"] == {
        "miou": pytest.approx((0.75 + 0 + 1) / 3), "fwiou": pytest.approx((4 * 0.75 + 2) / 8),
        "macc": pytest.approx((0.75 + 0 + 1) / 3), "pacc": pytest.approx(5 / 8),
        "n": 3, "absent": 1,
    }  # fmt: skip
    assert plain["semantic"]["seen"]["pacc"] == pytest.approx(5 / 6)
    assert plain["semantic"]["harmonic"] == {"miou": 0.0}
    assert set(plain["instance"].values()) == {None}
    assert plain["protocol"]["candidates"] == 4
    assert plain["protocol"]["tasks"] == ["panoptic", "semantic"]


def test_absent_classes_are_listed_but_in_no_mean():
    report = report_of()
    assert report.absent == {"panoptic": ("wall",), "semantic": ("wall",)}
    row = report.to_json()["per_class"][3]
    assert row == {
        "name": "wall", "id": 21, "seen": False, "thing": False, "pq": None, "sq": None, "rq": None,
        "tp": 0, "fp": 0, "fn": 0, "iou": None, "ap": None, "ap50": None, "ar": None,
    }  # fmt: skip


def test_harmonic_are_taken_of_each_figure_on_its_own():
    vocabulary = VOCABULARY.with_unseen({"sky"})  # seen: cat 0.75, cow 0; unseen: sky 1
    found = report_of(vocabulary).panoptic["harmonic"]
    assert found is not None
    assert found.pq == pytest.approx(harmonic(0.375, 1.0))
    assert found.sq == pytest.approx(harmonic(0.375, 1.0))
    assert found.rq == pytest.approx(harmonic(0.5, 1.0))
    assert harmonic(0.0, 0.0) == 0.0


def test_split_restricts_what_is_reported():
    plain = report_of(split="seen").to_json()
    assert [name for name, value in plain["panoptic"].items() if value] == ["seen"]
    assert [name for name, value in plain["semantic"].items() if value] == ["seen"]
    assert [row["name"] for row in plain["per_class"]] == ["cat", "sky"]
    assert plain["panoptic"]["seen"] == report_of().to_json()["panoptic"]["seen"]
    assert plain["protocol"]["candidates"] == 4  # all classes compete


def test_without_unseen_classes_there_is_no_harmonic_mean():
    plain = report_of(VOCABULARY.with_unseen(())).to_json()
    assert plain["panoptic"]["unseen"] is None and plain["panoptic"]["harmonic"] is None
    assert plain["semantic"]["unseen"] is None and plain["semantic"]["harmonic"] is None
    validate(plain)
