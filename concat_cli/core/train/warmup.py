"""Warm-up of the backbone on true masks of seen classes, before queries exist [ours]."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.config import AlignConfig, BackboneWarmupConfig
from concat_cli.core.data.loader import Batch
from concat_cli.core.losses.alignment import info_nce
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.train.con_module import trained_labels
from concat_cli.core.train.distributed import mean_over_processes
from concat_cli.core.train.teacher import Teacher


class WarmupModule(nn.Module):
    """Features pooled under true masks -> the class path -> cross-entropy over trained classes.

    With instance alignment on, the pooled features are also aligned with the CLS tokens of their
    masked segments. Arguments as in `ConModule`.
    """

    def __init__(
        self,
        segmentor: Segmentor,
        text: Tensor,
        to_trained: Tensor,
        align: AlignConfig,
        warmup: BackboneWarmupConfig,
        teacher: Teacher | None,
    ) -> None:
        super().__init__()
        self.segmentor, self.align = segmentor, align
        self.aligns = warmup.align and align.instance > 0
        self.register_buffer("text", text, persistent=False)
        self.register_buffer("to_trained", to_trained, persistent=False)
        self._teacher = (teacher,)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Weighted losses by name."""
        labels = trained_labels(batch.labels, self.to_trained)
        valid = labels >= 0
        masks = batch.masks()
        small = F.avg_pool2d(masks.float(), 4)
        padding = batch.padding if bool(batch.padding.any()) else None
        vision = self.segmentor.mask_queries(batch.images, small, padding)  # (B, N, D)
        semantic, logits = self.segmentor.classify(vision, self.text)
        count = mean_over_processes(valid.sum().float()).clamp(min=1)
        each = F.cross_entropy(logits[..., :-1][valid].float(), labels[valid], reduction="sum")
        losses = {"class": each / count}
        (teacher,) = self._teacher
        if self.aligns and teacher is not None:
            target = teacher.segments(batch, labels, masks)
            losses["align_instance"] = self.align.instance * info_nce(
                semantic[target.image, target.segment],
                target.tokens,
                target.valid,
                self.align.temperature,
                groups=labels[target.image, target.segment].masked_fill(~target.valid, -1),
            )
        return losses
