"""The masked-attention transformer decoder: queries read pixel features [Mask2Former, 3.2]."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.model.layers import (
    Attention,
    FeedForward,
    area_mean,
    drawn,
    map_size,
    sine_positions,
)
from concat_cli.core.model.pixel_decoder import PixelFeatures


@dataclass(frozen=True)
class Denoising:
    """Truth masks, usually noised, from which extra training queries are made [ours].

    masks: (B, M, h, w) float in 0-1, at any stride. valid: (B, M) bool.
    """

    masks: Tensor
    valid: Tensor


@dataclass(frozen=True)
class Tokens:
    """The tokens that queries may be selected from.

    features: (B, T, D). objectness: logits (B, T). padding: (B, T) bool or None.
    size: (h, w) with h*w = T.
    """

    features: Tensor
    objectness: Tensor
    padding: Tensor | None
    size: tuple[int, int]


@dataclass(frozen=True)
class Decoded:
    """Per layer: queries after the shared norm (L+1, B, Q+M, D), mask logits (L+1, B, Q+M, h, w).

    The first Q queries are ordinary ones, the M others denoising ones.
    """

    queries: Tensor
    mask_logits: Tensor
    tokens: Tokens | None


class DecoderLayer(nn.Module):
    """Masked cross-attention, self-attention, feed-forward; post-norm."""

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.cross_attention = Attention(width, heads)
        self.self_attention = Attention(width, heads)
        self.feed_forward = FeedForward(width, ffn)
        self.cross_norm = nn.LayerNorm(width)
        self.self_norm = nn.LayerNorm(width)
        self.feed_forward_norm = nn.LayerNorm(width)

    def forward(
        self,
        queries: Tensor,
        position: Tensor,
        memory: tuple[Tensor, Tensor],
        allowed_pixels: Tensor,
        allowed_queries: Tensor | None,
    ) -> Tensor:
        """Queries, position (B, Q, D), keys, values (B, T, D), bool (B, Q, T), (B, Q, Q)."""
        keys, values = memory
        read = self.cross_attention(queries + position, keys, values, allowed_pixels)
        queries = self.cross_norm(queries + read)
        placed = queries + position
        shared = self.self_attention(placed, placed, queries, allowed_queries)
        queries = self.self_norm(queries + shared)
        return self.feed_forward_norm(queries + self.feed_forward(queries))


class TokenEmbedding(nn.Module):
    """Makes query contents out of pixel tokens (selected or pooled ones) [ours]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, Q, D) -> (B, Q, D)."""
        return self.norm(self.linear(tokens))


class QueryDecoder(nn.Module):
    """Q queries through L layers, with a prediction before the first and after each.

    Args:
        width: D. mask_width: Dm. ffn: hidden width of the feed-forward blocks.
        queries: Q. layers: L.
        token_queries: contents and positions come from the tokens with the highest objectness
            (peaks first) instead of being learned; `forward` accepts `Denoising` then [ours].
        token_level: which level (coarse to fine) the tokens are taken from.
    """

    def __init__(
        self,
        width: int = 256,
        heads: int = 8,
        layers: int = 9,
        ffn: int = 2048,
        queries: int = 100,
        mask_width: int = 256,
        token_queries: bool = False,
        token_level: int = 0,
    ) -> None:
        super().__init__()
        self.width, self.queries, self.token_level = width, queries, token_level
        self.layers = nn.ModuleList(DecoderLayer(width, heads, ffn) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.level_embedding = nn.Parameter(drawn(3, width))
        self.mask_embedding = nn.Sequential(
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, mask_width),
        )
        self.token_embedding = TokenEmbedding(width) if token_queries else None
        self.objectness = nn.Linear(width, 1) if token_queries else None
        if not token_queries:
            self.query_content = nn.Parameter(drawn(queries, width))
            self.query_position = nn.Parameter(drawn(queries, width))

    def forward(
        self, pixel: PixelFeatures, denoising: Denoising | None = None, last_only: bool = False
    ) -> Decoded:
        """Decodes; with `last_only` the outputs hold the final layer alone (first dimension 1)."""
        positions = [
            sine_positions(map_size(x), self.width, pad, x.device)
            for x, pad in zip(pixel.levels, pixel.paddings, strict=True)
        ]
        content, position, tokens = self._initial(pixel, positions)
        allowed_queries = None
        if denoising is not None:
            content, position = self._append(content, position, denoising, pixel, positions)
            allowed_queries = isolation(self.queries, denoising.valid)
        memories = self._memories(pixel, positions)
        small = [
            F.interpolate(pixel.mask_features, map_size(x), mode="bilinear").flatten(2).detach()
            for x in pixel.levels
        ]  # resizing is linear: mask logits at a level = embedding . resized mask features
        states, queries = [self.norm(content)], content
        for index, layer in enumerate(self.layers):
            level = index % len(pixel.levels)
            allowed = self._allowed_pixels(states[-1], small[level], pixel.paddings[level])
            queries = layer(queries, position, memories[level], allowed, allowed_queries)
            states.append(self.norm(queries))
        kept = torch.stack(states[-1:] if last_only else states)  # (L + 1, B, Q + M, D)
        embedding = self.mask_embedding(kept).transpose(0, 1).flatten(1, 2)  # (B, (L+1) * N, Dm)
        masks = mask_products(embedding, pixel.mask_features.flatten(2))
        masks = torch.unflatten(masks, 1, (len(kept), -1)).transpose(0, 1)  # (L + 1, B, N, h*w)
        masks = torch.unflatten(masks, -1, map_size(pixel.mask_features))
        return Decoded(kept, masks, tokens)

    def masks_of(self, pixel: PixelFeatures, given: Denoising) -> Tensor:
        """Mask logits (B, M, h, w) of queries made of given masks, before any layer: how well a
        segment is found again from its own tokens."""
        content = self.norm(self._given(given, pixel)[1])
        masks = torch.bmm(self.mask_embedding(content), pixel.mask_features.flatten(2))
        return torch.unflatten(masks, -1, map_size(pixel.mask_features))

    def _memories(
        self, pixel: PixelFeatures, positions: list[Tensor]
    ) -> list[tuple[Tensor, Tensor]]:
        """Keys (with positions) and values of each level, (B, T, D) each."""
        memories: list[tuple[Tensor, Tensor]] = []
        for level, features in enumerate(pixel.levels):
            values = features.flatten(2).transpose(1, 2).contiguous()
            values = values + self.level_embedding[level].to(values.dtype)
            memories.append((values + positions[level].to(values.dtype), values))
        return memories

    @torch.no_grad()
    def _allowed_pixels(self, states: Tensor, features: Tensor, padding: Tensor | None) -> Tensor:
        """Where each query may look: inside its mask so far, everywhere if that is empty.

        states (B, Q, D), features (B, Dm, T), padding (B, h, w) -> bool (B, Q, T).
        """
        inside = mask_products(self.mask_embedding(states), features) >= 0
        if padding is None:
            return inside | ~inside.any(-1, keepdim=True)
        valid = ~padding.flatten(1)[:, None]  # (B, 1, T)
        inside = inside & valid
        return inside | (valid & ~inside.any(-1, keepdim=True))

    def _initial(
        self, pixel: PixelFeatures, positions: list[Tensor]
    ) -> tuple[Tensor, Tensor, Tokens | None]:
        """Contents and positions (B, Q, D) of the ordinary queries, and the tokens if used."""
        level = pixel.levels[self.token_level]
        if self.objectness is None or self.token_embedding is None:
            shape = (level.shape[0], -1, -1)
            return self.query_content.expand(shape), self.query_position.expand(shape), None
        features = level.flatten(2).transpose(1, 2)  # (B, T, D)
        padding = pixel.paddings[self.token_level]
        padding = None if padding is None else padding.flatten(1)
        logits = self.objectness(features)[..., 0].float()
        tokens = Tokens(features, logits, padding, map_size(level))
        chosen = select_tokens(tokens, self.queries)[..., None].expand(-1, -1, self.width)
        content = self.token_embedding(features.gather(1, chosen))
        places = positions[self.token_level].to(content.dtype)
        return content, places.expand(len(chosen), -1, -1).gather(1, chosen), tokens

    def _append(
        self,
        content: Tensor,
        position: Tensor,
        denoising: Denoising,
        pixel: PixelFeatures,
        positions: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Adds queries made of the token features and positions averaged under given masks."""
        weights, pooled = self._given(denoising, pixel)
        places = (weights @ positions[self.token_level]).to(position.dtype)
        return (
            torch.cat((content, pooled.to(content.dtype)), 1),
            torch.cat((position, places), 1),
        )

    def _given(self, given: Denoising, pixel: PixelFeatures) -> tuple[Tensor, Tensor]:
        """Weights (B, M, T) that average tokens under masks, contents (B, M, D) made of these."""
        assert self.token_embedding is not None, "built without token queries"
        level, padding = pixel.levels[self.token_level], pixel.paddings[self.token_level]
        weights = average_weights(given.masks, map_size(level), padding)
        features = level.flatten(2).transpose(1, 2)
        return weights, self.token_embedding(weights.to(features.dtype) @ features)


def mask_products(embedding: Tensor, features: Tensor) -> Tensor:
    """Embeddings (B, N, Dm), mask features (B, Dm, T) -> mask logits (B, N, T)."""
    if features.stride(1) == 1:  # channels last: else half precision is copied to multiply it
        return torch.bmm(features.transpose(1, 2), embedding.transpose(1, 2)).transpose(1, 2)
    return torch.bmm(embedding, features)


def average_weights(masks: Tensor, size: tuple[int, int], padding: Tensor | None) -> Tensor:
    """Masks (B, N, h, w) in 0-1 -> weights (B, N, T) over a map of `size` that sum to 1, fp32."""
    weights = area_mean(masks, size)
    if padding is not None:
        weights = weights.masked_fill(padding[:, None], 0.0)
    weights = weights.flatten(2)
    return weights / weights.sum(-1, keepdim=True).clamp(min=1e-6)


def isolation(queries: int, valid: Tensor) -> Tensor:
    """Who may see whom, bool (B, Q+M, Q+M): ordinary queries each other, denoising ones each other.

    Invalid denoising queries (valid (B, M)) are seen by themselves only.
    """
    ordinary = torch.arange(queries + valid.shape[1], device=valid.device) < queries
    real = torch.cat((valid.new_ones(len(valid), queries), valid), 1)  # (B, Q + M)
    itself = torch.eye(len(ordinary), dtype=torch.bool, device=valid.device)
    return ((ordinary[:, None] == ordinary) & real[:, None]) | itself


def select_tokens(tokens: Tokens, count: int) -> Tensor:
    """Indices (B, count) of the tokens to start from: peaks of objectness first, then the rest.

    A peak is the largest of its 3x3 neighbourhood, so that one large segment does not take every
    query. With fewer tokens than queries, tokens repeat.
    """
    scores = tokens.objectness.detach().sigmoid()
    usable = torch.full_like(scores[:, :1], scores.shape[1], dtype=torch.long)
    if tokens.padding is not None:
        scores = scores.masked_fill(tokens.padding, -1.0)
        usable = (~tokens.padding).sum(1, keepdim=True).clamp(min=1)
    grid = torch.unflatten(scores, 1, tokens.size)[:, None]
    peak = (F.max_pool2d(grid, 3, 1, 1) == grid).flatten(1) & (scores >= 0)
    ranking = scores + peak.to(scores.dtype)  # peaks lie in 1-2, the others in 0-1, padding at -1
    order = torch.argsort(ranking, dim=1, descending=True, stable=True)  # (B, T)
    ranks = torch.arange(count, device=order.device) % usable  # (B, count)
    return order.gather(1, ranks)
