"""What `concat predict` of a folder of photos takes, overlays and files written, against another
revision of this project; or (`--small`) how its memory grows with the number of small pictures.

Drawn scenes as JPEGs of 640x427, the built-in weights, a new process each time. The panoptic files
of both sides must be the same. The ratio of each pair, their median and quartiles come last.

    python benchmarks/photos_folder.py --before CHECKOUT
    python benchmarks/photos_folder.py --small 1000 5000 10000
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

import numpy as np
from pairs import PEAK, verdict
from PIL import Image

from concat_cli.core.data.image_io import read_id_png
from concat_cli.core.prepare.shapes_scene import draw_scene

HEIGHT, WIDTH, SMALL = 427, 640, 96
DRAWN = 40  # scenes; the other pictures are mirrored and shifted
TARGET = 0.35
ROOT = Path(__file__).resolve().parents[1]


def draw(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Pictures of different scenes, with the noise of a camera."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    scenes = [draw_scene(seed, size).image for seed in range(min(count, DRAWN))]
    for number in range(count):
        scene = scenes[number % DRAWN][:, :: 1 - number // DRAWN % 2 * 2]
        scene = np.roll(scene, number // DRAWN * 7, 1)
        noisy = (scene + rng.normal(0, 4, scene.shape)).clip(0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(folder / f"{number:06}.jpg", quality=90)


def predicted(folder: Path, out: Path, checkout: Path) -> tuple[float, float]:
    """Wall seconds and peak MiB of a `predict` that writes everything anew."""
    shutil.rmtree(out, ignore_errors=True)
    words = ["-m", "concat_cli", "predict", str(folder), "--out", str(out), "--device", "cpu"]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", PEAK, sys.executable, *words], check=True, cwd=checkout,
        env=os.environ | {"PYTHONPATH": str(checkout)}, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    return time.perf_counter() - start, int(done.stdout.split()[-1]) / 1024


def check_same(one: Path, other: Path) -> None:
    """SystemExit where the panoptic files differ."""
    texts = [json.loads((out / "panoptic.json").read_text()) for out in (one, other)]
    names = [annotation["file_name"] for annotation in texts[0]["annotations"]]
    maps = ([read_id_png(out / "panoptic" / name) for name in names] for out in (one, other))
    if texts[0] != texts[1] or any((a != b).any() for a, b in zip(*maps, strict=True)):
        raise SystemExit("the panoptic files have changed")


def compare(folder: Path, options: argparse.Namespace) -> None:
    """Prints the times and their ratio."""
    draw(folder / "photos", options.photos, (HEIGHT, WIDTH))
    sides = {"now": ROOT, "before": options.before.resolve()}
    for name, checkout in sides.items():  # texts and bytecode are in their caches from here on
        predicted(folder / "photos", folder / name, checkout)
    check_same(folder / "now", folder / "before")
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(options.pairs):
        for name, checkout in sides.items():
            times[name].append(predicted(folder / "photos", folder / name, checkout)[0])
    for name, some in times.items():
        print(f"{name}: {statistics.median(some):.1f} s, {options.photos} photos")
    ratios = [a / b for a, b in zip(times["now"], times["before"], strict=True)]
    print(f"ratio {verdict(ratios, TARGET)}")


def grow(folder: Path, counts: list[int]) -> None:
    """Prints time and peak memory for each number of pictures, then the slope between the ends."""
    draw(folder / "all", max(counts), (SMALL, SMALL))
    peaks: list[float] = []
    for count in counts:
        some = folder / str(count)
        some.mkdir()
        for path in sorted((folder / "all").iterdir())[:count]:
            (some / path.name).hardlink_to(path)
        seconds, peak = predicted(some, folder / "out", ROOT)
        peaks.append(peak)
        print(f"{count} pictures: {1000 * seconds / count:.0f} ms each, peak {peak:.0f} MiB")
    slope = (peaks[-1] - peaks[0]) * 1024 / (counts[-1] - counts[0])
    print(f"slope {slope:.2f} KiB a picture")


def main() -> None:
    """Parses the arguments and measures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--before", type=Path, help="a checkout of another revision")
    what.add_argument("--small", type=int, nargs="+", help="numbers of small pictures, rising")
    parser.add_argument("--pairs", type=int, default=7, help="of runs")
    parser.add_argument("--photos", type=int, default=200)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.small:
            grow(Path(folder), options.small)
        else:
            compare(Path(folder), options)


if __name__ == "__main__":
    main()
