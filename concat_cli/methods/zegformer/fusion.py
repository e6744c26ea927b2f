"""ZegFormer's two opinions of a segment and how they become one (Ding et al., CVPR 2022).

The segment branch names a segment by its semantic query: class logits (B, Q, K+1), no_object last.
The image branch names it by what CLIP's image encoder sees of it: image logits (B, Q, K), -inf
where a query was not sent to CLIP, which then says that it is of no class.

Everything here is plain arithmetic on (B, Q, K+1) scores whose last column is no_object.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Branch = Literal["segment", "image", "fusion"]


def class_scores(
    branch: Branch,
    class_logits: Tensor,
    image_logits: Tensor | None,
    seen: Tensor,
    exponent: float,
) -> Tensor:
    """(B, Q, K+1) scores in 0-1 of a branch: of its classes and, last, of no_object.

    seen (K,) bool; image_logits may be None for "segment". The scores of the fusion do not add up
    to 1: they are not normalised again [code].
    """
    by_segment = class_logits.softmax(-1)
    if branch == "segment":
        return by_segment
    assert image_logits is not None, f"branch {branch} needs image logits"
    by_image = image_probabilities(image_logits, class_logits[..., -1:])
    if branch == "image":
        return by_image
    return fuse(by_segment, by_image, seen, exponent)


def image_probabilities(image_logits: Tensor, no_object: Tensor) -> Tensor:
    """p' (B, Q, K+1): softmax over CLIP's logits (B, Q, K) and the segment branch's logit of
    no_object (B, Q, 1) [code]."""
    return torch.cat((image_logits, no_object), -1).softmax(-1)


def fuse(by_segment: Tensor, by_image: Tensor, seen: Tensor, exponent: float) -> Tensor:
    """The fusion of p and p', (..., K+1) each, with lambda = `exponent` in 0-1 [paper].

    Seen classes: p^lambda * avg^(1-lambda), avg the mean of p' over seen classes, so that CLIP does
    not change their order. Unseen classes: p^(1-lambda) * p'^lambda. no_object: p.
    """
    p, image = by_segment[..., :-1], by_image[..., :-1]
    average = (image * seen).sum(-1, keepdim=True) / seen.sum().clamp(min=1)
    fused = torch.where(
        seen,
        p**exponent * average ** (1 - exponent),
        p ** (1 - exponent) * image**exponent,
    )
    return torch.cat((fused, by_segment[..., -1:]), -1)


def highest_scores(
    branch: Branch, class_logits: Tensor, seen: Tensor, exponent: float, scale: float
) -> Tensor:
    """(B, Q) a bound on every class score of a query, whatever CLIP will say of it [ours].

    No image logit exceeds CLIP's logit `scale`, as a cosine does not exceed 1: p' of a class is at
    most sigmoid(scale - no_object logit). Scores grow with p'.
    """
    ceiling = torch.sigmoid(scale - class_logits[..., -1:])  # (B, Q, 1)
    if branch == "image":
        return ceiling[..., 0]
    by_segment = class_logits.softmax(-1)
    return fuse(by_segment, ceiling.expand_as(by_segment), seen, exponent)[..., :-1].amax(-1)


def left_out(bounds: Tensor, limit: float) -> Tensor:
    """(B, Q) bool: the queries of each image with the smallest bounds (B, Q), as many as have a sum
    of at most `limit` [ours]."""
    ordered, index = bounds.sort(1)
    within = ordered.cumsum(1) <= limit
    return torch.zeros_like(within).scatter(1, index, within)


def distribution(scores: Tensor, seen: Tensor, offset: float) -> Tensor:
    """(..., K+1) scores -> probabilities: the classes share what no_object leaves [ours].

    The fusion's scores of seen classes are at most (number of seen classes)^(lambda-1), too low for
    the thresholds of panoptic inference and against no_object; FC-CLIP (Yu et al., NeurIPS 2023)
    also scales the classes. Their order stays. `offset` is then taken off the seen ones.
    """
    classes, no_object = scores[..., :-1], scores[..., -1:]
    total = classes.sum(-1, keepdim=True).clamp(min=torch.finfo(classes.dtype).tiny)
    shared = classes / total * (1 - no_object) - offset * seen
    return torch.cat((shared.clamp(min=0), no_object), -1)
