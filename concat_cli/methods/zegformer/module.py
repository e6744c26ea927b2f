"""ZegFormer's training as one module: a batch in, weighted losses of every layer out."""

from __future__ import annotations

from torch import Tensor

from concat_cli.core.config import LossConfig
from concat_cli.core.data.loader import Batch
from concat_cli.core.losses.masks import class_loss, expected_weight
from concat_cli.core.train.distributed import Counts
from concat_cli.core.train.targets import ImageModule, Truth, on_void
from concat_cli.methods.zegformer.focal import match_whole_masks, whole_mask_losses
from concat_cli.methods.zegformer.maskformer import MaskFormer


class ZegFormerModule(ImageModule):
    """The segmentor with its losses: cross-entropy, focal and dice, on all layers.

    Void (and with it all that is unseen) is in no mask, as in ZegFormer; besides, a query that lies
    on void by more than `loss.void_share` is taken neither for a class nor for no_object [ours].

    Several forwards of a step add up as in `ConModule`.

    Args:
        text, to_trained: see `ImageModule`.
        loss: the weights; they are those of the matching, too.
    """

    def __init__(
        self, segmentor: MaskFormer, text: Tensor, to_trained: Tensor, loss: LossConfig
    ) -> None:
        super().__init__(text, to_trained)
        self.segmentor, self.loss = segmentor, loss

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Segments, and weights of queries in the class loss."""
        segments = Truth.of(batch, self.to_trained).segments
        weight = expected_weight(
            segments, self.segmentor.query_decoder.queries, self.loss.no_object
        )
        return {"segments": segments.sum(), "class": weight}

    def forward(self, batch: Batch, counts: Counts | None = None) -> dict[str, Tensor]:
        """Weighted losses by name."""
        counts = counts or self.alone(batch)
        truth = Truth.of(batch, self.to_trained)
        labels, masks, void = truth.labels, truth.masks, truth.void
        out = self.segmentor(batch.images, truth.padding, self.text)
        weights = (self.loss.classes, self.loss.mask, self.loss.dice)
        matched = match_whole_masks(out.class_logits, out.mask_logits, labels, masks, weights)
        ignore = None if void is None else on_void(out.mask_logits, void, self.loss.void_share)
        classes = class_loss(
            out.class_logits, matched, labels, self.loss.no_object, ignore, counts["class"].of_whole
        )
        mask, dice = whole_mask_losses(out.mask_logits, matched, masks, counts["segments"].whole)
        return {
            "class": self.loss.classes * classes,
            "mask": self.loss.mask * mask,
            "dice": self.loss.dice * dice,
        }
