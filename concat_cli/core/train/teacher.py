"""What a batch teaches: trained classes, their masks and void; the tokens of the CLIP teacher.

The paper of CON states an alignment with CLIP's CLS tokens of full and of masked images; its form
(InfoNCE), the pooling and the use of the bank are this project's choices.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.clip.encoder import Clip
from concat_cli.core.clip.tokens import TokenCache, image_tokens, segment_tokens
from concat_cli.core.data.loader import Batch
from concat_cli.core.losses import as_float, full_precision
from concat_cli.core.model.layers import area_mean, map_size
from concat_cli.core.train.distributed import (
    Count,
    Counts,
    gather_rows,
    mean_over_processes,
    of_the_step,
    process_rank,
)

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
    alike: float | None = None,
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
        alike: rows whose tokens have a greater cosine are no negatives of each other either.
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
        if alike is not None:
            same = same | (token[: len(query)] @ token.T > alike)
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
        """Appends the valid rows of tokens (M, E) with groups (M,) and drops the oldest.

        In evaluation mode, and with a size of 0, nothing changes.
        """
        if self.size == 0 or not self.training:
            return
        held = torch.cat([self.valid, valid])
        # A stable sort moves unused rows to the front and keeps the order of the others.
        last = held.to(torch.uint8).argsort(stable=True)[-self.size :]
        self.tokens.copy_(torch.cat([self.tokens, tokens.to(self.tokens)])[last])
        self.groups.copy_(torch.cat([self.groups, groups.to(self.groups)])[last])
        self.valid.copy_(held[last])


def with_slots(batch: Batch, least: int) -> Batch:
    """The batch with at least so many slots for segments; every process needs the same number of
    crops, and a batch without any segment still needs a slot."""
    missing = max(least, 1) - batch.labels.shape[1]
    if missing <= 0:
        return batch
    return replace(batch, labels=F.pad(batch.labels, (0, missing), value=-1))


def merged_by_category(batch: Batch) -> Batch:
    """The batch with the segments of a class of an image merged into the first of them."""
    batch = with_slots(batch, 1)
    slots = torch.arange(batch.labels.shape[1], device=batch.labels.device)
    alike = batch.labels[:, :, None] == batch.labels[:, None, :]  # (B, N, N)
    first = torch.where(alike, slots, len(slots)).amin(-1)  # (B, N), of the segments of its class
    number = F.pad(first + 1, (1, 0)).to(batch.segment_map.dtype)  # slot 0 of the map is void
    merged = number.gather(1, batch.segment_map.flatten(1).long())
    return replace(
        batch,
        segment_map=merged.view_as(batch.segment_map),
        labels=batch.labels.masked_fill(first != slots, -1),
    )


def trained_indices(is_seen: tuple[bool, ...], device: torch.device) -> Tensor:
    """(all classes,) int64: the index among the seen classes, -1 for unseen ones."""
    seen = torch.tensor(is_seen, device=device)
    return torch.where(seen, seen.cumsum(0) - 1, -1)


def trained_labels(labels: Tensor, to_trained: Tensor) -> Tensor:
    """Data-set class indices (B, N) -> indices among the trained classes, -1 for all others."""
    return torch.where(labels >= 0, to_trained[labels.clamp(min=0)], -1)


def void_of(batch: Batch, labels: Tensor) -> Tensor | None:
    """Pixels (B, H, W) without a trained label inside the image, or None where there are none."""
    known = F.pad(labels >= 0, (1, 0))  # slot 0 of the segment map is void
    inside = known.gather(1, batch.segment_map.flatten(1).long()).view_as(batch.padding)
    void = ~inside & ~batch.padding
    return void if bool(void.any()) else None


def on_void(mask_logits: Tensor, void: Tensor, most: float) -> Tensor:
    """True (L, B, Q) for queries with more than `most` of their mask on void: no target."""
    with full_precision(mask_logits):
        inside = (mask_logits.detach() >= 0).float()
        share = area_mean(void[:, None], map_size(inside))[:, 0]
        on = torch.einsum("lbqhw,bhw->lbq", inside, share)
        return on > most * inside.sum((-2, -1)).clamp(min=1)


@dataclass(frozen=True)
class Truth:
    """What may be learned from a batch: all else is void.

    labels: (B, N) among the trained classes, -1 for none.
    """

    batch: Batch
    labels: Tensor

    @staticmethod
    def of(batch: Batch, to_trained: Tensor, slots: int = 1) -> Truth:
        """The truth of a batch, with at least so many slots for segments."""
        batch = with_slots(batch, slots)
        return Truth(batch, trained_labels(batch.labels, to_trained))

    @cached_property
    def masks(self) -> Tensor:
        """(B, N, H, W) bool, of the segments with a label."""
        return self.batch.masks() & (self.labels >= 0)[..., None, None]

    @cached_property
    def quarter(self) -> Tensor:
        """(B, N, H/4, W/4) float: the share of each cell of stride 4 that the masks cover."""
        height, width = self.masks.shape[-2:]
        return area_mean(self.masks, (height // 4, width // 4))

    @cached_property
    def padding(self) -> Tensor | None:
        """(B, H, W) bool, None where nothing is padded."""
        return self.batch.padding if bool(self.batch.padding.any()) else None

    @cached_property
    def void(self) -> Tensor | None:
        """See `void_of`."""
        return void_of(self.batch, self.labels)

    @property
    def segments(self) -> Tensor:
        """(B,) int64, how many segments with a label each image has."""
        return (self.labels >= 0).sum(1)


class ImageModule(nn.Module):
    """What an image task trains, and what it may know of classes.

    Its forward(batch, counts) gives weighted losses by name; without counts, the batch is a whole
    one. What a batch holds is counted before the forward, in `counts`.

    Args:
        text: (K, E) embeddings of the classes that may be trained on, and of no other.
        to_trained: (all classes,) index among those K of each class of the data set, -1 where the
            class must not be trained on: its pixels are void.
        teacher: where losses need one.
    """

    text: Tensor
    to_trained: Tensor

    def __init__(self, text: Tensor, to_trained: Tensor, teacher: Teacher | None = None) -> None:
        super().__init__()
        self.register_buffer("text", text, persistent=False)
        self.register_buffer("to_trained", to_trained, persistent=False)
        self._teacher = (teacher,)  # in a tuple: a frozen teacher is no part of the state

    @property
    def teacher(self) -> Teacher:
        """The one that it was made with."""
        (teacher,) = self._teacher
        assert teacher is not None, "these losses need a teacher"
        return teacher

    def counts(self, batch: Batch) -> dict[str, Tensor]:
        """What the losses of a batch are means over, by name: (); see `Task.counts`."""
        return {"segments": (trained_labels(batch.labels, self.to_trained) >= 0).sum()}

    def alone(self, batch: Batch) -> Counts:
        """The counts of a batch that is a whole one."""
        return of_the_step([self.counts(batch)])[0]


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

    def joined(self, other: SegmentTokens, after: int) -> SegmentTokens:
        """These, and those of slots that come after `after` others."""
        return SegmentTokens(
            torch.cat((self.image, other.image)),
            torch.cat((self.segment, other.segment + after)),
            torch.cat((self.valid, other.valid)),
            torch.cat((self.tokens, other.tokens)),
        )


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

    def segments(self, truth: Truth) -> SegmentTokens:
        """CLS tokens of at most `crops` segments an image, drawn at random where there are more.

        Segments without a label are not looked at.
        """
        return self.masked(truth.batch, truth.masks, truth.labels)

    @torch.no_grad()
    def masked(
        self, batch: Batch, masks: Tensor, labels: Tensor, passing: bool = False
    ) -> SegmentTokens:
        """The same of masks (B, N, H, W) with labels (B, N), -1 for none.

        passing: such masks do not come again, so their tokens are not kept on disk.
        """
        count = min(self.crops, labels.shape[1])
        segment = drawn_segments(labels, count)
        image = torch.arange(len(labels), device=labels.device)[:, None].expand_as(segment)
        valid = labels.gather(1, segment) >= 0
        image, segment, valid = image.flatten(), segment.flatten(), valid.flatten()
        chosen = torch.stack((image[valid], segment[valid]), 1)
        if self.cache is not None and not passing:
            found = self.cache.segment_tokens(self.clip, batch.images, masks, chosen, batch.padding)
        else:
            found = segment_tokens(self.clip, batch.images, masks, chosen)
        tokens = found.new_zeros(len(image), self.clip.embed_dim)
        tokens[valid] = found
        return SegmentTokens(image, segment, valid, tokens)


def contrast(
    queries: Tensor,
    tokens: Tensor,
    valid: Tensor,
    groups: Tensor,
    temperature: float,
    count: Count | None = None,
    bank: TokenBank | None = None,
    alike: float | None = None,
) -> Tensor:
    """InfoNCE against the tokens of every process and of the bank, which is fed afterwards.

    The negatives are those of the forward at hand: a batch that is split over several has fewer of
    its own. First arguments as of `info_nce`, M equal in all processes.

    count: of rows, where the forwards of a step may differ in them.
    """
    every = gathered(tokens, groups, valid)
    negatives = every.without_rows(process_rank() * len(tokens), len(tokens))
    own = valid.sum().float()
    number = mean_over_processes(own) if count is None else count.of_whole(own)
    if bank is not None:
        negatives = negatives.joined(bank.negatives())
    loss = info_nce(queries, tokens, valid, temperature, groups, negatives, number, alike)
    if bank is not None:
        bank.push(every.tokens, every.groups, every.valid)
    return loss


def gathered(tokens: Tensor, groups: Tensor, valid: Tensor) -> Negatives:
    """The rows of every process, in rank order; their number is equal everywhere."""
    return Negatives(gather_rows(tokens), gather_rows(groups), gather_rows(valid))
