"""Large pictures: what they take in memory, and that strips leave outputs as they were."""

from __future__ import annotations

import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageDraw

from concat_cli.core.data import image_io
from concat_cli.core.data.image_io import read_id_png, read_image, write_id_png
from concat_cli.core.data.index import WHITE
from concat_cli.core.infer import files, postprocess, render
from concat_cli.core.infer.render import Drawing, Mark, overlay

SIZE = (4000, 3000)
MEASURE = """
import resource, sys
from pathlib import Path
from concat_cli.core.infer import files
from concat_cli.core.infer.predictor import Predictor
files.LARGE = 1_000_000
folder = Path(sys.argv[1])
predictor = Predictor.load(device="cpu")
for name in ("small", "large"):
    files.predict_paths(predictor, [folder / f"{name}.jpg"], folder / "out")
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def draw(size: tuple[int, int]) -> Image.Image:
    """Two objects on grass."""
    width, height = size
    image = Image.new("RGB", size, (20, 130, 30))
    pen = ImageDraw.Draw(image)
    pen.ellipse((width // 8, height // 8, width // 2, height // 2), fill=(220, 30, 30))
    pen.rectangle((width // 2, height // 2, width * 7 // 8, height * 7 // 8), fill=(30, 30, 220))
    return image


@pytest.mark.skipif(sys.platform != "linux", reason="the unit of ru_maxrss")
def test_memory_of_a_large_picture(tmp_path: Path) -> None:
    """Per pixel: the picture twice, its map, what decides it; and strips. 108 million pixels took
    7.3 GB above the model's own, 1.4 GB since."""
    draw((400, 300)).save(tmp_path / "small.jpg")
    draw(SIZE).save(tmp_path / "large.jpg")
    run = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(run, check=True, capture_output=True, text=True)
    small, large = (int(line) * 1024 for line in done.stdout.split())
    assert large - small < 14 * SIZE[0] * SIZE[1] + 200_000_000


def scene() -> tuple[np.ndarray, Drawing]:
    rng = np.random.default_rng(0)
    image = rng.integers(0, 256, (150, 230, 3), np.uint8)
    segment_map = np.kron(rng.integers(0, 6, (5, 10)), np.ones((30, 23), int)).astype(np.int32)
    marks = tuple(Mark(i, f"class {i % 3}", thing=i > 2, score=0.5) for i in range(1, 6))
    return image, Drawing(segment_map, marks)


def test_strips_leave_overlays_as_they_were(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also with edges that look across several strips."""
    image, drawing = scene()
    monkeypatch.setattr(render.math, "sqrt", lambda value: 280 * 5.0)  # edges 5 pixels wide
    whole = np.asarray(overlay(image, drawing))
    strips = image_io.strips
    for module in (render, image_io):
        monkeypatch.setattr(module, "strips", lambda h, w: strips(h, w, 3 * w))
    assert np.array_equal(np.asarray(overlay(image, drawing)), whole)


def test_strips_leave_files_as_they_were(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    image, drawing = scene()
    ids = drawing.segment_map * 70_000
    Image.fromarray(image).save(tmp_path / "a.png")
    write_id_png(tmp_path / "whole.png", ids)
    boxes = postprocess.bounding_boxes(drawing.segment_map, 6)
    sure = np.random.default_rng(1).random(drawing.segment_map.shape, np.float32)
    found = postprocess.regions(drawing.segment_map, sure)
    strips = image_io.strips
    for module in (postprocess, image_io):
        monkeypatch.setattr(module, "strips", lambda h, w: strips(h, w, 7 * w))
    write_id_png(tmp_path / "strips.png", ids)
    assert (tmp_path / "whole.png").read_bytes() == (tmp_path / "strips.png").read_bytes()
    assert np.array_equal(read_id_png(tmp_path / "strips.png"), ids)
    assert np.array_equal(read_image(tmp_path / "a.png"), image)
    assert np.array_equal(postprocess.bounding_boxes(drawing.segment_map, 6), boxes)
    again = postprocess.regions(drawing.segment_map, sure)
    assert again.segments == found.segments  # to the last bit of their scores
    assert np.array_equal(again.panoptic_map, found.panoptic_map)


def test_memory_of_regions() -> None:
    """The map of segments, 4 bytes a pixel, and strips; sorting all pixels took much more."""
    labels = np.kron(np.arange(12, dtype=np.int16).reshape(3, 4) * 2, np.ones((700, 700), np.int16))
    sure = np.full(labels.shape, 0.5, np.float32)
    tracemalloc.start()
    found = postprocess.regions(labels, sure)
    classes = image_io.looked_up(np.arange(0, 24, 2, dtype=np.int32), found.panoptic_map - 1)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (classes == labels).all() and [s.area for s in found.segments] == [490_000] * 12
    assert peak < 12 * labels.size + 60_000_000


def test_a_name_stays_inside_its_segment_in_a_large_picture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    mask = np.zeros((400, 600), bool)
    mask[100:300, 200:500] = True
    monkeypatch.setattr(render, "FINE", 500)
    left, top, right, bottom = render._place(mask, (60, 20), [], (600, 400))
    assert mask[top : bottom + 1, left : right + 1].all()


def test_a_large_picture_is_in_memory_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["a", "b", "LARGE", "c", "broken", "LARGER", "d"]
    for name in names:
        draw((40, 30) if name.isupper() else (20, 10)).save(tmp_path / f"{name}.png")
    (tmp_path / "broken.png").write_text("no picture")
    monkeypatch.setattr(files, "LARGE", 1000)
    paths = [tmp_path / f"{name}.png" for name in names]
    batches: list[int] = []

    def predict(images: list[np.ndarray], semantic: bool) -> list[None]:
        batches.append(len(images))
        return [None] * len(images)

    def add(first: int, key: str, value: dict[str, list[object]]) -> None:
        assert len(value["pictures"]) == 6 and len(value["errors"]) == 1

    predictor = SimpleNamespace(predict_batch=predict, cfg=SimpleNamespace(white=WHITE))
    monkeypatch.setattr(files, "_save", lambda *_: SimpleNamespace(to_json=dict))
    journal: Any = SimpleNamespace(add=add)
    work: Any = files._Work(predictor, files.Paths(paths), None, 1)
    files._predict_chunks(work, [0], [range(7)], journal)
    assert batches == [1, 1, 1, 1, 0, 1, 1]
    monkeypatch.setattr(files, "LARGE", 100_000)
    files._predict_chunks(work, [0], [range(7)], journal)
    assert batches[7:] == [6]
