"""CLIP-ZSS as one module: a batch in, weighted losses out (arXiv 2310.02296).

L = L_global + NEL(x, F) + CE(x, F) + L_bce: the global module pulls what the image's CLS token
attends to towards that token; the pixel module tells the pixels of F apart, the labels of seen
classes and, where there are none, pseudo labels from CLIP's dense tokens. NEL is ZegCLIP's loss of
classes that do not exclude one another: focal and dice on sigmoids.

C channels, P positions; targets (B, P) are channels, -1 where nothing is known. Such positions
carry no signal [ours]; in ZegCLIP they count as none of the classes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from concat_cli.core.data.loader import Batch
from concat_cli.core.losses import as_float, full_precision, sigmoid_focal
from concat_cli.core.model.layers import map_size, resize_padding
from concat_cli.core.train.distributed import Counts, mean_over_processes, of_the_step
from concat_cli.core.train.teacher import (
    ImageModule,
    Teacher,
    TokenBank,
    contrast,
    gathered,
    trained_labels,
)
from concat_cli.methods.clip_zss.config import ClipZssConfig
from concat_cli.methods.clip_zss.pseudo_labels import fuse, pseudo_labels
from concat_cli.methods.clip_zss.student import Student, Synthesizer

STRIDE = 4  # of the student's features


@dataclass(frozen=True)
class FusedLabels:
    """F: what each pixel is told to be.

    labels: (B, H, W) int64, trained classes 0..K-1, pseudo class k of its image K+k, void -1.
    active: (B, C) bool, which of the C = K + M channels an image has.
    """

    labels: Tensor
    active: Tensor


class ClipZssModule(ImageModule):
    """The student with its losses.

    Several forwards of a step add up to the whole batch. Known per forward only: the pseudo labels,
    with which each forward is a mean over its own pixels, and the negatives of the global module.

    Args:
        synthesizer: makes prototypes of the regions' centroids; None: these are the prototypes.
        text, to_trained: see `ImageModule`.
        teacher: needed with clip_zss.glm or clip_zss.pseudo.
    """

    def __init__(
        self,
        student: Student,
        synthesizer: Synthesizer | None,
        text: Tensor,
        to_trained: Tensor,
        cfg: ClipZssConfig,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__(text, to_trained, teacher)
        assert teacher is not None or not (cfg.glm or cfg.pseudo)
        self.student, self.synthesizer, self.cfg = student, synthesizer, cfg
        self.reads_cls = cfg.glm > 0 or synthesizer is not None
        self.bank = TokenBank(cfg.bank if self.reads_cls else 0, text.shape[1])

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """Pixels with a label, and classes present in each image."""
        if self.cfg.pseudo:
            return {}
        labels = self._annotated(batch)
        height, width = labels.shape[1:]
        size = (height, width) if self.cfg.full_size else (height // STRIDE, width // STRIDE)
        return told(labels_at(labels, size), len(self.text))

    def forward(self, batch: Batch, counts: Counts | None = None) -> dict[str, Tensor]:
        """Weighted losses by name. Random numbers come from torch's global generator."""
        padding = batch.padding if bool(batch.padding.any()) else None
        features = self.student(batch.images, padding)  # (B, E, h, w)
        fused = self._labels(batch, padding)
        if self.cfg.pseudo:
            fused = without_missed(fused, map_size(features), len(self.text))
        cls = self.teacher.images(batch) if self.reads_cls else None  # (B, E), of the views
        prototypes, losses = self._prototypes(features, fused, cls)
        losses |= self._pixels(features, fused, prototypes, counts or {})
        if cls is not None:
            losses |= self._global(features, padding, cls, batch.image_ids)
        return losses

    def _annotated(self, batch: Batch) -> Tensor:
        """(B, H, W) trained classes of the pixels, -1 for all else."""
        return label_map(batch.segment_map, trained_labels(batch.labels, self.to_trained))

    def _labels(self, batch: Batch, padding: Tensor | None) -> FusedLabels:
        """The truth of trained classes, and pseudo labels where it says nothing."""
        labels = self._annotated(batch)
        known = torch.ones(len(labels), len(self.text), dtype=torch.bool, device=labels.device)
        if not self.cfg.pseudo:
            return FusedLabels(labels, known)
        pseudo = pseudo_labels(self.teacher.clip, batch.images, labels, padding, self.cfg)
        slots = torch.arange(self.cfg.most, device=labels.device)
        active = torch.cat((known, slots < pseudo.count[:, None]), 1)
        return FusedLabels(fuse(labels, pseudo, len(self.text)), active)

    def _prototypes(
        self, features: Tensor, fused: FusedLabels, cls: Tensor | None
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """Prototypes (B, M, E) of pseudo classes, and L_bce of those of seen classes."""
        if not self.cfg.pseudo:
            return None, {}
        seen, channels = len(self.text), fused.active.shape[1]
        targets = labels_at(fused.labels, map_size(features))
        found = centroids(features.flatten(2), targets, channels)  # (B, C, E)
        if self.synthesizer is None or cls is None:
            return found[:, seen:], {}
        present = present_channels(targets, channels)
        bank = self.bank.negatives()
        tokens = torch.cat((cls[:, None], bank.tokens.expand(len(cls), -1, -1)), 1)
        valid = F.pad(bank.valid.expand(len(cls), -1), (1, 0), value=True)
        found = self.synthesizer(found, present, tokens, valid)
        count = mean_over_processes(present[:, :seen].sum().float()).clamp(min=1)
        loss = prototype_bce(
            found[:, :seen], present[:, :seen], self.text, self.cfg.prototype_scale, count
        )
        return found[:, seen:], {"prototypes": self.cfg.prototypes * loss}

    def _pixels(
        self,
        features: Tensor,
        fused: FusedLabels,
        prototypes: Tensor | None,
        counts: Counts | None = None,
    ) -> dict[str, Tensor]:
        """NEL and cross-entropy of x on F."""
        size = map_size(features)
        beta = self.cfg.pseudo_scale or None
        x = pixel_logits(features.flatten(2), self.text, prototypes, self.student.scale, beta)
        targets = labels_at(fused.labels, size)
        if self.cfg.full_size:
            maps = x.view(*x.shape[:2], *size)
            maps = F.interpolate(maps, fused.labels.shape[1:], mode="bilinear", align_corners=False)
            x = maps.flatten(2)
            targets = fused.labels.flatten(1)
        counts = counts or of_the_step([told(targets, x.shape[1])])[0]
        terms = nel(x, targets, fused.active, counts["masks"].whole)
        classes = pixel_cross_entropy(x, targets, fused.active, counts["pixels"].whole)
        return {
            "focal": self.cfg.focal * terms.focal,
            "dice": self.cfg.dice * terms.dice,
            "classes": self.cfg.classes * classes,
        }

    def _global(
        self, features: Tensor, padding: Tensor | None, cls: Tensor, image_ids: Tensor
    ) -> dict[str, Tensor]:
        """L_global, where it is on; either way the bank is fed."""
        valid = torch.ones_like(image_ids, dtype=torch.bool)
        if not self.cfg.glm:
            every = gathered(cls, image_ids, valid)
            self.bank.push(every.tokens, every.groups, every.valid)
            return {}
        pads = resize_padding(padding, map_size(features))
        inside = None if pads is None else ~pads.flatten(1)
        whole = pooled_by_cls(features.flatten(2), cls, inside, self.cfg.glm_temperature)
        # images are groups: another view of the same image is no negative
        loss = contrast(whole, cls, valid, image_ids, self.cfg.temperature, bank=self.bank)
        return {"global": self.cfg.glm * loss}


def told(targets: Tensor, channels: int) -> dict[str, Tensor]:
    """What the losses of pixels are means over, by their targets (B, P)."""
    masks = present_channels(targets, channels).sum()
    return {"pixels": (targets >= 0).sum(), "masks": masks}


def without_missed(fused: FusedLabels, size: tuple[int, int], classes: int) -> FusedLabels:
    """F without the pseudo classes that no position of the features (h, w) belongs to.

    They have no centroid. Their channels are not active and their pixels, which only labels of a
    finer resolution have, are void.
    """
    held = present_channels(labels_at(fused.labels, size), fused.active.shape[1])
    held[:, :classes] = True
    known = held.gather(1, fused.labels.clamp(min=0).flatten(1)).view_as(fused.labels)
    return FusedLabels(torch.where(known, fused.labels, -1), fused.active & held)


def label_map(segment_map: Tensor, labels: Tensor) -> Tensor:
    """Segments (B, H, W), 0 = none, with labels (B, N), -1 = void -> (B, H, W) int64 labels."""
    table = F.pad(labels, (1, 0), value=-1)  # segment 0 is void
    return table.gather(1, segment_map.flatten(1).long()).view(segment_map.shape)


def labels_at(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels (B, H, W) at the centres of a coarser grid's cells: (B, h * w)."""
    grid = F.interpolate(labels[:, None].float(), size, mode="nearest-exact")
    return grid.flatten(1).long()


def pooled_by_cls(
    features: Tensor, cls: Tensor, valid: Tensor | None, temperature: float
) -> Tensor:
    """The predicted CLS token S' = W R^T with W = softmax(S R / sqrt(E)) over positions [paper].

    Args:
        features: R, (B, E, P). cls: S, (B, E), L2-normalised as all of our CLIP's tokens.
        valid: (B, P) bool, at least one an image; None: all.
        temperature: 0: the paper's sqrt(E) over features as they are, which starts as an almost
            even mean; else of the cosine of S and R, whose pooled features are normalised [ours].
    """
    with full_precision(features):
        features, cls = as_float(features), as_float(cls)
        if temperature:
            features = F.normalize(features, dim=1)
        divisor = temperature or features.shape[1] ** 0.5
        scores = torch.einsum("be,bep->bp", cls.to(features.dtype), features) / divisor
        if valid is not None:
            scores = scores.masked_fill(~valid, -torch.inf)
        return torch.einsum("bp,bep->be", scores.softmax(-1), features)


def centroids(features: Tensor, targets: Tensor, channels: int) -> Tensor:
    """Mean feature of each target's region: (B, E, P), (B, P) -> (B, C, E), 0 where absent."""
    with full_precision(features):
        features = as_float(features)
        channel = torch.arange(channels, device=targets.device)[None, :, None]
        inside = (targets[:, None] == channel).to(features.dtype)  # (B, C, P)
        sums = torch.einsum("bcp,bep->bce", inside, features)
        return sums / inside.sum(2).clamp(min=1)[..., None]


def pixel_logits(
    features: Tensor,
    text: Tensor,
    pseudo: Tensor | None,
    scale: Tensor,
    pseudo_scale: Tensor | float | None = None,
) -> Tensor:
    """x = cat(a cos(R, T_seen), b cos(R, P_pseudo)) [paper].

    features (B, E, P), text (K, E), prototypes of pseudo classes (B, M, E) or None, a = `scale` (),
    b = `pseudo_scale`, None: b = a [ours] -> (B, K + M, P).
    """
    with full_precision(features):
        unit = F.normalize(as_float(features), dim=1)
        known = F.normalize(as_float(text).to(unit.dtype), dim=-1)
        logits = scale * torch.einsum("ke,bep->bkp", known, unit)
        if pseudo is None:
            return logits
        own = F.normalize(as_float(pseudo), dim=-1)
        beta = scale if pseudo_scale is None else pseudo_scale
        return torch.cat((logits, beta * (own @ unit)), 1)


def pixel_cross_entropy(
    logits: Tensor, targets: Tensor, active: Tensor, count: Tensor | float
) -> Tensor:
    """Cross-entropy over the active channels, summed over known positions, divided by `count`."""
    with full_precision(logits):
        logits = as_float(logits).masked_fill(~active[..., None], -torch.inf)
        return F.cross_entropy(logits, targets, ignore_index=-1, reduction="sum") / count


def prototype_bce(
    prototypes: Tensor, present: Tensor, text: Tensor, scale: float, count: Tensor | float
) -> Tensor:
    """L_bce: -log s(a t_k p_k) plus the mean over other texts of -log(1 - s(a t_j p_k)).

    s is the sigmoid, a the scale. The paper states the sigmoid of products of prototypes and texts;
    cosine, scale and negatives are [ours].

    Args:
        prototypes: (B, K, E) of seen classes; present: (B, K) bool. text: (K, E).
        count: divides the sum over present prototypes.
    """
    with full_precision(prototypes):
        found = F.normalize(as_float(prototypes), dim=-1)
        logits = scale * found @ F.normalize(as_float(text).to(found.dtype), dim=-1).T  # (B, K, K)
        positive = F.softplus(-logits.diagonal(dim1=1, dim2=2))  # (B, K)
        own = torch.eye(len(text), dtype=torch.bool, device=text.device)
        others = F.softplus(logits).masked_fill(own, 0.0).sum(-1) / max(len(text) - 1, 1)
        return ((positive + others) * present).sum() / count


class Nel(NamedTuple):
    """The two terms, scalars, without weights."""

    focal: Tensor
    dice: Tensor


def nel(logits: Tensor, targets: Tensor, active: Tensor, count: Tensor | float) -> Nel:
    """Focal loss of every active channel, dice of those present in an image [ZegCLIP, code].

    Both are sums over images and channels, divided by `count`; focal is a mean over the known
    positions of an image. Each position has one target at most, so that the targets need no (B, C,
    P) tensor of their own: what its channel adds is gathered and scattered.

    Args:
        logits: (B, C, P). targets: (B, P) int64.
        active: (B, C) bool; the targets are active.
        count: present channels of all images, averaged over processes, at least 1.
    """
    with full_precision(logits):
        logits = as_float(logits)
        known = (targets >= 0).to(logits.dtype)  # (B, P)
        own = targets.clamp(min=0)[:, None]  # (B, 1, P)
        area = known.sum(1).clamp(min=1)
        focal = _focal(logits, own, known, active) / area  # (B,)
        return Nel(focal.sum() / count, _dice(logits, own, known).sum() / count)


def present_channels(targets: Tensor, channels: int) -> Tensor:
    """Which channels the targets (B, P) hold: (B, C) bool."""
    held = F.pad(targets.new_zeros(len(targets), channels, dtype=torch.bool), (0, 1))
    index = torch.where(targets >= 0, targets, channels)  # what is not known goes to an extra slot
    return held.scatter(1, index, torch.ones_like(index, dtype=torch.bool))[:, :-1]


def _focal(logits: Tensor, own: Tensor, known: Tensor, active: Tensor) -> Tensor:
    """(B,) sums of focal losses over channels and known positions."""
    negative = sigmoid_focal(logits, torch.zeros_like(logits))  # (B, C, P)
    negative = torch.einsum("bcp,bp,bc->b", negative, known, active.to(known.dtype))
    chosen = logits.gather(1, own)[:, 0]  # (B, P)
    positive = sigmoid_focal(chosen, torch.ones_like(chosen))
    instead = sigmoid_focal(chosen, torch.zeros_like(chosen))
    return negative + ((positive - instead) * known).sum(1)


def _dice(logits: Tensor, own: Tensor, known: Tensor) -> Tensor:
    """(B,) sums of dice losses, smoothed by 1, over the channels present."""
    probability = logits.sigmoid() * known[:, None]  # (B, C, P)
    total = probability.sum(2)  # (B, C)
    index = own[:, 0]
    hit = torch.zeros_like(total).scatter_add(1, index, probability.gather(1, own)[:, 0])
    truth = torch.zeros_like(total).scatter_add(1, index, known)
    dice = 1 - (2 * hit + 1) / (total + truth + 1)
    return (dice * (truth > 0)).sum(1)
