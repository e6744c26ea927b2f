"""Values of maps at points: bilinear, without building full-size float masks.

Coordinates are (x, y) in 0-1 over the whole map, as in Mask2Former's point sampling
(`align_corners=False`, zero outside). A "truth" is a segment map (B, H, W) of integers, 0 for void
and i+1 for segment i, or masks (B, N, H, W) of bool or uint8.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from concat_cli.core.losses.precision import as_float


@dataclass(frozen=True)
class PointSampling:
    """How points for the mask losses are drawn [Mask2Former: 12544, 3, 0.75]."""

    count: int
    oversample: float = 3.0
    importance: float = 0.75


def random_points(
    rows: int, count: int, device: torch.device, generator: torch.Generator | None = None
) -> Tensor:
    """Uniform coordinates (rows, count, 2); drawn where the generator lives, then moved."""
    source = generator.device if generator is not None else device
    return torch.rand(rows, count, 2, generator=generator, device=source).to(device)


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


def sample_masks(truth: Tensor, segments: int, coords: Tensor) -> Tensor:
    """All N masks of each image at the image's coords (B, P, 2): (B, N, P) in 0-1, fp32.

    Equal to sampling each mask bilinearly; from a segment map no mask is ever built.
    """
    batch, points = coords.shape[:2]
    coords = as_float(coords)
    corners = _corners(coords, *truth.shape[-2:])  # four of (B, P)
    if truth.dim() == 4:
        assert truth.shape[1] == segments, "masks and number of segments differ"
        flat = truth.flatten(2)  # (B, N, HW)
        values = coords.new_zeros(batch, segments, points)
        for corner, weight in corners:
            picked = flat.gather(2, corner[:, None].expand(-1, segments, -1))
            values += picked.to(weight.dtype) * weight[:, None]
        return values
    flat = truth.flatten(1)  # (B, HW)
    slots = coords.new_zeros(batch, segments + 1, points)  # slot 0 collects void
    for corner, weight in corners:
        slots.scatter_add_(1, flat.gather(1, corner)[:, None].long(), weight[:, None])
    return slots[:, 1:]


def sample_segments(truth: Tensor, image: Tensor, segment: Tensor, coords: Tensor) -> Tensor:
    """Mask `segment[m]` of image `image[m]` at its own coords (M, P, 2): (M, P) in 0-1, fp32."""
    coords = as_float(coords)
    pixels = truth.shape[-2] * truth.shape[-1]
    flat = truth.reshape(-1)
    values = coords.new_zeros(coords.shape[:2])
    row = image if truth.dim() == 3 else image * truth.shape[1] + segment
    for corner, weight in _corners(coords, *truth.shape[-2:]):  # four of (M, P)
        picked = flat[corner + (row * pixels)[:, None]]
        hit = picked == (segment + 1)[:, None] if truth.dim() == 3 else picked
        values += hit.to(weight.dtype) * weight
    return values


@torch.no_grad()
def uncertain_points(
    mask_logits: Tensor,
    count: int,
    oversample: float,
    importance: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Coordinates (M, count, 2) for mask_logits (M, h, w), most of them where |logit| is small.

    A share `importance` is the most uncertain of `oversample * count` uniform points, the rest is
    uniform (PointRend; Mask2Former, sec. 3.3).
    """
    rows, device = mask_logits.shape[0], mask_logits.device
    candidates = random_points(rows, int(count * oversample), device, generator)
    uncertain = int(importance * count)
    doubt = -sample_at(mask_logits[:, None], candidates).abs().squeeze(1)  # (M, oversampled)
    best = doubt.topk(uncertain, dim=1, sorted=False).indices  # (M, uncertain)
    chosen = candidates.gather(1, best[..., None].expand(-1, -1, 2))
    uniform = random_points(rows, count - uncertain, device, generator)
    return torch.cat([chosen, uniform], dim=1)
