"""How fast the built-in world is drawn: scenes a second, pictures and id PNGs written.

    python benchmarks/draw_shapes.py [--scenes 2000] [--size 128] [--processes 2]

Claim: at least 100 scenes a second on two cores at 128x128.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

from concat_cli.core.config import ShapesConfig
from concat_cli.core.prepare.shapes import prepare_shapes
from concat_cli.core.prepare.shapes_scene import draw_scene


def main() -> None:
    """Draws into a temporary folder and prints the rates."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--scenes", type=int, default=2000)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--processes", type=int, default=2)
    args = parser.parse_args()
    start = time.perf_counter()
    count = max(args.scenes // 10, 1)
    for seed in range(count):
        draw_scene(seed, args.size)
    alone = (time.perf_counter() - start) / count
    print(f"drawing alone, one process: {1e3 * alone:.2f} ms a scene, {1 / alone:.0f} scenes/s")
    with tempfile.TemporaryDirectory() as folder:
        cfg = ShapesConfig(train=args.scenes, dev=1, val=1, size=args.size)
        start = time.perf_counter()
        prepare_shapes(Path(folder) / "shapes", cfg, processes=args.processes)
        rate = (args.scenes + 2) / (time.perf_counter() - start)
    print(
        f"written as a data set, {args.processes} processes, start included: {rate:.0f} scenes/s "
        f"({rate / 100:.1f}x the claim of 100 at 128x128 on two cores)"
    )


if __name__ == "__main__":
    main()
