"""What is missing or wrong in a data set is said by name, before anything is written."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from data_helpers import edit_json
from drawn_ade import CHALLENGE
from drawn_cityscapes import CITIES
from drawn_files import grey, palette
from drawn_layouts import CASES
from drawn_voc import CONTEXT_KIT, KIT, LISTS, VOC
from mini import Heard

from concat_cli.core.data.class_split import load_class_list
from concat_cli.core.data.dataset import PanopticDataset, read_dataset_info
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.recipes import (
    RECIPES,
    ade20k,
    cityscapes,
    coco,
    custom,
    pascal,
)
from concat_cli.core.prepare.recipes.layouts import digits, hashed, listed
from concat_cli.core.prepare.run import Options, Report, prepare
from concat_cli.core.prepare.source import Source

MMSEG = "coco_stuff164k/annotations"
IMAGE_ZIPS = (("train2017", "images"), ("val2017", "images"))
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
    find = RECIPES[name].find
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
        RECIPES[CASES[case].recipe].find(tmp_path, **CASES[case].options)
    assert "http" in caught.value.hint
    assert ("  found: " in caught.value.what) == (case != "ade zip")  # what is there is said, too


@pytest.mark.parametrize(
    ("recipe", "tars"),
    [
        ("voc", ["VOCtrainval_11-May-2012.tar"]),
        ("voc", ["benchmark.tgz", "my VOC.tar"]),
        ("pascal-context", ["VOCtrainval_03-May-2010.tar", "trainval.tar.gz"]),
        ("ade20k", ["annotations_instance.tar"]),
        ("coco", ["train2017.tar"]),
    ],
)
def test_a_tar_is_to_be_unpacked(recipe: str, tars: list[str], tmp_path: Path) -> None:
    """The command that the error prints does it."""
    for tar in tars:
        with tarfile.open(tmp_path / tar, "w:gz" if tar.endswith("gz") else "w") as archive:
            archive.add(__file__, f"inside/{tar}.txt")
    with pytest.raises(UserError) as caught:
        RECIPES[recipe].find(tmp_path)
    hint = caught.value.hint
    assert "http" in hint  # what else is needed
    command = hint[hint.index("tar -xf") :].partition("; ")[0]
    assert command.count("tar -xf ") == len(tars)
    subprocess.run(command, shell=True, check=True)
    assert {path.name for path in (tmp_path / "inside").iterdir()} == {f"{t}.txt" for t in tars}


def test_a_tar_one_folder_below(tmp_path: Path) -> None:
    (tmp_path / "in here").mkdir()
    path = tmp_path / "in here" / "VOCtrainval_11-May-2012.tar"
    path.touch()
    with pytest.raises(UserError) as caught:
        pascal.find(tmp_path)
    assert f"tar -xf '{path}' -C '{path.parent}'" in caught.value.hint


def test_a_category_that_is_unknown_is_not_dropped(tmp_path: Path) -> None:
    CASES["coco instances"].draw(tmp_path)
    path = tmp_path / "annotations" / "instances_train2017.json"

    def prepared(classes: int) -> Report:
        source = coco.find_instances(tmp_path, classes=classes)
        return prepare(source, tmp_path, tmp_path / "out", Options("all_seen", processes=1))

    def change(key: str, value: int) -> None:
        edit_json(path, lambda content: content["annotations"][1].update({key: value}))

    first, second = json.loads(path.read_text())["annotations"][:2]
    segments = prepared(80).parts["train"].totals.segments
    change("category_id", 777)
    for classes in (80, 65):
        with pytest.raises(UserError, match=r"unknown category \[777\]"):
            prepared(classes)
    change("category_id", second["category_id"])
    assert prepared(80).parts["train"].totals.segments == segments
    change("image_id", first["image_id"])
    change("id", first["id"])
    with pytest.raises(UserError, match=f"several annotations of the id {first['id']}"):
        prepared(80)


def test_a_tar_as_the_data_itself(tmp_path: Path) -> None:
    path = tmp_path / "VOCtrainval_11-May-2012.tar"
    path.touch()
    with pytest.raises(UserError) as caught:
        pascal.find(path)
    assert f"tar -xf {path} -C {tmp_path}" in caught.value.hint
    with pytest.raises(UserError) as caught:
        custom.find(tmp_path, images=path.name, json="x.json")
    assert f"tar -xf {path} -C {tmp_path}" in caught.value.hint


def test_ade_without_instances_says_how_to_get_them(tmp_path: Path) -> None:
    CASES["ade semantic"].draw(tmp_path)
    tar = tmp_path / "annotations_instance.tar"
    tar.touch()
    assert f"tar -xf {tar} -C {tmp_path}" in ade20k.find(tmp_path).notes[0]


# zips in a zip


@pytest.mark.parametrize("case", ["coco zips", "coco zips stored"])
def test_zips_in_a_zip_are_unpacked_once(case: str, tmp_path: Path) -> None:
    """Said with their size; what is read afterwards lies in plain zips, wherever the folder is."""
    CASES[case].draw(tmp_path)
    source, heard = coco.find(tmp_path), Heard()
    options = Options("all_seen", processes=1)
    for place, lines in ((tmp_path / "concat", 2), (tmp_path / "concat", 0)):
        heard.lines.clear()
        prepare(source, tmp_path, place, options, heard)
        assert sum("unpacking annotations/panoptic_" in line for line in heard.lines) == lines
    parts = json.loads((tmp_path / "concat" / "dataset.json").read_text())["parts"]
    for name, part in parts.items():
        assert re.fullmatch(
            r"zips/panoptic_\w+2017-[0-9a-f]{8}\.zip!panoptic_\w+2017", part["labels"]
        )
        assert part["images"] == f"../{'val' if name == 'val' else 'train'}2017.zip!" + (
            "val2017" if name == "val" else "train2017"
        )
    (tmp_path / "panoptic_annotations_trainval2017.zip").unlink()
    info = read_dataset_info(tmp_path / "concat")
    assert len(PanopticDataset(info.part("val"), info.vocabulary)[0].labels)


def test_the_annotations_of_coco_may_lie_in_their_folder(tmp_path: Path) -> None:
    truth = CASES["coco zips"].draw(tmp_path)
    (tmp_path / "annotations").mkdir()
    for name, folder in (("panoptic_annotations_trainval2017", "annotations"), *IMAGE_ZIPS):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / f"{name}.zip").rename(tmp_path / folder / f"{name}.zip")
    parts = coco.find(tmp_path).parts
    assert {name: len(list(part.items)) for name, part in parts.items()} == {
        name: len(known) for name, known in truth.items()
    }


@pytest.mark.parametrize("case", ["coco zips", "coco zips stored"])
def test_a_damaged_zip_in_a_zip_names_both(case: str, tmp_path: Path) -> None:
    CASES[case].draw(tmp_path)
    outer = tmp_path / "panoptic_annotations_trainval2017.zip"
    with zipfile.ZipFile(outer) as archive:
        inside = {name: archive.read(name) for name in archive.namelist()}
        kind = archive.infolist()[0].compress_type
    inside["annotations/panoptic_val2017.zip"] = inside["annotations/panoptic_val2017.zip"][:-200]
    with zipfile.ZipFile(outer, "w", kind) as archive:
        for name, data in inside.items():
            archive.writestr(name, data)
    wanted = r"trainval2017\.zip!annotations/panoptic_val2017\.zip is no complete zip"
    with pytest.raises(UserError, match=wanted):
        coco.find(tmp_path)


def test_coco_without_its_annotations(tmp_path: Path) -> None:
    CASES["coco zips"].draw(tmp_path)
    (tmp_path / "panoptic_annotations_trainval2017.zip").unlink()
    with pytest.raises(UserError) as caught:
        coco.find(tmp_path)
    for piece in ("json of train", "labels of train", "json of val", "labels of val"):
        assert f"missing: {piece}" in caught.value.what
    assert "found: images of train" in caught.value.what
    assert "Lists of segments: panoptic_annotations_trainval2017.zip" in caught.value.hint
    assert "panoptic_val2017.zip, which lie inside" in caught.value.hint
    assert "cocodataset.org" in caught.value.hint


def test_one_part_without_the_other(tmp_path: Path) -> None:
    """Labels of train come with those of val: without its images the part is just not there."""
    truth = CASES["coco-stuff zips"].draw(tmp_path)
    (tmp_path / "train2017.zip").unlink()
    source = coco.find_stuff(tmp_path)
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
    source = RECIPES[CASES[case].recipe].find(tmp_path)
    with pytest.raises(UserError) as caught:
        prepare(source, tmp_path, tmp_path / "out", Options("all_seen", processes=1))
    assert label in caught.value.what and f"value {value}" in caught.value.what
    assert not (tmp_path / "out" / "dataset.json").exists()


def test_voc_needs_a_label_for_each_listed_image(tmp_path: Path) -> None:
    CASES["voc trainaug"].draw(tmp_path)
    shutil.rmtree(tmp_path / KIT / "SegmentationClassAug")
    with pytest.raises(UserError, match=r"2 of the 4 .* 2007_000003\.png") as caught:
        pascal.find(tmp_path)
    assert "SBD" in caught.value.hint


def test_voc_without_sbd_says_so(tmp_path: Path) -> None:
    CASES["voc trainaug"].draw(tmp_path)
    (tmp_path / LISTS / "trainaug.txt").unlink()
    source = pascal.find(tmp_path)
    assert len(list(source.parts["train"].items)) == 2
    assert "1,464 images of VOC alone instead of 10,582" in source.notes[0]


def test_vocs_own_labels_go_before_those_of_sbd(tmp_path: Path) -> None:
    CASES["voc trainaug"].draw(tmp_path)
    for stem in VOC["train"]:
        other = palette(np.full((48, 64), 9))
        (tmp_path / KIT / "SegmentationClassAug" / f"{stem}.png").write_bytes(other)
    folders = [item.label.split("/")[0] for item in pascal.find(tmp_path).parts["train"].items]
    assert folders == ["SegmentationClass"] * 2 + ["SegmentationClassAug"] * 2


def test_the_background_of_voc(tmp_path: Path) -> None:
    CASES["voc d2"].draw(tmp_path)
    with pytest.raises(UserError, match="PASCAL VOC 2012"):  # it has thrown the background away
        pascal.find(tmp_path, background=True)
    assert "background" not in pascal.find(tmp_path).vocabulary.names


def test_labels_txt_must_fit(tmp_path: Path) -> None:
    CASES["context mat 59"].draw(tmp_path)
    right = {2: "aeroplane", 9: "bag", 308: "pottedplant"}
    names = load_class_list("pascal_context_459")
    lines = {number: names.names[names.index_of_id[number]] for number in names.ids} | right
    path = tmp_path / CONTEXT_KIT / "labels.txt"
    path.write_text("".join(f"{number}: {name}\n" for number, name in lines.items()))
    assert pascal.find_context(tmp_path).layout == "official"
    path.write_text(path.read_text().replace("308: pottedplant", "308: plant in a pot"))
    with pytest.raises(UserError, match="308 'plant in a pot'"):
        pascal.find_context(tmp_path)
    path.write_text("aeroplane\n")
    with pytest.raises(UserError, match="no list of"):
        pascal.find_context(tmp_path)


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
    with pytest.raises(UserError, match=r"`image_id` is .ulm_1., which no image has"):
        cityscapes.find(tmp_path)


@pytest.mark.parametrize(
    ("find", "options"),
    [
        (ade20k.find, {"classes": 151}),
        (ade20k.find, {"classes": 847, "task": "panoptic"}),
        (ade20k.find, {"task": "instance"}),
        (pascal.find_context, {"classes": 60}),
        (coco.find_instances, {"year": 2015}),
        (coco.find_instances, {"classes": 48}),
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
