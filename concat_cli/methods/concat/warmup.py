"""Warm-up of the backbone on true masks of seen classes, before queries exist [ours]."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.train.images import ImageStage, ImageTask, fit_images
from concat_cli.core.train.teacher import Teacher
from concat_cli.methods.concat.con_module import WarmupModule


class WarmupTask(ImageTask):
    """The same over the warm-up module, which has nothing to score or show."""

    def score(self, step: int) -> dict[str, float]:
        """Nothing: the query decoder is still random."""
        return {}

    def preview(self, path: Path) -> None:
        """Nothing to show."""


def warm_up(images: ImageStage, segmentor: Segmentor, teacher: Teacher | None) -> bool:
    """The warm-up, where one is asked for and was not done yet; False if it was stopped."""
    cfg = images.session.cfg
    if not cfg.warmup.steps or images.stage.state.exists():
        return True
    module = WarmupModule(
        segmentor, images.text, images.to_trained, cfg.loss, cfg.align, cfg.warmup, teacher
    )
    optim = replace(cfg.optim, steps=cfg.warmup.steps, lr=cfg.warmup.lr, ema=0.0, eval_every=0)
    task = WarmupTask(module, images.session, images.text, optim, images.train, images.by_category)
    return fit_images(task, images.stage.inner("warmup"), images.meta).finished
