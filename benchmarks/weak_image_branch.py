"""What ZegFormer's image branch owes to a CLIP that knows the whole world.

    python benchmarks/compare.py --only zegformer-segment      # trains what is looked at
    python benchmarks/weak_image_branch.py

The tiny CLIP names 96% of the true masks of the built-in world; on photos no CLIP comes near that.
Here its early checkpoint, which names about half of them, takes its place in the image branch at
test. Nothing is trained again: segments, and the segment branch with its text, stay as they are.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from cells import SPLITS, spread
from compare import ROOT, qualities

from concat_cli.console import ConsoleProgress
from concat_cli.core.build import config_of
from concat_cli.core.checkpoint import load_weights
from concat_cli.core.clip.encoder import load_clip
from concat_cli.core.clip.prompts import cached_texts, class_texts
from concat_cli.core.data.dataset import PanopticDataset, read_dataset_info
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.intervals import GROUPS
from concat_cli.core.evaluate.run import evaluate_model
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.runs import Run
from concat_cli.methods.zegformer.config import MASKED_PROMPTS, ZegFormerConfig
from concat_cli.methods.zegformer.predictor import ZegFormerPredictor

BRANCHES = ("image", "fusion")
WEAK = "tiny-weak"


def weakened(path: Path, branch: str, device: str) -> tuple[ZegFormerPredictor, PanopticDataset]:
    """The predictor of weights with the weak CLIP in its image branch, and what it is scored on."""
    weights = load_weights(path)
    cfg = config_of(weights)
    info = read_dataset_info(Path(cfg.data.root))
    predictor = Predictor.load(
        weights, info.vocabulary, device, overrides=[f"zegformer.branch={branch}"]
    )
    assert isinstance(predictor, ZegFormerPredictor)
    clip_cfg = replace(cfg.clip, model=WEAK)
    predictor.clip = weak = load_clip(clip_cfg, predictor.device)
    masked = cfg.own(ZegFormerConfig).image_prompts == "masked"
    texts = class_texts(info.vocabulary, clip_cfg, MASKED_PROMPTS if masked else ())
    predictor.image_text = cached_texts(weak.identity.sha256, texts, lambda: weak).to(
        predictor.device
    )
    return predictor, PanopticDataset(info.part("val"), info.vocabulary, keep_crowd=True)


def weights_of(split: str) -> Path:
    """What `compare.py` trained; UserError where it did not."""
    path = Run("zegformer", ROOT / split).stage("zegformer").weights
    if path is None:
        raise UserError(
            f"There is no ZegFormer of split {split} in {ROOT}.",
            f"Run python benchmarks/compare.py --splits {split} --only zegformer-segment first.",
        )
    return path


def measure(split: str, path: Path, branch: str, device: str) -> dict[str, Any]:
    """The scores of a branch on val."""
    found = evaluate_model(*weakened(path, branch, device), progress=ConsoleProgress())
    return {"split": split, "branch": branch, **qualities(found)}


def main(words: Sequence[str] | None = None) -> None:
    """Measures the branches on the splits, then prints a table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--splits", nargs="+", choices=SPLITS, default=list(SPLITS))
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=ROOT / "weak_image_branch.json")
    args = parser.parse_args(words)
    if args.threads:
        torch.set_num_threads(args.threads)
    paths = {split: weights_of(split) for split in dict.fromkeys(args.splits)}
    rows = [
        measure(split, path, branch, args.device)
        for split, path in paths.items()
        for branch in BRANCHES
    ]
    args.out.write_text(json.dumps(rows, indent=1) + "\n")
    columns = [(figure, group) for figure in ("mIoU", "PQ") for group in GROUPS]
    print(f"| branch | splits | {' | '.join(' '.join(reversed(one)) for one in columns)} |")
    print("|---" * (len(columns) + 2) + "|")
    for branch in BRANCHES:
        mine = [row for row in rows if row["branch"] == branch]
        shown = (spread([row[figure][group] for row in mine]) for figure, group in columns)
        print(f"| {branch} | {len(mine)} | {' | '.join(shown)} |")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"{error.what}\n{error.hint}")
