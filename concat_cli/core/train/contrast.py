"""InfoNCE over all processes with a bank of earlier tokens."""

from __future__ import annotations

from torch import Tensor

from concat_cli.core.losses.alignment import Negatives, info_nce
from concat_cli.core.losses.token_bank import TokenBank
from concat_cli.core.train.distributed import gather_rows, mean_over_processes, process_rank


def contrast(
    queries: Tensor,
    tokens: Tensor,
    valid: Tensor,
    groups: Tensor,
    bank: TokenBank,
    temperature: float,
) -> Tensor:
    """InfoNCE against the tokens of every process and of the bank, which is fed afterwards.

    Arguments as of `info_nce`: queries, tokens (M, E), valid, groups (M,). Nothing of a row's own
    group is among its negatives, and the bank holds earlier steps only.
    """
    every = gathered(tokens, groups, valid)
    others = every.without_rows(process_rank() * len(tokens), len(tokens))
    count = mean_over_processes(valid.sum().float())
    negatives = others.joined(bank.negatives())
    loss = info_nce(queries, tokens, valid, temperature, groups, negatives, count)
    feed(bank, every)
    return loss


def gathered(tokens: Tensor, groups: Tensor, valid: Tensor) -> Negatives:
    """The rows of every process, in rank order; their number is equal everywhere."""
    return Negatives(gather_rows(tokens), gather_rows(groups), gather_rows(valid))


def feed(bank: TokenBank, every: Negatives) -> None:
    """Puts the tokens of every process into the bank, in training."""
    if bank.training:
        bank.push(every.tokens, every.groups, every.valid)
