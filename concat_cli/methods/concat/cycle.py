"""CAT: losses that train the generator of pseudo vision queries.

Moment matching and query contrast lead from semantics to vision, the cycle loss back. The paper
states the three; the moment matching is PADing's, the form of the other two this project's choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from concat_cli.core.losses.precision import as_float, full_precision


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


def _class_shares(classes: Tensor | None, rows: Tensor, count: int) -> Tensor:
    """(N, C): 1 / size of its class for each row, so that products with it are class means."""
    if classes is None:
        return rows.new_full((rows.shape[0], 1), 1.0 / max(rows.shape[0], 1))
    member = F.one_hot(classes, count).to(rows.dtype)
    return member / member.sum(0).clamp(min=1)


def moment_matching(
    fake: Tensor,
    real: Tensor,
    bandwidths: Sequence[float],
    distance: Tensor | float | None = None,
    classes: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Square root of MMD^2 summed over Gaussian kernels, biased estimate (GMMN; PADing).

    Args:
        fake, real: (N, D) and (M, D); only `fake` receives a gradient.
        bandwidths: sigma of each kernel exp(-d^2 / (2 sigma^2)), in multiples of `distance`.
        distance: unit of the bandwidths; by default `mean_distance(real)`.
        classes: indices of the rows, (N,) and (M,): then the mean over the classes present on both
            sides, each matched on its own.
    """
    with full_precision(fake):
        fake, real = as_float(fake), as_float(real).detach().to(fake.dtype)
        unit = mean_distance(real) if distance is None else torch.as_tensor(distance)
        sigmas = torch.as_tensor(tuple(bandwidths)).to(fake) * unit.to(fake)
        rates = 0.5 / sigmas.square().clamp(min=1e-12)  # (V,)
        fake_classes, real_classes = classes if classes is not None else (None, None)
        count = 1
        if fake_classes is not None and real_classes is not None:
            count = int(torch.maximum(fake_classes.max(), real_classes.max())) + 1
        of_fake = _class_shares(fake_classes, fake, count)
        of_real = _class_shares(real_classes, real, count)
        squared = (
            _class_means(fake, fake, of_fake, of_fake, rates)
            - 2 * _class_means(fake, real, of_fake, of_real, rates)
            + _class_means(real, real, of_real, of_real, rates)
        )  # (C,)
        present = (of_fake.sum(0) > 0) & (of_real.sum(0) > 0)
        return _safe_sqrt(squared.masked_fill(~present, 0.0)).sum() / present.sum().clamp(min=1)


def _class_means(a: Tensor, b: Tensor, of_a: Tensor, of_b: Tensor, rates: Tensor) -> Tensor:
    """(C,): mean over the pairs of a class of the kernels' sum."""
    squares = _squared_distances(a, b)
    kernel = torch.zeros_like(squares)
    for rate in rates:  # a handful; keeps one (N, M) matrix a kernel
        kernel = kernel + torch.exp(-rate * squares)
    return ((of_a.T @ kernel) * of_b.T).sum(-1)


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
    paired: bool = False,
    other_classes: bool = False,
) -> Tensor:
    """Pulls pseudo queries to real queries of their class, pushes them from empty ones.

    -log(p / (p + sum over negatives of exp(cos / T))), p = mean over positives of exp(cos / T); the
    mean over pseudo queries that have a positive.

    Args:
        fake, classes: (N, D) and (N,).
        real, real_classes: (M, D) and (M,), queries that hold a segment.
        unmatched: (U, D), queries without a segment: the negatives.
        paired: row i of `real` alone is the positive of row i of `fake`.
        other_classes: real queries of other classes are negatives too.
    """
    with full_precision(fake):
        fake = F.normalize(as_float(fake), dim=-1)
        real = F.normalize(as_float(real).detach().to(fake.dtype), dim=-1)
        empty = F.normalize(as_float(unmatched).detach().to(fake.dtype), dim=-1)
        to_real = fake @ real.T / temperature  # (N, M)
        to_empty = fake @ empty.T / temperature  # (N, U)
        same = classes[:, None] == real_classes[None]
        positives = torch.eye(*same.shape, device=same.device) > 0 if paired else same
        has = positives.any(-1)
        pull = _masked_logsumexp(to_real, positives) - positives.sum(-1).clamp(min=1).to(fake).log()
        push = _masked_logsumexp(to_empty, torch.ones_like(to_empty, dtype=torch.bool))
        if other_classes:
            push = torch.logaddexp(push, _masked_logsumexp(to_real, ~same))
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
