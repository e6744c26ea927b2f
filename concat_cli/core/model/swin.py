"""Swin Transformers as Mask2Former uses them [Swin, section 3; Mask2Former, appendix].

timm's Swin shifts before it pads, does not shift where one window covers a map, and norms the last
stage alone; so its features differ from those Mask2Former was trained on wherever a map is no
multiple of the window. This one is made of the same parts, but pads first, shifts everywhere and
norms each stage's output. Its parameters have timm's names: timm's published weights load. timm,
which takes as long to import as torch, is imported where a Swin is built or run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.model.layers import map_size, resize_padding, zero_padding

_APART = -100.0  # added to attention logits of pixels that are neighbours by the shift alone


@dataclass(frozen=True)
class SwinShape:
    """Width of the first stage, blocks and heads of each stage, side of a window."""

    width: int
    depths: tuple[int, ...]
    heads: tuple[int, ...]
    window: int


_BASE, _LARGE = (128, (2, 2, 18, 2), (4, 8, 16, 32)), (192, (2, 2, 18, 2), (6, 12, 24, 48))
SWINS: dict[str, SwinShape] = {
    "swin_tiny_patch4_window7_224": SwinShape(96, (2, 2, 6, 2), (3, 6, 12, 24), 7),
    "swin_small_patch4_window7_224": SwinShape(96, (2, 2, 18, 2), (3, 6, 12, 24), 7),
    "swin_base_patch4_window7_224": SwinShape(*_BASE, 7),
    "swin_base_patch4_window12_384": SwinShape(*_BASE, 12),
    "swin_large_patch4_window7_224": SwinShape(*_LARGE, 7),
    "swin_large_patch4_window12_384": SwinShape(*_LARGE, 12),
}  # under timm's names


class WindowAttention(nn.Module):
    """Self-attention within windows, with a learned bias for each relative place."""

    places: Tensor  # (n, n), rows of the bias table

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        table = torch.zeros((2 * window - 1) ** 2, heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        row, column = torch.arange(window**2) // window, torch.arange(window**2) % window
        down, right = (x[:, None] - x[None] + window - 1 for x in (row, column))
        self.register_buffer("places", down * (2 * window - 1) + right, persistent=False)

    def forward(self, windows: Tensor, apart: Tensor | None) -> Tensor:
        """Windows (B, W, n, C), logits (W, n, n) to add or None -> (B, W, n, C)."""
        batch, count, tokens, _ = windows.shape
        qkv = self.qkv(windows).view(batch, count, tokens, 3, self.heads, -1)
        # windows and heads together, (B, W * heads, n, d): attention takes four dimensions
        query, key, value = qkv.permute(3, 0, 1, 4, 2, 5).flatten(2, 3)
        bias = self.relative_position_bias_table[self.places].permute(2, 0, 1)[None]
        bias = bias + apart[:, None] if apart is not None else bias.expand(count, -1, -1, -1)
        bias = bias.flatten(0, 1).to(query.dtype)  # (W * heads, n, n)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=bias[None])
        mixed = torch.unflatten(mixed, 1, (count, self.heads)).transpose(2, 3)
        return self.proj(mixed.flatten(3))  # (B, W, n, C)


class SwinBlock(nn.Module):
    """Attention in windows, by turns shifted by half a window, then an MLP; pre-norm."""

    def __init__(self, width: int, heads: int, window: int, shift: int, drop: float) -> None:
        from timm.layers.drop import DropPath
        from timm.layers.mlp import Mlp

        super().__init__()
        self.window, self.shift = window, shift
        self.norm1 = nn.LayerNorm(width)
        self.attn = WindowAttention(width, heads, window)
        self.drop_path = DropPath(drop)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, features: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h, w, C)."""
        features = features + self.drop_path(self._attend(self.norm1(features)))
        return features + self.drop_path(self.mlp(self.norm2(features)))

    def _attend(self, features: Tensor) -> Tensor:
        from timm.models.swin_transformer import window_reverse

        (height, width), side = features.shape[1:3], self.window
        padded = F.pad(features, (0, 0, 0, -width % side, 0, -height % side))
        size = padded.shape[1:3]
        shifted = padded.roll((-self.shift, -self.shift), (1, 2)) if self.shift else padded
        mixed = self.attn(self._windows(shifted), self._apart(size, features.device))
        mixed = window_reverse(mixed.flatten(0, 1), (side, side), *size)  # (B, h', w', C)
        mixed = mixed.roll((self.shift, self.shift), (1, 2)) if self.shift else mixed
        return mixed[:, :height, :width]

    def _windows(self, features: Tensor) -> Tensor:
        """(B, h', w', C) -> (B, W, n, C)."""
        from timm.models.swin_transformer import window_partition

        windows = window_partition(features, (self.window, self.window)).flatten(1, 2)
        return torch.unflatten(windows, 0, (len(features), -1))

    def _apart(self, size: Sequence[int], device: torch.device) -> Tensor | None:
        """Logits (W, n, n) that keep pixels from both ends of the image apart after a shift."""
        if not self.shift:
            return None
        height, width = (self._regions(length, device) for length in size)
        region = (3 * height[:, None] + width)[None, :, :, None]  # (1, h', w', 1)
        windows = self._windows(region)[0, :, :, 0]  # (W, n)
        return (windows[:, :, None] != windows[:, None]) * _APART

    def _regions(self, length: int, device: torch.device) -> Tensor:
        """0, 1 or 2 for each row: inside, before the shifted edge, wrapped around."""
        place = torch.arange(length, device=device)
        return (place >= length - self.window).int() + (place >= length - self.shift).int()


class SwinStage(nn.Module):
    """Merging (except in the first stage), then blocks."""

    def __init__(
        self, width: int, heads: int, window: int, drops: Sequence[float], merge: bool
    ) -> None:
        from timm.models.swin_transformer import PatchMerging

        super().__init__()
        self.downsample = PatchMerging(width // 2) if merge else nn.Identity()
        self.blocks = nn.Sequential(
            *(
                SwinBlock(width, heads, window, window // 2 if index % 2 else 0, drop)
                for index, drop in enumerate(drops)
            )
        )

    def forward(self, features: Tensor) -> Tensor:
        """(B, h, w, C) -> (B, h', w', C')."""
        return self.blocks(self.downsample(features))


class SwinBackbone(nn.Module):
    """A Swin Transformer with a norm on the output of each stage.

    Args:
        drop_path: chance to leave out the last block in training, growing up to it [Mask2Former].
    """

    def __init__(self, shape: SwinShape, drop_path: float = 0.3) -> None:
        from timm.layers.patch_embed import PatchEmbed

        super().__init__()
        drops = torch.linspace(0, drop_path, sum(shape.depths), device="cpu").numpy().tolist()
        self.channels = tuple(shape.width * 2**stage for stage in range(len(shape.depths)))
        self.patch_embed = PatchEmbed(
            None, 4, 3, shape.width, nn.LayerNorm, output_fmt="NHWC", dynamic_img_pad=True
        )
        self.layers = nn.ModuleList()
        for stage, (width, heads) in enumerate(zip(self.channels, shape.heads, strict=True)):
            before = sum(shape.depths[:stage])
            own = drops[before : before + shape.depths[stage]]
            self.layers.append(SwinStage(width, heads, shape.window, own, merge=stage > 0))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.channels)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                bias = cast("Tensor | None", module.bias)
                if bias is not None:
                    nn.init.zeros_(bias)

    def forward(self, images: Tensor, padding: Tensor | None = None) -> list[Tensor]:
        """Normalised (B, 3, H, W) -> maps at strides 4, 8, 16, 32, zero at the padding."""
        features = self.patch_embed(images)
        maps: list[Tensor] = []
        for stage, norm in zip(self.layers, self.norms, strict=True):
            features = stage(features)
            image = norm(features).permute(0, 3, 1, 2).contiguous()  # (B, C, h, w)
            maps.append(zero_padding(image, resize_padding(padding, map_size(image))))
        return maps
