"""How long `concat finetune --vocab` of 50 names takes on a ready bank, start included, against
another build's.

Takes a run of each build as `benchmarks/demo_cost.py` leaves them. Processes of their own, by
turns, wall clock; the ratio of each pair, their median and quartiles come last.

    python benchmarks/teach.py --before ../before --folder runs/demo_cost
"""

from __future__ import annotations

import argparse
import statistics
import sys
from itertools import islice, permutations
from pathlib import Path

from pairs import seconds, verdict

TARGET = 0.5
NAMES = 50
PATTERNS = ("solid", "striped", "dotted", "checkered", "outlined")
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "ring", "crescent")


def names() -> str:
    """A vocabulary file of names that no build was trained on, of the built-in CLIP's words."""
    made = (f"{a} {b} {shape}" for a, b in permutations(PATTERNS, 2) for shape in SHAPES)
    return "\n".join(islice(made, NAMES)) + "\n"


def main() -> None:
    """Measures, and prints the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--before", type=Path, required=True, help="a checkout of another revision")
    parser.add_argument("--folder", type=Path, default=Path("runs/demo_cost"))
    parser.add_argument("--run", default="seed1")
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    builds = {"now": Path(__file__).resolve().parents[1], "before": options.before.resolve()}
    command = [sys.executable, "-m", "concat_cli", "finetune", "--name", options.run, "--fresh"]
    command += ["--vocab", "fifty.txt"]
    for build, checkout in builds.items():
        (options.folder / build / "fifty.txt").write_text(names())
        seconds(command, options.folder / build, checkout)  # bytecode is in its cache now
    pairs = [
        tuple(seconds(command, options.folder / b, builds[b]) for b in ("now", "before"))
        for _ in range(options.pairs)
    ]
    now, before = (statistics.median(column) for column in zip(*pairs, strict=True))
    print(f"{NAMES} names: now {now:.2f} s, before {before:.2f} s, {options.pairs} pairs")
    print(f"ratio {verdict([a / b for a, b in pairs], TARGET)}")


if __name__ == "__main__":
    main()
