"""What predict and evaluate write: names that do not collide, names that no JSON can hold, COCO's
layout; and options that count for nothing."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from oracle import predictor, told_world
from panoptic_files import check_panoptic_files

from concat_cli.app import main
from concat_cli.core.data.image_io import write_png
from concat_cli.core.evaluate.files import evaluate_files
from concat_cli.core.evaluate.run import evaluate_model
from concat_cli.core.evaluate.scores import Scoring
from concat_cli.core.infer.files import Saver, flat_names
from concat_cli.core.vocabulary import ClassEntry, Vocabulary


def draw(path: Path, seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_png(path, np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8))
    return path


def test_names_that_would_be_one_are_told_apart():
    assert flat_names(["town/1.jpg", "a/b/2.png"]) == ["town_1", "a_b_2"]
    assert flat_names(["a/1.jpg", "a_1.jpg", "1.jpg", "1.png"]) == [
        "a_1_jpg", "a_1_jpg_2", "1_jpg", "1_png"
    ]  # fmt: skip
    assert len({name.casefold() for name in flat_names(["A/x.png", "a/X.png", "a/x.PNG"])}) == 3


def test_saved_predictions_of_colliding_names_score_as_before(tmp_path):
    """Two pictures of one name in two folders, and one named like both: each keeps its PNG."""
    dataset = told_world(tmp_path / "world")
    new = ["a/1.png", "a_1.png", "b/1.png", "b/1.jpg", "1.png"]
    part = dataset.part
    content = json.loads(part.index.read_text())
    for image, name in zip(content["images"], new, strict=True):
        old = part.images / image["file_name"]
        (part.images / name).parent.mkdir(exist_ok=True)
        old.rename(part.images / name)
        image["file_name"] = name
    part.index.write_text(json.dumps(content))
    dataset = type(dataset)(part, dataset.vocabulary, keep_crowd=True)
    report = evaluate_model(predictor(dataset, {7: 3}), dataset, Scoring(save=tmp_path / "found"))
    again = evaluate_files(tmp_path / "found/panoptic.json", part.index, unseen=["cow", "wall"])
    assert again.panoptic == report.panoptic
    for kind in ("panoptic", "semantic"):
        assert len(list((tmp_path / "found" / kind).iterdir())) == len(new)


@pytest.mark.skipif(sys.platform != "linux", reason="names are Unicode there")
def test_a_name_that_is_no_utf_8_is_refused_and_the_others_are_written(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    good = draw(Path("photos/good.png"))
    Path(os.fsdecode(b"photos/caf\xe9.png")).write_bytes(good.read_bytes())
    assert main(["predict", "photos", "--device", "cpu", "--dry-run"]) == 2
    assert r"caf\xe9.png is no UTF-8" in capsys.readouterr().err
    assert main(["predict", "photos", "--device", "cpu"]) == 2
    said = capsys.readouterr().err
    assert "1 picture could not be read. The other 1 are written." in said and r"caf\xe9" in said
    assert check_panoptic_files(Path("predictions"), [good])


def test_predictions_in_cocos_layout(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one, other = draw(Path("a/x.png"), 1), draw(Path("b/x.png"), 2)
    arguments = ["predict", str(one), str(other), "--device", "cpu", "--min-score", "0"]
    assert main([*arguments, "--layout", "coco", "--out", "coco"]) == 0
    assert main([*arguments, "--out", "plain"]) == 0
    index = Path("coco/annotations/panoptic_predictions.json")
    written, plain = (json.loads(p.read_text()) for p in (index, Path("plain/panoptic.json")))
    assert written["annotations"] == plain["annotations"]
    assert [row["id"] for row in plain["annotations"]] == [1, 2]  # kwcoco asks for ids
    names = [image["file_name"] for image in written["images"]]
    assert names == ["a_x_png.png", "b_x_png.png"]
    for name, picture in zip(names, (one, other), strict=True):
        assert Path("coco/images", name).read_bytes() == picture.read_bytes()
        png = Path("annotations/panoptic_predictions", name)
        assert Path("coco", png).read_bytes() == Path("plain/panoptic", name).read_bytes()
    assert sorted(p.name for p in Path("coco").iterdir() if p.is_dir()) == ["annotations", "images"]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("evaluate --name a --name b", "--name"),
        ("evaluate --name a infer.size=3 infer.batch=1 infer.size=4", "infer.size"),
        ("predict x.png --set infer.size=3 --set infer.size=4", "infer.size"),
        ("prepare-data coco x --out 3 --out=4", "--out"),
        ("weights get a --to x --to y", "--to"),
        ("train-con -c no_such --config neither", "--config"),
    ],
)
def test_of_what_is_given_twice_the_last_counts_and_that_is_said(line, what, capsys):
    assert main(line.split()) == 2  # for another reason
    assert f"note: {what} is given 2 times: only the last value counts" in capsys.readouterr().err


def test_what_may_be_given_twice(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    draw(Path("x.png"))
    line = "predict x.png --json --json --set infer.size=64 --set infer.batch=1 --dry-run"
    assert main(line.split()) == 0
    assert "times" not in capsys.readouterr().err
    assert main([*line.split(), "--set", "infer.size=128"]) == 0
    assert re.search(r"infer\.size +128\b", capsys.readouterr().err)


@pytest.mark.parametrize(
    "option",
    ["--save x", "--name x", "--weights photos", "--device cpu", "--dry-run", "--force", "a.b=1"],
)
def test_options_of_weights_mean_nothing_for_files(option, capsys):
    line = f"evaluate --predictions a.json --truth b.json {option}"
    assert main(line.split()) == 2
    said = capsys.readouterr().err
    assert "means nothing where files are scored" in said and option.split()[0][:3] in said + "a.b"


@pytest.mark.parametrize(
    "option",
    ["--match id", "--kinds x", "--as-panopticapi", "--truth-dir x", "--class-split all_seen"],
)
def test_options_of_files_mean_nothing_for_weights(option, capsys):
    assert main(f"evaluate {option}".split()) == 2
    assert f"{option.split()[0]} means nothing where weights" in capsys.readouterr().err


def test_a_split_without_classes_and_few_images(tmp_path):
    from drawn_panoptic import Lines, scored, write_pair

    from concat_cli.core.errors import UserError

    found, truth = write_pair(tmp_path / "files")
    with pytest.raises(UserError, match="None of the 2 classes is unseen"):
        evaluate_files(found, truth, Scoring(split="unseen"), class_split="all_seen")
    _, said = scored(tmp_path / "few", scoring=Scoring(bootstraps=5))
    assert "intervals of 3 images: below 30" in said
    dataset, lines = told_world(tmp_path / "world"), Lines()
    evaluate_model(predictor(dataset), dataset, Scoring(bootstraps=5), progress=lines)
    assert "intervals of 5 images" in lines.text


def test_a_class_that_occurs_nowhere_has_no_figure(tmp_path):
    from drawn_panoptic import scored

    def add(truth, found):
        truth["categories"].append({"id": 9, "name": "unicorn", "isthing": 1})

    report, _ = scored(tmp_path, add)
    rows = {row["name"]: row for row in report.to_json()["per_class"]}
    assert [rows["unicorn"][key] for key in ("pq", "sq", "rq", "tp", "fp", "fn")] == [
        None, None, None, 0, 0, 0
    ]  # fmt: skip
    assert rows["road"]["pq"] > 0.9


def test_hidden_lists_go_where_the_disk_is_full(tmp_path: Path) -> None:
    class Full(io.FileIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    saver = Saver(tmp_path, Vocabulary((ClassEntry("cat", 1),)))
    path = Path(saver.begin("panoptic.images").name)
    saver._waiting["panoptic.images"].close()
    saver._waiting["panoptic.images"] = io.BufferedWriter(Full(path, "w"))
    saver.begin("panoptic.images").write(b"what waits to be written")
    saver.abandon()
    assert not list(tmp_path.iterdir())
