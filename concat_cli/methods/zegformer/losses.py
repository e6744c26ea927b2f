"""Mask losses on whole masks, sigmoid focal and dice, and their matching (MaskFormer; ZegFormer).

Void is in no mask: its pixels are negative ones [ZegFormer, code].
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from concat_cli.core.losses import as_float, full_precision
from concat_cli.core.losses.masks import point_dice, sigmoid_focal
from concat_cli.core.losses.matcher import assigned, class_costs, dice_costs


def focal_costs(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean focal loss of logits (L, B, Q, P) with truth (B, N, P) in {0, 1}: (L, B, Q, N).

    A pair is sum(positive y) + sum(negative (1 - y)), so that one product serves all pairs.
    """
    positive = sigmoid_focal(logits, torch.ones_like(logits))
    negative = sigmoid_focal(logits, torch.zeros_like(logits))
    gain = torch.einsum("lbqp,bnp->lbqn", positive - negative, truth)
    return (gain + negative.sum(-1, keepdim=True)) / logits.shape[-1]


def whole_mask_costs(
    class_logits: Tensor,
    mask_logits: Tensor,
    labels: Tensor,
    masks: Tensor,
    weights: tuple[float, float, float],
) -> Tensor:
    """Weighted costs (class, focal, dice) of every query and segment: (L, B, Q, N), fp32.

    Truth is brought to the predictions' size, taking the nearest pixel. Other arguments as in
    `match_whole_masks`.
    """
    with full_precision(mask_logits):
        by_class = class_costs(class_logits, labels)
        small = F.interpolate(masks.to(by_class.dtype), mask_logits.shape[-2:]).flatten(2)
        costs: list[Tensor] = []
        for layer, own in zip(torch.split(mask_logits, 1), torch.split(by_class, 1), strict=True):
            logits = as_float(layer).flatten(3)  # (1, B, Q, P); a layer at a time saves memory
            focal, dice = focal_costs(logits, small), dice_costs(logits, small)
            costs.append(weights[0] * own + weights[1] * focal + weights[2] * dice)
        return torch.cat(costs)


@torch.no_grad()
def match_whole_masks(
    class_logits: Tensor,
    mask_logits: Tensor,
    labels: Tensor,
    masks: Tensor,
    weights: tuple[float, float, float],
) -> Tensor:
    """The query of each segment, (L, B, N) int64, -1 for padding and segments left over if N > Q.

    Args:
        class_logits: (L, B, Q, K+1).
        mask_logits: (L, B, Q, h, w).
        labels: (B, N) class indices; -1 is padding and never matched.
        masks: (B, N, H, W) bool.
        weights: of class, focal and dice cost [ZegFormer: 1, 20, 1].
    """
    return assigned(
        whole_mask_costs(class_logits, mask_logits, labels, masks, weights), labels >= 0
    )


def whole_mask_losses(
    mask_logits: Tensor, matched: Tensor, masks: Tensor, num_masks: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Focal and dice, each summed over layers and masks and divided by `num_masks`.

    Predictions are brought to the truth's size, bilinearly.

    Args:
        mask_logits: (L, B, Q, h, w).
        matched: (L, B, N) query per segment, -1 for none.
        masks: (B, N, H, W) bool.
        num_masks: segments of the batch, averaged over processes, at least 1.
    """
    layer, image, segment = (matched >= 0).nonzero(as_tuple=True)  # (M,) each
    if layer.numel() == 0:
        nothing = mask_logits.sum() * 0.0
        return nothing, nothing
    with full_precision(mask_logits):
        logits = as_float(mask_logits[layer, image, matched[layer, image, segment]])  # (M, h, w)
        logits = F.interpolate(logits[:, None], masks.shape[-2:], mode="bilinear").flatten(1)
        truth = masks[image, segment].flatten(1).to(logits.dtype)  # (M, H*W)
        focal = sigmoid_focal(logits, truth).mean(-1).sum() / num_masks
        return focal, point_dice(logits, truth).sum() / num_masks
