"""CLIP-ZSS (arXiv 2310.02296): what its two modules compute from dense features.

The global module pools the features by the image's CLS token; the pixel module tells positions
apart by text embeddings of seen classes and by prototypes of pseudo classes. Shapes as in `nel.py`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from concat_cli.core.losses import as_float, full_precision


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
