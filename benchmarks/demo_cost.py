"""What the chain of `make demo` costs, in processor time, against another build's, and what it
reaches.

Each build draws its own scenes once; then, seed by seed and by turns, both train, score and predict
as the Makefile has it. Processor seconds are those of the commands and their children. A seed that
is done is not run again, so that a stopped run goes on. The ratio of the summed times comes last.

    git worktree add --detach ../before e8f6891
    python benchmarks/demo_cost.py --before ../before --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

TARGET = 0.4
STAGES = ("data", "train-con", "train-cat", "finetune", "evaluate", "predict")
PICTURES = 12  # that the Makefile has predicted


def processor_seconds() -> float:
    """Of all children that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def run(checkout: Path, folder: Path, *command: str) -> tuple[float, str]:
    """Runs a command of a checkout, which must succeed: its processor seconds, what it printed."""
    before = processor_seconds()
    ended = subprocess.run(
        [sys.executable, "-m", "concat_cli", *command],
        cwd=folder,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(checkout)},
    )
    return processor_seconds() - before, ended.stdout


def chain(checkout: Path, folder: Path, seed: int) -> dict[str, Any]:
    """Trains, scores and predicts with a seed: hPQ in percent, and seconds by stage."""
    name = f"seed{seed}"
    seeds = [f"{section}.seed={seed}" for section in ("optim", "cat", "finetune")]
    pictures = sorted(map(str, (folder / "data/shapes/val").glob("*.png")))[:PICTURES]
    commands = {
        "train-con": ("-c", "demo", "data.root=data/shapes", *seeds),
        "train-cat": (),
        "finetune": (),
        "evaluate": ("--json",),
        "predict": ("--out", f"predictions/{name}", *pictures),
    }
    cost: dict[str, float] = {}
    printed: dict[str, str] = {}
    for stage, arguments in commands.items():
        cost[stage], printed[stage] = run(checkout, folder, stage, "--name", name, *arguments)
    report = json.loads(printed["evaluate"])
    return {"seed": seed, "hPQ": 100 * report["panoptic"]["harmonic"]["pq"], "seconds": cost}


def cost_of(checkout: Path, folder: Path, seed: int) -> dict[str, Any]:
    """A seed's row with the data's own cost, from the folder where it is done; see `chain`."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn, kept = folder / "data.json", folder / f"row{seed}.json"
    if not drawn.exists():
        seconds, _ = run(checkout, folder, "prepare-data", "shapes", "data/shapes")
        drawn.write_text(json.dumps(seconds))
    if not kept.exists():
        row = chain(checkout, folder, seed)
        row["seconds"] = {"data": json.loads(drawn.read_text()), **row["seconds"]}
        kept.write_text(json.dumps(row))
    return json.loads(kept.read_text())


def main() -> None:
    """Measures, and prints the ratio."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--before", type=Path, required=True, help="a checkout of another revision")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--folder", type=Path, default=Path("runs/demo_cost"))
    options = parser.parse_args()
    builds = {"before": options.before.resolve(), "now": Path(__file__).resolve().parents[1]}
    rows: dict[str, list[dict[str, Any]]] = {name: [] for name in builds}
    for seed in options.seeds:
        for name, checkout in builds.items():
            row = cost_of(checkout, options.folder.resolve() / name, seed)
            parts = " ".join(f"{stage} {row['seconds'][stage]:.0f}" for stage in STAGES)
            print(f"{name} seed {seed}: hPQ {row['hPQ']:.1f}, seconds: {parts}", flush=True)
            rows[name].append(row)
    total: dict[str, float] = {}
    for name, found in rows.items():
        total[name] = sum(sum(row["seconds"].values()) for row in found)
        mean = statistics.mean(row["hPQ"] for row in found)
        print(f"{name}: mean hPQ {mean:.1f}, {total[name] / len(found):.0f} processor s a run")
    ratio = total["now"] / total["before"]
    print(f"ratio {ratio:.2f}, <= {TARGET}: {'met' if ratio <= TARGET else 'MISSED'}")


if __name__ == "__main__":
    main()
