"""Warm-up of the backbone on true masks of seen classes, before queries exist [ours]."""

from __future__ import annotations

from torch import Tensor, nn

from concat_cli.core.config import AlignConfig, BackboneWarmupConfig
from concat_cli.core.data.loader import Batch
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.train.con_module import trained_labels, with_slots
from concat_cli.core.train.teacher import Teacher
from concat_cli.core.train.truth import truth_losses


class WarmupModule(nn.Module):
    """Features pooled under true masks -> the class path -> cross-entropy over trained classes.

    With instance alignment on, the pooled features are also aligned with the CLS tokens of their
    masked segments. Arguments as in `ConModule`.
    """

    text: Tensor
    to_trained: Tensor

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
        masks = batch.masks()
        padding = batch.padding if bool(batch.padding.any()) else None
        (teacher,) = self._teacher
        target = None
        if self.aligns and teacher is not None:
            target = teacher.segments(batch, labels, masks)
        maps = self.segmentor.features(batch.images, padding)
        return truth_losses(
            self.segmentor, maps, self.text, labels, masks, padding, target, self.align
        )
