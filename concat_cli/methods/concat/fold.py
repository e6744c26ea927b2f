"""Seen classes set aside as pseudo-unseen: how CAT is chosen and calibrated without unseen classes.

The segmentor has trained on these classes, so what the fold says is an approximation.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from concat_cli.methods.concat.build import Generator
from concat_cli.methods.concat.queries import ClassStatistics, pseudo_queries
from concat_cli.methods.concat.query_bank import QueryBank

SAMPLES = 64  # pseudo queries behind a pseudo mean


def choose_fold(bank: QueryBank, classes: int, size: int, seed: int) -> tuple[int, ...]:
    """Indices of `size` trained classes that the bank holds; never more than half of them."""
    held = np.asarray(bank.classes).reshape(-1)
    present = [c for c in range(classes) if np.count_nonzero(held == c) >= 2]
    rng = np.random.Generator(np.random.PCG64([seed, classes]))
    return tuple(sorted(rng.permutation(present)[: min(size, len(present) // 2)].tolist()))


def harmonic(a: float, b: float) -> float:
    """2ab / (a + b), 0 where both are 0."""
    return 2 * a * b / (a + b) if a + b > 0 else 0.0


@torch.no_grad()
def fold_figures(
    generator: Generator,
    text: Tensor,
    fold: tuple[int, ...],
    real: ClassStatistics,
    queries: Tensor,
    classes: Tensor,
) -> dict[str, float]:
    """How well pseudo queries of the fold stand for real ones.

    text (K, E) of the trained classes; real: statistics of train queries, fold included; queries
    (N, D) with classes (N,): of dev. Real queries of dev are given the class of the nearest mean
    (cosine around the common mean), pseudo means for the fold and real ones for the rest: accuracy
    on the fold, on the rest, and `score`, their harmonic mean. `distance`: of pseudo to real means
    of the fold, in units of the mean distance between real means. `nearest`: share of pseudo means
    whose nearest real mean is that of their own class. `spread`: of pseudo to real queries.
    """
    device = text.device
    source = torch.Generator(device="cpu").manual_seed(0)
    chosen = torch.tensor(fold, device=device)
    made = pseudo_queries(generator, text[chosen], SAMPLES, source=source)  # (F, S, D)
    centre, means = real.mean.to(device), real.means.to(device)
    mixed = means.clone()
    mixed[chosen] = made.mean(1)
    there = real.counts.to(device) > 0
    similarity = _cosine(queries.to(device) - centre, mixed - centre)
    found = similarity.masked_fill(~there, -2.0).argmax(-1)
    right = found == classes.to(device)
    in_fold = torch.isin(classes.to(device), chosen)
    on_fold, on_rest = (_mean(right[part]) for part in (in_fold, ~in_fold))
    own = _cosine(made.mean(1) - centre, means - centre).masked_fill(~there, -2.0)
    gaps = torch.cdist(means[there], means[there])
    apart = gaps.sum() / max(1, gaps.numel() - len(gaps))
    spread = (made - made.mean(1, keepdim=True)).square().mean().sqrt()
    return {
        "score": harmonic(on_fold, on_rest),
        "fold_accuracy": on_fold,
        "rest_accuracy": on_rest,
        "distance": float((made.mean(1) - means[chosen]).norm(dim=-1).mean() / apart.clamp(1e-6)),
        "nearest": _mean(own.argmax(-1) == chosen),
        "spread": float(spread / real.std.to(device).square().mean().sqrt()),
    }


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    return F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T


def _mean(hits: Tensor) -> float:
    return float(hits.float().mean()) if hits.numel() else 0.0
