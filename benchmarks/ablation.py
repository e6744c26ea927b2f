"""The ablation of CONCAT on the built-in world: which part helps, over three class splits.

    python benchmarks/ablation.py                     # everything, resumable cell by cell
    python benchmarks/ablation.py --splits 1 --only con
    python benchmarks/ablation.py --table             # the tables of what has been measured

Every cell is a run of the ordinary stages under runs/ablation/; a figure that is there is not
computed again, and one that was made with other arguments stops the script. Cells with instance
alignment share one warmed-up backbone, aligned as they are, and cells without it another; cells of
the weak teacher have their own. All of them saw seen classes alone. The bound with the labels of
all classes knows no split: it is trained once and scored on the classes of each.
The split `default` and the splits of seeds 1 and 2 are reported; nothing was tuned on them.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import (
    INTERVALS,
    SPLITS,
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
from numpy.typing import NDArray

from concat_cli.console import ConsoleProgress
from concat_cli.core.clip.encoder import load_clip
from concat_cli.core.clip.prompts import text_embeddings
from concat_cli.core.clip.tokens import segment_tokens
from concat_cli.core.config import Config
from concat_cli.core.config_file import load_config
from concat_cli.core.data.dataset import PanopticDataset, read_dataset_info
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.intervals import GROUPS, group_means, mean_pq
from concat_cli.core.evaluate.quality import PanopticScore
from concat_cli.core.evaluate.run import evaluate_model
from concat_cli.core.evaluate.scores import Scoring
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.runs import Run
from concat_cli.methods.concat.cat import train_cat
from concat_cli.methods.concat.con import train_con
from concat_cli.methods.concat.finetune import finetune

ROOT = Path("runs/ablation")
STAGE1 = {
    "projection": ["align.instance=0", "align.image=0"],
    "global": ["align.instance=0"],
    "instance": ["align.image=0"],
    "con": [],
}
CAT = {
    "control": ["finetune.pseudo=false"],
    "matching": ["cat.contrast=0", "cat.cycle=0"],
    "contrast": ["cat.cycle=0"],
    "cycle": [],
}
WEAK = "clip.model=tiny-weak"


@dataclass(frozen=True)
class Cell:
    """One row of the table: a stage 1, and what follows it ("" for nothing)."""

    stage1: str
    follow: str = ""
    weak: bool = False
    calibrated: bool = False

    @property
    def name(self) -> str:
        """The cell's name in files and tables."""
        parts = [self.stage1, self.follow, "calibrated" if self.calibrated else ""]
        return ("weak-" if self.weak else "") + "+".join(p for p in parts if p)


def cells() -> Iterator[Cell]:
    """Every cell, the cheapest to share first."""
    for stage1 in STAGE1:
        yield Cell(stage1)
        for follow in CAT:
            yield Cell(stage1, follow)
    yield Cell("projection", calibrated=True)
    yield Cell("con", "cycle", calibrated=True)
    yield Cell("all-labels")
    yield Cell("clip-on-true-masks")
    for stage1, follow in (("projection", ""), ("con", ""), ("con", "cycle")):
        yield Cell(stage1, follow, weak=True)


def config(split: str, cell: Cell, args: argparse.Namespace) -> Config:
    """The configuration of a cell."""
    labels = "unseen-none" if cell.stage1 == "all-labels" else f"split-{split}"
    keys = [f"data.root={ROOT / 'data' / labels}"]
    if cell.stage1 == "all-labels":
        keys += ["shapes.unseen=none", "align.instance=0", "align.image=0"]
    else:
        keys.append(f"shapes.unseen_seed={SPLITS[split]}")
    keys += budget_keys(args)
    keys += STAGE1.get(cell.stage1, []) + CAT.get(cell.follow, []) + [WEAK] * cell.weak
    if cell.calibrated:
        keys.append("finetune.calibrate=true")
        if not cell.follow:  # the model as it is, with an offset
            keys += ["finetune.pseudo=false", "finetune.steps=0"]
    return load_config(args.config, [*keys, *args.keys])


def budget_keys(args: argparse.Namespace) -> list[str]:
    """How long stage 1 trains, the same for every cell."""
    return [f"optim.steps={args.steps}", f"warmup.steps={args.warmup}"]


def digests(split: str, cell: Cell, args: argparse.Namespace) -> dict[str, str]:
    """`digest` of a cell's configuration; `budget` of what the arguments give to every cell."""
    common = load_config(args.config, [*budget_keys(args), *args.keys])
    return {"digest": digest(config(split, cell, args)), "budget": digest(common)}


def train(split: str, cell: Cell, args: argparse.Namespace) -> Path:
    """Trains what a cell needs and is not there yet; returns its weights."""
    cfg, say = config(split, cell, args), ConsoleProgress()
    draw_world(cfg, say)
    base = replace(cell, follow="", calibrated=False)
    folder = ROOT / (split if base.stage1 != "all-labels" else "any")
    first = Run(base.name, folder)
    share_warmup(folder, base, cfg, args.device)
    stage1 = train_con(cfg, first, device=args.device, progress=say).weights
    if not cell.follow and not cell.calibrated:
        return stage1
    run = Run(cell.name, ROOT / split)
    share_bank(first, run)
    if not cfg.finetune.pseudo:
        return finetune(cfg, run, weights=stage1, device=args.device, progress=say).weights
    trained = replace(cell, calibrated=False)
    cat = train_cat(
        cfg, Run(trained.name, ROOT / split), weights=stage1, device=args.device, progress=say
    )
    return finetune(cfg, run, weights=cat.weights, device=args.device, progress=say).weights


def share_warmup(folder: Path, cell: Cell, cfg: Config, device: str) -> None:
    """Gives a new run the warmed-up backbone of the first run whose warm-up is the same.

    The warm-up depends on the labels, the CLIP model and instance alignment; what else the cells
    differ in is set alike for all users of its folder.
    """
    kind = "all-labels" if cell.stage1 == "all-labels" else "plain"
    kind = "aligned" if cfg.align.instance else kind
    name = f"warmup-{'weak-' if cell.weak else ''}{kind}"
    target = folder / cell.name / "con"
    there = (target / "warmup").exists() or (target / "last.state.pt").exists()
    if there or not cfg.warmup.steps:
        return
    source = Run(name, folder)
    alone = replace(cfg, optim=replace(cfg.optim, steps=0), align=replace(cfg.align, image=0.0))
    train_con(alone, source, device=device, progress=ConsoleProgress())
    aside = target / "warmup.part"  # a copy that was broken off must not pass for a warm-up
    shutil.rmtree(aside, ignore_errors=True)
    shutil.copytree(source.path / "con" / "warmup", aside)
    aside.rename(target / "warmup")


def measure(split: str, cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """The figures of a cell on val, and its counts image by image in a file beside."""
    root = ROOT / "data" / f"split-{split}"
    began = time.monotonic()
    draw_world(config(split, replace(cell, stage1="projection"), args), ConsoleProgress())
    if cell.stage1 == "clip-on-true-masks":
        counts, extra = clip_on_true_masks(root, config(split, cell, args)), {}
    else:
        weights = train(split, cell, args)
        info = read_dataset_info(root)
        predictor = Predictor.load(weights, info.vocabulary, args.device)
        dataset = PanopticDataset(info.part("val"), info.vocabulary, keep_crowd=True)
        report = evaluate_model(
            predictor, dataset, Scoring(tasks="panoptic", diagnostics=True, counts=True)
        )
        assert report.counts is not None and report.counts.panoptic is not None
        counts, extra = report.counts.panoptic, {"diagnostics": report.diagnostics}
    vocabulary = read_dataset_info(root).vocabulary
    seen, unseen = vocabulary.seen_indices, vocabulary.unseen_indices
    means = group_means(counts.sum(0), mean_pq, (seen, unseen))
    made_with = digests(split, cell, args)
    np.savez_compressed(
        counts_file(ROOT, split, cell.name),
        counts=counts,
        seen=seen,
        unseen=unseen,
        digest=np.array(made_with["digest"]),
        budget=np.array(made_with["budget"]),
    )
    return {
        "split": split,
        "cell": cell.name,
        **made_with,
        **{group: float(means[group]) for group in GROUPS},
        "seconds": round(time.monotonic() - began, 1),
        **extra,
    }


@torch.no_grad()
def clip_on_true_masks(root: Path, cfg: Config) -> NDArray[np.float64]:
    """Counts (M, 4, K) of the true masks, each named by CLIP from its masked crop."""
    info = read_dataset_info(root)
    clip = load_clip(cfg.clip)
    text = text_embeddings(clip, info.vocabulary, cfg.clip)
    dataset = PanopticDataset(info.part("val"), info.vocabulary, keep_crowd=True)
    rows: list[NDArray[np.float64]] = []
    for sample in (dataset[i] for i in range(len(dataset))):
        image = torch.as_tensor(sample.image).permute(2, 0, 1)[None]
        select = torch.tensor([(0, n) for n in range(len(sample.labels))])
        tokens = segment_tokens(clip, image, torch.as_tensor(sample.segment_map)[None], select)
        labels = (tokens @ text.T).argmax(-1).numpy()
        score = PanopticScore(len(info.vocabulary))
        score.add(sample.segment_map, labels, sample.segment_map, sample.labels, sample.crowd)
        rows.append(score.counts)
    return np.stack(rows)


def table() -> str:
    """Mean and spread over splits of every cell, and the paired differences.

    Only rows of one budget are put together: that of the newest row.
    """
    rows = read_rows(ROOT)
    lines = [
        "| cell | splits | seen PQ | unseen PQ | hPQ | mask recall | accuracy, seen / unseen |"
    ]
    lines.append("|---|---|---|---|---|---|---|")
    rows, others = of_one_budget(rows)
    if others:
        lines[:0] = [f"{others} cells with another budget are not shown.", ""]
    for name in dict.fromkeys(str(row["cell"]) for row in rows):
        mine = [row for row in rows if row["cell"] == name]
        keys = ("seen", "unseen", "harmonic")
        shown = " | ".join(spread([row[key] for row in mine]) for key in keys)
        lines.append(f"| {name} | {len(mine)} | {shown} | {' | '.join(diagnosed(mine))} |")
    lines += ["", INTERVALS, ""]
    lines += ["| difference in hPQ | splits | mean [95% interval over images] |", "|---|---|---|"]
    for ours, theirs in PAIRS:
        splits, found = difference(ROOT, ours, theirs, "counts", mean_pq)
        interval = found.get("harmonic")
        if interval is not None:
            lines.append(f"| {ours} - {theirs} | {splits} | {interval.percent('+')} |")
    return "\n".join(lines)


def diagnosed(rows: Sequence[dict[str, Any]]) -> tuple[str, str]:
    """Class-agnostic recall at IoU 0.5 (mean and spread), and the accuracy of queries that fit a
    true segment, of seen and of unseen classes, in percent; "" where it was not measured."""
    keys = ("mask_recall", "matched_accuracy_seen", "matched_accuracy_unseen")
    told: list[dict[str, Any]] = [row.get("diagnostics") or {} for row in rows]
    found = [[each.get(key) for key in keys] for each in told]
    if any(value is None for figures in found for value in figures):
        return "", ""
    recall, seen, unseen = np.transpose(np.array(found, dtype=np.float64)) * 100
    spread = recall.std(ddof=len(recall) > 1)
    return f"{recall.mean():.1f} ± {spread:.1f}", f"{seen.mean():.1f} / {unseen.mean():.1f}"


PAIRS = [
    ("con+cycle", "projection"),
    ("con+cycle+calibrated", "projection+calibrated"),
    ("con+cycle", "con"),
    ("con+cycle", "projection+cycle"),
    ("con", "projection"),
    ("projection+cycle", "projection"),
    ("weak-con", "weak-projection"),
    ("weak-con+cycle", "weak-con"),
    ("weak-con+cycle", "weak-projection"),
]


def main(words: Sequence[str] | None = None) -> None:
    """Runs the cells that are asked for and not measured yet, then prints the tables."""
    every = tuple(cells())
    parser = command_line(str(__doc__), [cell.name for cell in every])
    parser.add_argument("--config", type=Path, default=Path("shapes"))
    parser.add_argument("--steps", type=int, default=600, help="iterations of stage 1")
    parser.add_argument("--warmup", type=int, default=400)
    args = parser.parse_args(words)
    measure_cells(ROOT, args, every, digests, measure)
    print(table())


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"{error.what}\n{error.hint}")
