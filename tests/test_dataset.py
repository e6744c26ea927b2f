"""Prepared data sets: reading, decoding, caching, and every kind of damage."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from data_helpers import CATEGORIES, VOCABULARY, edit_json, simple_part, write_part
from PIL import Image

from concat_cli.core.data.dataset import PanopticDataset, Part, read_dataset_info
from concat_cli.core.data.image_io import read_id_png, write_id_png
from concat_cli.core.data.index import Row, write_rows
from concat_cli.core.errors import UserError
from concat_cli.core.vocabulary import Vocabulary


@pytest.fixture
def part(tmp_path: Path) -> Part:
    return write_part(simple_part(tmp_path), {5: [3, 7], 9: [20], 2: []})


def test_samples_have_class_indices_and_segment_numbers(part: Part) -> None:
    dataset = PanopticDataset(part, VOCABULARY)
    assert [record.image_id for record in dataset.records] == [5, 9, 2]
    sample = dataset[0]
    assert sample.image.shape == (24, 32, 3) and sample.image.dtype == np.uint8
    assert sample.segment_map.dtype == np.int32 and sample.labels.tolist() == [0, 1]
    ids = read_id_png(part.labels / "000000000005.png")
    for i, number in enumerate(dataset.records[0].ids):
        assert ((sample.segment_map == i + 1) == (ids == number)).all()
    assert ((sample.segment_map == 0) == (ids == 0)).all() and (ids == 0).any()
    assert dataset[2].labels.shape == (0,) and (dataset[2].segment_map == 0).all()


def test_cache_gives_the_same_samples_without_reading_again(part: Part) -> None:
    plain, cached = PanopticDataset(part, VOCABULARY), PanopticDataset(part, VOCABULARY, cache=True)
    before = [plain[i] for i in range(3)]
    assert [cached[i].image_id for i in range(3)] == [5, 9, 2]
    for path in [*part.images.iterdir(), *part.labels.iterdir()]:
        path.unlink()
    for one, two in zip(before, [cached[i] for i in range(3)], strict=True):
        assert (one.image == two.image).all() and (one.labels == two.labels).all()
        assert (one.segment_map == two.segment_map).all()
        assert one.segment_map.dtype == two.segment_map.dtype


def test_crowd_becomes_void_unless_kept(part: Part) -> None:
    edit_json(part.index, lambda j: j["annotations"][0]["segments_info"][0].update(iscrowd=1))
    kept = PanopticDataset(part, VOCABULARY, keep_crowd=True)[0]
    assert kept.labels.tolist() == [0, 1] and kept.crowd.tolist() == [True, False]
    sample = PanopticDataset(part, VOCABULARY)[0]
    assert sample.labels.tolist() == [1] and sample.crowd.tolist() == [False]
    assert ((sample.segment_map == 1) == (kept.segment_map == 2)).all()
    assert (sample.segment_map[kept.segment_map == 1] == 0).all()


def _first(content: dict) -> dict:
    return content["annotations"][0]["segments_info"][0]


def _remove_segment(content: dict) -> None:
    content["annotations"][0]["segments_info"].pop()


def _add_segment(content: dict) -> None:
    content["annotations"][0]["segments_info"].append({"id": 4242, "category_id": 3})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_remove_segment, ["000000000005.png", "70006", "not in the JSON"]),
        (_add_segment, ["000000000005.png", "4242", "not in the PNG"]),
        (lambda j: j["images"][0].update(height=25), ["000000000005.png", "32 x 24", "32 x 25"]),
        (lambda j: _first(j).update(category_id=99), ["unknown category", "99", "image 5"]),
        (lambda j: _first(j).update(id=0), ["image 5", "segment ids"]),
        (lambda j: _first(j).update(id=1 << 24), ["image 5", "segment ids"]),
        (lambda j: _first(j).update(id=70_006), ["image 5", "repeated"]),
        (lambda j: _first(j).pop("category_id"), ["image 5", "no `category_id`"]),
        (lambda j: j["annotations"][0].update(image_id=77), ["`image_id` is 77"]),
        (lambda j: j["annotations"].append(j["annotations"][0]), ["annotated twice"]),
        (lambda j: j["images"][0].pop("file_name"), ["image 5", "no `file_name`"]),
        (lambda j: j["categories"].append(CATEGORIES[0]), ["two categories", "3"]),
        (lambda j: j.pop("annotations"), ["panoptic.json", "no annotations"]),
    ],
)
def test_bad_json_is_named(part: Part, change, words: list[str]) -> None:
    edit_json(part.index, change)
    with pytest.raises(UserError) as caught:
        PanopticDataset(part, VOCABULARY)[0]
    assert all(word in caught.value.what for word in words), caught.value.what


def test_broken_files_are_named(part: Part) -> None:
    dataset = PanopticDataset(part, VOCABULARY)
    png, image = (folder / "000000000005.png" for folder in (part.labels, part.images))
    whole = png.read_bytes()
    png.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=str(png)):
        dataset[0]
    png.unlink()
    with pytest.raises(UserError, match="does not exist"):
        dataset[0]
    png.write_bytes(whole)
    Image.new("RGB", (31, 24)).save(image)
    with pytest.raises(UserError, match="31 x 24"):
        dataset[0]
    part.index.write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        PanopticDataset(part, VOCABULARY)
    part.index.unlink()
    with pytest.raises(UserError, match=r"panoptic\.json"):
        PanopticDataset(part, VOCABULARY)


def test_pixels_above_every_id_are_noticed(part: Part) -> None:
    png = part.labels / "000000000009.png"
    ids = read_id_png(png)
    ids[0, 0] = (1 << 24) - 1
    write_id_png(png, ids)
    with pytest.raises(UserError, match="16777215 is not in the JSON"):
        PanopticDataset(part, VOCABULARY)[1]


def _write_info(root: Path, **changes: object) -> None:
    places = {"images": "images", "json": "panoptic.json", "pngs": "panoptic"}
    info = {"format": 1, "name": "mini", "class_split": "own", "unseen": ["cow"]}
    (root / "dataset.json").write_text(json.dumps(info | {"parts": {"val": places}} | changes))


def test_dataset_info(part: Part, tmp_path: Path) -> None:
    _write_info(tmp_path, source={"seed": 3})
    info = read_dataset_info(tmp_path)
    assert info.vocabulary == Vocabulary.from_categories(CATEGORIES, ["cow"])
    assert info.vocabulary.unseen_indices == (1,) and info.vocabulary.ids == (3, 7, 20, 21)
    assert info.parts == {"val": part} and info.part("val") == part
    assert (info.name, info.class_split, info.source) == ("mini", "own", {"seed": 3})
    with pytest.raises(UserError, match="no part 'train'"):
        info.part("train")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format": 4}, "format 4"),
        ({"unseen": ["dog"]}, "dog"),
        ({"unseen": None}, "not a data set"),
        ({"parts": {}}, "no parts"),
        ({"parts": {"val": {"images": "images"}}}, "not a data set"),
        ({"parts": {"val": {"images": "a", "json": "b.json", "pngs": "c"}}}, "b.json"),
    ],
)
def test_bad_dataset_info(part: Part, changes: dict, words: str) -> None:
    _write_info(part.index.parent, **changes)
    with pytest.raises(UserError, match=words):
        read_dataset_info(part.index.parent)


def _write_before(root: Path, name: str, kind: str, labels: str, classes: int = 2) -> Path:
    """What the version before wrote for a data set: format 2, whose labels lie in any form."""
    file = "000000000005.png"
    row = Row(5, file, file, 24, 32, [6, 70_006], [3, 7], [0, 0], [9, 9])
    write_rows(root / "index" / "train.jsonl", [row])
    part = {"images": "images", "labels": labels, "index": "index/train.jsonl"}
    part |= {"format": {"kind": kind, "pixels": "index", "table": {}, "void": [], "things": {}}}
    content = {
        "format": 2, "name": name, "layout": "official", "tasks": ["semantic"],
        "class_split": "all_seen", "unseen": [],
        "protocol": {"unseen_pixels": "void", "images_bad": 1},
        "parts": {"train": part}, "source": {"root": "data/x y"},
        "counts": {"train": {"images": 90}, "dev": {"images": 10}},
        "classes": VOCABULARY.to_json()[:classes],
    }  # fmt: skip
    (root / "dataset.json").write_text(json.dumps(content))
    return root


def test_id_maps_of_the_version_before_are_read(part: Part, tmp_path: Path) -> None:
    info = read_dataset_info(_write_before(tmp_path, "coco", "panoptic", "panoptic"))
    sample = PanopticDataset(info.part("train"), info.vocabulary)[0]
    assert sample.labels.tolist() == [0, 1]
    assert (sample.segment_map == PanopticDataset(part, VOCABULARY)[0].segment_map).all()


@pytest.mark.parametrize(
    ("name", "kind", "labels", "words"),
    [
        ("coco", "panoptic", "a.zip!b.zip!c", "coco 'data/x y' --class-split all_seen --out "),
        ("coco-instances", "instances", "x", "coco-instances 'data/x y' --class-split all_seen"),
        ("ade20k-847", "semantic", "x", "ade20k 'data/x y' --classes 847 --class-split all_seen"),
        ("photos", "semantic", "x", "custom 'data/x y' --class-split all_seen"),
    ],
)
def test_other_labels_of_the_version_before_name_the_command(
    tmp_path: Path, name: str, kind: str, labels: str, words: str
) -> None:
    with pytest.raises(UserError, match="of an earlier version") as caught:
        read_dataset_info(_write_before(tmp_path, name, kind, labels))
    assert f"`concat prepare-data {words}" in caught.value.hint
    assert f"--out {tmp_path} --unseen-pixels void`" in caught.value.hint


def test_missing_dataset_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        read_dataset_info(tmp_path / "shapes")
    assert f"concat prepare-data shapes {tmp_path / 'shapes'}" in caught.value.hint
