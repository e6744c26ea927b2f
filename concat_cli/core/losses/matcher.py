"""Hungarian matching of queries to segments, with batched costs (Mask2Former, as in DETR)."""

from __future__ import annotations

from itertools import product
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy.optimize import (  # pyright: ignore[reportMissingTypeStubs]
    linear_sum_assignment,  # pyright: ignore[reportUnknownVariableType]
)
from torch import Tensor

from concat_cli.core.losses import as_float, full_precision
from concat_cli.core.losses.masks import sample_at, sample_masks

# Stands for a cost that is not finite: never preferred, yet small enough for the other costs to
# count beside it in fp64.
_WORST = 1e8


def class_costs(class_logits: Tensor, labels: Tensor) -> Tensor:
    """-p(class): (L, B, Q, N) from logits (L, B, Q, K+1) and labels (B, N) padded with -1."""
    probability = as_float(class_logits).softmax(-1)
    index = labels.clamp(min=0)[None, :, None].expand(*class_logits.shape[:3], -1)
    return -probability.gather(-1, index)


def mask_costs(logits: Tensor, truth: Tensor) -> tuple[Tensor, Tensor]:
    """BCE and dice of point logits (L, B, Q, P) with truth (B, N, P): two of (L, B, Q, N).

    BCE per pair is mean(softplus(x)) - mean(x y), so that one product serves all pairs.
    """
    points = logits.shape[-1]
    product = torch.einsum("lbqp,bnp->lbqn", logits, truth)
    bce = F.softplus(logits).mean(-1, keepdim=True) - product / points
    return bce, dice_costs(logits, truth)


def dice_costs(logits: Tensor, truth: Tensor) -> Tensor:
    """Dice, smoothed by 1, of logits (L, B, Q, P) with truth (B, N, P): (L, B, Q, N)."""
    probability = logits.sigmoid()
    overlap = torch.einsum("lbqp,bnp->lbqn", probability, truth)
    total = probability.sum(-1, keepdim=True) + truth.sum(-1)[None, :, None]
    return 1 - (2 * overlap + 1) / (total + 1)


def match_costs(
    class_logits: Tensor,
    mask_logits: Tensor,
    labels: Tensor,
    truth: Tensor,
    weights: tuple[float, float, float],
    coords: Tensor,
) -> Tensor:
    """Weighted costs (class, mask, dice) of every query and segment: (L, B, Q, N), fp32."""
    with full_precision(mask_logits):
        flat = mask_logits.flatten(0, 1)  # (L B, Q, h, w)
        shared = coords.repeat(len(mask_logits), 1, 1)  # (L B, P, 2)
        size = (*mask_logits.shape[:3], coords.shape[1])  # L, B, Q, P
        logits = sample_at(flat, shared).view(size)
        segments = sample_masks(truth, coords).to(logits.dtype)
        bce, dice = mask_costs(logits, segments)
        by_class = class_costs(class_logits, labels)
        return weights[0] * by_class + weights[1] * bce + weights[2] * dice


@torch.no_grad()
def match(
    class_logits: Tensor,
    mask_logits: Tensor,
    labels: Tensor,
    truth: Tensor,
    valid: Tensor,
    weights: tuple[float, float, float],
    coords: Tensor,
) -> Tensor:
    """The query of each segment, (L, B, N) int64, -1 for padding and segments left over if N > Q.

    Args:
        class_logits: (L, B, Q, K+1).
        mask_logits: (L, B, Q, h, w).
        labels: (B, N) class indices; -1 is padding and never matched.
        truth: masks (B, N, H, W).
        valid: (B, N) bool.
        weights: of class, mask and dice cost [Mask2Former: 2, 5, 5].
        coords: (B, P, 2) points shared by all masks of an image.
    """
    costs = match_costs(class_logits, mask_logits, labels, truth, weights, coords)
    return assigned(costs, valid & (labels >= 0))


def assigned(costs: Tensor, wanted: Tensor) -> Tensor:
    """The query of each segment at the least cost in all, (L, B, N) int64; see `match`.

    costs: (L, B, Q, N), those that are not finite count as the worst. wanted: (B, N) bool; -1 for
    the other segments.
    """
    costs = costs.nan_to_num(_WORST, _WORST, _WORST).clamp(max=_WORST)
    costs = costs.masked_fill(~wanted[None, :, None], torch.inf)  # one copy carries both
    return torch.as_tensor(_assign(costs.cpu().double().numpy())).to(wanted.device)


def _assign(costs: NDArray[np.float64]) -> NDArray[np.int64]:
    """Optimal query per segment for costs (L, B, Q, N); columns of inf stay at -1."""
    layers, batch, queries, segments = costs.shape
    matched = np.full((layers, batch, segments), -1, dtype=np.int64)
    if queries == 0 or segments == 0:
        return matched
    solve = cast(Any, linear_sum_assignment)
    for layer, image in product(range(layers), range(batch)):
        (columns,) = np.nonzero(np.isfinite(costs[layer, image, 0]))
        rows, chosen = solve(costs[layer, image][:, columns])
        matched[layer, image, columns[chosen]] = rows
    return matched
