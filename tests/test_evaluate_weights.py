"""Weights on data sets that they were not made for, with fewer candidates, with other tasks."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from data_helpers import edit_json, write_part
from jsonschema import Draft202012Validator
from mini import Heard

from concat_cli.core.checkpoint import load_weights, save_weights
from concat_cli.core.data.dataset import Part, read_dataset_info
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.report import load_schema
from concat_cli.core.evaluate.scores import Scoring
from concat_cli.core.evaluate.weights import evaluate_weights, tasks_of
from concat_cli.core.runs import BUILT_IN

NAMES = {3: "Solid  Circle", 7: "checkered circle", 20: "violet glass", 21: "zebra"}
pytestmark = pytest.mark.skipif(not BUILT_IN.exists(), reason="the built-in weights are not here")


ANY = Scoring(force=True)  # also names that the built-in CLIP never saw


def write_set(root: Path, names: dict[int, str], unseen: list[str]) -> Path:
    """A data set of three scenes with the given class names."""
    part = write_part(
        Part(root / "images", root / "panoptic.json", root / "panoptic"),
        {1: [3, 20], 2: [7, 3, 21], 3: [20]},
        dict.fromkeys((1, 2, 3), (64, 96)),
    )

    def rename(content: dict) -> None:
        for category in content["categories"]:
            category["name"] = names[category["id"]]

    edit_json(part.index, rename)
    places = {"images": "images", "json": "panoptic.json", "pngs": "panoptic"}
    (root / "dataset.json").write_text(
        json.dumps(
            {"format": 1, "name": "zoo", "class_split": "own", "unseen": unseen,
             "parts": {"val": places}}
        )
    )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_set(tmp_path_factory.mktemp("zoo"), NAMES, unseen=["Solid  Circle"])


def test_another_data_set_is_divided_by_the_names_trained_on(zoo: Path) -> None:
    """Whatever the data set itself calls unseen; names that differ in case and spaces are one."""
    heard = Heard()
    report = evaluate_weights(BUILT_IN, [f"data.root={zoo}"], ANY, device="cpu", progress=heard)
    plain = report.to_json()
    Draft202012Validator(load_schema()).validate(json.loads(json.dumps(plain)))
    trained = set(load_weights(BUILT_IN).meta["trained"])
    assert "solid circle" in trained and not {"checkered circle", "zebra"} & trained
    seen = {row["name"]: row["seen"] for row in plain["per_class"]}
    assert seen == {n: " ".join(n.lower().split()) in trained for n in NAMES.values()}
    expected = [name for name, value in seen.items() if value]
    assert plain["protocol"]["overlap"] == {"count": len(expected), "of": 4, "names": expected}
    assert plain["protocol"]["class_split"] == "by the names trained on"
    assert plain["protocol"]["candidates"] == 4 and plain["protocol"]["unseen_with_labels"] == 0
    assert plain["protocol"]["mode"] == "transductive"  # it was taught checkered circles
    assert any("zebra" in line for line in heard.lines)  # the built-in CLIP never saw one


def test_what_was_taken_away_is_of_the_data_trained_on(zoo: Path, tmp_path: Path) -> None:
    header = json.loads((zoo / "dataset.json").read_text())
    header["protocol"] = {"unseen_pixels": "drop", "images_dropped": 3}
    (zoo / "dataset.json").write_text(json.dumps(header))
    weights, theirs = load_weights(BUILT_IN), {"unseen_pixels": "void", "segments_void": 7}
    for known, wanted in (({}, {}), ({"filtering": theirs}, theirs)):
        data = {k: v for k, v in weights.meta["data"].items() if k != "filtering"} | known
        save_weights(tmp_path / "w.safetensors", weights.tensors, weights.meta | {"data": data})
        report = evaluate_weights(
            tmp_path / "w.safetensors", [f"data.root={zoo}"], ANY, device="cpu"
        )
        assert report.protocol["filtering"] == wanted


def test_no_name_in_common_leaves_only_unseen_classes(tmp_path: Path) -> None:
    names = {3: "cat", 7: "cow", 20: "sky", 21: "wall"}
    root = write_set(tmp_path, names, unseen=["cow"])
    report = evaluate_weights(BUILT_IN, [f"data.root={root}"], ANY, device="cpu")
    assert report.protocol["overlap"] == {"count": 0, "of": 4, "names": []}
    assert report.panoptic["seen"] is None and report.panoptic["unseen"] == report.panoptic["all"]
    with pytest.raises(UserError, match="seen against unseen"):
        evaluate_weights(
            BUILT_IN, [f"data.root={root}"], Scoring(calibrate=True, force=True), device="cpu"
        )


def test_candidates_of_the_split_alone(zoo: Path) -> None:
    def score(**options):
        return evaluate_weights(
            BUILT_IN, [f"data.root={zoo}"], Scoring(**options, force=True), device="cpu"
        )

    report = score(split="unseen", candidates="split")
    unseen = [row.name for row in report.per_class]
    assert report.protocol["setting"] == "restricted"
    assert report.protocol["candidates"] == len(unseen) < 4
    assert score(split="unseen").protocol["candidates"] == 4
    with pytest.raises(UserError, match="--split, which is all"):
        score(candidates="split")


def test_the_sweep_says_where_an_offset_comes_from(zoo: Path, tmp_path: Path) -> None:
    def swept(path: Path, *keys: str):
        keys = (f"data.root={zoo}", *keys)
        found = evaluate_weights(
            path, keys, Scoring(calibrate=True, force=True), device="cpu"
        ).calibration
        assert found is not None
        return found

    found = swept(BUILT_IN)
    assert found.dev is None and found.plain == 0 and len(found.rows) == 11
    weights = load_weights(BUILT_IN)
    config = json.loads(json.dumps(weights.meta["config"]))
    config["finetune"]["calibrate"], config["infer"]["seen_offset"] = True, 0.77
    config["cat"]["fold"] = 2
    own = tmp_path / "own.safetensors"
    save_weights(own, weights.tensors, weights.meta | {"config": config})
    found = swept(own)
    assert found.dev == found.plain == 0.77 and 0.77 in [row.offset for row in found.rows]
    found = swept(own, "infer.seen_offset=0")
    assert (found.plain, found.dev) == (0, 0.77)


def test_tasks_that_the_truth_cannot_score(zoo: Path) -> None:
    info = read_dataset_info(zoo)
    assert tasks_of(info) == ("panoptic", "semantic")
    assert tasks_of(info, Scoring(tasks=["instance", "panoptic"])) == ("panoptic", "instance")
    assert tasks_of(info, Scoring(tasks="instance, panoptic")) == ("panoptic", "instance")
    maps, objects = replace(info, tasks=("semantic",)), replace(info, tasks=("instance",))
    assert tasks_of(maps) == ("semantic",) and tasks_of(objects) == ("instance",)
    for lacking, asked in ((maps, ["panoptic"]), (info, ["segment"]), (info, [])):
        with pytest.raises(UserError):
            tasks_of(lacking, Scoring(tasks=asked))
