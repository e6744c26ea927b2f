"""CON as modules: a batch in, weighted losses out (segmentation, alignment, and our options)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from concat_cli.core.config import Config
from concat_cli.core.data.loader import Batch
from concat_cli.core.losses import class_loss, expected_weight, mask_losses, match
from concat_cli.core.model.layers import area_mean, resize_padding
from concat_cli.core.model.pixel_decoder import PixelFeatures
from concat_cli.core.model.query_decoder import Denoising
from concat_cli.core.model.segmentor import DenseOutput, QueryOutput, Segmentor
from concat_cli.core.train.distributed import Count, Counts
from concat_cli.core.train.teacher import (
    ImageModule,
    SegmentTokens,
    Teacher,
    TokenBank,
    Truth,
    aggregate,
    contrast,
    drawn_segments,
    on_void,
)
from concat_cli.methods.concat.latent import Latent, held, latent_of, match_apart
from concat_cli.methods.concat.latent_config import LatentConfig

SEED_WEIGHT = 5.0  # of a positive token in the objectness loss
TOKEN_STRIDE = 16  # of the map whose tokens queries are selected from


class TruthModule(ImageModule):
    """The segmentor, and losses on features pooled under true masks, which need no queries [ours].

    Args:
        text, to_trained: see `ImageModule`.
        teacher: gives CLS tokens; needed when an alignment weight is positive.
    """

    def __init__(
        self,
        segmentor: Segmentor,
        text: Tensor,
        to_trained: Tensor,
        cfg: Config,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__(text, to_trained, teacher)
        self.segmentor, self.cfg = segmentor, cfg
        self.loss, self.align, self.latent = cfg.loss, cfg.align, cfg.own(LatentConfig)
        self._newest: tuple[Batch, Truth] | None = None

    def truth(self, batch: Batch) -> Truth:
        """The truth of a batch, kept for the next call: what counts a batch is followed by what
        learns from it."""
        if self._newest is None or self._newest[0] is not batch:
            slots = self.align.crops if self.align.instance else 1
            self._newest = batch, Truth.of(batch, self.to_trained, slots)
        return self._newest[1]

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Segments, and those of them that are shown to the teacher."""
        segments = self.truth(batch).segments
        return {"segments": segments.sum(), "crops": segments.clamp(max=self.align.crops).sum()}

    def latents(self, truth: Truth, pixel: PixelFeatures | None = None) -> Latent | None:
        """What void may hold, where it is asked for; see `latent_of`."""
        if not self.latent.weight:
            return None
        looks = None if pixel is None else (self.segmentor.query_decoder, pixel)
        return latent_of(truth, looks, self.latent)

    def tokens(self, truth: Truth, latent: Latent | None) -> SegmentTokens:
        """CLS tokens of labelled segments, and then of latent ones, where those are aligned."""
        found = self.teacher.segments(truth)
        if latent is None or not self.latent.align:
            return found
        other = self.teacher.masked(truth.batch, latent.masks, latent.labels, self.latent.split)
        return found.joined(other, truth.labels.shape[1])

    def truth_losses(
        self,
        maps: tuple[list[Tensor], PixelFeatures],
        truth: Truth,
        target: SegmentTokens | None,
        counts: Counts,
        latent: Latent | None = None,
    ) -> dict[str, Tensor]:
        """Cross-entropy of true segments over the trained classes, and their weighted alignment.

        maps: backbone and pixel features. target: CLS tokens of segments; None: no alignment.
        latent: segments that are aligned alone.
        """
        labels, quarter = labels_of(truth, latent), truth.quarter
        quarter = quarter if latent is None else torch.cat((quarter, latent.quarter), 1)
        vision = self.segmentor.mask_queries(*maps, quarter, truth.padding)
        semantic, logits = self.segmentor.classify(vision, self.text)
        valid = labels >= 0
        each = F.cross_entropy(logits[..., :-1][valid].float(), labels[valid], reduction="sum")
        losses = {"truth_class": each / counts["segments"].whole}
        if target is not None:
            if self.align.detach:
                semantic = self.segmentor.projector(vision.detach())
            semantic = semantic[target.image, target.segment]
            losses["truth_align"] = self._aligned(semantic, target, target.valid, labels, counts)
        return losses

    def _aligned(
        self,
        semantic: Tensor,
        target: SegmentTokens,
        valid: Tensor,
        labels: Tensor,
        counts: Counts,
        bank: TokenBank | None = None,
    ) -> Tensor:
        """Semantic queries (M, E) against the CLS tokens of their masked, cropped segments."""
        groups = labels[target.image, target.segment].masked_fill(~valid, -1)
        cfg, count = self.align, counts["crops"]
        alike = self.latent.alike if self.latent.weight else None
        return cfg.instance * contrast(
            semantic, target.tokens, valid, groups, cfg.temperature, count, bank, alike
        )

    def _latent_masks(
        self, logits: Tensor, matched: Tensor, latent: Latent, counts: Counts
    ) -> tuple[Tensor, Tensor]:
        """Weighted mask losses of latent segments, beside those of labelled ones."""
        loss, weight = self.loss, self.latent.weight
        bce, dice = mask_losses(logits, matched, latent.masks, counts["segments"].whole, loss)
        return weight * loss.mask * bce, weight * loss.dice * dice

    def _found_again(
        self, pixel: PixelFeatures, latent: Latent, counts: Counts
    ) -> dict[str, Tensor]:
        """The same of queries made of the latent segments themselves, before any layer; nothing
        where queries are learned."""
        if self.segmentor.query_decoder.token_embedding is None:
            return {}
        queries = self._denoising(latent.quarter, latent.labels)
        logits = self.segmentor.query_decoder.masks_of(pixel, queries)
        own = own_queries(latent.labels)
        mask, dice = self._latent_masks(logits[None], own, latent, counts)
        return {"again_mask": mask, "again_dice": dice}

    def _denoising(self, quarter: Tensor, labels: Tensor) -> Denoising:
        """Queries of truth masks, given at stride 4 (B, M, h, w), at stride 8 with about a third of
        the cells left out, where labels (B, M) are none of -1."""
        small = F.avg_pool2d(quarter, 2)
        return Denoising(small * (torch.rand_like(small) > 0.3), labels >= 0)


class WarmupModule(TruthModule):
    """Features pooled under true masks -> the class path -> cross-entropy over trained classes.

    With instance alignment on, the pooled features are also aligned with the CLS tokens of their
    masked segments. With `warmup.masks`, queries made of noised true masks also have to find those
    masks again: features that are told apart by class alone merge what has no class yet.
    """

    def forward(self, batch: Batch, counts: Counts | None = None) -> dict[str, Tensor]:
        """Weighted losses by name."""
        counts = counts or self.alone(batch)
        aligns = self.cfg.warmup.align and self.align.instance > 0
        truth = self.truth(batch)
        latent = self.latents(truth)
        target = self.tokens(truth, latent) if aligns else None
        maps = self.segmentor.features(batch.images, truth.padding)
        losses = self.truth_losses(maps, truth, target, counts, latent)
        if weight := self.cfg.warmup.masks:
            queries = self._denoising(truth.quarter, truth.labels)
            logits = self.segmentor.query_decoder.masks_of(maps[1], queries)
            bce, dice = mask_losses(
                logits[None],
                own_queries(truth.labels),
                truth.masks,
                counts["segments"].whole,
                self.loss,
            )
            losses["mask"] = weight * self.loss.mask * bce
            losses["dice"] = weight * self.loss.dice * dice
            if latent is not None:
                again = self._found_again(maps[1], latent, counts)
                losses |= {name: weight * value for name, value in again.items()}
        return losses


class ConModule(TruthModule):
    """The segmentor with its losses.

    Where a step takes several forwards, each is divided by the counts of all, so that they add up
    to the losses of the whole batch. Two things are only known per forward: which queries lie on
    void (the class loss takes their share to be alike in all forwards of a step), and the
    negatives of the alignment, which are those of the forward and of the banks before it.
    """

    def __init__(
        self,
        segmentor: Segmentor,
        text: Tensor,
        to_trained: Tensor,
        cfg: Config,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__(segmentor, text, to_trained, cfg, teacher)
        align = cfg.align
        self.image_bank = TokenBank(align.bank if align.image else 0, text.shape[1])
        self.segment_bank = TokenBank(align.bank if align.instance else 0, text.shape[1])

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Segments, weights of queries in the class loss, and tokens, where tokens are trained."""
        truth, decoder = self.truth(batch), self.segmentor.query_decoder
        found = super().counts(batch)
        found["class"] = expected_weight(truth.segments, decoder.queries, self.loss.no_object)
        if self.loss.denoising:
            found["noised"] = truth.segments.clamp(max=self.loss.denoising).sum()
        if decoder.objectness is not None:
            height, width = batch.padding.shape[1:]
            size = (height // TOKEN_STRIDE, width // TOKEN_STRIDE)
            targets = TokenTargets.of(truth, size, self.loss.void_share)
            found |= {"tokens": targets.valid.sum(), "dense": (targets.classes >= 0).sum()}
        return found

    def forward(self, batch: Batch, counts: Counts | None = None) -> dict[str, Tensor]:
        """Weighted losses by name. Random numbers come from torch's global generator."""
        counts = counts or self.alone(batch)
        truth = self.truth(batch)
        labels, masks = truth.labels, truth.masks
        # one set of points for all images, drawn before anything whose size depends on the batch:
        # matching does not depend on the split over processes
        coords = torch.rand(1, self.loss.points, 2, device=masks.device).expand(len(masks), -1, -1)
        own_labels, own_masks, noised = labels[:, :0], masks[:, :0], None
        if self.loss.denoising:
            chosen = drawn_segments(labels, min(self.loss.denoising, labels.shape[1]))
            own_labels = labels.gather(1, chosen)
            image = torch.arange(len(masks), device=masks.device)[:, None]
            own_masks = masks[image, chosen]
            noised = self._denoising(truth.quarter[image, chosen], own_labels)
        wants_tokens = self.segmentor.query_decoder.objectness is not None
        out = self.segmentor(batch.images, truth.padding, self.text, noised, dense=wants_tokens)
        weights = (self.loss.classes, self.loss.mask, self.loss.dice)
        matched = match(out.class_logits, out.mask_logits, labels, masks, weights, coords)
        ignore = None
        if truth.void is not None:
            ignore = on_void(out.mask_logits, truth.void, self.loss.void_share)
        latent, apart = self.latents(truth, out.pixel), matched[..., :0]
        if latent is not None:  # they have masks and no names: queries that hold them have no class
            apart = match_apart(out.mask_logits, matched, latent, weights[1:], coords)
            kept = held(apart, out.mask_logits.shape[2])
            ignore = kept if ignore is None else kept | ignore
        count = counts["segments"].whole
        losses = self._segmentation(out, matched, labels, masks, ignore, counts["class"], count)
        if out.denoising is not None:
            own = own_queries(own_labels).expand(len(out.class_logits), -1, -1)
            terms = self._segmentation(
                out.denoising, own, own_labels, own_masks, own < 0, counts["noised"], count
            )
            losses |= {f"denoising_{name}": value for name, value in terms.items()}
        if latent is not None:
            found = self._latent_masks(out.mask_logits, apart, latent, counts)
            losses |= dict(zip(("latent_mask", "latent_dice"), found, strict=True))
            losses |= self._found_again(out.pixel, latent, counts)
        if out.dense is not None:
            losses |= self._of_tokens(out.dense, truth, counts, latent)
        target = None
        if self.align.instance:
            target = self.tokens(truth, latent)
            whole = torch.cat((matched, apart), 2)[-1]
            query = whole[target.image, target.segment]  # (M,), -1 where unmatched
            semantic = self._semantic(out)[target.image, query.clamp(min=0)]  # (M, E)
            valid = target.valid & (query >= 0)
            every = labels_of(truth, latent)
            losses["align_instance"] = self._aligned(
                semantic, target, valid, every, counts, self.segment_bank
            )
        if self.loss.truth:  # the warm-up's losses, kept on beside the queries' own
            kept = self.truth_losses((out.features, out.pixel), truth, target, counts, latent)
            losses |= {name: self.loss.truth * value for name, value in kept.items()}
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
        weight: Count,
        count: Tensor,
    ) -> dict[str, Tensor]:
        """The losses of queries that should be what they are matched to; see `class_loss`.

        weight, count: of their weights, and of the segments of the whole batch.
        """
        classes = class_loss(
            out.class_logits, matched, labels, self.loss.no_object, ignore, weight.of_whole
        )
        mask, dice = mask_losses(out.mask_logits, matched, masks, count, self.loss)
        return {
            "class": self.loss.classes * classes,
            "mask": self.loss.mask * mask,
            "dice": self.loss.dice * dice,
        }

    def _of_tokens(
        self, dense: DenseOutput, truth: Truth, counts: Counts, latent: Latent | None
    ) -> dict[str, Tensor]:
        targets = TokenTargets.of(truth, dense.size, self.loss.void_share, latent)
        count = counts["tokens"].whole
        losses = {"objectness": objectness_loss(dense.objectness, targets, SEED_WEIGHT, count)}
        if self.loss.dense:
            count = counts["dense"].whole
            losses["dense"] = self.loss.dense * token_class_loss(
                dense.class_logits, targets.classes, count
            )
        return losses

    def _image(self, out: QueryOutput, matched: Tensor, batch: Batch) -> Tensor:
        """The aggregated semantic queries of an image against the CLS token of the full image."""
        tokens = self.teacher.images(batch)
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
        # another view of the same image is no negative
        return self.align.image * contrast(
            whole, tokens, valid, batch.image_ids, self.align.temperature, bank=self.image_bank
        )

    def _semantic(self, out: QueryOutput) -> Tensor:
        """Semantic queries (B, Q, E) of the last layer, cut from the decoder if so configured."""
        if not self.align.detach:
            return out.semantic_queries[-1]
        return self.segmentor.projector(out.vision_queries[-1].detach())


def labels_of(truth: Truth, latent: Latent | None) -> Tensor:
    """(B, N + M) classes of the labelled segments, and -1 for each latent one."""
    if latent is None:
        return truth.labels
    return torch.cat((truth.labels, torch.full_like(latent.labels, -1)), 1)


def own_queries(labels: Tensor) -> Tensor:
    """Labels (B, M) -> (1, B, M) int64: each denoising query belongs to the segment it was made of;
    -1 for a label of -1."""
    slots = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)
    return slots.masked_fill(labels < 0, -1)[None]


@dataclass(frozen=True)
class TokenTargets:
    """What the T tokens should be that queries are selected from [ours].

    seeds: (B, T) float, 1 at one token of each segment. valid: (B, T) bool, those with a target.
    classes: (B, T) int64, -1 for none.
    """

    seeds: Tensor
    valid: Tensor
    classes: Tensor

    @staticmethod
    def of(
        truth: Truth, size: tuple[int, int], void_share: float, latent: Latent | None = None
    ) -> TokenTargets:
        """The targets on a grid of tokens (h, w); void for more than `void_share` has none, save
        what a latent segment covers, which is a segment without a class."""
        share, void = area_mean(truth.quarter, size), truth.void
        seeds = seed_tokens(share, truth.labels)
        if latent is not None:
            other = seed_tokens(area_mean(latent.quarter, size), latent.labels)
            seeds = torch.maximum(seeds, other)
            void = None if void is None else void & ~latent.masks.any(1)
        valid = torch.ones_like(seeds, dtype=torch.bool)
        if void is not None:
            covered = area_mean(void[:, None], size)[:, 0].flatten(1)
            valid = (covered <= void_share) | (seeds > 0)
        pads = resize_padding(truth.padding, size)
        valid = valid if pads is None else valid & ~pads.flatten(1)
        return TokenTargets(seeds, valid, token_classes(share, truth.labels))


def token_classes(share: Tensor, labels: Tensor) -> Tensor:
    """The class of the segment that fills more than half of a token, -1 where none does.

    share (B, N, h, w), labels (B, N) with -1 for no segment -> (B, h*w) int64.
    """
    share = share.flatten(2).masked_fill((labels < 0)[..., None], 0.0)  # (B, N, T)
    best, index = share.max(1)
    return labels.gather(1, index).masked_fill(best <= 0.5, -1)


def seed_tokens(share: Tensor, labels: Tensor) -> Tensor:
    """One token per segment, the most interior one: the target of objectness.

    share (B, N, h, w), labels (B, N) -> (B, h*w) float, 1 at such tokens.
    """
    around = F.avg_pool2d(share, 3, stride=1, padding=1)
    wide = F.avg_pool2d(around, 3, stride=1, padding=1)
    inner = (share + around + wide).flatten(2)  # (B, N, T): a small distance transform
    seeds = inner.argmax(-1)  # (B, N)
    target = torch.zeros_like(inner[:, 0])
    return target.scatter_reduce(1, seeds, (labels >= 0).to(target.dtype), "amax")


def objectness_loss(logits: Tensor, targets: TokenTargets, weight: float, count: Tensor) -> Tensor:
    """BCE over tokens, positives weighted, divided by `count`; logits (B, T)."""
    loss = F.binary_cross_entropy_with_logits(
        logits.float(),
        targets.seeds,
        reduction="none",
        pos_weight=logits.new_tensor(weight).float(),
    )
    return (loss * targets.valid).sum() / count


def token_class_loss(class_logits: Tensor, classes: Tensor, count: Tensor) -> Tensor:
    """Cross-entropy of tokens that lie in one segment, divided by `count`.

    class_logits (B, T, K+1), classes (B, T) with -1 for void.
    """
    flat = class_logits.flatten(0, 1).float()
    return F.cross_entropy(flat, classes.flatten(), ignore_index=-1, reduction="sum") / count
