"""What the scripts that measure cell by cell share: splits, digests, rows, loop, differences."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from concat_cli.core.config import Config
from concat_cli.core.config_file import to_dict
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.intervals import Interval, Mean, paired_differences
from concat_cli.core.prepare.shapes import prepare_shapes
from concat_cli.core.progress import Progress
from concat_cli.core.runs import Run

SPLITS = {"default": -1, "1": 1, "2": 2}  # name -> shapes.unseen_seed; nothing was tuned on them
REPEATS = 1000  # draws of the images for an interval
INTERVALS = (
    "The intervals are bootstraps over the images alone, the same ones drawn for both cells: they\n"
    "say nothing of other seeds, each cell was trained once a split."
)
UNSHOWN = ("digest", "budget", "diagnostics", "cost")  # of a row that is printed as it comes
Rows = list[dict[str, Any]]


class Named(Protocol):
    """A row of a table."""

    @property
    def name(self) -> str:
        """The cell's name in files and tables."""
        ...


C = TypeVar("C", bound=Named)

# Sections that are in every digest, also where nothing in them differs from the defaults: those of
# the first rows that were measured. A later section counts only where something in it differs.
_FIRST = (
    "data", "shapes", "clip", "model", "warmup", "loss", "align", "optim", "bank", "cat",
    "finetune", "infer", "protocol",
)  # fmt: skip


def digest(cfg: Config) -> str:
    """Twelve hex digits that differ where any key differs; keys at their default are left out, so
    that a new key which changes nothing leaves what was measured valid."""
    usual = to_dict(Config())
    own = {
        section: {key: value for key, value in keys.items() if value != usual[section][key]}
        for section, keys in to_dict(cfg).items()
    }
    own = {section: keys for section, keys in own.items() if keys or section in _FIRST}
    text = json.dumps(own, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_rows(root: Path) -> Rows:
    """All rows measured so far."""
    path = root / "results.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def add_row(root: Path, row: dict[str, Any]) -> None:
    """Keeps a row."""
    with (root / "results.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def is_there(rows: Rows, root: Path, split: str, cell: str, now: str) -> bool:
    """Whether a cell's row is among these; UserError if its digest is not the one of `now`."""
    mine = [row for row in rows if row["split"] == split and row["cell"] == cell]
    if any(row.get("digest") != now for row in mine):
        raise UserError(
            f"The cell {cell} of split {split} in {root / 'results.jsonl'} was measured with "
            "other arguments.",
            f"Move {root} away to measure again, or repeat the old arguments; another budget is "
            "measured beside it from another folder.",
        )
    return bool(mine)


def of_one_budget(rows: Rows) -> tuple[Rows, int]:
    """The rows of the newest row's budget, and how many others there are."""
    kept = [row for row in rows if row.get("budget") == rows[-1].get("budget")]
    return kept, len(rows) - len(kept)


def counts_file(root: Path, split: str, cell: str) -> Path:
    """Where a cell's counts, image by image, are kept."""
    return root / "counts" / f"{split}-{cell}.npz"


def command_line(about: str, names: Sequence[str]) -> argparse.ArgumentParser:
    """Which splits and cells, where they are computed, and keys for all of them."""
    parser = argparse.ArgumentParser(
        description=about, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument(
        "--only", nargs="+", choices=names, default=list(names), metavar="CELL",
        help=f"of {', '.join(names)}; all of them by default",
    )  # fmt: skip
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--table", action="store_true", help="only print the tables")
    parser.add_argument("keys", nargs="*", help="section.key=value for every cell")
    return parser


def measure_cells(
    root: Path,
    args: argparse.Namespace,
    cells: Sequence[C],
    digests: Callable[[str, C, argparse.Namespace], dict[str, str]],
    measure: Callable[[str, C, argparse.Namespace], dict[str, Any]],
) -> None:
    """Measures the cells that `args` ask for and that are not there yet, one after the other.

    Both functions take the split, the cell and `args`; `digests` has a "digest". Raises UserError
    before the first is trained if one of them was made with other arguments.
    """
    if args.table:
        return
    if args.threads:
        torch.set_num_threads(args.threads)
    (root / "counts").mkdir(parents=True, exist_ok=True)
    rows = read_rows(root)
    asked = [cell for cell in cells if cell.name in args.only]
    todo = [(split, cell) for split in dict.fromkeys(args.splits) for cell in asked]
    missing = [
        (split, cell)
        for split, cell in todo
        if not is_there(rows, root, split, cell.name, digests(split, cell, args)["digest"])
    ]
    for split, cell in missing:
        row = measure(split, cell, args)
        add_row(root, row)
        print({key: value for key, value in row.items() if key not in UNSHOWN}, flush=True)


def difference(
    root: Path, ours: str, theirs: str, task: str, mean: Mean
) -> tuple[int, dict[str, Interval | None]]:
    """The paired differences of two cells by group, and over how many splits: those that have the
    counts of `task` of both, trained with one budget. No split: (0, {})."""
    counts: tuple[list[Any], list[Any]] = ([], [])
    splits: list[tuple[list[int], list[int]]] = []
    for split in SPLITS:
        files = [counts_file(root, split, name) for name in (ours, theirs)]
        if not all(file.exists() for file in files):
            continue
        a, b = (np.load(file) for file in files)
        whole = all(key in one for one in (a, b) for key in (task, "budget"))
        if whole and str(a["budget"]) == str(b["budget"]):
            splits.append((a["seen"].tolist(), a["unseen"].tolist()))
            counts[0].append(a[task])
            counts[1].append(b[task])
    return len(splits), paired_differences(*counts, mean, splits, REPEATS) if splits else {}


def share_bank(first: Run, run: Run) -> None:
    """Gives a run the query bank of the run whose segmentor it has."""
    run.path.mkdir(parents=True, exist_ok=True)
    if not (run.path / "bank").exists():
        (first.path / "bank").mkdir(parents=True, exist_ok=True)
        (run.path / "bank").symlink_to((first.path / "bank").resolve(), target_is_directory=True)


def draw_world(cfg: Config, progress: Progress) -> Path:
    """The data set of a configuration, drawn if it is not there."""
    root = Path(cfg.data.root)
    if not (root / "dataset.json").exists():
        prepare_shapes(root, cfg.shapes, progress)
    return root


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation in percent: `45.0 ± 7.1`."""
    found = 100 * np.array(values, dtype=np.float64)
    return f"{found.mean():.1f} ± {found.std(ddof=len(found) > 1):.1f}"
