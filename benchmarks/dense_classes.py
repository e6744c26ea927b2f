"""Memory and time of naming every pixel of a photo, over the number of classes.

    python benchmarks/dense_classes.py            # K = 20, 171, 847; 640 x 640 pixels, E = 512
    python benchmarks/dense_classes.py --size 1024 --classes 20 171 847 --out dense_classes.json

Each line is two processes. One tells the peak: Linux's high-water mark, less what the process held
before, with an allocator that gives back what is freed (glibc's keeps some of it by default, the
more the more calls there are). The other tells the seconds. "at once" holds the logits of all
classes, "chunks" is what `concat` does.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from concat_cli.methods.clip_zss.predictor import CHUNK, classify_pixels

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)


def high_water(reset: bool = False) -> float:
    """The most memory in MiB that this process has held since the last reset (Linux)."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) / 1024


def at_once(features: Tensor, text: Tensor, scale: float, off: Tensor, side: int) -> Tensor:
    """The logits of every class at the photo's size, then their argmax."""
    logits = scale * torch.einsum("ke,ehw->khw", text, features) - off[:, None, None]
    return F.interpolate(logits[None], (side, side), mode="bilinear")[0].argmax(0)


def measure(how: str, classes: int, side: int, width: int, repeats: int) -> dict[str, Any]:
    """Median seconds and the growth of this process's peak memory in MiB."""
    torch.manual_seed(0)
    features = F.normalize(torch.randn(width, side // 4, side // 4), dim=0)
    text = F.normalize(torch.randn(classes, width), dim=1)
    off, size = torch.zeros(classes), (side, side)

    def run() -> Tensor:
        if how == "at once":
            return at_once(features, text, 14.0, off, side)
        return classify_pixels(features, text, 14.0, off, size, size)[0]

    F.interpolate(torch.randn(1, 1, 8, 8), (16, 16), mode="bilinear")  # libraries are loaded
    before = high_water(reset=True)
    seconds: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - start)
    row = {"how": how, "classes": classes, "peak_mib": high_water() - before}
    return row | {"seconds": statistics.median(seconds)}


def in_a_process(
    how: str, classes: int, side: int, width: int, repeats: int, gives_back: bool = False
) -> dict[str, Any]:
    """`measure` in a process of its own; `gives_back`: whose allocator returns what is freed."""
    with ProcessPoolExecutor(1, get_context("fork"), give_back if gives_back else None) as pool:
        return pool.submit(measure, how, classes, side, width, repeats).result()


def give_back() -> None:
    """Lets glibc return freed memory to the system from 64 KiB on."""
    for option in (M_TRIM_THRESHOLD, M_MMAP_THRESHOLD):
        assert ctypes.CDLL(None).mallopt(option, 65536)


def main(words: Sequence[str] | None = None) -> None:
    """Runs a process for each way and number of classes, then prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--classes", nargs="+", type=int, default=[20, 171, 847])
    parser.add_argument("--size", type=int, default=640)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args(words)
    rows: list[dict[str, Any]] = []
    for how in ("chunks", "at once"):
        for classes in args.classes:
            sizes = args.size, args.width
            row = in_a_process(how, classes, *sizes, args.repeats)
            lean = in_a_process(how, classes, *sizes, 1, gives_back=True)
            rows.append(row | {"peak_mib": lean["peak_mib"]})
    print(f"{args.size} x {args.size} pixels, E = {args.width}, chunks of {CHUNK} classes\n")
    print("| how | K | peak MiB | seconds |\n|---|---|---|---|")
    for row in rows:
        print(f"| {row['how']} | {row['classes']} | {row['peak_mib']:.0f} | {row['seconds']:.2f} |")
    if args.out:
        args.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
