"""ZegFormer's only stage: a segmentor trained on seen classes, CLIP's text alone at hand."""

from __future__ import annotations

import torch

from concat_cli.core.build import check_start
from concat_cli.core.config import Config
from concat_cli.core.errors import UserError
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.runs import Run
from concat_cli.core.train.images import ImageStage, micro_batches
from concat_cli.core.train.loop import StageResult
from concat_cli.core.train.session import open_session, text_clip
from concat_cli.methods.concat.con import warm_up
from concat_cli.methods.concat.con_module import ConModule
from concat_cli.methods.zegformer.build import build_zegformer
from concat_cli.methods.zegformer.maskformer import MaskFormer
from concat_cli.methods.zegformer.maskformer_pixel import GROUPS
from concat_cli.methods.zegformer.module import ZegFormerModule


def train_zegformer(
    cfg: Config,
    run: Run,
    *,
    device: str = "auto",
    fresh: bool = False,
    progress: Progress = SILENT,
) -> StageResult:
    """Trains a run's ZegFormer, or resumes it; its weights are in `runs/<name>/zegformer/`."""
    check_keys(cfg)
    session = open_session(cfg, device, progress)
    micro_batches(cfg.optim, session.processes)  # what cannot be trained leaves no folder behind
    check_start(cfg.model)
    clip = text_clip(cfg, session.device)
    torch.manual_seed(cfg.optim.seed)
    segmentor = build_zegformer(cfg, clip.embed_dim, pretrained=True, progress=progress)
    session.place(segmentor)
    images = ImageStage.open(
        session,
        run.stage("zegformer"),
        clip,
        fresh=fresh,
        by_category=cfg.zegformer.targets == "category",
    )
    if isinstance(segmentor, MaskFormer):
        return images.fit(ZegFormerModule(segmentor, images.text, images.to_trained, cfg.loss))
    if not warm_up(images, segmentor, None):
        return images.unfinished()
    return images.fit(ConModule(segmentor, images.text, images.to_trained, cfg.loss, cfg.align))


def check_keys(cfg: Config) -> None:
    """UserError for keys that ask for what the chosen segmentor or ZegFormer does not have."""
    if cfg.align.image or cfg.align.instance:
        raise UserError(
            "ZegFormer aligns nothing with CLIP's image encoder: align.image and align.instance "
            "are CON's.",
            "Set both to 0, or train CON with `concat train-con`.",
        )
    if cfg.zegformer.segmentor == "mask2former":
        return
    asked = {
        "model.init": cfg.model.init,
        "warmup.steps": cfg.warmup.steps,
        "loss.dense": cfg.loss.dense,
        "loss.denoising": cfg.loss.denoising,
        "loss.truth": cfg.loss.truth,
    }
    beyond = [key for key, value in asked.items() if value]
    if cfg.model.width % GROUPS:
        raise UserError(
            f"model.width={cfg.model.width} does not divide into the {GROUPS} groups of a "
            "MaskFormer's norms.",
            f"Make it a multiple of {GROUPS}, or set zegformer.segmentor=mask2former.",
        )
    if beyond:
        raise UserError(
            f"zegformer.segmentor=maskformer has no {' and no '.join(beyond)}.",
            "Leave them out, or set zegformer.segmentor=mask2former.",
        )
