"""ZegFormer's training as one module: a batch in, weighted losses of every layer out."""

from __future__ import annotations

from torch import Tensor, nn

from concat_cli.core.config import LossConfig
from concat_cli.core.data.loader import Batch
from concat_cli.core.losses.classes import class_loss
from concat_cli.core.train.distributed import mean_over_processes
from concat_cli.core.train.targets import on_void, trained_labels, void_of, with_slots
from concat_cli.methods.zegformer.focal import match_whole_masks, whole_mask_losses
from concat_cli.methods.zegformer.maskformer import MaskFormer


class ZegFormerModule(nn.Module):
    """The segmentor with its losses: cross-entropy, focal and dice, on all layers.

    Void (and with it all that is unseen) is in no mask, as in ZegFormer; besides, a query that lies
    on void by more than `loss.void_share` is taken neither for a class nor for no_object [ours].

    Args:
        text: (K, E) embeddings of the classes that may be trained on, and of no other.
        to_trained: (all classes,) index among those K of each class of the data set, -1 where the
            class must not be trained on: its pixels are void.
        loss: the weights; they are those of the matching, too.
    """

    text: Tensor
    to_trained: Tensor

    def __init__(
        self, segmentor: MaskFormer, text: Tensor, to_trained: Tensor, loss: LossConfig
    ) -> None:
        super().__init__()
        self.segmentor, self.loss = segmentor, loss
        self.register_buffer("text", text, persistent=False)
        self.register_buffer("to_trained", to_trained, persistent=False)

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Weighted losses by name."""
        batch = with_slots(batch, 1)
        labels = trained_labels(batch.labels, self.to_trained)
        masks = batch.masks() & (labels >= 0)[..., None, None]  # (B, N, H, W)
        padding = batch.padding if bool(batch.padding.any()) else None
        count = mean_over_processes((labels >= 0).sum().float()).clamp(min=1)
        out = self.segmentor(batch.images, padding, self.text)
        weights = (self.loss.classes, self.loss.mask, self.loss.dice)
        matched = match_whole_masks(out.class_logits, out.mask_logits, labels, masks, weights)
        void = void_of(batch, labels)
        ignore = None if void is None else on_void(out.mask_logits, void, self.loss.void_share)
        classes = class_loss(
            out.class_logits, matched, labels, self.loss.no_object, ignore, mean_over_processes
        )
        mask, dice = whole_mask_losses(out.mask_logits, matched, masks, count)
        return {
            "class": self.loss.classes * classes,
            "mask": self.loss.mask * mask,
            "dice": self.loss.dice * dice,
        }
