"""Panoptic PNGs counted by runs, against a count of every pixel."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from drawn_coco import coco_panoptic
from PIL import Image

from concat_cli.core.data import image_io
from concat_cli.core.data.image_io import (
    ids_at,
    joint_runs,
    read_id_pixels,
    read_id_png,
    write_id_png,
)
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.map_pairs import in_order
from concat_cli.core.evaluate.quality import SemanticScore, class_map, overlaps


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (7, 1), (19, 23)])
def test_runs_count_what_pixels_count(tmp_path, shape):
    """Ids that differ in one channel alone, in all three, and not at all."""
    rng = np.random.default_rng(0)
    known = np.array([0, 1, 256, 65536, 65793, 2**24 - 1])
    maps = [rng.integers(len(known), size=shape).repeat(3, axis=1) for _ in range(2)]
    for number, numbers in enumerate(maps):
        write_id_png(tmp_path / f"{number}.png", known[numbers])
    pixels = [read_id_pixels(tmp_path / f"{number}.png") for number in range(2)]
    starts, lengths = joint_runs(*pixels)
    for some, numbers in zip(pixels, maps, strict=True):
        values = ids_at(some, starts)
        assert np.array_equal(np.repeat(values, lengths), known[numbers].ravel())
    ids = known[np.stack(maps)].reshape(2, -1)
    assert len(starts) == 1 + (ids[:, 1:] != ids[:, :-1]).any(0).sum() and lengths.min() > 0


def test_alpha_is_no_part_of_an_id(tmp_path):
    pixels = np.zeros((2, 3, 4), np.uint8)
    pixels[..., 0], pixels[..., 3] = 7, np.arange(3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (read_id_png(tmp_path / "a.png") == 7).all()


def test_classes_of_shared_pixels_are_those_of_class_maps():
    rng = np.random.default_rng(0)
    real, found = rng.integers(5, size=(2, 20, 30))
    labels, theirs = np.array([2, 0, -1, 2]), np.array([1, 2, 0, 0])
    maps, shared = SemanticScore(3), SemanticScore(3)
    one = maps.add(class_map(found, theirs), class_map(real, labels))
    other = shared.add_shared(overlaps(real, found, 4, 4), theirs, labels)
    assert np.array_equal(one, other) and np.array_equal(maps.matrix, shared.matrix)


def test_few_results_wait_and_the_first_error_is_raised():
    started = []

    def work(number):
        started.append(number)
        return 1 // (number - 500)

    results = in_order(work, range(1000))
    assert [next(results) for _ in range(3)] == [-1, -1, -1]
    assert len(started) < 100
    with pytest.raises(ZeroDivisionError):
        list(results)
    assert len(started) < 600


def test_forked_processes_give_results_in_order_and_hand_on_mistakes():
    def work(number):
        if number == 70:
            raise UserError("70 is too many.", "Take fewer.")
        return number, os.getpid()

    if sys.platform != "linux":
        pytest.skip("nothing forks here")
    found = list(in_order(work, range(50), forked=True))
    assert [number for number, _ in found] == list(range(50))
    assert os.getpid() not in {process for _, process in found}
    with pytest.raises(UserError, match="70 is too many"):
        list(in_order(work, range(100), forked=True))


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (40, 31)])
def test_the_quick_reader_reads_what_pillow_reads(tmp_path, monkeypatch, shape):
    pytest.importorskip("kornia_rs")
    ids = np.random.default_rng(0).integers(2**24, size=shape)
    write_id_png(tmp_path / "a.png", ids)
    with monkeypatch.context() as patch:  # Pillow is not asked
        patch.setattr(image_io, "open_image", None)
        assert np.array_equal(read_id_png(tmp_path / "a.png", shape), ids)
        assert np.array_equal(read_id_png(tmp_path / "a.png"), ids)
    assert read_id_png(tmp_path / "a.png", (9, 9)).shape == shape  # which its caller refuses
    raw = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(raw[:45])
    with pytest.raises(UserError, match="it is damaged"):
        read_id_png(tmp_path / "a.png")


def test_commands_without_a_tensor_import_no_torch(tmp_path):
    """Beside every help: see test_help.py."""
    coco_panoptic(tmp_path / "coco")
    golden = Path(__file__).parent / "golden" / "pq"
    lines = [
        ["weights"],
        ["prepare-data", "shapes", f"{tmp_path}/shapes", *"--train 2 --dev 1 --val 1".split()],
        ["prepare-data", "shapes", f"{tmp_path}/none", "--dry-run"],
        ["prepare-data", "coco", f"{tmp_path}/coco"],
        ["evaluate", "--predictions", f"{golden}/pred.json", "--truth", f"{golden}/gt.json"],
    ]
    code = (
        "import sys, concat_cli.app as app\n"
        f"for words in {lines!r}:\n"
        "    assert app.main(words) == 0, words\n"
        "    assert 'torch' not in sys.modules, words\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, encoding="utf-8")
    assert done.returncode == 0, done.stderr
