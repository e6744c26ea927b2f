"""Class loss of all queries: weighted cross-entropy with no_object (Mask2Former)."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from concat_cli.core.losses.precision import as_float


def query_targets(matched: Tensor, labels: Tensor, queries: int, classes: int) -> Tensor:
    """Class of each query, (L, B, Q) int64; `classes` (= K, no_object) where nothing is matched.

    `matched` (L, B, N) holds queries or -1, `labels` (B, N) class indices or -1.
    """
    slots = torch.full(
        (*matched.shape[:2], queries + 1), classes, dtype=torch.int64, device=matched.device
    )
    label = labels[None].expand_as(matched)
    nowhere = (matched < 0) | (label < 0)  # goes to the extra slot
    slots.scatter_(2, matched.masked_fill(nowhere, queries), label.masked_fill(nowhere, classes))
    return slots[..., :queries]


def expected_weight(segments: Tensor, queries: int, no_object: float) -> Tensor:
    """What a layer's weights in `class_loss` sum up to, (), if none is ignored.

    segments: (B,), how many segments with a label each image has.
    """
    matched = segments.clamp(max=queries).sum()
    return matched + no_object * (queries * len(segments) - matched)


def class_loss(
    class_logits: Tensor,
    matched: Tensor,
    labels: Tensor,
    no_object: float,
    ignore: Tensor | None = None,
    average: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Cross-entropy, a weighted mean in each layer, summed over the layers.

    Args:
        class_logits: (L, B, Q, K+1), no_object last.
        matched: (L, B, N) query per segment, -1 for none.
        labels: (B, N), -1 for padding.
        no_object: weight of queries without a segment.
        ignore: (B, Q) or (L, B, Q) bool, queries mostly on void: no target unless matched.
        average: brings the sum of a layer's weights to the whole batch, however it is split; see
            `Count.of_whole`.
    """
    queries, classes = class_logits.shape[2], class_logits.shape[3] - 1
    targets = query_targets(matched, labels, queries, classes)
    log_probability = as_float(class_logits).log_softmax(-1)
    loss = -log_probability.gather(-1, targets[..., None]).squeeze(-1)  # (L, B, Q)
    empty = targets == classes
    weights = torch.ones_like(loss).masked_fill(empty, no_object)
    if ignore is not None:
        weights = weights.masked_fill(empty & ignore, 0.0)
    total = (weights * loss).sum((1, 2))  # (L,)
    norm = weights.sum((1, 2))
    norm = norm if average is None else average(norm)
    return (total / norm.clamp(min=1e-12)).sum()
