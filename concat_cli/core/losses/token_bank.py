"""A first-in first-out store of CLS tokens, kept as further negatives for the alignment losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from concat_cli.core.losses.alignment import Negatives


class TokenBank(nn.Module):
    """The last `size` tokens, oldest first; unused rows come before them.

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
