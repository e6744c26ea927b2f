"""Panoptic PNGs counted by runs, against a count of every pixel."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from concat_cli.core.data.image_io import read_id_png, write_id_png
from concat_cli.core.evaluate.map_pairs import in_order, joint_runs
from concat_cli.core.evaluate.quality import SemanticScore, class_map, overlaps


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (7, 1), (19, 23)])
def test_runs_count_what_pixels_count(tmp_path, shape):
    """Ids that differ in one channel alone, in all three, and not at all."""
    rng = np.random.default_rng(0)
    known = np.array([0, 1, 256, 65536, 65793, 2**24 - 1])
    maps = [rng.integers(len(known), size=shape).repeat(3, axis=1) for _ in range(2)]
    for number, numbers in enumerate(maps):
        write_id_png(tmp_path / f"{number}.png", known[numbers])
    ids, others, lengths = joint_runs(*(read_id_png(tmp_path / f"{n}.png") for n in range(2)))
    for values, numbers in zip((ids, others), maps, strict=True):
        assert np.array_equal(np.repeat(values, lengths), known[numbers].ravel())
    assert lengths.min() > 0


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


def test_scoring_files_imports_no_torch():
    code = "import sys, concat_cli.core.evaluate.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
