"""What commands cost that need no tensor, start included, against a Python that does nothing.

Each is run in a process of its own, by turns with the other, wall clock; a row says the median of
both, whether torch was imported, and the median and quartiles of the ratio. It fails if torch was.

    python benchmarks/without_torch.py --pairs 7
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from pathlib import Path

from score_files import categories, timed, write

MAIN = """import sys
from concat_cli.app import main
if main(sys.argv[1:]):
    raise SystemExit("the command failed")
print("\\ntorch" if "torch" in sys.modules else "\\nno torch")"""
HELPS = ("predict", "train-con", "finetune", "evaluate", "prepare-data coco", "doctor")


def commands(folder: Path) -> dict[str, list[str]]:
    """Their words by what a row calls them."""
    found, truth = write(folder, 100, categories())
    shapes = ["--train", "80", "--dev", "10", "--val", "10"]
    return {
        **{f"{name} --help": [*name.split(), "--help"] for name in HELPS},
        "weights": ["weights"],
        "prepare-data shapes of 100": ["prepare-data", "shapes", str(folder / "world"), *shapes],
        "evaluate --predictions of 100": [
            "evaluate", "--json", "--predictions", str(found), "--truth", str(truth),
        ],
    }  # fmt: skip


def main() -> None:
    """Measures, and prints a row for each command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    heavy: list[str] = []
    idle: list[float] = []
    nothing = [sys.executable, "-c", "pass"]
    with tempfile.TemporaryDirectory() as folder:
        for name, words in commands(Path(folder)).items():
            ours = [sys.executable, "-c", MAIN, *words]
            said = timed(ours)[1].splitlines()[-1]
            heavy += [name] * (said != "no torch")
            times = [(timed(again(ours, n))[0], timed(nothing)[0]) for n in range(options.pairs)]
            idle += [other for _, other in times]
            usual = statistics.median(one for one, _ in times)
            low, middle, high = statistics.quantiles([one / other for one, other in times], n=4)
            ratio = f"ratio {middle:.0f} (quartiles {low:.0f}-{high:.0f})"
            print(f"{name}: {said}, {usual:.2f} s, {ratio}")
        print(f"python -c pass: {statistics.median(idle):.3f} s")
    print(f"torch imported by {', '.join(heavy) or 'none'}")
    raise SystemExit(bool(heavy))


def again(command: list[str], number: int) -> list[str]:
    """The command for a further run: scenes are drawn into a new folder."""
    return [f"{word}-{number}" if word.endswith("/world") else word for word in command]


if __name__ == "__main__":
    main()
