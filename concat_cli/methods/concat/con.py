"""Stage 1: the segmentor, trained on seen classes and aligned with CLIP (CON)."""

from __future__ import annotations

from pathlib import Path

import torch

from concat_cli.core.build import build_segmentor, check_start
from concat_cli.core.clip.encoder import load_clip
from concat_cli.core.clip.tokens import TokenCache
from concat_cli.core.config import Config
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.runs import Run
from concat_cli.core.train.images import ImageStage, micro_batches
from concat_cli.core.train.loop import StageResult
from concat_cli.core.train.session import open_session
from concat_cli.core.train.teacher import Teacher
from concat_cli.methods.concat.con_module import ConModule
from concat_cli.methods.concat.warmup import warm_up


def train_con(
    cfg: Config,
    run: Run,
    *,
    device: str = "auto",
    fresh: bool = False,
    progress: Progress = SILENT,
) -> StageResult:
    """Trains stage 1 of a run, or resumes it; its weights are in `runs/<name>/con/`."""
    session = open_session(cfg, device, progress)
    micro_batches(cfg.optim, session.processes)  # what cannot be trained leaves no folder behind
    check_start(cfg.model)
    clip = load_clip(cfg.clip, session.device)
    cache = None
    if cfg.align.source == "cache":
        folder = Path(cfg.data.root) / "clip"
        cache = TokenCache(folder, clip.identity, clip.embed_dim, progress=progress)
    teacher = Teacher(clip, cfg.align.crops, cache)
    torch.manual_seed(cfg.optim.seed)
    segmentor = build_segmentor(cfg.model, clip.embed_dim, pretrained=True, progress=progress)
    session.place(segmentor)
    images = ImageStage.open(session, run.stage("con"), clip, fresh=fresh)
    if not warm_up(images, segmentor, teacher):
        return images.unfinished()
    return images.fit(
        ConModule(segmentor, images.text, images.to_trained, cfg.loss, cfg.align, teacher)
    )
