"""Losses on the tokens that queries are selected from [ours]."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Average = Callable[[Tensor], Tensor]  # mean of a tensor over the processes


def coverage(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """The share of each token's area that each segment covers.

    masks (B, N, H, W) bool -> (B, N, h, w) float in 0-1.
    """
    return F.interpolate(masks.float(), size=size, mode="area")


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


def objectness_loss(
    logits: Tensor,
    target: Tensor,
    valid: Tensor | None,
    weight: float,
    average: Average | None = None,
) -> Tensor:
    """BCE over tokens, positives weighted.

    logits, target (B, T); valid (B, T) bool or None; weight: of a positive.
    """
    loss = F.binary_cross_entropy_with_logits(
        logits.float(), target, reduction="none", pos_weight=logits.new_tensor(weight).float()
    )
    valid = torch.ones_like(target, dtype=torch.bool) if valid is None else valid
    count = valid.sum().float()
    count = count if average is None else average(count)
    return (loss * valid).sum() / count.clamp(min=1)


def token_class_loss(
    class_logits: Tensor, classes: Tensor, average: Average | None = None
) -> Tensor:
    """Cross-entropy of tokens that lie in one segment.

    class_logits (B, T, K+1), classes (B, T) with -1 for void.
    """
    count = (classes >= 0).sum().float()
    count = (count if average is None else average(count)).clamp(min=1e-12)
    flat = class_logits.flatten(0, 1).float()
    return F.cross_entropy(flat, classes.flatten(), ignore_index=-1, reduction="sum") / count
