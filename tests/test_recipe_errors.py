"""What is missing or wrong in a data set is said by name, before anything is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from drawn_ade import CHALLENGE
from drawn_cityscapes import CITIES
from drawn_files import grey, palette
from drawn_layouts import CASES
from drawn_voc import CONTEXT_KIT, KIT, LISTS, VOC

from concat_cli.core.data.class_list import load_class_list
from concat_cli.core.data.prepare import Options, prepare
from concat_cli.core.data.recipes import (
    RECIPES,
    ade20k,
    cityscapes,
    coco_instances,
    coco_stuff,
    pascal_context,
    voc,
)
from concat_cli.core.data.recipes.places import digits, hashed, listed
from concat_cli.core.data.source import Source
from concat_cli.core.errors import UserError

MMSEG = "coco_stuff164k/annotations"
SITES = {  # of their publishers
    "coco-stuff": "cocodataset.org",
    "voc": "host.robots.ox.ac.uk",
    "pascal-context": "roozbeh/pascal-context",
    "ade20k": "sceneparsing.csail.mit.edu",
    "cityscapes": "cityscapes-dataset.com",
    "coco-instances": "cocodataset.org",
}


@pytest.mark.parametrize("name", SITES)
def test_an_empty_folder(name: str, tmp_path: Path) -> None:
    find = RECIPES[name]
    with pytest.raises(UserError) as caught:
        find(tmp_path)
    assert str(tmp_path) in caught.value.what
    assert caught.value.what.count("missing: ") >= 4 and "found: " not in caught.value.what
    assert "of train" in caught.value.what and "of val" in caught.value.what
    assert SITES[name] in caught.value.hint
    with pytest.raises(UserError, match="no folder"):
        find(tmp_path / "nowhere")


@pytest.mark.parametrize(
    ("case", "gone", "words"),
    [
        ("coco-stuff", "stuffthingmaps/val2017", r"labels of val \(stuffthingmaps/val2017 or "),
        ("coco-stuff zips", "stuffthingmaps_trainval2017.zip", "missing: labels of train"),
        ("ade semantic", f"{CHALLENGE}annotations/validation", "labels of val .annotations/valid"),
        ("ade zip", "ADEChallengeData2016.zip", r"images of train \(images/training\)"),
        ("context mmseg", f"{CONTEXT_KIT}ImageSets", r"list of val \(ImageSets/SegmentationConte"),
        ("context mat 59", f"{CONTEXT_KIT}trainval", "labels of val .trainval"),
        ("cityscapes", "cityscapes/gtFine/val", "missing: labels of val .gtFine/val or gtFine_tr"),
        ("cityscapes zips", "gtFine_trainvaltest.zip", "missing: labels of train"),
        ("coco instances", "annotations", r"json of train \(annotations/instances_train2017.json"),
        ("voc trainaug", f"{KIT}ImageSets", "devkit of val .VOCdevkit/VOC2012/ImageSets"),
    ],
)
def test_a_missing_piece_is_listed(case: str, gone: str, words: str, tmp_path: Path) -> None:
    CASES[case].draw(tmp_path)
    path = tmp_path / gone
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(UserError, match=words) as caught:
        RECIPES[CASES[case].recipe](tmp_path, **CASES[case].options)
    assert "http" in caught.value.hint
    assert ("  found: " in caught.value.what) == (case != "ade zip")  # what is there is said, too


def test_a_tar_is_to_be_unpacked(tmp_path: Path) -> None:
    (tmp_path / "VOCtrainval_11-May-2012.tar").touch()
    with pytest.raises(UserError) as caught:
        voc.find(tmp_path)
    assert "Unpack VOCtrainval_11-May-2012.tar" in caught.value.hint


def test_one_part_without_the_other(tmp_path: Path) -> None:
    """Labels of train come with those of val: without its images the part is just not there."""
    truth = CASES["coco-stuff zips"].draw(tmp_path)
    (tmp_path / "train2017.zip").unlink()
    source = coco_stuff.find(tmp_path)
    assert set(source.parts) == {"val"} and len(list(source.parts["val"].items)) == 2
    assert len(truth["train"]) == 4


def test_a_damaged_zip_is_named(tmp_path: Path) -> None:
    CASES["cityscapes zips"].draw(tmp_path)
    path = tmp_path / "gtFine_trainvaltest.zip"
    path.write_bytes(path.read_bytes()[:500])
    with pytest.raises(UserError, match=r"gtFine_trainvaltest\.zip is no complete zip"):
        cityscapes.find(tmp_path)


@pytest.mark.parametrize(
    ("case", "label", "value"),
    [
        ("coco-stuff", "stuffthingmaps/val2017/000000000005.png", 25),  # an id that is not in use
        ("coco-stuff mmseg", f"{MMSEG}/val2017/000000000005_labelTrainIds.png", 171),
        ("voc trainaug", f"{KIT}SegmentationClass/2007_000005.png", 21),
        ("context mmseg", f"{CONTEXT_KIT}SegmentationClassContext/2008_000005.png", 60),
        ("ade semantic", f"{CHALLENGE}annotations/validation/ADE_val_00000005.png", 151),
        ("cityscapes labelIds", f"gtFine/val/{CITIES['val'][0]}_gtFine_labelIds.png", 34),
        ("cityscapes labelTrainIds", f"gtFine/val/{CITIES['val'][0]}_gtFine_labelTrainIds.png", 19),
    ],
)  # fmt: skip
def test_a_value_of_no_class_names_the_file(
    case: str, label: str, value: int, tmp_path: Path
) -> None:
    CASES[case].draw(tmp_path)
    assert (tmp_path / label).is_file()
    (tmp_path / label).write_bytes(grey(np.full((48, 64), value)))
    source = RECIPES[CASES[case].recipe](tmp_path)
    with pytest.raises(UserError) as caught:
        prepare(source, tmp_path, tmp_path / "out", Options("all_seen", processes=1))
    assert label in caught.value.what and f"value {value}" in caught.value.what
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_voc_needs_a_label_for_each_listed_image(tmp_path: Path) -> None:
    CASES["voc trainaug"].draw(tmp_path)
    shutil.rmtree(tmp_path / KIT / "SegmentationClassAug")
    with pytest.raises(UserError, match=r"2 of the 4 .* 2007_000003\.png") as caught:
        voc.find(tmp_path)
    assert "SBD" in caught.value.hint


def test_voc_without_sbd_says_so(tmp_path: Path) -> None:
    CASES["voc trainaug"].draw(tmp_path)
    (tmp_path / LISTS / "trainaug.txt").unlink()
    source = voc.find(tmp_path)
    assert len(list(source.parts["train"].items)) == 2
    assert "1,464 images of VOC alone instead of 10,582" in source.notes[0]


def test_vocs_own_labels_go_before_those_of_sbd(tmp_path: Path) -> None:
    CASES["voc trainaug"].draw(tmp_path)
    for stem in VOC["train"]:
        other = palette(np.full((48, 64), 9))
        (tmp_path / KIT / "SegmentationClassAug" / f"{stem}.png").write_bytes(other)
    folders = [item.label.split("/")[0] for item in voc.find(tmp_path).parts["train"].items]
    assert folders == ["SegmentationClass"] * 2 + ["SegmentationClassAug"] * 2


def test_the_background_of_voc(tmp_path: Path) -> None:
    CASES["voc d2"].draw(tmp_path)
    with pytest.raises(UserError, match="PASCAL VOC 2012"):  # it has thrown the background away
        voc.find(tmp_path, background=True)
    assert "background" not in voc.find(tmp_path).vocabulary.names


def test_labels_txt_must_fit(tmp_path: Path) -> None:
    CASES["context mat 59"].draw(tmp_path)
    right = {2: "aeroplane", 9: "bag", 308: "pottedplant"}
    names = load_class_list("pascal_context_459")
    lines = {number: names.names[names.index_of_id[number]] for number in names.ids} | right
    path = tmp_path / CONTEXT_KIT / "labels.txt"
    path.write_text("".join(f"{number}: {name}\n" for number, name in lines.items()))
    assert pascal_context.find(tmp_path).layout == "official"
    path.write_text(path.read_text().replace("308: pottedplant", "308: plant in a pot"))
    with pytest.raises(UserError, match="308 'plant in a pot'"):
        pascal_context.find(tmp_path)
    path.write_text("aeroplane\n")
    with pytest.raises(UserError, match="no list of"):
        pascal_context.find(tmp_path)


def test_ade_without_instances_says_so(tmp_path: Path) -> None:
    CASES["ade semantic"].draw(tmp_path)
    assert "mIoU, not PQ" in ade20k.find(tmp_path).notes[0]
    assert not ade20k.find(tmp_path, task="semantic").notes
    with pytest.raises(UserError, match="instances of train"):
        ade20k.find(tmp_path, task="panoptic")


def test_ade_semantic_although_there_are_instances(tmp_path: Path) -> None:
    CASES["ade instances"].draw(tmp_path)
    source = ade20k.find(tmp_path, task="semantic")
    assert source.tasks == ("semantic",) and source.layout == "official"


def test_a_json_of_another_data_set(tmp_path: Path) -> None:
    CASES["cityscapes JSON"].draw(tmp_path)
    path = tmp_path / "gtFine" / "cityscapes_panoptic_val.json"
    content = json.loads(path.read_text())
    content["categories"][0]["name"] = "cow"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"cityscapes_panoptic_val\.json lists the category 'cow'"):
        cityscapes.find(tmp_path)
    content["categories"][0]["name"] = "road"
    content["annotations"][0]["image_id"] = "ulm_1"
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="no panoptic JSON of this data set"):
        cityscapes.find(tmp_path)


@pytest.mark.parametrize(
    ("find", "options"),
    [
        (ade20k.find, {"classes": 151}),
        (ade20k.find, {"classes": 847, "task": "panoptic"}),
        (ade20k.find, {"task": "instance"}),
        (pascal_context.find, {"classes": 60}),
        (coco_instances.find, {"year": 2015}),
        (coco_instances.find, {"classes": 48}),
    ],
)
def test_options_that_do_not_exist(
    find: Callable[..., Source], options: dict[str, object], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        find(tmp_path, **options)
    assert caught.value.hint


def test_names_and_numbers(tmp_path: Path) -> None:
    assert digits("000000000139") == 139
    assert digits("2007_000032") == 2007000032
    assert digits("urban/street_12/ADE_val_00000017") == 17
    with pytest.raises(UserError, match="no number"):
        digits("street")
    assert hashed("aachen/aachen_0_19") == hashed("aachen_0_19") != hashed("ulm_0_19")
    assert 0 <= hashed("x") < 1 << 48
    path = tmp_path / "list.txt"
    path.write_text("\ufeff2007_1\n\n/JPEGImages/2007_2.jpg /Aug/2007_2.png\n2007_1\r\n")
    assert listed(str(path)) == ["2007_1", "2007_2"]
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="no list of names"):
        listed(str(path))


def test_the_root_may_be_the_archive_itself(tmp_path: Path) -> None:
    CASES["ade zip"].draw(tmp_path)
    source = ade20k.find(tmp_path / "ADEChallengeData2016.zip")
    assert source.layout == "official, zips in place" and set(source.parts) == {"train", "val"}
