"""Files on disk become a data set without unseen segments in training, or a clear refusal."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_helpers import CATEGORIES, PHOTOS, edit_json, official_part, simple_part, write_part
from drawn_labels import KINDS, VOCABULARY, draw_part
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mini import Heard
from prepare_helpers import CAT, COW, SKY, coco, contents, draw_root, write_split

from concat_cli.core import files
from concat_cli.core.data.dataset import PanopticDataset, read_dataset_info
from concat_cli.core.data.index import Lines
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.run import Options, check_writable, prepare
from concat_cli.core.prepare.source import Source


@pytest.fixture
def split(tmp_path: Path) -> str:
    return write_split(tmp_path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return draw_root(tmp_path)


def pack(root: Path) -> Path:
    """The official layout as its zips, in another folder."""
    packed = root.parent / "packed"
    (packed / "annotations").mkdir(parents=True)
    for part in ("train", "val"):
        for folder, name in ((root, f"{part}2017"), (root / "annotations", f"panoptic_{part}2017")):
            place = packed / folder.relative_to(root) / f"{name}.zip"
            with zipfile.ZipFile(place, "w") as archive:
                for path in (folder / name).iterdir():
                    archive.write(path, f"{name}/{path.name}")
        shutil.copy(root / f"annotations/panoptic_{part}2017.json", packed / "annotations")
    return packed


@pytest.mark.parametrize("zipped", [False, True], ids=["folders", "zips"])
def test_official_layout(root: Path, split: str, zipped: bool) -> None:
    root = pack(root) if zipped else root
    report = coco(root, split, dev=3)
    assert report.source.layout == ("official, zips in place" if zipped else "official")
    assert report.out == root / "concat" and report.class_split == "no_cow"
    taken = report.taken
    assert (taken.images_listed, taken.images_dropped, taken.segments_dropped) == (20, 5, 10)
    assert taken.images_by_class == {"cow": 5} and taken.pixels_dropped == 5 * 24 * 32
    totals = {name: part.totals for name, part in report.parts.items()}
    assert [totals[p].images for p in ("train", "dev", "val")] == [12, 3, 4]
    assert totals["val"].segments == 4 and totals["train"].segments == 24
    info = read_dataset_info(root / "concat")
    assert info.vocabulary.unseen_indices == (1,) and info.class_split == "no_cow"
    assert info.tasks == ("panoptic", "semantic", "instance")
    assert info.protocol["unseen_pixels"] == "drop" and info.protocol["images_dropped"] == 5
    parts = {name: PanopticDataset(info.part(name), info.vocabulary) for name in info.parts}
    ids = {name: {r.image_id for r in part.records} for name, part in parts.items()}
    assert ids["train"] | ids["dev"] == {i for i in range(1, 21) if i % 4}
    assert not ids["train"] & ids["dev"] and ids["val"] == {100, 101, 102, 103}
    for name in ("train", "dev"):
        for sample in map(parts[name].__getitem__, range(3)):
            assert 1 not in sample.labels and len(sample.labels) == 2
    assert parts["val"][1].labels.tolist() == [1]


def test_an_unseen_crowd_counts_too(root: Path, split: str) -> None:
    def crowd(content: dict) -> None:
        for annotation in content["annotations"]:
            for segment in annotation["segments_info"]:
                segment["iscrowd"] = int(segment["category_id"] == COW)

    edit_json(official_part(root, "train").index, crowd)
    report = coco(root, split)
    assert report.taken.images_dropped == 5 and report.parts["train"].totals.crowd == 0
    report = coco(root, split, unseen_pixels="void")
    assert report.taken.segments_void == 5 and report.parts["train"].totals.crowd == 0


def test_void_keeps_every_image_and_no_unseen_segment(root: Path, split: str) -> None:
    report = coco(root, split, unseen_pixels="void", dev=4)
    assert (report.taken.images_dropped, report.taken.segments_void) == (0, 5)
    info = read_dataset_info(root / "concat")
    assert info.protocol["pixels_void"] == report.taken.pixels_void > 0
    seen = {c["id"] for c in CATEGORIES} - {COW}
    found = 0
    for name in ("train", "dev"):
        lines = Lines(root / "concat" / "index" / f"{name}.jsonl")
        assert {c for row in lines for c in row.categories} <= seen
        dataset = PanopticDataset(info.part(name), info.vocabulary, keep_crowd=True)
        for record, sample in zip(
            dataset.records, map(dataset.__getitem__, range(99)), strict=False
        ):
            assert record.hidden == (record.image_id % 4 == 0)
            assert len(sample.labels) == 2 - record.hidden and 1 not in sample.labels
            found += 1
    assert found == 20 and 1 in PanopticDataset(info.part("val"), info.vocabulary)[1].labels


DRAWN = settings(
    max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("unseen_pixels", ["drop", "void"])
@DRAWN
@given(
    kind=st.sampled_from(sorted(KINDS)),
    seed=st.integers(0, 999),
    unseen=st.sets(st.sampled_from(VOCABULARY.names), max_size=2),
)
def test_no_unseen_pixel_reaches_training_or_dev(
    tmp_path_factory: pytest.TempPathFactory,
    unseen_pixels: Any,
    kind: str,
    seed: int,
    unseen: set[str],
) -> None:
    """Whatever the kind of labels: what training sees is the truth with unseen classes void."""
    root = tmp_path_factory.mktemp("drawn")
    part, truths = draw_part(root, KINDS[kind], 12, seed, zipped=seed % 2 == 0)
    source = Source(
        "own", "drawn", VOCABULARY, ("semantic",), {"train": part}, "all_seen", single=True
    )
    (root / "own.yaml").write_text(json.dumps({"unseen": sorted(unseen)}))
    how = Options(str(root / "own.yaml"), unseen_pixels, dev=2, processes=1)
    try:
        prepare(source, root, root / "out", how)
    except UserError as error:
        assert "is left" in error.what or "dev cannot take" in error.what
        return
    info = read_dataset_info(root / "out")
    gone = {entry.id for entry in info.vocabulary.entries if not entry.seen}
    held = set()
    for name in ("train", "dev", "val"):
        dataset = PanopticDataset(info.part(name), info.vocabulary, keep_crowd=True)
        for index in range(len(dataset)):
            sample = dataset[index]
            wanted = np.full(sample.segment_map.shape, -1)
            for category, _, mask in truths[sample.image_id]:
                if name == "val" or category not in gone:
                    wanted[mask] = category
            ids = np.array([-1, *(info.vocabulary.ids[label] for label in sample.labels)])
            assert (ids[sample.segment_map] == wanted).all()
            if name != "val":
                held.add(sample.image_id)
    clean = {i for i, truth in truths.items() if not gone & {category for category, *_ in truth}}
    assert held == (clean if unseen_pixels == "drop" else truths.keys())


def test_the_folder_can_be_moved(root: Path, split: str, tmp_path: Path) -> None:
    for place in (root, pack(root)):
        coco(place, split)
        moved = tmp_path / f"{place.name}-elsewhere"
        shutil.move(place, moved)
        info = read_dataset_info(moved / "concat")
        assert PanopticDataset(info.part("val"), info.vocabulary)[0].image_id == 100


def test_dev_is_cut_by_image_id_not_by_order(root: Path, split: str) -> None:
    coco(root, split, dev=4)
    first = {row.id for row in Lines(root / "concat/index/dev.jsonl")}

    def turn(content: dict) -> None:
        content["images"].reverse()
        content["annotations"].reverse()

    edit_json(official_part(root, "train").index, turn)
    coco(root, split, dev=4)
    assert len(first) == 4 and first == {row.id for row in Lines(root / "concat/index/dev.jsonl")}
    with pytest.raises(UserError, match="15 of 15"):
        coco(root, split, dev=15)


def test_simple_layout_and_few_images(tmp_path: Path, split: str) -> None:
    root = tmp_path / "own"
    write_part(simple_part(root), {1: [CAT], 2: [SKY], 3: [COW]})
    heard = Heard()
    report = coco(root, split, tmp_path / "out", heard)
    images = {name: part.totals.images for name, part in report.parts.items()}
    assert images == {"train": 2, "dev": 2, "val": 3}
    assert "serves as train and as val" in heard.lines[1]
    assert "dev is a copy of train" in heard.lines[2]
    info = read_dataset_info(tmp_path / "out")
    assert PanopticDataset(info.part("train"), info.vocabulary)[1].labels.tolist() == [2]


def test_val_alone_serves_as_both(root: Path, split: str) -> None:
    shutil.rmtree(root / "train2017")  # its JSON is still there, as in the official archive
    with pytest.raises(UserError, match=r"holds val of coco .* of train were not found") as caught:
        coco(root, split)
    assert "--one-part" in caught.value.hint and not (root / "concat" / "dataset.json").exists()
    report = coco(root, split, one_part=True)
    assert report.taken.images_listed == 4 and report.parts["train"].totals.images == 2


@pytest.mark.parametrize("skip_bad", [False, True])
def test_a_part_without_an_image_is_refused(root: Path, split: str, skip_bad: bool) -> None:
    for path in (root / "val2017").iterdir():
        path.unlink()
    with pytest.raises(UserError, match="No image of val is left" if skip_bad else "Missing"):
        coco(root, split, skip_bad=skip_bad)
    assert not (root / "concat" / "dataset.json").exists()


def test_another_prepared_data_set_is_not_overwritten(root: Path, split: str) -> None:
    coco(root, split)
    header = root / "concat" / "dataset.json"
    edit_json(header, lambda content: content.update(name="other"))
    before = contents(root / "concat")
    with pytest.raises(UserError, match=r"dataset\.json is .* data set 'other'") as caught:
        coco(root, split)
    assert "--out" in caught.value.hint and before == contents(root / "concat")
    header.write_text("{broken")
    assert not coco(root, split).unchanged


def test_an_archive_as_the_root(root: Path) -> None:
    archive = root / "train2017.zip"
    archive.touch()
    with pytest.raises(UserError, match=r"train2017\.zip is a file") as caught:
        coco(archive)
    assert str(root) in caught.value.hint and "--out" in caught.value.hint
    with pytest.raises(UserError, match=r"train2017\.zip is no complete zip"):
        coco(archive, out=root / "out")


def test_nothing_left_to_train_on(tmp_path: Path, split: str) -> None:
    root = tmp_path / "cows"
    write_part(simple_part(root), {1: [COW], 2: [CAT, COW]})
    with pytest.raises(UserError) as caught:
        coco(root, split)
    assert "2 images" in caught.value.what and "cow (2)" in caught.value.what
    assert "--class-split all_seen" in caught.value.hint
    assert "--unseen-pixels void" in caught.value.hint
    assert not (root / "concat" / "dataset.json").exists()
    assert coco(root).parts["train"].totals.images == 2
    assert coco(root, split, unseen_pixels="void").parts["train"].totals.segments == 1
    write_part(simple_part(root), {1: [COW], 2: [COW]})
    with pytest.raises(UserError, match="No training segment is left"):
        coco(root, split, unseen_pixels="void")


def test_a_failed_write_leaves_the_old_data_set(root: Path, split: str, monkeypatch) -> None:
    coco(root, split)
    before = contents(root / "concat")
    monkeypatch.setattr(files, "write_json", _full_disk)
    with pytest.raises(UserError, match="No space left"):
        coco(root)
    assert before == contents(root / "concat")


def _full_disk(*_: object, **__: object) -> str:
    raise OSError(28, "No space left on device")


def test_a_read_only_root_needs_out(root: Path, split: str, tmp_path: Path, monkeypatch) -> None:
    """Said at once, before anything is read; --out makes it work, and the root stays untouched."""
    before = contents(root)

    def read_only(dir: Path) -> Any:
        if Path(dir).is_relative_to(root):
            raise OSError(30, "Read-only file system")
        return open(os.devnull)  # noqa: PTH123

    monkeypatch.setattr("concat_cli.core.prepare.run.tempfile.TemporaryFile", read_only)
    with pytest.raises(UserError, match="Read-only") as caught:
        coco(root, split)
    assert "--out" in caught.value.hint
    coco(root, split, out=tmp_path / "out")
    assert before == contents(root)
    info = read_dataset_info(tmp_path / "out")
    assert info.part("train").images == root / "train2017"


def test_an_unwritable_place(tmp_path: Path) -> None:
    check_writable(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot write") as caught:
        check_writable(tmp_path / "file" / "out")
    assert "--out" in caught.value.hint


@pytest.mark.skipif(not PHOTOS.is_dir(), reason="the two COCO photos are not here")
def test_two_real_photos(tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        coco(PHOTOS, "coco_panoptic_119_14", tmp_path / "out")
    assert "2 images" in caught.value.what
    for name in ("tree-merged", "sky-other-merged", "grass-merged"):
        assert name in caught.value.what
    report = coco(PHOTOS, "all_seen", tmp_path / "out", decode=True)
    assert len(report.vocabulary) == 133 and report.parts["train"].totals.images == 2
    info = read_dataset_info(tmp_path / "out")
    dataset = PanopticDataset(info.part("train"), info.vocabulary)
    assert [dataset[i].image.shape for i in (0, 1)] == [(427, 640, 3), (360, 640, 3)]
    areas = {
        s["id"]: s["area"]
        for a in json.loads((PHOTOS / "panoptic.json").read_text())["annotations"]
        for s in a["segments_info"]
    }
    rows = list(Lines(tmp_path / "out/index/train.jsonl"))
    assert {i: n for row in rows for i, n in zip(row.ids, row.areas, strict=True)} == areas
    void = coco(PHOTOS, "coco_panoptic_119_14", tmp_path / "void", unseen_pixels="void")
    assert void.taken.segments_void == 6 and replace(void.taken, pixels_void=0) != void.taken
