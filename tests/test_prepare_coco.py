"""COCO panoptic files become a data set without unseen segments in training, or a clear refusal."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from data_helpers import PHOTOS, edit_json, official_part, simple_part, write_part
from PIL import Image

from concat_cli.core import files
from concat_cli.core.data.class_split import class_split_names, load_class_split
from concat_cli.core.data.coco_layout import CocoPaths
from concat_cli.core.data.dataset import PanopticDataset, read_dataset_info
from concat_cli.core.data.prepare_coco import check_writable, prepare_coco
from concat_cli.core.errors import UserError

CAT, COW, SKY, WALL = 3, 7, 20, 21


class Said:
    """Keeps what the core says."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def say(self, message: str) -> None:
        self.messages.append(message)

    def track(self, items, what: str, total: int | None = None):
        return iter(items)

    def status(self, text: str) -> None:
        raise AssertionError("not used here")


@pytest.fixture
def split(tmp_path: Path) -> str:
    path = tmp_path / "no_cow.yaml"
    path.write_text("unseen: [cow]\n")
    return str(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """20 training images, of which every fourth holds a cow, and 4 val images."""
    root = tmp_path / "coco"
    train = {i: [CAT, COW if i % 4 == 0 else WALL] for i in range(1, 21)}
    write_part(official_part(root, "train"), train)
    write_part(official_part(root, "val"), {100: [CAT], 101: [COW], 102: [SKY, COW], 103: []})
    return root


def _files(folder: Path) -> list[str]:
    return sorted(str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file())


def test_official_layout(root: Path, split: str) -> None:
    report = prepare_coco(root, class_split=split, dev_share=0.2)
    assert report.out == root / "concat" and report.class_split == "no_cow"
    assert (report.listed, report.dropped, report.dropped_by) == (20, 5, {"cow": 5})
    assert (report.seen, report.unseen) == (3, ("cow",))
    assert [report.parts[p].images for p in ("train", "dev", "val")] == [12, 3, 4]
    assert report.parts["val"].segments == 4 and report.parts["train"].segments == 24
    info = read_dataset_info(root / "concat")
    assert info.vocabulary.unseen_indices == (1,) and info.class_split == "no_cow"
    parts = {name: PanopticDataset(info.part(name), info.vocabulary) for name in info.parts}
    ids = {name: {r.image_id for r in part.records} for name, part in parts.items()}
    assert ids["train"] | ids["dev"] == {i for i in range(1, 21) if i % 4}
    assert not ids["train"] & ids["dev"] and ids["val"] == {100, 101, 102, 103}
    for name in ("train", "dev"):  # no unseen label or segment
        assert all(
            1 not in part_sample.labels for part_sample in map(parts[name].__getitem__, range(3))
        )
    assert parts["val"][1].labels.tolist() == [1]


def test_an_unseen_crowd_drops_the_image_too(root: Path, split: str) -> None:
    def crowd(content: dict) -> None:
        for annotation in content["annotations"]:
            for segment in annotation["segments_info"]:
                segment["iscrowd"] = int(segment["category_id"] == COW)

    edit_json(official_part(root, "train").json, crowd)
    report = prepare_coco(root, class_split=split)
    assert report.dropped == 5 and report.parts["train"].crowd == 0


def test_repeating_gives_the_same_and_leaves_nothing_else(root: Path, split: str) -> None:
    prepare_coco(root, class_split=split)
    before = {name: (root / "concat" / name).read_bytes() for name in _files(root / "concat")}
    assert sorted(before) == [
        "annotations/panoptic_dev_seen.json",
        "annotations/panoptic_train_seen.json",
        "dataset.json",
    ]
    prepare_coco(root, class_split=split)
    assert before == {
        name: (root / "concat" / name).read_bytes() for name in _files(root / "concat")
    }


def test_the_folder_can_be_moved(root: Path, split: str, tmp_path: Path) -> None:
    prepare_coco(root, class_split=split)
    moved = tmp_path / "elsewhere"
    shutil.move(root, moved)
    info = read_dataset_info(moved / "concat")
    assert PanopticDataset(info.part("val"), info.vocabulary)[0].image_id == 100


def test_dev_is_cut_by_image_id_not_by_order(root: Path, split: str) -> None:
    prepare_coco(root, class_split=split, dev=4)
    dev = root / "concat" / "annotations" / "panoptic_dev_seen.json"
    first = {image["id"] for image in json.loads(dev.read_text())["images"]}

    def turn(content: dict) -> None:
        content["images"].reverse()
        content["annotations"].reverse()

    edit_json(official_part(root, "train").json, turn)
    prepare_coco(root, class_split=split, dev=4)
    assert len(first) == 4 and first == {i["id"] for i in json.loads(dev.read_text())["images"]}
    with pytest.raises(UserError, match="15 of 15"):
        prepare_coco(root, class_split=split, dev=15)


def test_simple_layout_and_few_images(tmp_path: Path, split: str) -> None:
    root = tmp_path / "own"
    write_part(simple_part(root), {1: [CAT], 2: [SKY], 3: [COW]})
    said = Said()
    report = prepare_coco(root, tmp_path / "out", split, progress=said)
    assert {name: part.images for name, part in report.parts.items()} == {
        "train": 2,
        "dev": 2,
        "val": 3,
    }
    assert "serves as train and as val" in said.messages[0]
    assert "dev is a copy of train" in said.messages[1]
    info = read_dataset_info(tmp_path / "out")
    assert PanopticDataset(info.part("train"), info.vocabulary)[1].labels.tolist() == [2]


def test_val_alone_serves_as_both(root: Path, split: str) -> None:
    shutil.rmtree(root / "train2017")  # its JSON is still there, as in the official archive
    report = prepare_coco(root, class_split=split)
    assert report.listed == 4 and report.parts["train"].images == 2


def test_given_paths(root: Path, split: str, tmp_path: Path) -> None:
    other = write_part(simple_part(tmp_path / "other"), {i: [WALL] for i in range(200, 212)})
    paths = CocoPaths(other.images, other.json, other.pngs)
    report = prepare_coco(root, tmp_path / "out", split, train=paths)
    assert report.listed == 12 and report.parts["val"].images == 4
    with pytest.raises(UserError, match="nowhere"):
        prepare_coco(root, tmp_path / "out", split, train=CocoPaths(images=Path("nowhere")))


def test_no_training_image_left(tmp_path: Path, split: str) -> None:
    root = tmp_path / "cows"
    write_part(simple_part(root), {1: [COW], 2: [CAT, COW]})
    with pytest.raises(UserError) as caught:
        prepare_coco(root, class_split=split)
    assert "2 images" in caught.value.what and "cow (2)" in caught.value.what
    assert "--class-split all_seen" in caught.value.hint
    assert not (root / "concat").exists()
    assert prepare_coco(root, class_split="all_seen").parts["train"].images == 2


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

    edit_json(official_part(root, "val").json, change)


def _segment_only_in_png(root: Path) -> None:
    def change(content: dict) -> None:
        content["annotations"][1]["segments_info"].pop()

    edit_json(official_part(root, "val").json, change)


def _unknown_category(root: Path) -> None:
    def change(content: dict) -> None:
        content["annotations"][0]["segments_info"][0]["category_id"] = 77

    edit_json(official_part(root, "train").json, change)


def _other_categories(root: Path) -> None:
    def change(content: dict) -> None:
        content["categories"][0]["name"] = "dog"

    edit_json(official_part(root, "val").json, change)


def _missing_image(root: Path) -> None:
    (root / "train2017" / "000000000003.png").unlink()
    (root / "train2017" / "000000000005.png").unlink()


def _packed_pngs(root: Path) -> None:
    shutil.rmtree(root / "annotations" / "panoptic_train2017")
    (root / "annotations" / "panoptic_train2017.zip").touch()


def _no_json(root: Path) -> None:
    official_part(root, "val").json.unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (_corrupt_image, "train2017/000000000003.png"),
        (_corrupt_png, "panoptic_val2017/000000000101.png"),
        (_wrong_image_size, "000000000005.png is 9 x 9 pixels"),
        (_segment_only_in_json, "12345 is not in the PNG"),
        (_segment_only_in_png, "not in the JSON"),
        (_unknown_category, r"unknown category \[77\]"),
        (_other_categories, "different categories"),
        (_missing_image, "000000000003.png and 1 more files"),
        (_packed_pngs, "The pngs of .* are missing"),
        (_no_json, r"The json of .*/panoptic_val2017\.json"),
    ],
)
def test_damage_is_named_and_nothing_written(root: Path, split: str, damage, words: str) -> None:
    damage(root)
    with pytest.raises(UserError, match=words) as caught:
        prepare_coco(root, class_split=split)
    assert caught.value.hint and not (root / "concat").exists()


def test_a_truncated_image_is_found_by_decoding(root: Path, split: str) -> None:
    path = root / "train2017" / "000000000003.png"
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "JPEG")
    path.write_bytes(path.read_bytes()[:-200])
    prepare_coco(root, class_split=split)
    with pytest.raises(UserError, match=r"000000000003\.png"):
        prepare_coco(root, class_split=split, decode=True)


def test_without_verify_only_the_files_are_looked_for(root: Path, split: str) -> None:
    _corrupt_image(root)
    assert prepare_coco(root, class_split=split, verify=False).dropped == 5


def test_wrong_layout_says_what_was_looked_for(tmp_path: Path) -> None:
    (tmp_path / "pictures").mkdir()
    with pytest.raises(UserError) as caught:
        prepare_coco(tmp_path)
    assert "train2017" in caught.value.what and "pictures" in caught.value.what
    with pytest.raises(UserError, match="no folder"):
        prepare_coco(tmp_path / "none")


def test_a_failed_write_leaves_the_old_data_set(root: Path, split: str, monkeypatch) -> None:
    prepare_coco(root, class_split=split)
    before = {name: (root / "concat" / name).read_bytes() for name in _files(root / "concat")}
    monkeypatch.setattr(json, "dumps", _full_disk)
    with pytest.raises(UserError, match="No space left"):
        prepare_coco(root, class_split="all_seen")
    assert before == {
        name: (root / "concat" / name).read_bytes() for name in _files(root / "concat")
    }


def _full_disk(*_: object, **__: object) -> str:
    raise OSError(28, "No space left on device")


def test_an_unwritable_place(tmp_path: Path, monkeypatch) -> None:
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write") as caught:
        check_writable(tmp_path / "file" / "out")
    assert "--out" in caught.value.hint
    assert files.write_error(Path("x"), PermissionError(13, "Permission denied")).hint


NAMES = [f"class {i}" for i in range(119)]


def test_the_published_split() -> None:
    assert class_split_names() == ["all_seen", "coco_panoptic_119_14"]
    unseen = ["cow", "giraffe", "suitcase", "frisbee", "skateboard", "carrot", "scissors"]
    unseen += ["cardboard", "playingfield", "river", "road"]
    unseen += ["tree-merged", "sky-other-merged", "grass-merged"]
    assert load_class_split("coco_panoptic_119_14", [*NAMES, *unseen]) == tuple(unseen)
    with pytest.raises(UserError, match="119 seen and 14 unseen"):
        load_class_split("coco_panoptic_119_14", [*NAMES[1:], *unseen])
    with pytest.raises(UserError, match="grass-merged"):
        load_class_split("coco_panoptic_119_14", [*NAMES, *unseen[:-1]])


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("unseen: [dog]", "does not have: dog"),
        ("unseen: cow", "no list"),
        ("[cow]", "no list"),
        ("unseen: [cow", "Cannot read"),
        ("unseen: [cow, cow]", "twice"),
        ("unseen: [cow]\nsource: me", "unknown keys"),
        ("unseen: [cow, cat]", "no seen class"),
    ],
)
def test_bad_split_files(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises(UserError, match=words):
        load_class_split(path, ["cow", "cat"])


def test_split_names_and_missing_classes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="Did you mean 'coco_panoptic_119_14'") as caught:
        load_class_split("coco_panoptic_119", ["cow"])
    assert "all_seen" in caught.value.hint
    path = tmp_path / "own.yaml"
    path.write_text("unseen: [dog, cow]\nallow_missing: true\n")
    assert load_class_split(path, ["cat", "cow"]) == ("cow",)
    with pytest.raises(UserError) as caught:
        path.write_text("unseen: [cows]\n")
        load_class_split(path, ["cat", "cow"])
    assert "'cow'" in caught.value.hint


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the two COCO photos are not here")
def test_two_real_photos(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        prepare_coco(PHOTOS, tmp_path / "out")
    assert "2 images" in caught.value.what
    for name in ("tree-merged", "sky-other-merged", "grass-merged"):
        assert name in caught.value.what
    report = prepare_coco(PHOTOS, tmp_path / "out", "all_seen", decode=True)
    assert report.seen == 133 and report.parts["train"].images == 2
    info = read_dataset_info(tmp_path / "out")
    dataset = PanopticDataset(info.part("train"), info.vocabulary)
    assert [sample.image.shape for sample in (dataset[0], dataset[1])] == [
        (427, 640, 3),
        (360, 640, 3),
    ]
    categories = json.loads((PHOTOS / "panoptic.json").read_text())["categories"]
    names = [category["name"] for category in categories]
    assert len(load_class_split("coco_panoptic_119_14", names)) == 14
