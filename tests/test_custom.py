"""The user's own data in four forms, and lists of classes with what can be wrong in them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from drawn_labels import encode
from drawn_own import BOX, MAPS, NAMES, draw_own, halves, prepared, same

from concat_cli.core.errors import UserError
from concat_cli.core.prepare.class_values import read_classes
from concat_cli.core.prepare.recipes.custom import find
from concat_cli.core.prepare.run import Options, prepare_data


@pytest.fixture
def root(tmp_path: Path) -> Path:
    draw_own(tmp_path)
    return tmp_path


def maps_of(raw: np.ndarray, *but: int) -> list[tuple[str, np.ndarray]]:
    names = list(NAMES.values())
    return [(names[v], raw == v) for v in np.unique(raw) if v < 255 and v not in but]


@pytest.mark.parametrize("labels", [{"labels": "pngs"}, {}], ids=["named", "beside"])
def test_panoptic(root: Path, labels: dict[str, str]) -> None:
    if not labels:
        (root / "pngs").rename(root / "panoptic")
    found = prepared(root, images="photos", json="panoptic.json", **labels)
    assert len(found) == 3
    for name, raw in MAPS.items():
        assert same(found[name.replace("png", "jpg")], maps_of(raw))


def test_semantic(root: Path) -> None:
    found = prepared(root, images="photos", labels="maps", classes="classes.txt")
    for name, raw in MAPS.items():
        assert same(found[name.replace("png", "jpg")], maps_of(raw))
    source = find(root, images="photos", labels="maps", classes="classes.txt")
    assert source.tasks == ("semantic",) and source.vocabulary.is_thing == (
        True,
        True,
        False,
        False,
    )


def test_instances(root: Path) -> None:
    found = prepared(root, images="photos", json="instances.json")
    assert all(same(segments, [("cat", BOX)]) for segments in found.values())


def test_instances_over_maps(root: Path) -> None:
    """Cats come from the JSON, so that those of the map are void; the box covers what is there."""
    found = prepared(
        root, images="photos", json="instances.json", labels="maps", classes="classes.txt"
    )
    for name, raw in MAPS.items():
        below = [(label, mask & ~BOX) for label, mask in maps_of(raw, 0)]
        assert same(found[name.replace("png", "jpg")], [*below, ("cat", BOX)])
    given = {
        "images": "photos",
        "json": "instances.json",
        "labels": "maps",
        "classes": "classes.txt",
    }
    vocabulary = find(root, **given).vocabulary
    assert vocabulary.is_thing == (True, False, False, False)


def test_a_part_of_its_own_for_val(root: Path) -> None:
    (root / "vp").mkdir()
    (root / "vm").mkdir()
    (root / "vp" / "9.jpg").write_bytes((root / "photos" / "3.jpg").read_bytes())
    (root / "vm" / "9.png").write_bytes(encode(halves(1, 2)))
    found = prepared(
        root,
        images="photos",
        labels="maps",
        classes="classes.txt",
        val_images="vp",
        val_labels="vm",
    )
    assert list(found) == ["9.jpg"] and same(found["9.jpg"], maps_of(halves(1, 2)))


def test_an_image_keeps_its_id_when_others_are_added(root: Path) -> None:
    """And with it its part, as dev is cut by ids."""
    given = {"images": "photos", "labels": "maps", "classes": "classes.txt"}
    (root / "photos" / "x.jpg").write_bytes((root / "photos" / "3.jpg").read_bytes())
    before = {item.image: item.image_id for item in find(root, **given).parts["train"].items}
    (root / "photos" / "b.jpg").write_bytes((root / "photos" / "3.jpg").read_bytes())
    after = {item.image: item.image_id for item in find(root, **given).parts["train"].items}
    assert after | before == after and len(set(after.values())) == len(after) == 5


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({}, "where the images are"),
        ({"images": "photos"}, "their truth is missing"),
        ({"images": "none"}, "no folder .*none"),
        ({"images": "photos", "json": "none.json"}, r"no file .*none\.json"),
        ({"images": "photos", "labels": "maps"}, "their truth is missing"),
        ({"images": "photos", "json": "instances.json", "labels": "maps"}, "the values in .*maps"),
        (
            {"images": "photos", "json": "panoptic.json", "labels": "pngs", "classes": "c.txt"},
            "has its own classes",
        ),
        ({"images": "photos", "json": "classes.txt"}, r"classes\.txt is not valid JSON"),
        (
            {"images": "photos", "json": "instances.json", "classes": "classes.txt"},
            "--classes is for maps, and none are given",
        ),
        (
            {"images": "photos", "labels": "maps", "classes": "none.txt"},
            r"no file .*none\.txt",
        ),
        (
            {"images": "photos", "json": "instances.json", "val_images": "photos",
             "val_json": "panoptic.json", "val_labels": "pngs"},
            "instances and val is panoptic|panoptic and val is instances|train is",
        ),
    ],
    ids=range(11),
)  # fmt: skip
def test_what_does_not_fit_says_what_to_give(root: Path, given: dict, words: str) -> None:
    with pytest.raises(UserError, match=words) as caught:
        find(root, **given)
    assert caught.value.hint


def test_what_is_wrong_in_the_files_is_named(root: Path) -> None:
    (root / "classes.txt").write_text("cat\ncow\nsky\n")
    with pytest.raises(UserError, match=r"maps/.*\.png has the value 3"):
        prepared(root, images="photos", labels="maps", classes="classes.txt")
    (root / "classes.txt").write_text("dog\ncow\nsky\nwall\n")
    with pytest.raises(UserError, match="no class 'cat', which the JSON has"):
        find(root, images="photos", labels="maps", classes="classes.txt", json="instances.json")
    (root / "maps" / "3.png").unlink()
    with pytest.raises(UserError, match=r"Missing: .*maps/3\.png"):
        prepared(root, images="photos", labels="maps", classes="classes.txt")
    (root / "maps" / "a" / "1.tif").touch()
    with pytest.raises(UserError, match=r"1\.png and a/1\.tif|1\.tif and a/1\.png"):
        find(root, images="photos", labels="maps", classes="classes.txt")


@pytest.mark.parametrize(
    ("text", "values", "void"),
    [
        ("cat\ncow\n", [0, 1], (255, 65535)),
        ("# all\n\ncat, kitten\nsky : stuff  # blue\n", [0, 1], (255, 65535)),
        ("void\ncat\ncow\n", [1, 2], (0, 255, 65535)),
        ("cat = 7\nsky : stuff = 255\nvoid = 0\n", [7, 255], (0, 65535)),
        ("VOID = 3\ncat = 0\nvoid = 255\n", [0], (3, 255, 65535)),
    ],
)
def test_values_of_classes(tmp_path: Path, text: str, values: list[int], void: tuple) -> None:
    (tmp_path / "c.txt").write_text(text)
    found = read_classes(tmp_path / "c.txt")
    vocabulary = found.vocabulary
    assert list(vocabulary.ids) == values == list(found.table) and found.void == void
    assert not found.coloured
    assert vocabulary.names[0] == "cat" and "void" not in vocabulary.names


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cat = 1\ncow\n", "1 of 2 lines have a value"),
        ("cat = 1\ncow = 1\n", "two lines have the value 1"),
        ("cat = 1\nvoid = 1\n", "two lines have the value 1"),
        ("cat = 70000\n", "70000 is no value"),
        ("cat\ncat\n", "stands twice"),
        ("", "names no class"),
        ("void\n", "names no class"),
    ],
)
def test_lists_of_classes_that_cannot_be(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "c.txt").write_text(text)
    with pytest.raises(UserError, match=words):
        read_classes(tmp_path / "c.txt")


def test_lists_in_other_forms(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("- cat\n- sky : stuff\n")
    assert read_classes(tmp_path / "c.yaml").vocabulary.ids == (0, 1)
    with pytest.raises(UserError, match="no vocabulary file"):
        read_classes(tmp_path / "none.txt")


def test_places_are_also_seen_from_the_current_folder(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Below ROOT first; also the class split."""
    (root / "split.yaml").write_text("unseen: [cow]\n")
    given = {"images": "photos", "labels": "maps", "classes": "classes.txt"}
    options = Options("split.yaml", processes=1)
    report = prepare_data("custom", root, None, options, **given)
    assert report.class_split == "split" and not report.vocabulary.entries[1].seen
    monkeypatch.chdir(root)
    (root / "empty").mkdir()
    again = prepare_data("custom", root / "empty", root / "out", options, **given)
    assert again.vocabulary == report.vocabulary and again.parts == report.parts
    with pytest.raises(UserError, match=r"no folder .*empty/none, and none at .*none"):
        find(root / "empty", images="none")


def test_a_share_becomes_val(root: Path) -> None:
    given = {"images": "photos", "json": "panoptic.json", "labels": "pngs"}
    whole = find(root, **given).parts["train"].items
    cuts = [find(root, **given, val_share=0.4, seed=seed) for seed in (0, 0, *range(1, 9))]
    names = [{name: [i.image for i in p.items] for name, p in c.parts.items()} for c in cuts]
    assert names[0] == names[1] and len({one["val"][0] for one in names}) == len(list(whole))
    for one in names:
        assert sorted(one["train"] + one["val"]) == sorted(item.image for item in whole)
    assert "val: 1 of 3 images are cut from train" in " ".join(cuts[0].notes)
    for wrong in (-0.1, 1.0, 0.9):
        with pytest.raises(UserError, match="cannot be cut from 3 images"):
            find(root, **given, val_share=wrong)
    with pytest.raises(UserError, match="val is given"):
        find(
            root,
            **given,
            val_images="photos",
            val_json="panoptic.json",
            val_labels="pngs",
            val_share=0.4,
        )
