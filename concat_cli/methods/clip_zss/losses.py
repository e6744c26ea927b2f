"""CLIP-ZSS (arXiv 2310.02296): what its two modules compute from dense features.

The global module pools the features by the image's CLS token; the pixel module tells positions
apart by text embeddings of seen classes and by prototypes of pseudo classes, with cross-entropy and
NEL, ZegCLIP's loss of classes that do not exclude one another: focal and dice on sigmoids.

C channels, P positions; targets (B, P) are channels, -1 where nothing is known. Such positions
carry no signal [ours]; in ZegCLIP they count as none of the classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from concat_cli.core.losses import as_float, full_precision
from concat_cli.core.losses.masks import sigmoid_focal


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
