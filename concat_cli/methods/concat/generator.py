"""The generator of pseudo vision queries: (text embedding, noise) -> vision query."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OutputStatistics(nn.Module):
    """Per-dimension affine map to the mean and spread of real queries; fixed, not learned."""

    mean: Tensor
    std: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("std", torch.ones(width))

    def set(self, mean: Tensor, std: Tensor) -> None:
        """Takes the statistics of real queries, (D,) each."""
        assert mean.shape == self.mean.shape and std.shape == self.std.shape
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, values: Tensor) -> Tensor:
        """(..., D) of about zero mean and unit spread -> (..., D) like real queries."""
        return values * self.std + self.mean


def _unit_variance(text: Tensor) -> Tensor:
    """Normalised embeddings (N, E), scaled so that a dimension has a variance of about 1."""
    return F.normalize(text, dim=-1) * text.shape[-1] ** 0.5


def _normal(
    rows: int, width: int, device: torch.device, generator: torch.Generator | None
) -> Tensor:
    """N(0, 1) noise (rows, width), drawn where the generator lives, then moved."""
    source = generator.device if generator is not None else device
    return torch.randn(rows, width, generator=generator, device=source).to(device)


class _PrimitiveLayer(nn.Module):
    """A post-norm transformer decoder layer for tokens that are each alone in their sequence.

    Self-attention of a single token is a linear map, and is written as one.
    """

    def __init__(self, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        assert width % heads == 0, "width must be a multiple of heads"
        self.heads = heads
        self.attention_dropout = dropout
        self.own = nn.Sequential(nn.Linear(width, width), nn.Linear(width, width))
        self.query = nn.Linear(width, width)
        self.key_value = nn.Linear(width, 2 * width)
        self.out = nn.Linear(width, width)
        self.ffn = nn.Sequential(
            nn.Linear(width, ffn), nn.ReLU(), nn.Dropout(dropout), nn.Linear(ffn, width)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(3))
        self.dropout = nn.Dropout(dropout)

    def _attend(self, tokens: Tensor, primitives: Tensor) -> Tensor:
        """Tokens (N, D) over primitives (R, D); their keys are projected once for all tokens."""
        query = self.query(tokens).unflatten(-1, (self.heads, -1)).transpose(0, 1)  # (heads, N, d)
        key, value = (
            part.unflatten(-1, (self.heads, -1)).transpose(0, 1)  # (heads, R, d)
            for part in self.key_value(primitives).chunk(2, dim=-1)
        )
        dropout = self.attention_dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            query[None], key[None], value[None], dropout_p=dropout
        )
        return self.out(mixed[0].transpose(0, 1).flatten(1))

    def forward(self, tokens: Tensor, primitives: Tensor, noise: Tensor) -> Tensor:
        """Tokens (N, D), primitives (R, D), noise (N, D) -> (N, D)."""
        tokens = self.norms[0](tokens + self.dropout(self.own(tokens)))
        attended = self.dropout(self._attend(tokens, primitives))
        tokens = self.norms[1](tokens + attended + noise)
        return self.norms[2](tokens + self.dropout(self.ffn(tokens)))


class Generator(nn.Module):
    """A transformer decoder over learned primitives, as in PADing (CVPR 2023, sec. 3.2).

    Noise enters after cross-attention in every layer, before the norm, also at sampling time.
    """

    def __init__(
        self,
        text_width: int,
        width: int,
        layers: int = 3,
        primitives: int = 400,
        heads: int = 8,
        ffn: int = 1024,
        dropout: float = 0.1,
    ) -> None:
        super().__init__()
        self.noise_size = layers * width
        self.embed = nn.Linear(text_width, width)
        self.primitives = nn.Parameter(torch.randn(primitives, width))
        self.layers = nn.ModuleList(
            _PrimitiveLayer(width, heads, ffn, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.statistics = OutputStatistics(width)

    def forward(self, text: Tensor, noise: Tensor) -> Tensor:
        """Text embeddings (N, E) and noise (N, layers * D) -> pseudo vision queries (N, D)."""
        tokens = self.embed(_unit_variance(text))
        parts = noise.chunk(len(self.layers), dim=-1)
        for layer, part in zip(self.layers, parts, strict=True):
            tokens = layer(tokens, self.primitives, part)
        return self.statistics(self.norm(tokens))

    def sample_noise(self, rows: int, generator: torch.Generator | None = None) -> Tensor:
        """N(0, 1) noise (rows, noise_size) on the module's device."""
        return _normal(rows, self.noise_size, self.primitives.device, generator)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Starts the output near real queries of this mean and spread, (D,) each."""
        self.statistics.set(mean, std)
