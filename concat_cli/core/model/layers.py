"""What all networks here are made of: exact padding, positions, attention and feed-forward.

A batch holds images of different sizes, padded at the right and at the bottom. Everything here is
exact: with these functions an image gives the same result alone and padded in a batch. `padding` is
bool, True where there is no image; None means that nothing is padded and costs nothing.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TEMPERATURE = 10000.0  # of sine positions


def drawn(*shape: int) -> Tensor:
    """Normal numbers, those of `torch.randn`. On the meta device, where there are none, torch would
    import a part of its compiler to draw them."""
    empty = torch.empty(shape)
    return empty if empty.is_meta else empty.normal_()


def map_size(features: Tensor) -> tuple[int, int]:
    """(h, w) of a map (..., h, w)."""
    height, width = features.shape[-2:]
    return height, width


def unit_variance(vectors: Tensor) -> Tensor:
    """Vectors (..., E), scaled so that an entry has a variance of about 1."""
    return F.normalize(vectors, dim=-1) * vectors.shape[-1] ** 0.5


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
    features = zero_padding(features, padding)
    if features.stride(1) == 1:  # tokens that were a map: torch takes them for one only when copied
        features = features.clone(memory_format=torch.channels_last)
    resized = F.interpolate(features, size=size, mode="bilinear", align_corners=False)
    if padding is None:
        return resized
    valid = (~padding)[:, None].to(resized.dtype)
    share = F.interpolate(valid, size=size, mode="bilinear", align_corners=False)
    return resized / share.clamp(min=1e-4)


def area_mean(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Maps (B, N, h, w) -> (B, N, *size): the mean over each cell's area, fp32.

    As `F.interpolate(mode="area")`, whose kernel takes ten times as long on a CPU.
    """
    height, width = map_size(maps)
    if (height, width) == size:
        return maps.float()
    if height % size[0] or width % size[1]:
        return F.interpolate(maps.float(), size=size, mode="area")
    return F.avg_pool2d(maps.float(), (height // size[0], width // size[1]))


class PaddedGroupNorm(nn.GroupNorm):
    """Group normalisation with the statistics of the valid area only."""

    def forward(self, features: Tensor, padding: Tensor | None = None) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
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


class TokenLinear(nn.Linear):
    """A linear layer over tokens (B, T, D); without gradients in fp32 on a CPU: a 1x1 convolution.

    The result is the same; the convolution's kernels (oneDNN) are up to twice as fast as the BLAS
    behind a linear layer on some processors, and not slower on others. Its backward is slower.
    """

    def forward(self, tokens: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(B, T, D) -> (B, T, D')."""
        plain = tokens.device.type != "cpu" or tokens.dtype != torch.float32
        plain = plain or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
        if plain or tokens.ndim != 3:
            return super().forward(tokens)
        image = tokens.contiguous().unsqueeze(1).permute(0, 3, 1, 2)  # (B, D, 1, T), channels last
        found = F.conv2d(image, self.weight[:, :, None, None], self.bias)
        return found.squeeze(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention with separate query, key and value inputs; `dropout` of its weights."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        assert width % heads == 0, "width must be a multiple of heads"
        self.heads, self.dropout = heads, dropout
        self.query = TokenLinear(width, width)
        self.key = TokenLinear(width, width)
        self.value = TokenLinear(width, width)
        self.out = TokenLinear(width, width)
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _split(self, tokens: Tensor) -> Tensor:
        return torch.unflatten(tokens, -1, (self.heads, -1)).transpose(1, 2)  # (B, heads, n, d)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None
    ) -> Tensor:
        """(B, Q, D), (B, T, D), (B, T, D), bool allowed (B or 1, Q or 1, T) -> (B, Q, D)."""
        heads = [
            self._split(tokens) for tokens in (self.query(query), self.key(key), self.value(value))
        ]
        mask = None if allowed is None else allowed[:, None]
        dropout = self.dropout if self.training else 0.0
        learns = torch.is_grad_enabled() and torch.is_autocast_enabled("cpu")
        if query.device.type == "cpu" and learns:
            # backwards the CPU's fused kernel is up to nine times slower in bf16; forwards, faster
            with torch.autocast("cpu", enabled=False):
                mixed = F.scaled_dot_product_attention(
                    *(head.float() for head in heads), attn_mask=mask, dropout_p=dropout
                )
        else:
            mixed = F.scaled_dot_product_attention(*heads, attn_mask=mask, dropout_p=dropout)
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Linear, ReLU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first = TokenLinear(width, hidden)
        self.second = TokenLinear(hidden, width)
        for layer in (self.first, self.second):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.second(F.relu(self.first(tokens), inplace=True))


class EncoderLayer(nn.Module):
    """Self-attention over the tokens of one feature map, then feed-forward, post-norm."""

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.feed_forward = FeedForward(width, ffn)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward_norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, position: Tensor, padding: Tensor | None) -> Tensor:
        """(B, T, D), (B or 1, T, D), padding (B, T) -> (B, T, D)."""
        placed = tokens + position.to(tokens.dtype)
        allowed = None if padding is None else ~padding[:, None]  # (B, 1, T)
        tokens = self.attention_norm(tokens + self.attention(placed, placed, tokens, allowed))
        return self.feed_forward_norm(tokens + self.feed_forward(tokens))
