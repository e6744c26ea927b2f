"""The generator of pseudo vision queries, (text embedding, noise) -> vision query, and its losses.

Moment matching and query contrast lead from semantics to vision, the cycle loss back. The paper
states the three; the moment matching is PADing's, the form of the other two this project's choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.build import clip_width_of, config_of, filled
from concat_cli.core.checkpoint import Weights
from concat_cli.core.config import CatConfig
from concat_cli.core.errors import UserError
from concat_cli.core.losses import as_float, full_precision
from concat_cli.core.model.layers import drawn, unit_variance


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

    Attributes:
        precision: of its matrix products; None: fp32, in which it learns. Once it is frozen, bf16
            takes half the time, and its rounding is small beside the noise.
    """

    precision: torch.dtype | None = None

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
        self.primitives = nn.Parameter(drawn(primitives, width))
        self.layers = nn.ModuleList(
            _PrimitiveLayer(width, heads, ffn, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.statistics = OutputStatistics(width)

    def forward(self, text: Tensor, noise: Tensor) -> Tensor:
        """Text embeddings (N, E) and noise (N, layers * D) -> pseudo vision queries (N, D)."""
        half = self.precision is not None
        with torch.autocast(text.device.type, self.precision, enabled=half):
            tokens = self.embed(unit_variance(text))
            parts = noise.chunk(len(self.layers), dim=-1)
            for layer, part in zip(self.layers, parts, strict=True):
                tokens = layer(tokens, self.primitives, part)
            return self.statistics(self.norm(tokens).float())

    def sample_noise(self, rows: int, generator: torch.Generator | None = None) -> Tensor:
        """N(0, 1) noise (rows, noise_size), drawn where `generator` lives, then moved."""
        device = self.primitives.device
        source = generator.device if generator is not None else device
        return torch.randn(rows, self.noise_size, generator=generator, device=source).to(device)

    def set_statistics(self, mean: Tensor, std: Tensor) -> None:
        """Starts the output near real queries of this mean and spread, (D,) each."""
        self.statistics.set(mean, std)


def build_generator(cfg: CatConfig, clip_width: int, width: int) -> Generator:
    """A generator of vision queries of the given width from text embeddings of CLIP's width."""
    if width % cfg.heads:
        raise UserError(
            f"cat.heads={cfg.heads} does not divide the width of the queries, {width}.",
            "Take a number that does, such as 4.",
        )
    return Generator(clip_width, width, cfg.layers, cfg.primitives, cfg.heads, cfg.ffn, cfg.dropout)


def restore_generator(weights: Weights) -> Generator:
    """The generator of a weights file of stage `cat` or `finetune`, in evaluation mode."""
    cfg, text = config_of(weights), clip_width_of(weights)
    return filled(lambda: build_generator(cfg.cat, text, cfg.model.width), weights, "generator")


def mean_distance(queries: Tensor) -> Tensor:
    """Mean Euclidean distance over the pairs of different rows of (M, D): a scalar, no gradient."""
    rows = queries.shape[0]
    distances = _squared_distances(queries.detach(), queries.detach()).sqrt()
    off_diagonal = 1 - torch.eye(rows, dtype=distances.dtype, device=distances.device)
    return (distances * off_diagonal).sum() / max(rows * (rows - 1), 1)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    """(N, M) from (N, D) and (M, D); rows are centred first, which keeps fp32 accurate."""
    centre = b.detach().mean(0)
    a, b = a - centre, b - centre
    squares = (a * a).sum(-1)[:, None] + (b * b).sum(-1)[None] - 2 * a @ b.T
    return squares.clamp(min=0)


def moment_matching(fake: Tensor, real: Tensor, bandwidths: Sequence[float]) -> Tensor:
    """Square root of MMD^2 summed over Gaussian kernels, biased estimate (GMMN; PADing).

    Args:
        fake, real: (N, D) and (M, D); only `fake` receives a gradient.
        bandwidths: sigma of each kernel exp(-d^2 / (2 sigma^2)), in multiples of the mean distance
            between real queries.
    """
    with full_precision(fake):
        fake, real = as_float(fake), as_float(real).detach().to(fake.dtype)
        sigmas = torch.as_tensor(tuple(bandwidths)).to(fake) * mean_distance(real).to(fake)
        rates = 0.5 / sigmas.square().clamp(min=1e-12)  # (V,)
        squared = (
            _mean_kernel(fake, fake, rates)
            - 2 * _mean_kernel(fake, real, rates)
            + _mean_kernel(real, real, rates)
        )
        return _safe_sqrt(squared)


def _mean_kernel(a: Tensor, b: Tensor, rates: Tensor) -> Tensor:
    """Mean over the pairs of the kernels' sum, ()."""
    squares = _squared_distances(a, b)
    kernel = torch.zeros_like(squares)
    for rate in rates:  # a handful; keeps one (N, M) matrix a kernel
        kernel = kernel + torch.exp(-rate * squares)
    of_a, of_b = (rows.new_full((1, len(rows)), 1 / len(rows)) for rows in (a, b))
    return ((of_a @ kernel) * of_b).sum()


def _safe_sqrt(values: Tensor) -> Tensor:
    """sqrt with value and gradient 0 at (and, by rounding, below) 0; exact everywhere else."""
    positive = values > 0
    return torch.where(positive, torch.where(positive, values, 1.0).sqrt(), 0.0)


def query_contrast(
    fake: Tensor,
    classes: Tensor,
    real: Tensor,
    real_classes: Tensor,
    unmatched: Tensor,
    temperature: float,
) -> Tensor:
    """Pulls pseudo queries to real queries of their class, pushes them from empty ones.

    -log(p / (p + sum over negatives of exp(cos / T))), p = mean over positives of exp(cos / T); the
    mean over pseudo queries that have a positive.

    Args:
        fake, classes: (N, D) and (N,).
        real, real_classes: (M, D) and (M,), queries that hold a segment.
        unmatched: (U, D), queries without a segment: the negatives.
    """
    with full_precision(fake):
        fake = F.normalize(as_float(fake), dim=-1)
        real = F.normalize(as_float(real).detach().to(fake.dtype), dim=-1)
        empty = F.normalize(as_float(unmatched).detach().to(fake.dtype), dim=-1)
        to_real = fake @ real.T / temperature  # (N, M)
        to_empty = fake @ empty.T / temperature  # (N, U)
        positives = classes[:, None] == real_classes[None]
        has = positives.any(-1)
        pull = _masked_logsumexp(to_real, positives) - positives.sum(-1).clamp(min=1).to(fake).log()
        push = _masked_logsumexp(to_empty, torch.ones_like(to_empty, dtype=torch.bool))
        loss = F.softplus(push - pull).masked_fill(~has, 0.0)
        return loss.sum() / has.sum().clamp(min=1)


def _masked_logsumexp(logits: Tensor, keep: Tensor) -> Tensor:
    """logsumexp over the kept entries of each row; a very negative, finite number for none."""
    worst = torch.finfo(logits.dtype).min / 4
    floor = logits.new_full((logits.shape[0], 1), worst)
    return torch.cat([logits.masked_fill(~keep, worst), floor], dim=1).logsumexp(-1)


def cycle_loss(
    projected: Tensor, text: Tensor, labels: Tensor, scale: float | Tensor = 100.0
) -> Tensor:
    """Cross-entropy of projected pseudo queries (N, E) over text embeddings (K, E).

    Logits are scale * cosine; `labels` (N,) are class indices.
    """
    with full_precision(projected):
        query = F.normalize(as_float(projected), dim=-1)
        target = F.normalize(as_float(text).to(query.dtype), dim=-1)
        return F.cross_entropy(scale * query @ target.T, labels)
