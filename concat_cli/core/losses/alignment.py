"""CON: alignment of semantic queries with CLIP CLS tokens of full and of masked images.

The paper states the two losses; their form (InfoNCE), the pooling and the use of
the bank are this project's choices.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.losses import as_float, full_precision

Pooling = Literal["attention", "objectness", "matched"]


@dataclass(frozen=True)
class Negatives:
    """Tokens beside those of the batch: tokens (T, E), groups (T,) int64 or -1, valid (T,) bool."""

    tokens: Tensor
    groups: Tensor
    valid: Tensor

    def joined(self, other: Negatives) -> Negatives:
        """These and others."""
        return Negatives(
            torch.cat([self.tokens, other.tokens.to(self.tokens)]),
            torch.cat([self.groups, other.groups]),
            torch.cat([self.valid, other.valid]),
        )

    def without_rows(self, start: int, count: int) -> Negatives:
        """The same without rows start .. start+count: a process's own part of gathered tokens."""
        row = torch.arange(self.valid.shape[0], device=self.valid.device)
        own = (row >= start) & (row < start + count)
        return Negatives(self.tokens, self.groups, self.valid & ~own)


def info_nce(
    queries: Tensor,
    tokens: Tensor,
    valid: Tensor,
    temperature: float,
    groups: Tensor | None = None,
    negatives: Negatives | None = None,
    count: Tensor | None = None,
) -> Tensor:
    """-log exp(q_i t_i / T) / sum_j exp(q_i t_j / T), cosine similarities, over the valid rows.

    Row j is a negative of row i if it is valid and of another group (or of none, -1).

    Args:
        queries, tokens: (M, E), paired by row.
        valid: (M,) bool; other rows are neither queries nor negatives.
        groups: (M,) int64, class indices or image ids.
        negatives: further tokens, of a bank or of other processes.
        count: divides the sum; by default the number of valid rows. With several processes: its
            mean over them, so that the averaged gradient is that of the whole batch.
    """
    if groups is None:
        groups = torch.full_like(valid, -1, dtype=torch.int64)
    every = Negatives(tokens, groups, valid)
    every = every if negatives is None else every.joined(negatives)
    with full_precision(queries):
        query = F.normalize(as_float(queries), dim=-1)
        token = F.normalize(as_float(every.tokens).to(query.dtype), dim=-1)
        logits = query @ token.T / temperature  # (M, M + T)
        same = (groups[:, None] == every.groups[None]) & (groups[:, None] >= 0)
        own = torch.eye(*same.shape, dtype=torch.bool, device=same.device)
        logits = logits.masked_fill(~(every.valid[None] & ~same | own), -torch.inf)
        loss = (logits.logsumexp(-1) - logits.diagonal()).masked_fill(~valid, 0.0).sum()
        norm = valid.sum() if count is None else count
        return loss / norm.to(loss.dtype).clamp(min=1e-12)


def aggregate(
    semantic_queries: Tensor,
    pooling: Pooling,
    cls: Tensor,
    objectness: Tensor,
    matched: Tensor,
    temperature: float,
) -> Tensor:
    """One vector per image, (B, E): a weighted mean of its normalised semantic queries.

    Args:
        semantic_queries: (B, Q, E).
        pooling: "attention": softmax over the queries of their cosine with the image's CLS token
            / temperature, times objectness; "objectness"; "matched": mean of matched queries.
        cls: (B, E).
        objectness: (B, Q), 1 - p(no_object).
        matched: (B, Q) bool; an image without matched query gives a zero vector.
    """
    with full_precision(semantic_queries):
        queries = F.normalize(as_float(semantic_queries), dim=-1)
        if pooling == "attention":
            given = F.normalize(as_float(cls).to(queries.dtype), dim=-1)
            similarity = torch.einsum("bqe,be->bq", queries, given) / temperature
            weights = similarity.softmax(-1) * as_float(objectness)
        else:
            weights = as_float(objectness) if pooling == "objectness" else matched
        weights = weights.to(queries.dtype)
        weights = weights / weights.sum(-1, keepdim=True).clamp(min=1e-12)
        return torch.einsum("bq,bqe->be", weights, queries)


class TokenBank(nn.Module):
    """The last `size` tokens, kept as further negatives: oldest first, unused rows before them.

    Shapes never change and everything lies in the state dict, so that a resumed run goes on
    bit-exactly. A size of 0 keeps nothing.
    """

    tokens: Tensor  # (T, E)
    groups: Tensor  # (T,) int64: class index or image id, -1 for none
    valid: Tensor  # (T,) bool: rows that hold a token

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("tokens", torch.zeros(size, width))
        self.register_buffer("groups", torch.full((size,), -1, dtype=torch.int64))
        self.register_buffer("valid", torch.zeros(size, dtype=torch.bool))

    @property
    def size(self) -> int:
        """How many tokens fit."""
        return self.tokens.shape[0]

    def negatives(self) -> Negatives:
        """A copy of what the bank holds now."""
        return Negatives(self.tokens.clone(), self.groups.clone(), self.valid.clone())

    @torch.no_grad()
    def push(self, tokens: Tensor, groups: Tensor, valid: Tensor) -> None:
        """Appends the valid rows of tokens (M, E) with groups (M,) and drops the oldest."""
        if self.size == 0:
            return
        held = torch.cat([self.valid, valid])
        # A stable sort moves unused rows to the front and keeps the order of the others.
        last = held.to(torch.uint8).argsort(stable=True)[-self.size :]
        self.tokens.copy_(torch.cat([self.tokens, tokens.to(self.tokens)])[last])
        self.groups.copy_(torch.cat([self.groups, groups.to(self.groups)])[last])
        self.valid.copy_(held[last])
