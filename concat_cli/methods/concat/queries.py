"""Batches of real queries out of the bank, and pseudo queries out of the generator."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from concat_cli.methods.concat.build import Generator
from concat_cli.methods.concat.query_bank import QueryBank

PER_CLASS = 512  # real queries a class mean is taken over, at most


@dataclass(frozen=True)
class QueryBatch:
    """real (N, D) with classes (N,), index among the trained classes or EMPTY; empty (U, D)."""

    real: Tensor
    classes: Tensor
    empty: Tensor

    def to(self, device: torch.device) -> QueryBatch:
        """The batch on `device`."""
        return QueryBatch(self.real.to(device), self.classes.to(device), self.empty.to(device))


def query_batches(
    bank: QueryBank, rows: np.ndarray, count: int, empty: int, seed: int, start: int
) -> Iterator[list[QueryBatch]]:
    """Endless steps: `count` queries of the flat indices `rows`, and `empty` without a segment.

    What step t holds depends on (seed, t) alone.
    """
    nothing = bank.empty()
    step = start
    while True:
        rng = np.random.Generator(np.random.PCG64([seed, step]))
        real, classes = bank.take(np.sort(rng.choice(rows, count)))
        unmatched = torch.empty(0, bank.width)
        if empty:
            unmatched, _ = bank.take(np.sort(rng.choice(nothing, empty)))
        yield [QueryBatch(real, classes, unmatched)]
        step += 1


@dataclass(frozen=True)
class ClassStatistics:
    """Of real queries: means (K, D) of each class, how many were looked at (K,), and the mean (D,)
    and standard deviation (D,) over all."""

    means: Tensor
    counts: Tensor
    mean: Tensor
    std: Tensor


def class_statistics(
    bank: QueryBank, classes: int, without: tuple[int, ...] = (), seed: int = 0
) -> ClassStatistics:
    """Statistics over at most PER_CLASS queries of each class; zero means for classes left out."""
    rng = np.random.Generator(np.random.PCG64(seed))
    held = bank.held(without)
    of = np.asarray(bank.classes).reshape(-1)[held]
    chosen = [rng.permutation(held[of == c])[:PER_CLASS] for c in range(classes)]
    queries, found = bank.take(np.sort(np.concatenate(chosen)))
    member = F.one_hot(found, classes).float()  # (N, K)
    counts = member.sum(0)
    means = member.T @ queries / counts.clamp(min=1)[:, None]
    return ClassStatistics(means, counts, queries.mean(0), queries.std(0).clamp(min=1e-4))


def pseudo_queries(
    generator: Generator,
    text: Tensor,
    each: int,
    residuals: Tensor | None = None,
    source: torch.Generator | None = None,
) -> Tensor:
    """`each` pseudo vision queries of every class: (K, each, D), from embeddings text (K, E).

    With `residuals` (R, D), real queries minus their class means: the noise is by analogy, the
    generated mean of a class plus residuals drawn at random [ours].
    """
    noise = generator.sample_noise(len(text) * each, source)
    made = generator(text.repeat_interleave(each, 0), noise).unflatten(0, (len(text), each))
    if residuals is None:
        return made
    where = residuals.device if source is None else source.device
    drawn = torch.randint(len(residuals), made.shape[:2], generator=source, device=where)
    return made.mean(1, keepdim=True) + residuals[drawn.to(residuals.device)]


def residuals_of(queries: Tensor, classes: Tensor, statistics: ClassStatistics) -> Tensor:
    """Queries (N, D) that hold a segment minus the mean of their class: (R, D)."""
    held = classes >= 0
    return queries[held] - statistics.means.to(queries)[classes[held]]
