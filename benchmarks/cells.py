"""What the scripts that measure cell by cell share: splits, digests, rows that are kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from concat_cli.core.config import Config
from concat_cli.core.config_file import to_dict
from concat_cli.core.data.prepare_shapes import prepare_shapes
from concat_cli.core.errors import UserError
from concat_cli.core.progress import Progress

SPLITS = {"default": -1, "1": 1, "2": 2}  # name -> shapes.unseen_seed; nothing was tuned on them
Rows = list[dict[str, Any]]

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
            f"Move {root} away to measure again, or repeat the old arguments.",
        )
    return bool(mine)


def of_one_budget(rows: Rows) -> tuple[Rows, int]:
    """The rows of the newest row's budget, and how many others there are."""
    kept = [row for row in rows if row.get("budget") == rows[-1].get("budget")]
    return kept, len(rows) - len(kept)


def counts_file(root: Path, split: str, cell: str) -> Path:
    """Where a cell's counts, image by image, are kept."""
    (root / "counts").mkdir(parents=True, exist_ok=True)
    return root / "counts" / f"{split}-{cell}.npz"


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
