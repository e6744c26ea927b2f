"""NEL, ZegCLIP's loss of classes that do not exclude one another: focal and dice on sigmoids.

Here and in `clip_zss.py`: C channels, P positions; targets (B, P) are channels, -1 where nothing is
known. Such positions carry no signal [ours]; in ZegCLIP they count as none of the classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from concat_cli.core.losses import as_float, full_precision
from concat_cli.methods.zegformer.focal import sigmoid_focal


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
