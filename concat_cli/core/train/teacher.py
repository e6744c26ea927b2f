"""What the frozen CLIP teacher says of a training batch, and how students are held to it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from concat_cli.core.clip.encoder import Clip
from concat_cli.core.clip.tokens import TokenCache, image_tokens, segment_tokens
from concat_cli.core.data.loader import Batch
from concat_cli.core.losses.alignment import Negatives, TokenBank, info_nce
from concat_cli.core.train.distributed import (
    Count,
    gather_rows,
    mean_over_processes,
    process_rank,
)
from concat_cli.core.train.targets import Truth


@dataclass(frozen=True)
class SegmentTokens:
    """CLS tokens of masked, box-cropped segments, in fixed-size slots.

    image, segment: (M,) int64, which slot holds which segment of which image. valid: (M,) bool.
    tokens: (M, E), normalised; zero where not valid.
    """

    image: Tensor
    segment: Tensor
    valid: Tensor
    tokens: Tensor


def drawn_segments(labels: Tensor, count: int) -> Tensor:
    """Slots (B, count) of labels (B, N) in random order, those of -1 last."""
    order = torch.rand(labels.shape, device=labels.device).masked_fill(labels < 0, 2.0)
    return order.argsort(1)[:, :count]


class Teacher:
    """CLS tokens of exactly the view that the student sees, online or from a cache."""

    def __init__(self, clip: Clip, crops: int, cache: TokenCache | None = None) -> None:
        self.clip, self.crops, self.cache = clip, crops, cache

    @torch.no_grad()
    def images(self, batch: Batch) -> Tensor:
        """CLS tokens (B, E) of the full images."""
        if self.cache is not None:
            return self.cache.image_tokens(self.clip, batch.images, batch.padding)
        return image_tokens(self.clip, batch.images, batch.padding)

    @torch.no_grad()
    def segments(self, truth: Truth) -> SegmentTokens:
        """CLS tokens of at most `crops` segments an image, drawn at random where there are more.

        Segments without a label are not looked at.
        """
        batch, labels, masks = truth.batch, truth.labels, truth.masks
        count = min(self.crops, labels.shape[1])
        segment = drawn_segments(labels, count)
        image = torch.arange(len(labels), device=labels.device)[:, None].expand_as(segment)
        valid = labels.gather(1, segment) >= 0
        image, segment, valid = image.flatten(), segment.flatten(), valid.flatten()
        chosen = torch.stack((image[valid], segment[valid]), 1)
        if self.cache is not None:
            found = self.cache.segment_tokens(self.clip, batch.images, masks, chosen, batch.padding)
        else:
            found = segment_tokens(self.clip, batch.images, masks, chosen)
        tokens = found.new_zeros(len(image), self.clip.embed_dim)
        tokens[valid] = found
        return SegmentTokens(image, segment, valid, tokens)


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
