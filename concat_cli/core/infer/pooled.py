"""Segments as one pass of CLIP over each picture sees them; the counterpart of `crops.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from concat_cli.core.clip.pooling import MaskPooling
from concat_cli.core.infer.postprocess import MASK_STRIDE, Size


def pool_segments(
    pooling: MaskPooling, images: Tensor, masks: Tensor, valid: Sequence[Size], select: Tensor
) -> tuple[Tensor, Tensor]:
    """CLIP's tokens (M, E) of segments, and each one's share (M, N) of the N cells of CLIP's map.

    Args:
        images: (B, 3, H, W) uint8, padded at the right and below.
        masks: (B, Q, h, w) mask logits at stride 4; a mask is where they are above 0.
        valid: height and width of each image without its padding.
        select: (B, Q) bool: the segments, in the order of `nonzero`. Images without any are not
            shown to CLIP.
    """
    shown = cast("list[int]", select.any(1).nonzero()[:, 0].tolist())
    if not shown:
        empty = torch.zeros(0, pooling.clip.embed_dim, device=images.device)
        return empty, empty.new_zeros(0, pooling.grid**2)
    counts = select[shown].sum(1)
    views = [images[b : b + 1, :, : valid[b][0], : valid[b][1]].float() / 255 for b in shown]
    views = torch.cat([pooling.clip.resize(view, pooling.side) for view in views])
    shares = views.new_zeros(len(shown), int(counts.max()), pooling.grid, pooling.grid)
    for row, b in enumerate(shown):
        found = mask_shares(masks[b][select[b]] > 0, valid[b], pooling.grid)
        shares[row, : len(found)] = found
    there = torch.arange(shares.shape[1], device=counts.device) < counts[:, None]  # (b, M)
    return pooling.tokens(views, shares)[there], shares[there].flatten(1)


def mask_shares(masks: Tensor, valid: Size, grid: int) -> Tensor:
    """(M, h, w) bool at stride 4 -> (M, grid, grid): how much of each cell of a grid over the valid
    part is under the mask, 0-1."""
    down = overlaps(masks.shape[1], valid[0], grid).to(masks.device)
    across = overlaps(masks.shape[2], valid[1], grid).to(masks.device)
    return down @ masks.to(down.dtype) @ across.T


def overlaps(source: int, valid: int, grid: int) -> Tensor:
    """(grid, source): the share of each of `grid` equal parts of `valid` pixels that lies in each
    mask pixel, `MASK_STRIDE` wide."""
    edges = (torch.arange(source + 1, dtype=torch.double) * MASK_STRIDE).clamp(max=valid)
    cuts = torch.arange(grid + 1, dtype=torch.double) * valid / grid
    ends = torch.minimum(cuts[1:, None], edges[1:])
    starts = torch.maximum(cuts[:-1, None], edges[:-1])
    return ((ends - starts).clamp(min=0) * grid / valid).float()
