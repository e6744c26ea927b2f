"""How long `prepare-data` takes on data of COCO's size, and how much memory.

    python benchmarks/prepare_20k.py [--images 20000] [--processes 2]

Draws so many JPEGs of 640 x 480 with panoptic PNGs and their JSON (a few dozen different ones, hard
links under many names), prepares them through the command's core, and prints seconds, the peak
memory of this process and of its largest child, and the same scaled to the 118,287 images of COCO.
Then the index of so many images is opened.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from concat_cli.core.data.index import Row, read_records, write_rows
from concat_cli.core.prepare.run import Options, Report, prepare_data
from concat_cli.core.vocabulary import Vocabulary

COCO = 118_287
DIFFERENT = 32  # images that are really drawn
SEGMENTS = 11  # of an image of COCO, on average
CATEGORIES = [{"id": i, "name": f"class {i}", "isthing": int(i <= 80)} for i in range(1, 134)]


def draw(root: Path, images: int) -> None:
    """COCO's official layout with `images` training images and as many as are different for val."""
    rng = np.random.default_rng(0)
    (root / "originals").mkdir(parents=True)
    drawn = [_draw_one(root / "originals", i, rng) for i in range(DIFFERENT)]
    for part, count in (("train", images), ("val", DIFFERENT)):
        photos, pngs = root / f"{part}2017", root / "annotations" / f"panoptic_{part}2017"
        photos.mkdir()
        pngs.mkdir(parents=True)
        listed, annotations = [], []
        for number in range(count):
            name, segments = f"{number:012}", drawn[number % DIFFERENT]
            original = root / "originals" / str(number % DIFFERENT)
            _link(original.with_suffix(".jpg"), photos / f"{name}.jpg")
            _link(original.with_suffix(".png"), pngs / f"{name}.png")
            listed.append({"id": number, "file_name": f"{name}.jpg", "height": 480, "width": 640})
            annotations.append(
                {"image_id": number, "file_name": f"{name}.png", "segments_info": segments}
            )
        content = {"images": listed, "annotations": annotations, "categories": CATEGORIES}
        pngs.with_suffix(".json").write_text(json.dumps(content))


def _link(original: Path, copy: Path) -> None:
    """A further name of a file; a copy where the file system has no links, or no more of them."""
    try:
        os.link(original, copy)
    except OSError:
        shutil.copyfile(original, copy)


def _draw_one(folder: Path, number: int, rng: np.random.Generator) -> list[dict[str, Any]]:
    """A photo-like JPEG and curved segments that leave some void; the segments' entries."""
    y, x = np.mgrid[:480, :640]
    centres = rng.random((SEGMENTS + 1, 2)) * (480, 640)
    wobble = 25 * np.sin(x / rng.uniform(8, 30)) + 25 * np.cos(y / rng.uniform(8, 30))
    distance = [(y - cy + wobble) ** 2 + (x - cx) ** 2 for cy, cx in centres]
    owner = np.argmin(distance, 0)
    ids = np.append(0, rng.choice(1 << 24, SEGMENTS, replace=False) + 1).clip(max=(1 << 24) - 1)
    code = ids[owner]
    planes = np.stack([code & 255, code >> 8 & 255, code >> 16], -1).astype(np.uint8)
    Image.fromarray(planes).save(folder / f"{number}.png")
    colours = rng.integers(0, 256, (SEGMENTS + 1, 3))
    noise = rng.normal(0, 12, (480, 640, 3))
    picture = (colours[owner] + noise).clip(0, 255).astype(np.uint8)
    Image.fromarray(picture).save(folder / f"{number}.jpg", quality=90)
    return [
        {
            "id": int(ids[i]),
            "category_id": int(rng.integers(1, 134)),
            "iscrowd": 0,
            "bbox": [0, 0, 640, 480],
            "area": int((owner == i).sum()),
        }
        for i in np.unique(owner)
        if i
    ]


def megabytes(who: int) -> float:
    """The peak of resident memory: of this process, or of the largest of its children."""
    return resource.getrusage(who).ru_maxrss / 1024


def processor() -> float:
    """Seconds of the processor that this process and its ended children have taken."""
    both = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in both)


def prepare(root: Path, processes: int, decode: bool) -> tuple[Report, float, float]:
    """What `concat prepare-data coco ROOT --class-split all_seen` does; the seconds it took, on the
    clock and of the processor."""
    start, used = time.perf_counter(), processor()
    options = Options("all_seen", processes=processes, decode=decode)
    report = prepare_data("coco", root, options=options)
    return report, time.perf_counter() - start, processor() - used


def open_index(folder: Path) -> float:
    """Seconds to open an index of COCO's size."""
    row = Row(
        139, "000000000139.jpg", "000000000139.png", 480, 640,
        list(range(3_000_001, 3_000_001 + SEGMENTS)), [7] * SEGMENTS, [0] * SEGMENTS,
        [25_000] * SEGMENTS,
    )  # fmt: skip
    write_rows(folder / "index.jsonl", [row] * COCO)
    start = time.perf_counter()
    records = read_records(folder / "index.jsonl", Vocabulary.from_categories(CATEGORIES))
    assert len(records) == COCO and len(records[COCO // 2].ids) == SEGMENTS
    return time.perf_counter() - start


def main() -> None:
    """Draws, prepares, prepares again, and prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # pyright: ignore
    parser.add_argument("--images", type=int, default=20_000)
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--decode", action="store_true", help="Decode the images in full.")
    parser.add_argument("--folder", type=Path, help="Where to draw. Default: a temporary one.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.folder) as folder:
        root = Path(folder) / "coco"
        draw(root, given.images)
        before = megabytes(resource.RUSAGE_SELF)
        report, first, used = prepare(root, given.processes, given.decode)
        again, second, _ = prepare(root, given.processes, given.decode)
        assert again.unchanged and not report.unchanged
        own, child = megabytes(resource.RUSAGE_SELF), megabytes(resource.RUSAGE_CHILDREN)
        opened = open_index(Path(folder))
    scale = COCO / given.images
    print(f"{given.images} images, {given.processes} processes, decode {given.decode}")
    print(f"first   {first:8.1f} s  {given.images / first:6.0f} images/s")
    print(f"        {used:8.1f} s of the processor: {1000 * used / given.images:.1f} ms an image")
    print(f"again   {second:8.1f} s  (nothing to do)")
    print(f"memory  {own:8.0f} MB here (before: {before:.0f}), {child:.0f} MB in the largest child")
    print(f"COCO's {COCO}: about {first * scale / 60:.1f} min, again {second * scale:.0f} s;")
    free = used * scale / given.processes / 60
    print(f"        {free:.1f} min where {given.processes} processors have nothing else to do")
    grown = (own - before) * scale
    print(f"        about {before + grown:.0f} MB here, {child:.0f} MB in each child")
    print(f"index   {opened:8.3f} s to open {COCO} images")


if __name__ == "__main__":
    main()
