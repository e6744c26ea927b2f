"""Stage 1: the segmentor, trained on seen classes and aligned with CLIP (CON).

Before it comes, if asked for, a warm-up of the backbone on true masks of seen classes [ours].
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from concat_cli.core.build import build_segmentor, check_start
from concat_cli.core.clip.encoder import load_clip
from concat_cli.core.config import Config
from concat_cli.core.errors import UserError
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.runs import Run
from concat_cli.core.train.images import ImageStage, ImageTask, open_image_session
from concat_cli.core.train.loop import StageResult
from concat_cli.core.train.plan import Plan, clip_width, segmentor_facts
from concat_cli.core.train.session import seed_torch
from concat_cli.core.train.teacher import Teacher
from concat_cli.methods.concat.borrowed_con import plan_on_borrowed, train_on_borrowed
from concat_cli.methods.concat.con_module import ConModule, WarmupModule
from concat_cli.methods.concat.latent_config import LatentConfig


def train_con(
    cfg: Config,
    run: Run,
    *,
    device: str = "auto",
    fresh: bool = False,
    force: bool = False,
    progress: Progress = SILENT,
) -> StageResult:
    """Trains stage 1 of a run, or resumes it; its weights are in `runs/<name>/con/`."""
    check_latent(cfg)
    if cfg.model.segmentor:
        return train_on_borrowed(cfg, run, device, fresh, force, progress)
    session = open_image_session(cfg, device, progress, force)
    check_start(cfg.model)
    clip = load_clip(cfg.clip, session.device, dtype=session.teacher_dtype, progress=progress)
    teacher = session.teacher(clip, cfg.align.crops, cfg.align.source)
    seed_torch(cfg.optim.seed)
    segmentor = build_segmentor(cfg.model, clip.embed_dim, pretrained=True, progress=progress)
    session.place(segmentor)
    images = ImageStage.open(session, run.stage("con"), clip, fresh=fresh)
    warmed = warm_up(images, segmentor, teacher)
    if warmed is not None and not warmed.finished:
        return images.unfinished(warmed)
    return images.fit(ConModule(segmentor, images.text, images.to_trained, cfg, teacher))


def check_latent(cfg: Config) -> None:
    """UserError where latent segments are asked of a segmentor that cannot learn from them."""
    latent = cfg.own(LatentConfig)
    if latent.weight and cfg.model.segmentor:
        raise UserError(
            "latent.weight is the weight of masks, and those of a published segmentor are frozen.",
            "Set latent.weight=0; latent.evidence does not need it.",
        )
    if latent.weight and latent.split and not cfg.model.token_queries:
        raise UserError(
            "latent.split=true needs model.token_queries=true: void is split by queries made of "
            "given masks.",
            "Set latent.split=false to take the connected parts of void as they are.",
        )


class WarmupTask(ImageTask):
    """The same over the warm-up module, which has nothing to score or show."""

    def score(self, step: int) -> dict[str, float]:
        """Nothing: the query decoder is still random."""
        return {}

    def preview(self, path: Path) -> None:
        """Nothing to show."""


def warm_up(
    images: ImageStage, segmentor: Segmentor, teacher: Teacher | None
) -> StageResult | None:
    """The warm-up, where one is asked for and was not done yet."""
    cfg = images.session.cfg
    if not cfg.warmup.steps or images.stage.state.exists():
        return None
    module = WarmupModule(segmentor, images.text, images.to_trained, cfg, teacher)
    optim = replace(cfg.optim, steps=cfg.warmup.steps, lr=cfg.warmup.lr, ema=0.0, eval_every=0)
    return images.fit(module, WarmupTask, optim, "warmup")


def plan(cfg: Config, run: Run, weights: Path | None, vocabulary: Path | None) -> Plan:
    """What `train_con` would do; UserError for what would stop it at once."""
    check_latent(cfg)
    if cfg.model.segmentor:
        return plan_on_borrowed(cfg)
    with torch.device("meta"):
        segmentor = build_segmentor(cfg.model, clip_width(cfg.clip) or 512)
    return segmentor_facts(cfg, segmentor, segmentor.backbone, run.stage("con"))
