"""Pixel decoders: backbone features -> mask features at stride 4 and three levels of tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.model.deformable import (
    DeformableAttention,
    Sizes,
    reference_points,
)
from concat_cli.core.model.layers import (
    EncoderLayer,
    FeedForward,
    PaddedGroupNorm,
    drawn,
    map_size,
    resize_features,
    resize_padding,
    sine_positions,
    zero_padding,
)


@dataclass(frozen=True)
class PixelFeatures:
    """What the query decoder looks at.

    mask_features: (B, Dm, H/4, W/4). levels: three maps (B, D, h, w), coarse to fine.
    paddings: for each level (B, h, w) bool or None; mask_padding: the same at stride 4.
    """

    mask_features: Tensor
    levels: list[Tensor]
    paddings: list[Tensor | None]
    mask_padding: Tensor | None


def _convolution(inputs: int, outputs: int, kernel: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2)
    nn.init.kaiming_uniform_(conv.weight, a=1)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv


class FPNPixelDecoder(nn.Module):
    """A light feature pyramid with attention at stride 16 only [ours].

    Args:
        channels: of the backbone's maps at strides 4, 8, 16, 32.
        width: D, channels of the levels. mask_width: Dm.
        layers: transformer encoder layers over the stride-16 tokens.
        level_strides: three strides out of 32, 16, 8, 4, coarse to fine.
    """

    def __init__(
        self,
        channels: Sequence[int],
        width: int = 128,
        mask_width: int = 128,
        heads: int = 8,
        ffn: int = 512,
        layers: int = 1,
        level_strides: Sequence[int] = (16, 8, 4),
    ) -> None:
        super().__init__()
        self.width = width
        self.level_strides = tuple(level_strides)
        self.laterals = nn.ModuleList(_convolution(c, width, 1) for c in channels)
        self.encoder = nn.ModuleList(EncoderLayer(width, heads, ffn) for _ in range(layers))
        self.smooth = _convolution(width, width, 3)  # after the step to stride 8
        self.mask_hidden = _convolution(width, mask_width, 3)
        self.mask_out = _convolution(mask_width, mask_width, 1)

    def _attend(self, features: Tensor, padding: Tensor | None) -> Tensor:
        """(B, D, h, w) -> (B, D, h, w) through the transformer encoder."""
        size = map_size(features)
        tokens = features.flatten(2).transpose(1, 2)  # (B, T, D)
        position = sine_positions(size, self.width, padding, features.device)
        flat = None if padding is None else padding.flatten(1)
        for layer in self.encoder:
            tokens = layer(tokens, position, flat)
        return torch.unflatten(tokens.transpose(1, 2), 2, size)

    def forward(self, features: list[Tensor], padding: Tensor | None = None) -> PixelFeatures:
        """Four backbone maps, padding (B, H, W) -> PixelFeatures."""
        fine, middle, coarse, coarsest = (
            lateral(x) for lateral, x in zip(self.laterals, features, strict=True)
        )
        at4, at8, at16, at32 = (resize_padding(padding, map_size(x)) for x in features)
        coarse = coarse + resize_features(coarsest, map_size(coarse), at32)
        coarse = self._attend(coarse, at16)
        middle = middle + resize_features(coarse, map_size(middle), at16)
        middle = middle + F.relu(self.smooth(zero_padding(middle, at8)))
        fine = fine + resize_features(middle, map_size(fine), at8)
        hidden = F.relu(self.mask_hidden(zero_padding(fine, at4)))
        maps = {4: (fine, at4), 8: (middle, at8), 16: (coarse, at16), 32: (coarsest, at32)}
        chosen = [maps[stride] for stride in self.level_strides]
        return PixelFeatures(
            mask_features=self.mask_out(hidden),
            levels=[level for level, _ in chosen],
            paddings=[pad for _, pad in chosen],
            mask_padding=at4,
        )


class DeformableLayer(nn.Module):
    """Deformable self-attention over all levels, then feed-forward, post-norm."""

    def __init__(self, width: int, heads: int, ffn: int, points: int) -> None:
        super().__init__()
        self.attention = DeformableAttention(width, heads, 3, points)
        self.feed_forward = FeedForward(width, ffn)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward_norm = nn.LayerNorm(width)

    def forward(
        self,
        tokens: Tensor,
        position: Tensor,
        references: Tensor,
        sizes: Sizes,
        padding: Tensor | None,
    ) -> Tensor:
        """(B, T, D), position (B or 1, T, D), references (B or 1, T, ...) -> (B, T, D)."""
        read = self.attention(tokens + position, tokens, references, sizes, padding)
        tokens = self.attention_norm(tokens + read)
        return self.feed_forward_norm(tokens + self.feed_forward(tokens))


class NormedConvolution(nn.Module):
    """A convolution and a group norm that leave the padding out."""

    def __init__(self, inputs: int, outputs: int, kernel: int, bias: bool, groups: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=bias)
        self.norm = PaddedGroupNorm(groups, outputs)
        nn.init.xavier_uniform_(self.conv.weight)
        if self.conv.bias is not None:
            nn.init.zeros_(self.conv.bias)

    def forward(self, features: Tensor, padding: Tensor | None) -> Tensor:
        """(B, C, h, w), padding (B, h, w) -> (B, C', h, w)."""
        return self.norm(self.conv(zero_padding(features, padding)), padding)


class DeformablePixelDecoder(nn.Module):
    """Multi-scale deformable attention over strides 32-8, then one step to stride 4 [Mask2Former].

    Args:
        channels: of the backbone's maps at strides 4, 8, 16, 32.
        width: D. mask_width: Dm. ffn: hidden width of the feed-forward blocks.
        layers: encoder layers. points: read per head and level. groups: of the group norms.
    """

    def __init__(
        self,
        channels: Sequence[int],
        width: int = 256,
        mask_width: int = 256,
        heads: int = 8,
        ffn: int = 1024,
        layers: int = 6,
        points: int = 4,
        groups: int = 32,
    ) -> None:
        super().__init__()
        self.width = width
        self.level_strides = (32, 16, 8)
        self.inputs = nn.ModuleList(
            NormedConvolution(c, width, 1, True, groups) for c in reversed(channels[1:])
        )
        self.level_embedding = nn.Parameter(drawn(3, width))
        self.read_shape = (heads, 3, points) if layers else (1, 3, 1)
        self.layers = nn.ModuleList(
            DeformableLayer(width, heads, ffn, points) for _ in range(layers)
        )
        self.lateral = NormedConvolution(channels[0], width, 1, False, groups)
        self.smooth = NormedConvolution(width, width, 3, False, groups)
        self.mask_out = _convolution(width, mask_width, 1)

    def forward(self, features: list[Tensor], padding: Tensor | None = None) -> PixelFeatures:
        """Four backbone maps, padding (B, H, W) -> PixelFeatures."""
        fine, *coarse = features
        coarse = coarse[::-1]  # strides 32, 16, 8
        sizes = [map_size(x) for x in coarse]
        paddings = [resize_padding(padding, size) for size in sizes]
        projected = [
            project(x, pad) for project, x, pad in zip(self.inputs, coarse, paddings, strict=True)
        ]
        levels = self._encode(projected, sizes, paddings)
        mask_padding = resize_padding(padding, map_size(fine))
        fine = self.lateral(fine, mask_padding)
        fine = fine + resize_features(levels[-1], map_size(fine), paddings[-1])
        fine = F.relu(self.smooth(fine, mask_padding))
        return PixelFeatures(self.mask_out(fine), levels, paddings, mask_padding)

    def _encode(
        self, maps: list[Tensor], sizes: Sizes, paddings: list[Tensor | None]
    ) -> list[Tensor]:
        """Maps (B, D, h, w) of the three levels -> the same after the encoder."""
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], 1)  # (B, T, D)
        position = torch.cat(
            [
                sine_positions(size, self.width, pad, tokens.device) + embedding
                for size, pad, embedding in zip(sizes, paddings, self.level_embedding, strict=True)
            ],
            1,
        ).to(tokens.dtype)
        references = reference_points(sizes, valid_extents(sizes, paddings, tokens.device))
        references = references.expand(-1, -1, *self.read_shape, 2).contiguous()  # for all layers
        padded = [pad.flatten(1) for pad in paddings if pad is not None]
        flat = torch.cat(padded, 1) if padded else None  # (B, T)
        for layer in self.layers:
            tokens = layer(tokens, position, references, sizes, flat)
        parts = torch.split(tokens.transpose(1, 2), [h * w for h, w in sizes], 2)
        return [torch.unflatten(part, 2, size) for part, size in zip(parts, sizes, strict=True)]


def valid_extents(sizes: Sizes, paddings: Sequence[Tensor | None], device: torch.device) -> Tensor:
    """Columns and rows of each level that are not padding: (B or 1, levels, 2), fp32."""
    extents: list[Tensor] = []
    for (height, width), padding in zip(sizes, paddings, strict=True):
        if padding is None:
            extents.append(torch.tensor([[width, height]], device=device))
        else:
            extents.append(torch.stack(((~padding[:, 0]).sum(1), (~padding[:, :, 0]).sum(1)), -1))
    return torch.stack(extents, 1).float()
