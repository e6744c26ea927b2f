"""How long `concat predict` of one small picture takes, start included, against `import torch`.

The built-in weights, texts in the cache, the picture in the files of the disk cache: processes of
their own, by turns, wall clock. The ratio of each pair, their median and quartiles come last.

    OMP_NUM_THREADS=1 python benchmarks/start.py --pairs 11
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

import numpy as np
from pairs import seconds, verdict
from PIL import Image

TARGET = 1.6


def main() -> None:
    """Measures, and prints the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=11)
    parser.add_argument("--python", default=sys.executable, help="of the build that is measured")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        picture = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
        Image.fromarray(picture).save(Path(folder, "a.png"))
        ours = [options.python, "-m", "concat_cli", "predict", "a.png", "--device", "cpu"]
        torch = [options.python, "-c", "import torch"]
        for command in (ours, torch):
            seconds(command, folder)  # texts and bytecode are in their caches from here on
        times = [(seconds(ours, folder), seconds(torch, folder)) for _ in range(options.pairs)]
    a, b = (statistics.median(column) for column in zip(*times, strict=True))
    print(f"predict {a:.2f} s, import torch {b:.2f} s, {options.pairs} pairs")
    print(f"ratio {verdict([one / other for one, other in times], TARGET)}")


if __name__ == "__main__":
    main()
