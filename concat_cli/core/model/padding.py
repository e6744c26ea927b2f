"""Padded pixels stay without effect: masks for each stride, norms and resizing over the valid area.

A batch holds images of different sizes, padded at the right and at the bottom. Everything here is
exact: with these functions an image gives the same result alone and padded in a batch. `padding` is
bool, True where there is no image; None means that nothing is padded and costs nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def map_size(features: Tensor) -> tuple[int, int]:
    """(h, w) of a map (..., h, w)."""
    height, width = features.shape[-2:]
    return height, width


def resize_padding(padding: Tensor | None, size: tuple[int, int]) -> Tensor | None:
    """(B, H, W) -> (B, h, w): a cell is padding where its top left pixel is."""
    if padding is None:
        return None
    return F.interpolate(padding[:, None].float(), size=size, mode="nearest")[:, 0] > 0.5


def zero_padding(features: Tensor, padding: Tensor | None) -> Tensor:
    """(B, C, h, w) with zeros at the padding (B, h, w), as a convolution sees beyond an edge."""
    return features if padding is None else features.masked_fill(padding[:, None], 0.0)


def resize_features(features: Tensor, size: tuple[int, int], padding: Tensor | None) -> Tensor:
    """Bilinear (B, C, h, w) -> (B, C, *size) that takes the valid area's edge for the image's edge.

    Interpolating features and validity alike and dividing equals clamping at the edge.
    """
    resized = F.interpolate(
        zero_padding(features, padding), size=size, mode="bilinear", align_corners=False
    )
    if padding is None:
        return resized
    valid = (~padding)[:, None].to(resized.dtype)
    share = F.interpolate(valid, size=size, mode="bilinear", align_corners=False)
    return resized / share.clamp(min=1e-4)


class PaddedGroupNorm(nn.GroupNorm):
    """Group normalisation with the statistics of the valid area only."""

    def forward(self, features: Tensor, padding: Tensor | None = None) -> Tensor:
        """(B, C, h, w), padding (B, h, w) -> (B, C, h, w)."""
        if padding is None:
            return super().forward(features)
        batch, channels, height, width = features.shape
        groups = features.float().view(batch, self.num_groups, -1, height, width)
        valid = (~padding)[:, None, None].float()  # (B, 1, 1, h, w)
        count = valid.sum((2, 3, 4), keepdim=True) * (channels // self.num_groups)
        mean = (groups * valid).sum((2, 3, 4), keepdim=True) / count.clamp(min=1)
        spread = ((groups - mean) * valid).square().sum((2, 3, 4), keepdim=True)
        groups = (groups - mean) * torch.rsqrt(spread / count.clamp(min=1) + self.eps)
        normed = groups.view(batch, channels, height, width)
        return (normed * self.weight[:, None, None] + self.bias[:, None, None]).to(features.dtype)
