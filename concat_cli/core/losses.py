"""Losses of queries: weighted cross-entropy with no_object, BCE and dice on points (Mask2Former).

And the Hungarian matching of queries to segments, with batched costs (Mask2Former, as in DETR). All
are functions of tensors, computed in at least fp32, whatever autocast is on.

Values of maps at points are bilinear, without building full-size float masks. Coordinates are
(x, y) in 0-1 over the whole map, as in Mask2Former's point sampling (`align_corners=False`, zero
outside). A "truth" is masks (B, N, H, W) of bool or uint8.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from itertools import product
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from concat_cli.core.config import LossConfig


def as_float(values: Tensor) -> Tensor:
    """The values in fp32; fp64 stays fp64."""
    return values if values.dtype == torch.float64 else values.float()


def full_precision(like: Tensor) -> AbstractContextManager[object]:
    """A context without autocast on the tensor's device."""
    return torch.autocast(like.device.type, enabled=False)


# Stands for a cost that is not finite: never preferred, yet small enough for the other costs to
# count beside it in fp64.
_WORST = 1e8
ALPHA = 0.25  # of focal losses: weight of positive pixels; that of negative ones is 1 - ALPHA


def query_targets(matched: Tensor, labels: Tensor, queries: int, classes: int) -> Tensor:
    """Class of each query, (L, B, Q) int64; `classes` (= K, no_object) where nothing is matched.

    `matched` (L, B, N) holds queries or -1, `labels` (B, N) class indices or -1.
    """
    slots = torch.full(
        (*matched.shape[:2], queries + 1), classes, dtype=torch.int64, device=matched.device
    )
    label = labels[None].expand_as(matched)
    nowhere = (matched < 0) | (label < 0)  # goes to the extra slot
    slots.scatter_(2, matched.masked_fill(nowhere, queries), label.masked_fill(nowhere, classes))
    return slots[..., :queries]


def expected_weight(segments: Tensor, queries: int, no_object: float) -> Tensor:
    """What a layer's weights in `class_loss` sum up to, (), if none is ignored.

    segments: (B,), how many segments with a label each image has.
    """
    matched = segments.clamp(max=queries).sum()
    return matched + no_object * (queries * len(segments) - matched)


def class_loss(
    class_logits: Tensor,
    matched: Tensor,
    labels: Tensor,
    no_object: float,
    ignore: Tensor | None = None,
    average: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Cross-entropy, a weighted mean in each layer, summed over the layers.

    Args:
        class_logits: (L, B, Q, K+1), no_object last.
        matched: (L, B, N) query per segment, -1 for none.
        labels: (B, N), -1 for padding.
        no_object: weight of queries without a segment.
        ignore: (B, Q) or (L, B, Q) bool, queries mostly on void: no target unless matched.
        average: brings the sum of a layer's weights to the whole batch, however it is split; see
            `Count.of_whole`.
    """
    queries, classes = class_logits.shape[2], class_logits.shape[3] - 1
    targets = query_targets(matched, labels, queries, classes)
    log_probability = as_float(class_logits).log_softmax(-1)
    loss = -log_probability.gather(-1, targets[..., None]).squeeze(-1)  # (L, B, Q)
    empty = targets == classes
    weights = torch.ones_like(loss).masked_fill(empty, no_object)
    if ignore is not None:
        weights = weights.masked_fill(empty & ignore, 0.0)
    total = (weights * loss).sum((1, 2))  # (L,)
    norm = weights.sum((1, 2))
    norm = norm if average is None else average(norm)
    return (total / norm.clamp(min=1e-12)).sum()


def sample_at(maps: Tensor, coords: Tensor) -> Tensor:
    """Bilinear values of maps (B, C, h, w) at coords (B, P, 2): (B, C, P) in fp32."""
    maps = as_float(maps)
    grid = (2.0 * coords.to(maps.dtype) - 1.0).unsqueeze(2)  # (B, P, 1, 2)
    return F.grid_sample(maps, grid, align_corners=False).squeeze(3)


def _neighbours(position: Tensor, size: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """The two pixels around each position (0-1) along an axis, each as (index, weight)."""
    place = position * size - 0.5
    lower = place.floor()
    share = place - lower
    first = lower.clamp(min=0).long(), (1 - share) * (lower >= 0)
    second = (lower + 1).clamp(max=size - 1).long(), share * (lower + 1 < size)
    return first, second


def _corners(coords: Tensor, height: int, width: int) -> list[tuple[Tensor, Tensor]]:
    """Flat index (...) and bilinear weight (...) of the four pixels around coords (..., 2)."""
    columns = _neighbours(coords[..., 0], width)
    rows = _neighbours(coords[..., 1], height)
    return [(row * width + column, u * v) for row, u in rows for column, v in columns]


def sample_masks(truth: Tensor, coords: Tensor) -> Tensor:
    """All N masks of each image at the image's coords (B, P, 2): (B, N, P) in 0-1, fp32.

    Equal to sampling each mask bilinearly.
    """
    coords = as_float(coords)
    batch, segments = truth.shape[:2]
    flat = truth.flatten(2)  # (B, N, HW)
    values = coords.new_zeros(batch, segments, coords.shape[1])
    for corner, weight in _corners(coords, *truth.shape[-2:]):  # four of (B, P)
        picked = flat.gather(2, corner[:, None].expand(-1, segments, -1))
        values += picked.to(weight.dtype) * weight[:, None]
    return values


def sample_segments(truth: Tensor, image: Tensor, segment: Tensor, coords: Tensor) -> Tensor:
    """Mask `segment[m]` of image `image[m]` at its own coords (M, P, 2): (M, P) in 0-1, fp32."""
    coords = as_float(coords)
    pixels = truth.shape[-2] * truth.shape[-1]
    flat = truth.reshape(-1)
    values = coords.new_zeros(coords.shape[:2])
    row = image * truth.shape[1] + segment
    for corner, weight in _corners(coords, *truth.shape[-2:]):  # four of (M, P)
        values += flat[corner + (row * pixels)[:, None]].to(weight.dtype) * weight
    return values


@torch.no_grad()
def uncertain_points(
    mask_logits: Tensor, count: int, oversample: float, importance: float
) -> Tensor:
    """Coordinates (M, count, 2) for mask_logits (M, h, w), most of them where |logit| is small.

    A share `importance` is the most uncertain of `oversample * count` uniform points, the rest is
    uniform (PointRend; Mask2Former, sec. 3.3).
    """
    rows, device = mask_logits.shape[0], mask_logits.device
    candidates = torch.rand(rows, int(count * oversample), 2, device=device)
    uncertain = int(importance * count)
    doubt = -sample_at(mask_logits[:, None], candidates).abs().squeeze(1)  # (M, oversampled)
    best = doubt.topk(uncertain, dim=1, sorted=False).indices  # (M, uncertain)
    chosen = candidates.gather(1, best[..., None].expand(-1, -1, 2))
    uniform = torch.rand(rows, count - uncertain, 2, device=device)
    return torch.cat([chosen, uniform], dim=1)


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
    num_masks: float | Tensor,
    cfg: LossConfig,
) -> tuple[Tensor, Tensor]:
    """BCE and dice on points, each summed over layers and masks and divided by `num_masks`.

    Only matched masks are gathered: the padding of a batch may be several times their number.

    Args:
        mask_logits: (L, B, Q, h, w).
        matched: (L, B, N) query per segment, -1 for none.
        truth: masks (B, N, H, W).
        num_masks: segments of the batch, averaged over processes, at least 1.
        cfg: says how many points and where.
    """
    layer, image, segment = (matched >= 0).nonzero(as_tuple=True)  # (M,) each
    if layer.numel() == 0:
        nothing = mask_logits.sum() * 0.0
        return nothing, nothing
    with full_precision(mask_logits):
        logits = mask_logits[layer, image, matched[layer, image, segment]]  # (M, h, w)
        with torch.no_grad():
            coords = uncertain_points(logits, cfg.points, cfg.oversample, cfg.importance)
            wanted = sample_segments(truth, image, segment, coords)
        values = sample_at(logits[:, None], coords).squeeze(1)  # (M, P)
        wanted = wanted.to(values.dtype)
        bce = point_bce(values, wanted).sum() / num_masks
        return bce, point_dice(values, wanted).sum() / num_masks


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
    weights: tuple[float, float, float],
    coords: Tensor,
) -> Tensor:
    """The query of each segment, (L, B, N) int64, -1 for padding and segments left over if N > Q.

    Args:
        class_logits: (L, B, Q, K+1).
        mask_logits: (L, B, Q, h, w).
        labels: (B, N) class indices; -1 is padding and never matched.
        truth: masks (B, N, H, W).
        weights: of class, mask and dice cost [Mask2Former: 2, 5, 5].
        coords: (B, P, 2) points shared by all masks of an image.
    """
    costs = match_costs(class_logits, mask_logits, labels, truth, weights, coords)
    return assigned(costs, labels >= 0)


def assigned(costs: Tensor, wanted: Tensor) -> Tensor:
    """The query of each segment at the least cost in all, (L, B, N) int64; see `match`.

    costs: (L, B, Q, N), those that are not finite count as the worst. wanted: (B, N) bool; -1 for
    the other segments.
    """
    finite = costs.nan_to_num(_WORST, _WORST, _WORST).clamp(max=_WORST).cpu().double().numpy()
    layers, batch, _, segments = finite.shape
    matched = np.full((layers, batch, segments), -1, dtype=np.int64)
    columns = [np.flatnonzero(own) for own in wanted.cpu().numpy()]
    # here, as its import takes 0.3 s, and many stages match nothing
    solve: Any = import_module("scipy.optimize").linear_sum_assignment
    for layer, image in product(range(layers), range(batch)):
        rows, chosen = solve(finite[layer, image][:, columns[image]])
        matched[layer, image, columns[image][chosen]] = rows
    return torch.as_tensor(matched).to(wanted.device)
