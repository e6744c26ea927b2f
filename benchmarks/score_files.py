"""What it costs to score panoptic files: `concat evaluate --predictions` against hotcoco, and
against another revision of this project.

Drawn pairs of 640x480 PNGs with the 133 classes of COCO, a new process each time, so that its start
counts; ours with seen and unseen classes, mIoU and 1,000 draws for the intervals, and its figures
compared with the other revision's. Each ratio is the median of interleaved runs with its quartiles.

    python benchmarks/score_files.py --hotcoco VENV/bin/python --before CHECKOUT
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
from pairs import PEAK, verdict

from concat_cli.core.data.class_split import load_class_list
from concat_cli.core.data.image_io import png_decoder, write_id_png

HEIGHT, WIDTH, SEGMENTS = 480, 640, 12
DRAWN = 40  # pairs; the others are copies of these
TARGETS = {"hotcoco": 1.5, "before": 0.1}
ROOT = Path(__file__).resolve().parents[1]
HOTCOCO = """import sys
from hotcoco.panoptic import pq_compute
print(pq_compute(*sys.argv[1:])["All"]["pq"])"""
Json = dict[str, Any]


def drawn(rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Segment numbers of the truth and of a prediction: cells with wavy borders, moved a little."""
    y, x = np.mgrid[:HEIGHT, :WIDTH].astype(np.float32)
    wave = 6 * (np.sin(y / rng.uniform(5, 15)) + np.cos(x / rng.uniform(5, 15)))
    points = rng.uniform(0, (HEIGHT, WIDTH), (SEGMENTS, 2)).astype(np.float32)
    moved = points + rng.normal(0, 12, points.shape).astype(np.float32)
    real, found = (
        np.argmin([np.hypot(y - a + wave, x - b - wave) for a, b in some], 0)
        for some in (points, moved)
    )
    return real, found


def write(folder: Path, images: int, categories: list[Json]) -> tuple[Path, Path]:
    """The JSONs of predictions and truth; every tenth true pixel row is void."""
    rng = np.random.default_rng(0)
    paths = folder / "found.json", folder / "truth.json"
    rows: tuple[list[Json], list[Json]] = ([], [])
    for path in paths:
        path.with_suffix("").mkdir()
    for number in range(min(images, DRAWN)):
        real, found = drawn(rng)
        classes = rng.integers(len(categories), size=SEGMENTS)
        wrong = np.where(rng.random(SEGMENTS) < 0.3, rng.integers(len(categories)), classes)
        ids = 1 + rng.choice(2**24 - 2, SEGMENTS, replace=False)
        for path, row, numbers, named in zip(
            paths, rows, (found, real), (wrong, classes), strict=True
        ):
            pixels = ids[numbers]
            if path == paths[1]:
                pixels[::10] = 0
            segments: list[Json] = [
                {"id": int(one), "category_id": categories[label]["id"], "iscrowd": 0,
                 "area": int((pixels == one).sum()), "bbox": [0, 0, WIDTH, HEIGHT]}
                for one, label in zip(ids, named, strict=True) if (pixels == one).any()
            ]  # fmt: skip
            name = f"{number:012}.png"
            write_id_png(path.with_suffix("") / name, pixels)
            row.append({"image_id": number, "file_name": name, "segments_info": segments})
    for number in range(DRAWN, images):
        for path, row in zip(paths, rows, strict=True):
            one, name = row[number % DRAWN], f"{number:012}.png"
            row.append(one | {"image_id": number, "file_name": name})
            shutil.copy(path.with_suffix("") / one["file_name"], path.with_suffix("") / name)
    pictures = [
        {"id": n, "height": HEIGHT, "width": WIDTH, "file_name": f"{n:012}.jpg"}
        for n in range(images)
    ]
    for path, row in zip(paths, rows, strict=True):
        content = {"images": pictures, "annotations": row, "categories": categories}
        path.write_text(json.dumps(content), encoding="utf-8")
    return paths


def timed(command: list[str], checkout: Path = ROOT) -> tuple[float, str]:
    """Wall seconds of a process, and what it printed."""
    place = os.environ | {"PYTHONPATH": str(checkout)}
    start = time.perf_counter()
    done = subprocess.run(
        command, env=place, cwd=checkout, check=True, stdout=subprocess.PIPE, text=True,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    return time.perf_counter() - start, done.stdout


def peak(command: list[str], checkout: Path) -> tuple[str, float]:
    """What a process printed, and its peak memory in MiB."""
    *said, most = timed([sys.executable, "-c", PEAK, *command], checkout)[1].splitlines()
    return "\n".join(said), int(most) / 1024


def difference(one: Any, other: Any) -> float:
    """The largest difference of the figures of two reports; inf where they are built otherwise."""
    if isinstance(one, dict) and isinstance(other, dict):
        a, b = cast("Json", one), cast("Json", other)
        if a.keys() == b.keys():
            return max((difference(a[key], b[key]) for key in a), default=0.0)
    if isinstance(one, list) and isinstance(other, list):
        rows, others = cast("list[Any]", one), cast("list[Any]", other)
        if len(rows) == len(others):
            return max(map(difference, rows, others), default=0.0)
    if isinstance(one, float | int) and isinstance(other, float | int):
        return abs(one - other)
    return 0.0 if one == other else float("inf")


def figures(said: str) -> Json:
    """A report without what differs between any two runs."""
    return {key: value for key, value in json.loads(said).items() if key != "seconds"}


def summary(name: str, ours: list[float], theirs: list[float]) -> str:
    """The median of the paired ratios with its quartiles, and whether it meets its target."""
    ratios = [a / b for a, b in zip(ours, theirs, strict=True)]
    return f"ours / {name}: {verdict(ratios, TARGETS[name])}"


def main() -> None:
    """Parses the arguments and measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7, help="of runs")
    parser.add_argument("--images", type=int, default=1000)
    parser.add_argument("--hotcoco", help="a Python that has hotcoco")
    parser.add_argument("--before", type=Path, help="a checkout of another revision")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        measure(Path(folder), options)


def categories() -> list[Json]:
    """COCO's 133, as its JSON lists them."""
    return [
        {"id": one.id, "name": one.name, "isthing": int(one.kind == "thing")}
        for one in load_class_list("coco_panoptic_133").entries
    ]


def measure(folder: Path, options: argparse.Namespace) -> None:
    """Prints memory and times, then the ratios."""
    print("PNGs are read by", "kornia_rs" if png_decoder() else "Pillow")
    found, truth = write(folder, options.images, categories())
    score = [sys.executable, "-m", "concat_cli", "evaluate", "--json", "--bootstrap", "1000"]
    score += ["--predictions", str(found), "--truth", str(truth)]
    score += ["--class-split", "coco_panoptic_119_14"]
    runs = {"ours": (score, ROOT)}
    if options.hotcoco:
        theirs = [options.hotcoco, "-c", HOTCOCO, str(truth), str(found)]
        runs["hotcoco"] = (theirs, folder)
    if options.before:
        runs["before"] = (score, options.before.resolve())
    said = {name: peak(*run) for name, run in runs.items()}  # files are in memory from here on
    if "hotcoco" in said:
        own = figures(said["ours"][0])["panoptic"]["all"]["pq"]
        print(f"PQ: {own!r}, hotcoco {said['hotcoco'][0].split()[-1]}")
    if "before" in said:
        most = difference(*(figures(said[name][0]) for name in ("ours", "before")))
        print(f"largest difference from the figures before: {most:.1e}")
        if most > 1e-12:
            raise SystemExit("the figures have changed")
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(options.pairs):
        for name, run in runs.items():
            times[name].append(timed(*run)[0])
    for name, some in times.items():
        print(f"{name}: {statistics.median(some):.2f} s, peak {said[name][1]:.0f} MiB")
    for name in list(runs)[1:]:
        print(summary(name, times["ours"], times[name]))


if __name__ == "__main__":
    main()
