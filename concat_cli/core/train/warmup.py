"""Warm-up of the backbone on true masks of seen classes, before queries exist [ours]."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.config import AlignConfig, BackboneWarmupConfig
from concat_cli.core.data.loader import Batch
from concat_cli.core.losses.alignment import Negatives, info_nce
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.train.con_module import trained_labels, with_slots
from concat_cli.core.train.distributed import gather_rows, mean_over_processes, process_rank
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
        batch = with_slots(batch, self.align.crops if self.aligns else 1)
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
        if self.aligns:
            losses["align_instance"] = self.align.instance * self._aligned(
                semantic, batch, labels, masks
            )
        return losses

    def _aligned(self, semantic: Tensor, batch: Batch, labels: Tensor, masks: Tensor) -> Tensor:
        """Semantic embeddings (B, N, E) of true masks against the CLS tokens of every process."""
        (teacher,) = self._teacher
        assert teacher is not None
        target = teacher.segments(batch, labels, masks)
        groups = labels[target.image, target.segment].masked_fill(~target.valid, -1)
        every = Negatives(*(gather_rows(x) for x in (target.tokens, groups, target.valid)))
        return info_nce(
            semantic[target.image, target.segment],
            target.tokens,
            target.valid,
            self.align.temperature,
            groups,
            every.without_rows(process_rank() * len(groups), len(groups)),
            mean_over_processes(target.valid.sum().float()),
        )
