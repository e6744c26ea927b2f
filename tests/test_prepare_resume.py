"""What has been checked is not checked again: repeated, after a kill, for another protocol."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from data_helpers import edit_json, official_part, simple_part, write_part
from mini import Heard, Interrupt, KilledError
from PIL import Image
from prepare_helpers import CAT, COW, SKY, WALL, coco, contents, draw_root, write_split

from concat_cli.core.data.index import Lines
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.run import Options, prepare_data
from concat_cli.core.prepare.verify import CHUNK


@pytest.fixture
def split(tmp_path: Path) -> str:
    return write_split(tmp_path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return draw_root(tmp_path)


def test_repeating_writes_nothing(root: Path, split: str) -> None:
    assert not coco(root, split).unchanged
    before = contents(root / "concat")
    assert sorted(before) == [
        "checked/train.jsonl",
        "checked/val.jsonl",
        "dataset.json",
        "index/dev.jsonl",
        "index/train.jsonl",
        "index/val.jsonl",
    ]
    times = {name: (root / "concat" / name).stat().st_mtime_ns for name in before}
    assert coco(root, split).unchanged
    assert before == contents(root / "concat")
    assert times == {name: (root / "concat" / name).stat().st_mtime_ns for name in before}
    assert not coco(root, split, dev=5).unchanged


def test_another_protocol_needs_no_new_check(root: Path, split: str, monkeypatch) -> None:
    coco(root, split)
    monkeypatch.setattr("concat_cli.core.prepare.verify.Checker.row", None)  # would fail if it ran
    coco(root, split, unseen_pixels="void")
    assert coco(root).taken.images_dropped == 0


def test_a_killed_run_goes_on_where_it_was(root: Path, split: str) -> None:
    """Also where it was killed within a line: that image is checked again, and the result is that
    of a run which was never killed."""
    whole = root.parent / "whole"
    coco(root, split, whole)
    with pytest.raises(KilledError):
        coco(root, split, progress=Interrupt("checking train", 7))
    ledger = root / "concat" / "checked" / "train.jsonl"
    assert len(ledger.read_text().splitlines()) == 1 + 7
    ledger.write_bytes(ledger.read_bytes()[:-5])
    assert not (root / "concat" / "dataset.json").exists()
    heard = Heard()
    coco(root, split, progress=heard)
    assert "train: 6 of 20 images were checked before" in heard.lines
    heard = Heard()
    assert coco(root, split, progress=heard).unchanged and len(heard.lines) == 1
    ours, theirs = contents(root / "concat", "checked"), contents(whole, "checked")
    assert ours.keys() == theirs.keys()
    assert all(ours[name] == theirs[name] for name in ours if name != "dataset.json")


def test_a_changed_file_is_checked_again(root: Path, split: str) -> None:
    coco(root, split)
    Image.new("RGB", (9, 9)).save(root / "train2017" / "000000000005.png")
    heard = Heard()
    before = contents(root / "concat", "checked")
    with pytest.raises(UserError, match=r"000000000005\.png is 9 x 9"):
        coco(root, split, progress=heard)
    assert any("19 of 20 images were checked before" in line for line in heard.lines)
    assert before == contents(root / "concat", "checked")
    path = root / "annotations" / "panoptic_val2017" / "000000000101.png"
    os.utime(path, ns=(5, 5))  # the same again: only looked at again
    Image.new("RGB", (32, 24)).save(root / "train2017" / "000000000005.png")
    heard = Heard()
    coco(root, split, progress=heard)
    assert any("val: 3 of 4" in line for line in heard.lines)


def test_a_changed_list_is_checked_again(root: Path, split: str) -> None:
    coco(root, split)

    def rename(content: dict) -> None:
        content["annotations"][2]["segments_info"][0]["category_id"] = SKY

    edit_json(official_part(root, "train").index, rename)
    assert not coco(root, split).unchanged
    lines = Lines(root / "concat/index/train.jsonl")
    assert any(SKY in row.categories for row in lines)


def test_full_decoding_is_not_skipped_after_a_header_check(root: Path, split: str) -> None:
    path = root / "train2017" / "000000000003.png"
    noise = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path, "BMP")  # nothing marks the end of such a file
    path.write_bytes(path.read_bytes()[:-200])
    coco(root, split)
    with pytest.raises(UserError, match=r"000000000003\.png"):
        coco(root, split, decode=True)
    Image.fromarray(noise).save(path, "BMP")
    coco(root, split, decode=True)
    heard = Heard()
    assert coco(root, split, progress=heard).unchanged  # decoded is more than asked for
    assert not any("checked before" in line for line in heard.lines)


def test_processes_find_what_one_finds(tmp_path: Path, split: str) -> None:
    """A spawned process imports no torch, which would take longer than its work."""
    root = tmp_path / "many"
    scenes = {i: [CAT, COW if i % 4 == 0 else WALL] for i in range(1, 4 * CHUNK)}
    write_part(simple_part(root), scenes, dict.fromkeys(scenes, (6, 9)))
    (root / "images" / "000000000007.png").write_bytes(b"damaged")
    for name, count in (("one", 1), ("two", 2)):
        how = Options(split, skip_bad=True, processes=count)
        report = prepare_data("coco", root, tmp_path / name, how)
        assert [bad.image_id for bad in report.bad["train"]] == [7]
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    code = "import sys, concat_cli.core.prepare.verify; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
