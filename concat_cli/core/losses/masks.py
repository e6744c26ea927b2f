"""Mask losses of matched queries: BCE and dice on sampled points (Mask2Former); focal loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from concat_cli.core.losses.points import (
    PointSampling,
    sample_at,
    sample_segments,
    uncertain_points,
)
from concat_cli.core.losses.precision import full_precision

ALPHA = 0.25  # of focal losses: weight of positive pixels; that of negative ones is 1 - ALPHA


def point_bce(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean BCE of each mask over its points: (M,) from two of (M, P)."""
    return F.binary_cross_entropy_with_logits(logits, truth, reduction="none").mean(-1)


def point_dice(logits: Tensor, truth: Tensor) -> Tensor:
    """Dice loss of each mask, smoothed by 1: (M,) from two of (M, P)."""
    probability = logits.sigmoid()
    overlap = 2 * (probability * truth).sum(-1)
    return 1 - (overlap + 1) / (probability.sum(-1) + truth.sum(-1) + 1)


def sigmoid_focal(logits: Tensor, truth: Tensor) -> Tensor:
    """-alpha_t (1 - p_t)^2 log(p_t) of each element, truth in {0, 1} (RetinaNet, gamma = 2)."""
    probability = logits.sigmoid()
    wrong = probability + truth - 2 * probability * truth  # 1 - p_t
    weight = 1 - ALPHA + (2 * ALPHA - 1) * truth
    entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    return weight * wrong.square() * entropy


def mask_losses(
    mask_logits: Tensor,
    matched: Tensor,
    truth: Tensor,
    valid: Tensor,
    num_masks: float | Tensor,
    points: PointSampling,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """BCE and dice, each summed over layers and masks and divided by `num_masks`.

    Only matched masks are gathered: the padding of a batch may be several times their number.

    Args:
        mask_logits: (L, B, Q, h, w).
        matched: (L, B, N) query per segment, -1 for none.
        truth: segment map (B, H, W) or masks (B, N, H, W); see `points`.
        valid: (B, N) bool.
        num_masks: segments of the batch, averaged over processes, at least 1.
        points: how many points and where.
        generator: source of the random points; by default torch's own.
    """
    layer, image, segment = ((matched >= 0) & valid[None]).nonzero(as_tuple=True)  # (M,) each
    if layer.numel() == 0:
        nothing = mask_logits.sum() * 0.0
        return nothing, nothing
    with full_precision(mask_logits):
        logits = mask_logits[layer, image, matched[layer, image, segment]]  # (M, h, w)
        with torch.no_grad():
            coords = uncertain_points(
                logits, points.count, points.oversample, points.importance, generator
            )
            wanted = sample_segments(truth, image, segment, coords)
        values = sample_at(logits[:, None], coords).squeeze(1)  # (M, P)
        wanted = wanted.to(values.dtype)
        bce = point_bce(values, wanted).sum() / num_masks
        return bce, point_dice(values, wanted).sum() / num_masks
