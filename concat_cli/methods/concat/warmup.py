"""Warm-up of the backbone on true masks of seen classes, before queries exist [ours]."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from concat_cli.core.config import AlignConfig, BackboneWarmupConfig, LossConfig
from concat_cli.core.data.loader import Batch
from concat_cli.core.losses.masks import mask_losses
from concat_cli.core.losses.points import PointSampling
from concat_cli.core.model.pixel_decoder import PixelFeatures
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.train.distributed import mean_over_processes
from concat_cli.core.train.images import ImageStage, ImageTask, fit_images
from concat_cli.core.train.targets import trained_labels, with_slots
from concat_cli.core.train.teacher import Teacher
from concat_cli.methods.concat.con_module import noised
from concat_cli.methods.concat.truth import truth_losses


class WarmupModule(nn.Module):
    """Features pooled under true masks -> the class path -> cross-entropy over trained classes.

    With instance alignment on, the pooled features are also aligned with the CLS tokens of their
    masked segments. With `warmup.masks`, queries made of noised true masks also have to find those
    masks again: features that are told apart by class alone merge what has no class yet.
    Arguments as in `ConModule`.
    """

    text: Tensor
    to_trained: Tensor

    def __init__(
        self,
        segmentor: Segmentor,
        text: Tensor,
        to_trained: Tensor,
        loss: LossConfig,
        align: AlignConfig,
        warmup: BackboneWarmupConfig,
        teacher: Teacher | None,
    ) -> None:
        super().__init__()
        self.segmentor, self.align, self.loss = segmentor, align, loss
        self.masks = warmup.masks
        self.points = PointSampling(loss.points, loss.oversample, loss.importance)
        self.aligns = warmup.align and align.instance > 0
        self.register_buffer("text", text, persistent=False)
        self.register_buffer("to_trained", to_trained, persistent=False)
        self._teacher = (teacher,)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Weighted losses by name."""
        batch = with_slots(batch, self.align.crops if self.aligns else 1)
        labels = trained_labels(batch.labels, self.to_trained)
        masks = batch.masks()
        padding = batch.padding if bool(batch.padding.any()) else None
        (teacher,) = self._teacher
        target = None
        if self.aligns and teacher is not None:
            target = teacher.segments(batch, labels, masks)
        maps = self.segmentor.features(batch.images, padding)
        losses = truth_losses(
            self.segmentor, maps, self.text, labels, masks, padding, target, self.align
        )
        return losses | (self._masks(maps[1], labels, masks) if self.masks else {})

    def _masks(self, pixel: PixelFeatures, labels: Tensor, masks: Tensor) -> dict[str, Tensor]:
        """BCE and dice of the masks that are found again."""
        valid = labels >= 0
        count = mean_over_processes(valid.sum().float()).clamp(min=1)
        logits = self.segmentor.query_decoder.masks_of(pixel, noised(masks, valid))
        own = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
        own = own.masked_fill(~valid, -1)[None]  # (1, B, N)
        bce, dice = mask_losses(logits[None], own, masks, valid, count, self.points)
        return {
            "mask": self.masks * self.loss.mask * bce,
            "dice": self.masks * self.loss.dice * dice,
        }


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
