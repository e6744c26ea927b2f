"""Damage on disk is named, each image by its own, and can be left out; the old data set stays."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from data_helpers import edit_json, official_part
from PIL import Image
from prepare_helpers import CAT, coco, contents, draw_root, write_split

from concat_cli.core.data.dataset import PanopticDataset, read_dataset_info
from concat_cli.core.data.index import Lines
from concat_cli.core.errors import UserError


@pytest.fixture
def split(tmp_path: Path) -> str:
    return write_split(tmp_path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return draw_root(tmp_path)


def _corrupt_image(root: Path) -> None:
    (root / "train2017" / "000000000003.png").write_bytes(b"damaged")


def _corrupt_png(root: Path) -> None:
    path = root / "annotations" / "panoptic_val2017" / "000000000101.png"
    path.write_bytes(path.read_bytes()[:60])


def _wrong_image_size(root: Path) -> None:
    Image.new("RGB", (9, 9)).save(root / "train2017" / "000000000005.png")


def _segment_only_in_json(root: Path) -> None:
    def change(content: dict) -> None:
        content["annotations"][1]["segments_info"].append({"id": 12345, "category_id": CAT})

    edit_json(official_part(root, "val").index, change)


def _segment_only_in_png(root: Path) -> None:
    def change(content: dict) -> None:
        content["annotations"][1]["segments_info"].pop()

    edit_json(official_part(root, "val").index, change)


def _unknown_category(root: Path) -> None:
    def change(content: dict) -> None:
        content["annotations"][0]["segments_info"][0]["category_id"] = 77

    edit_json(official_part(root, "train").index, change)


def _missing_image(root: Path) -> None:
    (root / "train2017" / "000000000003.png").unlink()
    (root / "train2017" / "000000000005.png").unlink()


def _name_leads_out(root: Path) -> None:
    edit_json(official_part(root, "val").index, lambda j: j["images"][0].update(file_name="../x"))


IN_AN_IMAGE = [
    (_corrupt_image, "train2017/000000000003.png", 1),
    (_corrupt_png, "panoptic_val2017/000000000101.png", 1),
    (_wrong_image_size, "000000000005.png is 9 x 9 pixels", 1),
    (_segment_only_in_json, "12345 is not in the PNG", 1),
    (_segment_only_in_png, "not in the JSON", 1),
    (_unknown_category, r"unknown category \[77\]", 1),
    (_missing_image, "000000000003.png and 1 more files", 2),
]


@pytest.mark.parametrize(("damage", "words", "count"), IN_AN_IMAGE)
def test_damage_is_named_or_left_out(
    root: Path, split: str, damage, words: str, count: int
) -> None:
    coco(root, split)
    before = contents(root / "concat", "checked")
    damage(root)
    with pytest.raises(UserError, match=words) as caught:
        coco(root, split)
    assert "--skip-bad" in caught.value.hint and before == contents(root / "concat", "checked")
    report = coco(root, split, skip_bad=True)
    assert sum(len(bad) for bad in report.bad.values()) == count
    lines = (root / "concat" / "bad.jsonl").read_text().splitlines()
    assert [set(json.loads(line)) for line in lines] == [
        {"part", "image_id", "image", "reason"}
    ] * count
    info = read_dataset_info(root / "concat")
    assert info.protocol["images_bad"] == count
    listed = {row.id for name in info.parts for row in Lines(info.part(name).index)}
    bad = {json.loads(line)["image_id"] for line in lines}
    assert not listed & bad and len(listed | bad) == 19
    for name in info.parts:
        dataset = PanopticDataset(info.part(name), info.vocabulary)
        assert all(
            dataset[i].labels.size for i in range(len(dataset)) if dataset.records[i].ids.size
        )


def test_only_the_first_of_many_are_named(root: Path) -> None:
    for number in range(1, 21):
        (root / "train2017" / f"{number:012}.png").write_bytes(b"damaged")
    with pytest.raises(UserError) as caught:
        coco(root)
    lines = caught.value.what.splitlines()
    assert lines[0] == "20 of 20 images are faulty:" and len(lines) == 12
    assert "000000000010.png: " in lines[10] and lines[11].strip() == "and 10 more"


def test_bad_jsonl_goes_when_nothing_is_bad(root: Path) -> None:
    whole = (root / "train2017" / "000000000003.png").read_bytes()
    _corrupt_image(root)
    coco(root, skip_bad=True)
    (root / "train2017" / "000000000003.png").write_bytes(whole)
    assert sum(len(bad) for bad in coco(root, skip_bad=True).bad.values()) == 0
    assert not (root / "concat" / "bad.jsonl").exists()


def _other_categories(root: Path) -> None:
    def change(content: dict) -> None:
        content["categories"][0]["name"] = "dog"

    edit_json(official_part(root, "val").index, change)


def _packed_pngs(root: Path) -> None:
    shutil.rmtree(root / "annotations" / "panoptic_train2017")


def _no_json(root: Path) -> None:
    official_part(root, "val").index.unlink()


def _twice(root: Path) -> None:
    edit_json(
        official_part(root, "val").index, lambda j: j["annotations"].append(j["annotations"][0])
    )


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_other_categories, "different categories"),
        (_packed_pngs, r"missing: labels of train \(annotations/panoptic_train2017 or"),
        (_no_json, r"missing: json of val .*/panoptic_val2017\.json"),
        (_twice, "annotated twice"),
        (_name_leads_out, "'../x' leads out of"),
    ],
)
@pytest.mark.parametrize("skip_bad", [False, True])
def test_what_is_wrong_with_all_of_it_is_never_skipped(
    root: Path, split: str, damage, words: str, skip_bad: bool
) -> None:
    damage(root)
    with pytest.raises(UserError, match=words) as caught:
        coco(root, split, skip_bad=skip_bad)
    assert caught.value.hint and not (root / "concat" / "dataset.json").exists()


def test_wrong_layout_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError) as caught:
        coco(tmp_path)
    assert "train2017" in caught.value.what and "pictures" in caught.value.what
    assert "cocodataset.org" in caught.value.hint and "custom" in caught.value.hint
    assert not (tmp_path / "concat").exists()
    with pytest.raises(UserError, match="no folder"):
        coco(tmp_path / "none")
