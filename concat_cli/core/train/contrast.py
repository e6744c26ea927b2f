"""InfoNCE over all processes with a bank of earlier tokens, as CON and CLIP-ZSS use it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from concat_cli.core.losses.alignment import Negatives, info_nce
from concat_cli.core.losses.token_bank import TokenBank
from concat_cli.core.train.distributed import (
    Count,
    gather_rows,
    mean_over_processes,
    process_rank,
)


@dataclass(frozen=True)
class Rows:
    """queries, tokens (M, E), paired by row; valid (M,) bool; groups (M,) int64: nothing of a row's
    own group (classes, image ids; -1: none) is among its negatives. M is equal in all processes."""

    queries: Tensor
    tokens: Tensor
    valid: Tensor
    groups: Tensor


def contrast(
    rows: Rows, temperature: float, count: Count | None = None, bank: TokenBank | None = None
) -> Tensor:
    """InfoNCE against the tokens of every process and of the bank, which is fed afterwards.

    count: of rows, where the forwards of a step may differ in them. The negatives are those of the
    forward at hand: a batch that is split over several has fewer of its own.
    """
    every = gathered(rows.tokens, rows.groups, rows.valid)
    negatives = every.without_rows(process_rank() * len(rows.tokens), len(rows.tokens))
    own = rows.valid.sum().float()
    number = mean_over_processes(own) if count is None else count.of_whole(own)
    if bank is not None:
        negatives = negatives.joined(bank.negatives())
    loss = info_nce(
        rows.queries, rows.tokens, rows.valid, temperature, rows.groups, negatives, number
    )
    if bank is not None:
        feed(bank, every)
    return loss


def gathered(tokens: Tensor, groups: Tensor, valid: Tensor) -> Negatives:
    """The rows of every process, in rank order; their number is equal everywhere."""
    return Negatives(gather_rows(tokens), gather_rows(groups), gather_rows(valid))


def feed(bank: TokenBank, every: Negatives) -> None:
    """Puts the tokens of every process into the bank, in training."""
    if bank.training:
        bank.push(every.tokens, every.groups, every.valid)
