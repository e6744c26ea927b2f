"""CLIP-ZSS as one module: a batch in, weighted losses out (arXiv 2310.02296).

L = L_global + NEL(x, F) + CE(x, F) + L_bce: the global module pulls what the image's CLS token
attends to towards that token; the pixel module tells the pixels of F apart, the labels of seen
classes and, where there are none, pseudo labels from CLIP's dense tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.config_methods import ClipZssConfig
from concat_cli.core.data.loader import Batch
from concat_cli.core.losses.token_bank import TokenBank
from concat_cli.core.model.layers import map_size, resize_padding
from concat_cli.core.train.contrast import contrast, feed, gathered
from concat_cli.core.train.distributed import mean_over_processes
from concat_cli.core.train.targets import trained_labels
from concat_cli.core.train.teacher import Teacher
from concat_cli.methods.clip_zss.losses import (
    centroids,
    pixel_cross_entropy,
    pixel_logits,
    pooled_by_cls,
    prototype_bce,
)
from concat_cli.methods.clip_zss.nel import nel, present_channels
from concat_cli.methods.clip_zss.pseudo_labels import PseudoOptions, fuse, pseudo_labels
from concat_cli.methods.clip_zss.student import Student
from concat_cli.methods.clip_zss.synthesizer import Synthesizer


@dataclass(frozen=True)
class FusedLabels:
    """F: what each pixel is told to be.

    labels: (B, H, W) int64, trained classes 0..K-1, pseudo class k of its image K+k, void -1.
    active: (B, C) bool, which of the C = K + M channels an image has.
    """

    labels: Tensor
    active: Tensor


class ClipZssModule(nn.Module):
    """The student with its losses.

    Args:
        synthesizer: makes prototypes of the regions' centroids; None: these are the prototypes.
        text: (K, E) embeddings of the classes that may be trained on, and of no other.
        to_trained: (all classes,) index among those K of each class of the data set, -1 where the
            class must not be trained on: its pixels are void.
        teacher: needed with clip_zss.glm or clip_zss.pseudo.
    """

    text: Tensor
    to_trained: Tensor

    def __init__(
        self,
        student: Student,
        synthesizer: Synthesizer | None,
        text: Tensor,
        to_trained: Tensor,
        cfg: ClipZssConfig,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        assert teacher is not None or not (cfg.glm or cfg.pseudo)
        self.student, self.synthesizer, self.cfg = student, synthesizer, cfg
        self.options = pseudo_options(cfg)
        self.register_buffer("text", text, persistent=False)
        self.register_buffer("to_trained", to_trained, persistent=False)
        self.reads_cls = cfg.glm > 0 or synthesizer is not None
        self.bank = TokenBank(cfg.bank if self.reads_cls else 0, text.shape[1])
        self._teacher = (teacher,)  # in a tuple: a frozen teacher is no part of the state

    def forward(self, batch: Batch, step: int) -> dict[str, Tensor]:
        """Weighted losses by name. Random numbers come from torch's global generator."""
        padding = batch.padding if bool(batch.padding.any()) else None
        features = self.student(batch.images, padding)  # (B, E, h, w)
        fused = self._labels(batch, padding)
        if self.cfg.pseudo:
            fused = without_missed(fused, map_size(features), len(self.text))
        cls = self._cls(batch)
        prototypes, losses = self._prototypes(features, fused, cls)
        losses |= self._pixels(features, fused, prototypes)
        if cls is not None:
            losses |= self._global(features, padding, cls, batch.image_ids)
        return losses

    def _labels(self, batch: Batch, padding: Tensor | None) -> FusedLabels:
        """The truth of trained classes, and pseudo labels where it says nothing."""
        labels = label_map(batch.segment_map, trained_labels(batch.labels, self.to_trained))
        known = torch.ones(len(labels), len(self.text), dtype=torch.bool, device=labels.device)
        (teacher,) = self._teacher
        if not self.cfg.pseudo or teacher is None:
            return FusedLabels(labels, known)
        pseudo = pseudo_labels(teacher.clip, batch.images, labels, padding, self.options)
        slots = torch.arange(self.options.most, device=labels.device)
        active = torch.cat((known, slots < pseudo.count[:, None]), 1)
        return FusedLabels(fuse(labels, pseudo, len(self.text)), active)

    def _cls(self, batch: Batch) -> Tensor | None:
        """CLS tokens (B, E) of the views, where something reads them."""
        (teacher,) = self._teacher
        if not self.reads_cls or teacher is None:
            return None
        return teacher.images(batch)

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
        self, features: Tensor, fused: FusedLabels, prototypes: Tensor | None
    ) -> dict[str, Tensor]:
        """NEL and cross-entropy of x on F."""
        size = map_size(features)
        beta = self.cfg.pseudo_scale or None
        x = pixel_logits(features.flatten(2), self.text, prototypes, self.student.scale, beta)
        targets = labels_at(fused.labels, size)
        if self.cfg.full_size:
            x = F.interpolate(
                x.unflatten(2, size), fused.labels.shape[1:], mode="bilinear", align_corners=False
            ).flatten(2)
            targets = fused.labels.flatten(1)
        pixels = mean_over_processes((targets >= 0).sum().float()).clamp(min=1)
        masks = mean_over_processes(present_channels(targets, x.shape[1]).sum().float())
        terms = nel(x, targets, fused.active, masks.clamp(min=1))
        classes = pixel_cross_entropy(x, targets, fused.active, pixels)
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
            feed(self.bank, gathered(cls, image_ids, valid))
            return {}
        pads = resize_padding(padding, map_size(features))
        inside = None if pads is None else ~pads.flatten(1)
        whole = pooled_by_cls(features.flatten(2), cls, inside, self.cfg.glm_temperature)
        # images are groups: another view of the same image is no negative
        loss = contrast(whole, cls, valid, image_ids, self.bank, self.cfg.temperature)
        return {"global": self.cfg.glm * loss}


def without_missed(fused: FusedLabels, size: tuple[int, int], classes: int) -> FusedLabels:
    """F without the pseudo classes that no position of the features (h, w) belongs to.

    They have no centroid. Their channels are not active and their pixels, which only labels of a
    finer resolution have, are void.
    """
    held = present_channels(labels_at(fused.labels, size), fused.active.shape[1])
    held[:, :classes] = True
    known = held.gather(1, fused.labels.clamp(min=0).flatten(1)).view_as(fused.labels)
    return FusedLabels(torch.where(known, fused.labels, -1), fused.active & held)


def pseudo_options(cfg: ClipZssConfig) -> PseudoOptions:
    """How pseudo labels are made."""
    return PseudoOptions(
        size=cfg.dense_size,
        path=cfg.dense_path,
        windows=cfg.windows,
        stride=cfg.stride,
        covered=cfg.covered,
        iterations=cfg.iterations,
        threshold=cfg.merge,
        centre=cfg.centre,
        min_share=cfg.min_share,
        most=cfg.most,
    )


def label_map(segment_map: Tensor, labels: Tensor) -> Tensor:
    """Segments (B, H, W), 0 = none, with labels (B, N), -1 = void -> (B, H, W) int64 labels."""
    table = F.pad(labels, (1, 0), value=-1)  # segment 0 is void
    return table.gather(1, segment_map.flatten(1).long()).view(segment_map.shape)


def labels_at(labels: Tensor, size: tuple[int, int]) -> Tensor:
    """Labels (B, H, W) at the centres of a coarser grid's cells: (B, h * w)."""
    grid = F.interpolate(labels[:, None].float(), size, mode="nearest-exact")
    return grid.flatten(1).long()
