"""Stage 1 as one module: a batch in, weighted losses out (segmentation, CON, and our options)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.config import AlignConfig, LossConfig
from concat_cli.core.data.loader import Batch
from concat_cli.core.losses.alignment import aggregate
from concat_cli.core.losses.classes import class_loss
from concat_cli.core.losses.masks import mask_losses
from concat_cli.core.losses.matcher import match
from concat_cli.core.losses.points import PointSampling
from concat_cli.core.losses.token_bank import TokenBank
from concat_cli.core.model.query_decoder import Denoising
from concat_cli.core.model.segmentor import QueryOutput, Segmentor, SegmentorOutput
from concat_cli.core.train.contrast import contrast
from concat_cli.core.train.distributed import mean_over_processes
from concat_cli.core.train.targets import on_void, trained_labels, void_of, with_slots
from concat_cli.core.train.teacher import SegmentTokens, Teacher, drawn_segments
from concat_cli.methods.concat import token_losses as dense
from concat_cli.methods.concat.truth import truth_losses

SEED_WEIGHT = 5.0  # of a positive token in the objectness loss


class ConModule(nn.Module):
    """The segmentor with its losses.

    Args:
        text: (K, E) embeddings of the classes that may be trained on, and of no other.
        to_trained: (all classes,) index among those K of each class of the data set, -1 where the
            class must not be trained on: its pixels are void.
        teacher: gives CLS tokens; needed when an alignment weight is positive.
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
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        assert teacher is not None or not (align.image or align.instance)
        self.segmentor, self.loss, self.align = segmentor, loss, align
        self.points = PointSampling(loss.points, loss.oversample, loss.importance)
        self.register_buffer("text", text, persistent=False)
        self.register_buffer("to_trained", to_trained, persistent=False)
        self.image_bank = TokenBank(align.bank if align.image else 0, text.shape[1])
        self.segment_bank = TokenBank(align.bank if align.instance else 0, text.shape[1])
        self._teacher = (teacher,)  # in a tuple: a frozen teacher is no part of the state

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Weighted losses by name. Random numbers come from torch's global generator."""
        batch = with_slots(batch, self.align.crops if self.align.instance else 1)
        labels = trained_labels(batch.labels, self.to_trained)
        masks = batch.masks() & (labels >= 0)[..., None, None]  # (B, N, H, W)
        padding = batch.padding if bool(batch.padding.any()) else None
        count = mean_over_processes((labels >= 0).sum().float()).clamp(min=1)
        # one set of points for all images, drawn before anything whose size depends on the batch:
        # matching does not depend on the split over processes
        coords = torch.rand(1, self.loss.points, 2, device=masks.device).expand(len(masks), -1, -1)
        chosen = self._chosen(labels)
        own_labels = labels.gather(1, chosen)
        own_masks = masks[torch.arange(len(masks), device=masks.device)[:, None], chosen]
        noised = self._denoising(own_masks, own_labels)
        wants_tokens = self.segmentor.query_decoder.objectness is not None
        out = self.segmentor(batch.images, padding, self.text, noised, dense=wants_tokens)
        weights = (self.loss.classes, self.loss.mask, self.loss.dice)
        matched = match(
            out.class_logits, out.mask_logits, labels, masks, labels >= 0, weights, coords
        )
        void = void_of(batch, labels)
        ignore = None if void is None else on_void(out.mask_logits, void, self.loss.void_share)
        losses = self._segmentation(out, matched, labels, masks, ignore, count)
        if noised is not None and out.denoising is not None:
            losses |= self._of_noised(out.denoising, own_labels, own_masks, count)
        if out.dense is not None:
            losses |= self._of_tokens(out, labels, masks, void)
        target = self._segment_tokens(batch, labels, masks)
        if target is not None:
            losses["align_instance"] = self._instance(out, matched, target, labels)
        if self.loss.truth:
            losses |= self._of_truth(out, labels, masks, padding, target)
        if self.align.image:
            losses["align_image"] = self._image(out, matched, batch)
        return losses

    def _segmentation(
        self,
        out: QueryOutput,
        matched: Tensor,
        labels: Tensor,
        masks: Tensor,
        ignore: Tensor | None,
        count: Tensor,
    ) -> dict[str, Tensor]:
        classes = class_loss(
            out.class_logits, matched, labels, self.loss.no_object, ignore, mean_over_processes
        )
        mask, dice = mask_losses(out.mask_logits, matched, masks, labels >= 0, count, self.points)
        return {
            "class": self.loss.classes * classes,
            "mask": self.loss.mask * mask,
            "dice": self.loss.dice * dice,
        }

    def _chosen(self, labels: Tensor) -> Tensor:
        """Slots (B, M) of the segments that denoising queries are made of, drawn at random."""
        if not self.loss.denoising:
            return labels.new_zeros(len(labels), 0)
        return drawn_segments(labels, min(self.loss.denoising, labels.shape[1]))

    def _denoising(self, masks: Tensor, labels: Tensor) -> Denoising | None:
        """Queries made of noised truth masks, where they are switched on."""
        return noised(masks, labels >= 0) if self.loss.denoising else None

    def _of_noised(
        self, out: QueryOutput, labels: Tensor, masks: Tensor, count: Tensor
    ) -> dict[str, Tensor]:
        """Each denoising query belongs to the segment it was made of."""
        slots = torch.arange(labels.shape[1], device=labels.device)
        own = slots.expand_as(labels).masked_fill(labels < 0, -1)
        own, empty = (x[None].expand(len(out.class_logits), -1, -1) for x in (own, labels < 0))
        terms = self._segmentation(out, own, labels, masks, empty, count)
        return {f"denoising_{name}": value for name, value in terms.items()}

    def _of_tokens(
        self, out: SegmentorOutput, labels: Tensor, masks: Tensor, void: Tensor | None
    ) -> dict[str, Tensor]:
        assert out.dense is not None
        share = dense.coverage(masks, out.dense.size)
        valid = None if out.dense.padding is None else ~out.dense.padding
        seeds = dense.seed_tokens(share, labels)
        if void is not None:
            covered = dense.coverage(void[:, None], out.dense.size)[:, 0].flatten(1)
            astray = covered > self.loss.void_share
            known = ~astray | (seeds > 0)
            valid = known if valid is None else known & valid
        losses = {
            "objectness": dense.objectness_loss(
                out.dense.objectness, seeds, valid, SEED_WEIGHT, mean_over_processes
            )
        }
        if self.loss.dense:
            classes = dense.token_classes(share, labels)
            losses["dense"] = self.loss.dense * dense.token_class_loss(
                out.dense.class_logits, classes, mean_over_processes
            )
        return losses

    def _segment_tokens(self, batch: Batch, labels: Tensor, masks: Tensor) -> SegmentTokens | None:
        """CLS tokens of the segments, where instance alignment is on."""
        (teacher,) = self._teacher
        if not self.align.instance or teacher is None:
            return None
        return teacher.segments(batch, labels, masks)

    def _of_truth(
        self,
        out: SegmentorOutput,
        labels: Tensor,
        masks: Tensor,
        padding: Tensor | None,
        target: SegmentTokens | None,
    ) -> dict[str, Tensor]:
        """The warm-up's losses, kept on beside the queries' own."""
        maps = (out.features, out.pixel)
        losses = truth_losses(
            self.segmentor, maps, self.text, labels, masks, padding, target, self.align
        )
        return {name: self.loss.truth * value for name, value in losses.items()}

    def _instance(
        self, out: QueryOutput, matched: Tensor, target: SegmentTokens, labels: Tensor
    ) -> Tensor:
        """Each matched semantic query against the CLS token of its masked, cropped segment."""
        query = matched[-1][target.image, target.segment]  # (M,), -1 where unmatched
        valid = target.valid & (query >= 0)
        semantic = self._semantic(out)[target.image, query.clamp(min=0)]  # (M, E)
        groups = labels[target.image, target.segment].masked_fill(~valid, -1)
        loss = contrast(
            semantic, target.tokens, valid, groups, self.segment_bank, self.align.temperature
        )
        return self.align.instance * loss

    def _image(self, out: QueryOutput, matched: Tensor, batch: Batch) -> Tensor:
        """The aggregated semantic queries of an image against the CLS token of the full image."""
        (teacher,) = self._teacher
        assert teacher is not None
        tokens = teacher.images(batch)
        taken = torch.zeros(out.class_logits.shape[1:3], dtype=torch.long, device=tokens.device)
        taken.scatter_add_(1, matched[-1].clamp(min=0), (matched[-1] >= 0).long())
        objectness = 1 - out.class_logits[-1].detach().softmax(-1)[..., -1]
        whole = aggregate(
            self._semantic(out),
            self.align.pooling,
            tokens,
            objectness,
            taken > 0,
            self.align.temperature,
        )
        valid = torch.ones_like(batch.image_ids, dtype=torch.bool)
        groups = batch.image_ids  # another view of the same image is no negative
        loss = contrast(whole, tokens, valid, groups, self.image_bank, self.align.temperature)
        return self.align.image * loss

    def _semantic(self, out: QueryOutput) -> Tensor:
        """Semantic queries (B, Q, E) of the last layer, cut from the decoder if so configured."""
        if not self.align.detach:
            return out.semantic_queries[-1]
        return self.segmentor.projector(out.vision_queries[-1].detach())


def noised(masks: Tensor, valid: Tensor) -> Denoising:
    """Truth masks (B, M, H, W) at stride 8 with about a third of the cells left out."""
    small = F.avg_pool2d(masks.float(), 8)
    return Denoising(small * (torch.rand_like(small) > 0.3), valid)
