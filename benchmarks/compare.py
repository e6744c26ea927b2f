"""CONCAT, ZegFormer and CLIP-ZSS on the built-in world, trained on the same scenes, three splits.

    python benchmarks/compare.py                      # everything, resumable cell by cell
    python benchmarks/compare.py --splits default --only concat zegformer-fusion
    python benchmarks/compare.py --table              # the tables of what has been measured
    mkdir long && cd long && python ../benchmarks/compare.py warmup.steps=1200 optim.steps=1500

The world is drawn with `unseen_pixels=void`: training scenes hold unseen classes without a label,
as in the protocol of ZegFormer and CLIP-ZSS. Every cell is a run of the ordinary stages under
runs/compare/, scored on the same 500 scenes of val; cells that differ only in how they are scored
share a run. A figure that is there is not computed again, and one that was made with other
arguments stops the script. Speed and memory depend on the machine and on what else runs there.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from cells import (
    INTERVALS,
    SPLITS,
    Rows,
    command_line,
    counts_file,
    difference,
    digest,
    draw_world,
    measure_cells,
    of_one_budget,
    read_rows,
    share_bank,
    spread,
)

from concat_cli.console import ConsoleProgress
from concat_cli.core.config import Config
from concat_cli.core.config_file import load_config
from concat_cli.core.data.dataset import read_dataset_info
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.cost import measure_cost
from concat_cli.core.evaluate.intervals import GROUPS, mean_iou, mean_pq
from concat_cli.core.evaluate.report import Report
from concat_cli.core.evaluate.scores import Scoring
from concat_cli.core.evaluate.weights import evaluate_weights
from concat_cli.core.runs import Run
from concat_cli.methods.clip_zss.train import train_clip_zss
from concat_cli.methods.concat.cat import train_cat
from concat_cli.methods.concat.con import train_con
from concat_cli.methods.concat.finetune import finetune
from concat_cli.methods.zegformer.train import train_zegformer

ROOT = Path("runs/compare")
FIGURES = {"PQ": ("panoptic", mean_pq), "mIoU": ("semantic", mean_iou)}


@dataclass(frozen=True)
class Cell:
    """A row of the table: a method trained in a run, and the keys it is trained and scored with."""

    name: str
    method: str  # of METHODS
    run: str  # cells of one run share its weights
    train: tuple[str, ...] = ()
    score: tuple[str, ...] = ()
    before: str = ""  # the run whose stages it takes, all but the last; by default its own


class Method(NamedTuple):
    """A configuration, and the stages that are trained with it, in their order."""

    config: str
    stages: tuple[Callable[..., Any], ...]


METHODS = {
    "concat": Method("demo", (train_con, train_cat, finetune)),
    "con": Method("demo", (train_con,)),
    "zegformer": Method("shapes_zegformer", (train_zegformer,)),
    "clip-zss": Method("shapes_clip_zss", (train_clip_zss,)),
}
_LATENT = ("latent.weight=1",)
_EVIDENCE = (*_LATENT, "latent.evidence=1", "finetune.unseen_weight=0.3")
_HALF = "infer.overlap=0.5"  # a segment that keeps half of its mask stays, not from 0.8 on
_JOINT = "infer.joint_stuff=true"  # what stuff loses to its own class is not lost
_SCORED = (("half", _HALF), ("joint", _JOINT))  # otherwise than by default, by name
_PLAIN = ("clip_zss.glm=0", "clip_zss.pseudo=false", "clip_zss.synthesizer=0")
CELLS = (
    Cell("concat", "concat", "concat"),
    *(Cell(f"concat-{n}", "concat", "concat", (), (key,)) for n, key in _SCORED),
    Cell("con+latent", "con", "concat+latent", _LATENT),
    Cell("concat+masks", "concat", "concat+masks", (*_LATENT, "latent.align=false")),
    Cell("concat+latent", "concat", "concat+latent", _LATENT),
    *(
        Cell(name, "concat", name, (*_LATENT, *keys), (), "concat+latent")
        for name, *keys in (
            ("concat+latent-control", "finetune.pseudo=false"),
            ("concat+latent-light", "finetune.unseen_weight=0.3"),
        )
    ),
    Cell("concat+evidence", "concat", "concat+evidence", _EVIDENCE, (), "concat+latent"),
    *(
        Cell(
            f"concat+evidence-{n}", "concat", "concat+evidence", _EVIDENCE, (key,), "concat+latent"
        )
        for n, key in _SCORED
    ),
    *(
        Cell(f"zegformer-{branch}", "zegformer", "zegformer", (), (f"zegformer.branch={branch}",))
        for branch in ("segment", "image", "fusion")
    ),
    *(
        Cell(f"zegformer-{b}-{n}", "zegformer", "zegformer", (), (f"zegformer.branch={b}", key))
        for n, key in _SCORED
        for b in ("segment", "image", "fusion")
    ),
    Cell("clip-zss-plain", "clip-zss", "clip-zss-plain", _PLAIN),
    Cell("clip-zss+glm", "clip-zss", "clip-zss+glm", _PLAIN[1:]),
    Cell("clip-zss+glm+pseudo", "clip-zss", "clip-zss+glm+pseudo", _PLAIN[2:]),
    Cell("clip-zss", "clip-zss", "clip-zss"),
)
PAIRS = (  # ours, theirs, figure, group
    ("zegformer-fusion", "zegformer-segment", "mIoU", "unseen"),
    ("zegformer-fusion", "zegformer-image", "mIoU", "unseen"),
    ("clip-zss", "clip-zss-plain", "mIoU", "unseen"),
    ("clip-zss+glm", "clip-zss-plain", "mIoU", "unseen"),
    ("clip-zss+glm+pseudo", "clip-zss+glm", "mIoU", "unseen"),
    ("clip-zss", "clip-zss+glm+pseudo", "mIoU", "unseen"),
    ("clip-zss", "clip-zss+glm", "mIoU", "unseen"),
    ("concat", "zegformer-segment", "mIoU", "harmonic"),
    ("concat", "zegformer-image", "mIoU", "harmonic"),
    ("concat", "zegformer-fusion", "mIoU", "harmonic"),
    ("concat", "clip-zss", "mIoU", "harmonic"),
    ("concat", "zegformer-segment", "PQ", "harmonic"),
    ("concat", "zegformer-fusion", "PQ", "harmonic"),
    *(
        (ours, theirs, figure, group)
        for ours, theirs in (
            ("concat+masks", "concat"),
            ("concat+latent", "concat+masks"),
            ("concat+latent", "concat"),
            ("con+latent", "zegformer-fusion"),
            ("con+latent", "zegformer-image"),
            ("concat+latent-control", "con+latent"),
            ("concat+evidence", "con+latent"),
            ("concat+latent", "concat+latent-control"),
            ("concat+latent-light", "concat+latent-control"),
            ("concat+evidence", "concat+latent-control"),
            ("concat+evidence", "concat+latent-light"),
            ("concat+evidence", "concat+latent"),
            ("concat+evidence", "concat"),
            ("concat+evidence", "zegformer-fusion"),
            ("concat+evidence", "zegformer-image"),
            ("concat+evidence-half", "concat-half"),
            ("concat+evidence-half", "zegformer-fusion-half"),
            ("concat+evidence-half", "zegformer-image-half"),
            ("concat+evidence-joint", "concat+evidence"),
            ("concat-joint", "concat"),
            ("concat+evidence-joint", "concat-joint"),
            ("zegformer-fusion-joint", "zegformer-fusion"),
            ("zegformer-image-joint", "zegformer-image"),
            ("concat+evidence-joint", "zegformer-fusion-joint"),
            ("concat+evidence-joint", "zegformer-image-joint"),
        )
        for figure, group in (("PQ", "harmonic"), ("mIoU", "harmonic"), ("PQ", "unseen"))
    ),
)


def config(split: str, cell: Cell, args: argparse.Namespace, *more: str) -> Config:
    """The configuration that a cell is trained with, and `more` keys."""
    keys = [f"data.root={ROOT / 'data' / f'shapes-{split}'}", "shapes.unseen_pixels=void"]
    keys += [f"shapes.unseen_seed={SPLITS[split]}", *cell.train, *args.keys, *more]
    return load_config(METHODS[cell.method].config, keys)


def digests(split: str, cell: Cell, args: argparse.Namespace) -> dict[str, str]:
    """`digest` of how a cell is trained and scored; `budget` of what the arguments give to all."""
    return {
        "digest": digest(config(split, cell, args, *cell.score)),
        "budget": digest(load_config(None, args.keys)),
    }


def train(split: str, cell: Cell, args: argparse.Namespace) -> Path:
    """Trains what a cell needs and is not there yet; returns its weights."""
    cfg, say = config(split, cell, args), ConsoleProgress()
    draw_world(cfg, say)
    stages, weights = METHODS[cell.method].stages, None
    run = first = Run(cell.before or cell.run, ROOT / split)
    for stage in stages:
        given = dict[str, Any]()
        if cell.before and stage is stages[-1]:
            run, given = Run(cell.run, ROOT / split), {"weights": weights}
            share_bank(first, run)
        result = stage(cfg, run, device=args.device, progress=say, **given)
        if not result.finished:
            raise UserError(f"{cell.name} of split {split} was stopped.", "Call it again.")
        weights = result.weights
    assert weights is not None
    return weights


def measure(split: str, cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of a cell on val, what it costs, and its counts image by image in a file."""
    began = time.monotonic()
    weights = train(split, cell, args)
    trained = time.monotonic()
    scoring = Scoring(counts=True, diagnostics=cell.method in ("concat", "con"))
    report = evaluate_weights(
        weights, cell.score, scoring, device=args.device, progress=ConsoleProgress()
    )
    scored = time.monotonic()
    assert report.counts is not None
    made_with = digests(split, cell, args)
    vocabulary = read_dataset_info(config(split, cell, args).data.root).vocabulary
    kept = {"panoptic": report.counts.panoptic, "semantic": report.counts.semantic}
    arrays: dict[str, Any] = {
        "seen": vocabulary.seen_indices,
        "unseen": vocabulary.unseen_indices,
        "budget": np.array(made_with["budget"]),
    }
    arrays |= {task: one for task, one in kept.items() if one is not None}
    np.savez_compressed(counts_file(ROOT, split, cell.name), **arrays)
    return {
        "split": split,
        "cell": cell.name,
        **made_with,
        **qualities(report),
        "mode": report.protocol["mode"],
        "diagnostics": report.diagnostics,
        "cost": asdict(measure_cost(weights, cell.score, args.device)),
        "seconds": {"train": round(trained - began, 1), "score": round(scored - trained, 1)},
    }


def qualities(report: Report) -> dict[str, dict[str, float | None]]:
    """PQ and mIoU by group, as fractions; None where undefined."""
    return {
        "PQ": {g: getattr(report.panoptic[g], "pq", None) for g in GROUPS},
        "mIoU": {g: getattr(report.semantic[g], "miou", None) for g in GROUPS},
    }


def table() -> str:
    """Mean and spread over splits of every cell, and the paired differences.

    Only rows of one budget are put together: that of the newest row.
    """
    rows, others = of_one_budget(read_rows(ROOT))
    lines = [f"{others} cells with another budget are not shown.", ""] if others else []
    figures = [f"{group} {name}" for name in FIGURES for group in GROUPS]
    lines.append(
        f"| cell | splits | {' | '.join(figures)} | M parameters | images/s | MiB | CLIP's image "
        "encoder |"
    )
    lines.append("|---" * (len(figures) + 6) + "|")
    for cell in CELLS:
        mine = [row for row in rows if row["cell"] == cell.name]
        if mine:
            lines.append(f"| {cell.name} | {len(mine)} | {' | '.join(shown(mine))} |")
    lines += ["", *masks(rows), "", INTERVALS, ""]
    lines.append("| difference | of | splits | mean [95% interval over images] |")
    lines.append("|---|---|---|---|")
    for ours, theirs, figure, group in PAIRS:
        splits, found = difference(ROOT, ours, theirs, *FIGURES[figure])
        interval = found.get(group)
        if interval is not None:
            told = interval.percent("+")
            lines.append(f"| {ours} - {theirs} | {group} {figure} | {splits} | {told} |")
    return "\n".join(lines)


def masks(rows: Rows) -> Iterator[str]:
    """Of cells that were asked: class-agnostic recall at IoU 0.5, and the share of these masks that
    are named right, mean and spread over splits."""
    figures, groups = ("mask_recall", "matched_accuracy"), ("seen", "unseen")
    keys = [f"{figure}_{group}" for figure in figures for group in groups]
    yield "| cell | splits | seen masks | unseen masks | seen names | unseen names |"
    yield "|---" * 6 + "|"
    for name in dict.fromkeys(str(row["cell"]) for row in rows):
        mine = [row.get("diagnostics") for row in rows if row["cell"] == name]
        told = [one for one in mine if one]
        if told:
            cells = [spread([one[key] for one in told]) for key in keys]
            yield f"| {name} | {len(told)} | {' | '.join(cells)} |"


def shown(rows: Rows) -> Iterator[str]:
    """Quality as mean and spread over splits, then the cost: the median of the splits."""
    for figure in FIGURES:
        for group in GROUPS:
            values = [row[figure][group] for row in rows]
            yield "-" if None in values else spread(values)
    costs = [row["cost"] for row in rows]
    yield f"{np.median([cost['parameters'] for cost in costs]) / 1e6:.2f}"
    yield f"{np.median([cost['images_per_second']['semantic'] for cost in costs]):.3g}"
    peaks = [cost["peak_mib"] for cost in costs]
    yield "-" if None in peaks else f"{np.median(peaks):.0f}"
    yield "needed" if costs[0]["clip_image"] else "no"


def main(words: Sequence[str] | None = None) -> None:
    """Runs the cells that are asked for and not measured yet, then prints the tables."""
    args = command_line(str(__doc__), [cell.name for cell in CELLS]).parse_args(words)
    measure_cells(ROOT, args, CELLS, digests, measure)
    print(table())


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"{error.what}\n{error.hint}")
