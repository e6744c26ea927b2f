"""Sine position encodings over the valid area of a feature map."""

import math

import torch
from torch import Tensor

TEMPERATURE = 10000.0


def _encode(place: Tensor, width: int) -> Tensor:
    """(B, n) places in 0-2*pi -> (B, n, width), sine and cosine alternating."""
    half = torch.arange(width // 2, device=place.device, dtype=torch.float32)
    angle = place[..., None] / TEMPERATURE ** (2 * half / width)  # (B, n, width / 2)
    return torch.stack((angle.sin(), angle.cos()), dim=-1).flatten(-2)


def _places(valid: Tensor) -> Tensor:
    """(B, n) bool -> (B, n) in 0-2*pi, counted and normalised over the valid ones."""
    count = valid.float().cumsum(1)
    return count / (count[:, -1:] + 1e-6) * (2 * math.pi)


def sine_positions(
    size: tuple[int, int], width: int, padding: Tensor | None, device: torch.device
) -> Tensor:
    """Encodings (B or 1, h*w, width), fp32, row-major tokens [DETR, section 3; Mask2Former].

    The first half of the channels encodes the row, the second the column. The valid area is a
    rectangle, so rows and columns are encoded apart.
    """
    height, columns = size
    if padding is None:
        rows_valid = torch.ones(1, height, dtype=torch.bool, device=device)
        columns_valid = torch.ones(1, columns, dtype=torch.bool, device=device)
    else:
        rows_valid, columns_valid = ~padding.all(2), ~padding.all(1)
    row = _encode(_places(rows_valid), width // 2)  # (B, h, width / 2)
    column = _encode(_places(columns_valid), width // 2)  # (B, w, width / 2)
    grid = (
        row[:, :, None].expand(-1, -1, columns, -1),
        column[:, None].expand(-1, height, -1, -1),
    )
    return torch.cat(grid, dim=-1).flatten(1, 2)  # (B, h*w, width)
