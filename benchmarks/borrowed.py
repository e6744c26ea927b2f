"""CONCAT on a published segmentor, against CLIP naming the same masks, on the built-in world.

    python benchmarks/borrowed.py                     # everything, resumable cell by cell
    python benchmarks/borrowed.py --splits default --only image concat
    python benchmarks/borrowed.py --table             # the table of what has been measured

A Mask2Former (ResNet-18, deformable decoder, learned queries, no mask pooling) is trained on seen
labels, after a warm-up of its backbone on them, and exported as a folder of `transformers`, which
is then opened as anybody's would be. Its masks are named five ways: "own" by the class path that
they were trained with, "image" by ZegFormer's image branch (a pass of CLIP's image encoder for each
mask), "crops" by the borrowed method with the same CLIP alone and the same crops, "pair" by that
method as it is by default, "concat" by CONCAT on top, which needs no image encoder at test. Its
seconds are those of all three stages, the bank included. A cell that is there is not computed
again, and one that was made with other arguments stops the script.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cells import SPLITS, command_line, digest, draw_world, measure_cells, read_rows, spread

from concat_cli.console import ConsoleProgress
from concat_cli.core.build import build_segmentor, config_of
from concat_cli.core.checkpoint import load_weights
from concat_cli.core.clip.encoder import load_clip
from concat_cli.core.clip.prompts import cached_texts, class_texts
from concat_cli.core.config import BackboneWarmupConfig, ClipConfig, Config
from concat_cli.core.config_file import load_config
from concat_cli.core.data.dataset import DatasetInfo, PanopticDataset, read_dataset_info
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.intervals import GROUPS
from concat_cli.core.evaluate.report import Report
from concat_cli.core.evaluate.run import evaluate_model
from concat_cli.core.evaluate.weights import evaluate_weights
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.model.layers import sine_positions
from concat_cli.core.model.query_decoder import QueryDecoder
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.runs import Run
from concat_cli.core.segmentors.source import open_frozen
from concat_cli.core.train.images import ImageStage, open_image_session
from concat_cli.core.train.session import seed_torch, text_clip
from concat_cli.methods.borrowed.weights import pair
from concat_cli.methods.concat.cat import train_cat
from concat_cli.methods.concat.con import WarmupTask, train_con
from concat_cli.methods.concat.con_module import ConModule, WarmupModule
from concat_cli.methods.concat.finetune import finetune
from concat_cli.methods.zegformer.config import MASKED_PROMPTS, ZegFormerConfig
from concat_cli.methods.zegformer.predictor import ZegFormerPredictor

ROOT = Path("runs/borrowed")
CLIP_ALONE = ("borrowed.naming=crops", "borrowed.known=1", "borrowed.new=1")
GRID = (4, 6)  # where the learned queries begin to look
SEGMENTOR = f"""model.backbone=resnet18 model.pixel_decoder=deformable model.token_queries=false
model.mask_pooling=false model.encoder_layers=1 model.encoder_ffn=256 model.decoder_layers=3
model.decoder_ffn=256 model.queries={GRID[0] * GRID[1]} loss.points=400 optim.steps=1500
optim.ema=0.99 optim.warmup=30 optim.channels_last=true infer.min_score=0.3""".split()
WARM_UP = 500  # steps
OF_SEGMENTOR = ("model.", "optim.", "loss.")  # keys of the command line that are its alone


@dataclass(frozen=True)
class Cell:
    """A way to name the masks of one segmentor."""

    name: str


CELLS = tuple(Cell(name) for name in ("own", "image", "crops", "pair", "concat"))


def config(split: str, args: argparse.Namespace) -> Config:
    """The configuration of the segmentor."""
    return load_config(None, [*_world(split), *SEGMENTOR, *args.keys])


def on_top(split: str, folder: Path, args: argparse.Namespace) -> Config:
    """The configuration of CONCAT on top: that of the demo."""
    keys = [key for key in args.keys if not key.startswith(OF_SEGMENTOR)]
    return load_config("demo", [*_world(split), f"model.segmentor={folder}", *keys])


def _world(split: str) -> list[str]:
    root = ROOT / "data" / f"shapes-{split}"
    return [f"data.root={root}", f"shapes.unseen_seed={SPLITS[split]}"]


def digests(split: str, cell: Cell, args: argparse.Namespace) -> dict[str, str]:
    """`digest` of how the segmentor and what names its masks are trained."""
    made = digest(config(split, args))
    if cell.name == "concat":
        made += digest(on_top(split, ROOT / split / "published", args))
    return {"digest": made}


def anchored(decoder: QueryDecoder) -> None:
    """Learned queries that begin at the places of a grid, which shortens their training."""
    grid = sine_positions(GRID, decoder.width, None, torch.device("cpu"))
    places = grid.reshape(-1, decoder.width)
    with torch.no_grad():
        decoder.query_position.copy_(places)
        decoder.query_content.copy_(places + 0.1 * torch.randn_like(places))


def train(split: str, args: argparse.Namespace) -> Path:
    """Trains the segmentor of a split, where it is not there yet; returns its weights."""
    cfg, say = config(split, args), ConsoleProgress()
    draw_world(cfg, say)
    session = open_image_session(cfg, args.device, say)
    clip = text_clip(cfg, session.device)
    seed_torch(cfg.optim.seed)
    segmentor = build_segmentor(cfg.model, clip.embed_dim)
    anchored(segmentor.query_decoder)
    session.place(segmentor)
    stage = Run("segmentor", ROOT / split).stage("con")
    images = ImageStage.open(session, stage, clip, fresh=False)
    warm_up(images, segmentor)
    result = images.fit(ConModule(segmentor, images.text, images.to_trained, cfg))
    if not result.finished:
        raise UserError(f"The segmentor of split {split} was stopped.", "Call it again.")
    return result.weights


def warm_up(images: ImageStage, segmentor: Segmentor) -> None:
    """Teaches backbone and pixel decoder the seen classes under true masks, as what is published
    begins with a backbone that knows what things look like; CLIP's image encoder teaches nothing.
    """
    if images.stage.state.exists():
        return
    cfg = images.session.cfg
    pooled = replace(cfg.model, mask_pooling=True)
    warmed = images.session.place(build_segmentor(pooled, images.text.shape[1]))
    module = WarmupModule(warmed, images.text, images.to_trained, replace(cfg, model=pooled))
    optim = replace(cfg.optim, steps=WARM_UP, lr=BackboneWarmupConfig.lr, ema=0.0)
    if not images.fit(module, WarmupTask, optim, "warmup").finished:
        raise UserError("The warm-up was stopped.", "Call it again.")
    segmentor.backbone.load_state_dict(warmed.backbone.state_dict())
    segmentor.pixel_decoder.load_state_dict(warmed.pixel_decoder.state_dict())


def published(split: str, weights: Path) -> Path:
    """The segmentor as a folder of `transformers`, written where it is not there yet."""
    folder = ROOT / split / "published"
    if not folder.exists():
        words = ["export", str(folder), "--format", "transformers", "--weights", str(weights)]
        subprocess.run([sys.executable, "-m", "concat_cli", *words], check=True)
    return folder


def image_branch(path: Path, device: str) -> Report:
    """ZegFormer's image branch on the masks of weights, on val."""
    weights = load_weights(path)
    cfg = config_of(weights)
    info = read_dataset_info(Path(cfg.data.root))
    plain = Predictor.load(weights, info.vocabulary, device)
    clip = load_clip(cfg.clip, plain.device)
    texts = class_texts(info.vocabulary, cfg.clip, MASKED_PROMPTS)
    text = cached_texts(clip.identity.sha256, texts, lambda: clip).to(plain.device)
    way = replace(ZegFormerConfig(), branch="image", targets="segment")
    predictor = ZegFormerPredictor(
        plain.model, plain.text, plain.vocabulary, plain.cfg, plain.device, plain.dtype,
        way=way, clip=clip, image_text=text,
    )  # fmt: skip
    return scored(predictor, info)


def borrowed(folder: Path, cfg: Config, device: str, *own: str) -> Report:
    """The published segmentor with the tiny CLIP, on val; thresholds as those of the others."""
    info = read_dataset_info(Path(cfg.data.root))
    weights = pair(open_frozen(str(folder)), ClipConfig())
    keys = [f"infer.min_score={cfg.infer.min_score}", *own]
    return scored(Predictor.load(weights, info.vocabulary, device, overrides=keys), info)


def scored(predictor: Predictor, info: DatasetInfo) -> Report:
    """On val, with all classes as candidates."""
    data = PanopticDataset(info.part("val"), info.vocabulary, keep_crowd=True)
    return evaluate_model(predictor, data, progress=ConsoleProgress())


def concat(split: str, folder: Path, args: argparse.Namespace) -> tuple[Path, float]:
    """CONCAT's three stages on the published folder: weights, and seconds of all that is new."""
    cfg, run, say = on_top(split, folder, args), Run("concat", ROOT / split), ConsoleProgress()
    began = time.monotonic()
    weights = None
    for stage in (train_con, train_cat, finetune):
        result = stage(cfg, run, device=args.device, progress=say)
        if not result.finished:
            raise UserError(f"CONCAT of split {split} was stopped.", "Call it again.")
        weights = result.weights
    assert weights is not None
    return weights, time.monotonic() - began


def measure(split: str, cell: Cell, args: argparse.Namespace) -> dict[str, Any]:
    """PQ of a way to name the masks, on val."""
    weights = train(split, args)
    seconds = None
    if cell.name == "image":
        report = image_branch(weights, args.device)
    elif cell.name in ("crops", "pair"):
        keys = CLIP_ALONE if cell.name == "crops" else ()
        report = borrowed(published(split, weights), config(split, args), args.device, *keys)
    else:
        if cell.name == "concat":
            weights, seconds = concat(split, published(split, weights), args)
        report = evaluate_weights(weights, device=args.device, progress=ConsoleProgress())
    quality = {g: getattr(report.panoptic[g], "pq", None) for g in GROUPS}
    row = {"split": split, "cell": cell.name, **digests(split, cell, args), "PQ": quality}
    return row | {"seconds": None if seconds is None else round(seconds, 1)}


def table() -> str:
    """PQ by group over the splits, hPQ as a share of the image branch's, seconds of training."""
    rows = read_rows(ROOT)
    reference = {row["split"]: row["PQ"]["harmonic"] for row in rows if row["cell"] == "image"}
    lines = [f"| masks named by | splits | {' | '.join(GROUPS)} | of image's hPQ | seconds |"]
    lines.append("|---" * (len(GROUPS) + 4) + "|")
    for cell in CELLS:
        mine = [row for row in rows if row["cell"] == cell.name]
        if not mine:
            continue
        told = [spread([row["PQ"][group] for row in mine]) for group in GROUPS]
        pairs = [(row["PQ"]["harmonic"], reference.get(row["split"])) for row in mine]
        shares = [f"{ours / theirs:.2f}" for ours, theirs in pairs if theirs]
        times = [row["seconds"] for row in mine if row["seconds"] is not None]
        told += [", ".join(shares), f"{np.median(times):.0f}" if times else "-"]
        lines.append(f"| {cell.name} | {len(mine)} | {' | '.join(told)} |")
    return "\n".join(lines)


def main(words: Sequence[str] | None = None) -> None:
    """Runs the cells that are asked for and not measured yet, then prints the table."""
    args = command_line(str(__doc__), [cell.name for cell in CELLS]).parse_args(words)
    measure_cells(ROOT, args, CELLS, digests, measure)
    print(table())


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"{error.what}\n{error.hint}")
