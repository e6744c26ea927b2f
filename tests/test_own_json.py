"""A user's own JSON and photos that do not quite fit: what is read, said and refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from drawn_labels import column_runs, encode
from mini import Heard

from concat_cli.app import main
from concat_cli.core.data.coco import read_coco
from concat_cli.core.data.dataset import PanopticDataset, read_dataset_info, training_part
from concat_cli.core.data.index import Lines
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.recipes.custom import find
from concat_cli.core.prepare.recipes.names import fitted
from concat_cli.core.prepare.run import Options, Report, prepare_data

SIZE = (12, 16)
PHOTO = encode(np.full((*SIZE, 3), 99, np.uint8), "JPEG")
SQUARE = [[4, 2, 12, 2, 12, 8, 4, 8]]
Change = Callable[[dict[str, Any]], Any]


def draw(root: Path, change: Change = lambda _: None, names: str = "p{}.jpg") -> Path:
    """Two photos in `images` and own.json with a square in each."""
    (root / "images").mkdir(parents=True)
    content: dict[str, Any] = {
        "images": [],
        "annotations": [],
        "categories": [{"id": 1, "name": "square"}],
    }
    for i in (1, 2):
        (root / "images" / f"p{i}.jpg").write_bytes(PHOTO)
        content["images"].append(
            {"id": i, "file_name": names.format(i), "height": SIZE[0], "width": SIZE[1]}
        )
        content["annotations"].append(
            {"id": i, "image_id": i, "category_id": 1, "iscrowd": 0, "segmentation": SQUARE}
        )
    change(content)
    (root / "own.json").write_text(json.dumps(content))
    return root


def panoptic(root: Path, kinds: tuple[dict[str, Any], ...], name: str = "{}.png") -> Path:
    """Two red squares on grass, a PNG each; `kinds` are what the two categories say."""

    def change(content: dict[str, Any]) -> None:
        content["categories"] = [
            {"id": i, "name": label} | kind
            for i, label, kind in zip((1, 2), ("square", "grass"), kinds, strict=True)
        ]
        content["annotations"] = [
            {"image_id": i, "file_name": name.format(i), "segments_info": [
                {"id": n, "category_id": c} for n, c in ((1, 1), (2, 1), (5, 2))
            ]}
            for i in (1, 2)
        ]  # fmt: skip

    draw(root, change)
    ids = np.full(SIZE, 5, np.uint8)
    ids[2:6, 1:6], ids[2:6, 8:14] = 1, 2
    (root / "own").mkdir()
    for i in (1, 2):
        (root / "own" / f"{i}.png").write_bytes(encode(np.dstack([ids, 0 * ids, 0 * ids])))
    return root


def prepare(root: Path, heard: Heard | None = None, **given: Any) -> Report:
    given = {"images": "images", "json": "own.json"} | given
    how = Options(processes=1, skip_bad=given.pop("skip_bad", False))
    return prepare_data("custom", root, root / "out", how, heard or Heard(), **given)


def command(capsys: pytest.CaptureFixture[str], root: Path, *more: str) -> str:
    """What the command says, in one line."""
    words = ["prepare-data", "custom", str(root), "--images", "images", "--json", "own.json"]
    code = main([*words, *more])
    out = capsys.readouterr()
    assert code == 0, out.err
    return " ".join(f"{out.out} {out.err}".split())


# Crowds


def brush(content: dict[str, Any]) -> None:
    mask = np.zeros(SIZE, bool)
    mask[2:8, 4:12] = True
    for annotation in content["annotations"]:
        annotation.update(segmentation=column_runs(mask), iscrowd=1)


def test_crowds_are_told_of_and_can_be_objects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    root = draw(tmp_path / "all", brush)
    said = command(capsys, root)
    assert "crowds: square (2 of 2 in train): nothing is learnt from a crowd" in said
    assert "--crowds objects" in said
    with pytest.raises(UserError, match=r"nothing to learn .*2 segments are crowds") as caught:
        training_part(read_dataset_info(root / "concat"))
    assert "--crowds objects" in caught.value.hint
    words = ["train-con", f"data.root={root / 'concat'}", "--name", "r", "--force"]
    for more in ([], ["--dry-run"]):
        capsys.readouterr()
        code, said = main([*words, *more]), capsys.readouterr()
        assert code == 2 and "nothing to learn" in said.err, said
    said = command(capsys, root, "--crowds", "objects")
    assert "crowds:" not in said
    sample = training_part(read_dataset_info(root / "concat"))[0]
    assert (sample.segment_map == 1).sum() == 48


def test_a_class_that_is_crowd_among_others_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def some(content: dict[str, Any]) -> None:
        brush(content)
        content["categories"].append({"id": 2, "name": "ball"})
        rest = [[0, 9, 3, 9, 3, 11, 0, 11]]
        content["annotations"] += [
            {"id": 9, "image_id": 1, "category_id": 2, "segmentation": rest, "iscrowd": 0}
        ]

    said = command(capsys, draw(tmp_path, some))
    assert "square (2 of 2 in train)" in said and "ball (" not in said


# Things and stuff

THING, STUFF = {"isthing": 1}, {"isthing": 0}


@pytest.mark.parametrize(
    ("kinds", "words"),
    [
        (({}, {}), ["kinds: 2 things, 0 stuff", "all 2 classes are things", "says `isthing`"]),
        (
            (STUFF, STUFF),
            ["kinds: 0 things, 2 stuff", "all 2 classes are stuff", "square (2 images)"],
        ),
        (({"isthing": "True"}, {"isthing": "False"}), ["kinds: 1 things, 1 stuff"]),
        ((STUFF, THING), ["stuff with several segments in an image: square (2 images)"]),
        ((THING, STUFF), ["kinds: 1 things, 1 stuff"]),
    ],
)
def test_kinds_are_counted_and_what_is_odd_is_said(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    kinds: tuple[dict[str, Any], ...],
    words: list[str],
) -> None:
    said = command(capsys, panoptic(tmp_path, kinds))
    assert all(word in said for word in words), said
    assert ("--kinds" in said) == (len(words) > 1 or "several" in words[0])


def test_an_option_or_a_file_sets_the_kinds(tmp_path: Path) -> None:
    root = panoptic(tmp_path, ({}, {}))
    (root / "kinds.txt").write_text("grass : stuff\n")
    given = {"images": "images", "json": "own.json"}
    assert find(root, **given).vocabulary.is_thing == (True, True)
    for kinds in ("grass : stuff", "kinds.txt", "square; grass : stuff"):
        assert find(root, **given, kinds=kinds).vocabulary.is_thing == (True, False)
    assert find(root, **given, kinds="square : stuff").vocabulary.is_thing == (False, True)
    with pytest.raises(UserError, match="--kinds names 'tree', which is no class") as caught:
        find(root, **given, kinds="tree : stuff")
    assert "square, grass" in caught.value.hint
    prepare(root, kinds="grass : stuff")
    assert read_dataset_info(root / "out").vocabulary.is_thing == (True, False)


# Annotations that leave no segment


def test_what_vanishes_is_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A square, the same again, a small one of a crowd under both, and three of nothing."""

    def change(content: dict[str, Any]) -> None:
        small = [[5, 3, 7, 3, 7, 5, 5, 5]]
        outside = [[40, 40, 50, 40, 50, 50]]
        masks = [SQUARE, small, outside, [], None]
        content["annotations"] += [
            {"id": 10 + i, "image_id": 1, "category_id": 1, "iscrowd": int(mask is small),
             "segmentation": mask}
            for i, mask in enumerate(masks)
        ]  # fmt: skip

    root = draw(tmp_path, change)
    said = command(capsys, root)
    told = "annotations of train: 7 listed, 2 kept, 2 hidden under others (1 with the mask of"
    assert told in said and "3 empty" in said and "annotations of val" not in said
    header = json.loads((root / "concat" / "dataset.json").read_text())
    counts = {"listed": 7, "kept": 2, "hidden": 2, "double": 1, "empty": 3}
    assert header["annotations"] == {"train": counts, "val": counts}
    before = (root / "concat" / "index" / "train.jsonl").read_bytes()
    said = command(capsys, root)  # from what was checked before
    assert told in said and "nothing is written" in said
    assert before == (root / "concat" / "index" / "train.jsonl").read_bytes()
    assert not any(row.lost for row in Lines(root / "concat" / "index" / "train.jsonl"))


def test_a_pixel_belongs_to_the_smallest_that_covers_it(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        inner = [[5, 3, 7, 3, 7, 5, 5, 5]]
        content["annotations"].insert(
            0, {"id": 0, "image_id": 1, "category_id": 1, "segmentation": inner}
        )

    prepare(root := draw(tmp_path, change))
    info = read_dataset_info(root / "out")
    sample = PanopticDataset(info.part("train"), info.vocabulary)[0]
    assert sorted(np.bincount(sample.segment_map.ravel())[1:]) == [4, 44]


@pytest.mark.parametrize(
    ("corners", "box", "area", "told"),
    [
        ((4, 2, 11, 2, 11, 5, 4, 5), [4, 2, 8, 4], 21, True),  # datumaro: box of the pixels
        ((4, 2, 4, 5, 11, 5, 11, 2), [4, 2, 7, 3], 32, True),  # supervision: area of the pixels
        ((4, 2, 11, 2, 11, 5), [4.0, 2.0, 7.0, 3.0], 17.0, True),  # a triangle, by Pick's theorem
        ((4, 2, 12, 2, 12, 6, 4, 6), [4, 2, 8, 4], 32, False),  # around the pixels, as COCO's
        ((4, 2, 11, 2, 11, 5, 4, 5), [4, 2, 8, 3], 21, False),
        ((4, 2, 11, 2, 11, 5, 4, 5), None, None, False),
        ((4, 2, 11, 2, 11, 5, 4, 5), [[4], 2, 8, 4], "32", False),
        ((4.5, 2, 11, 2, 11, 5, 4.5, 5), [4.5, 2, 7.5, 4], 32, False),
    ],
)
def test_outlines_that_lost_a_row_and_a_column_are_counted(
    tmp_path: Path, corners: tuple[float, ...], box: Any, area: Any, told: bool
) -> None:
    def change(content: dict[str, Any]) -> None:
        for row in content["annotations"]:
            row |= {"segmentation": [list(corners)], "bbox": box, "area": area}

    listed = read_coco(draw(tmp_path, change) / "own.json")
    counted = [note for note in listed.notes if "2 of 2 outlines lost a row and a" in note]
    assert len(counted) == told


def test_an_odd_outline_takes_its_image_and_says_why(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["annotations"][1]["segmentation"] = [[4, 4, 20, 4, 20]]

    root = draw(tmp_path, change)
    with pytest.raises(UserError, match=r"annotation 2 of image 2 .*an x without a y") as caught:
        prepare(root)
    assert "ownload" not in caught.value.hint
    assert len(prepare(root, skip_bad=True).bad["train"]) == 1


# Names of files


@pytest.mark.parametrize(
    "names",
    [
        "images\\p{}.jpg",
        "..\\..\\tool\\media\\upload\\4\\p{}.jpg",
        "/home/me/data/p{}.jpg",
        "C:\\Users\\me\\Images\\P{}.JPG",
        "images/p{}.jpg",
        "https://host/set/images/p{}.jpg",
    ],
)
def test_names_as_other_systems_write_them(tmp_path: Path, names: str) -> None:
    root, heard = draw(tmp_path, names=names), Heard()
    report = prepare(root, heard)
    assert [row.image for row in Lines(root / "out/index/train.jsonl")] == ["p1.jpg", "p2.jpg"]
    note = next(line for line in heard.lines if "otherwise" in line)
    assert "2 of 2 names" in note and repr(names.format(1)) in note and "p1.jpg" in note
    assert report.parts["train"].totals.segments == 2


def test_a_bare_name_is_found_in_a_folder_below(tmp_path: Path) -> None:
    root = draw(tmp_path)
    prepare(root, images=".")
    assert [row.image for row in Lines(root / "out/index/train.jsonl")] == [
        "images/p1.jpg",
        "images/p2.jpg",
    ]


def test_names_of_labels_too(tmp_path: Path) -> None:
    prepare(root := panoptic(tmp_path, (THING, STUFF), "panoptic\\{}.png"))
    assert [row.label for row in Lines(root / "out/index/train.jsonl")] == ["1.png", "2.png"]


def test_names_that_fit_several_files_or_none(tmp_path: Path) -> None:
    for name in ("a/1.jpg", "b/1.jpg", "b/2.jpg"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    with pytest.raises(UserError, match=r"'1\.jpg', which may be a/1\.jpg or b/1\.jpg"):
        fitted(["1.jpg"], str(tmp_path), "own.json")
    with pytest.raises(UserError, match=r"x/b/2\.jpg' and 'b\\\\2\.jpg', but .* b/2\.jpg alone"):
        fitted(["x/b/2.jpg", "b\\2.jpg"], str(tmp_path), "own.json")
    names = ["a/1.jpg", "train/b/1.jpg", "train/c/1.jpg", "..\\c\\9.jpg"]
    found, note = fitted(names, str(tmp_path), "own.json")
    assert found == {
        "a/1.jpg": "a/1.jpg",
        "train/b/1.jpg": "b/1.jpg",
        "train/c/1.jpg": "train/c/1.jpg",
        "..\\c\\9.jpg": "c/9.jpg",
    }
    assert note.startswith("1 of 4 names")


def test_what_is_missing_is_missing_and_not_unsafe(tmp_path: Path) -> None:
    root = draw(tmp_path, names="images\\q{}.jpg")
    with pytest.raises(UserError, match=r"Missing: .*images/images/q1\.jpg and 1 more") as caught:
        prepare(root)
    assert "the folder and the names" in caught.value.hint


# Categories that only group others


def test_an_unused_parent_is_left_out_and_said(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["categories"] = [
            {"id": 0, "name": "project", "supercategory": "none"},
            {"id": 1, "name": "square", "supercategory": "project"},
            {"id": 2, "name": "ball", "supercategory": "project"},  # unused, and still a class
        ]

    root, heard = draw(tmp_path, change), Heard()
    prepare(root, heard)
    assert read_dataset_info(root / "out").vocabulary.names == ("square", "ball")
    assert any("'project' (id 0) groups others" in line for line in heard.lines)


def test_a_parent_that_another_part_uses_stays(tmp_path: Path) -> None:
    def change(content: dict[str, Any]) -> None:
        content["categories"] = [
            {"id": 0, "name": "dog", "supercategory": "animal"},
            {"id": 1, "name": "puppy", "supercategory": "dog"},
        ]

    root = draw(tmp_path, change)
    content = json.loads((root / "own.json").read_text())
    content["annotations"][0]["category_id"] = 0
    (root / "val.json").write_text(json.dumps(content))
    given = {"images": "images", "json": "own.json", "val_images": "images"}
    assert find(root, **given, val_json="val.json").vocabulary.names == ("dog", "puppy")
    assert find(root, **given, val_json="own.json").vocabulary.names == ("puppy",)
