"""From queries to instances that may overlap, each with a score, as run-length masks.

The algorithm is Mask2Former's instance inference (Cheng et al., CVPR 2022): the best pairs of query
and class, whose score is that of the class times the mean probability inside the mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from pycocotools import mask as coco_mask
from torch import Tensor

from concat_cli.core.infer.postprocess import BUDGET, MASK_STRIDE, Size, resized_strips

TOP = 100  # pairs of query and class that are looked at, things or not [Mask2Former]
Rle = dict[str, Any]  # COCO's compressed run lengths: size [H, W], counts (bytes)


@dataclass(frozen=True)
class Instance:
    """One instance; its mask holds `area` pixels."""

    class_index: int
    score: float
    area: int
    rle: Rle


def instances(
    probabilities: Tensor,
    mask_logits: Tensor,
    sizes: Sequence[Size],
    is_thing: Tensor,
    valid: Sequence[Size] | None = None,
) -> list[list[Instance]]:
    """The instances of things in B images, those without a pixel left out.

    Arguments as in `postprocess.panoptic`.
    """
    probabilities = probabilities[..., :-1]
    classes = probabilities.shape[-1]
    flat = probabilities.flatten(1)  # (B, Q * K)
    scores, pairs = flat.topk(min(TOP, flat.shape[1]), dim=1)
    whole = (MASK_STRIDE * mask_logits.shape[-2], MASK_STRIDE * mask_logits.shape[-1])
    found: list[list[Instance]] = []
    for row, size in enumerate(sizes):
        labels = pairs[row] % classes
        thing = is_thing.to(labels.device)[labels]
        queries, which = cast(
            "tuple[Tensor, Tensor]", (pairs[row] // classes)[thing].unique(return_inverse=True)
        )
        inner = whole if valid is None else valid[row]
        masks = list(_masks(mask_logits[row, queries].float(), size, inner))
        kept = (
            cast("list[int]", labels[thing].tolist()),
            cast("list[float]", scores[row][thing].tolist()),
        )
        own = [masks[n] for n in cast("list[int]", which.tolist())]
        found.append(
            [
                Instance(label, score * mean, area, rle)
                for label, score, (rle, mean, area) in zip(*kept, own, strict=True)
                if area
            ]
        )
    return found


def _masks(mask_logits: Tensor, size: Size, valid: Size) -> Iterator[tuple[Rle, float, int]]:
    """Of each of n queries the mask, the mean probability inside it, and its pixels."""
    step = max(1, BUDGET // (size[0] * size[1]))
    for start in range(0, len(mask_logits), step):
        strips = list(resized_strips(mask_logits[None, start : start + step], size, valid))
        inside = torch.cat([strip[0] > 0 for strip in strips], 1)  # (n, H, W)
        inner = sum(((s[0].sigmoid() * (s[0] > 0)).sum((1, 2)) for s in strips), torch.zeros(()))
        area = inside.sum((1, 2))
        columns: Any = (inner / area.clamp(min=1), area)
        means, areas = (column.tolist() for column in columns)
        yield from zip(encoded(inside.cpu().numpy()), means, areas, strict=True)


def bounding_box(rle: Any) -> list[float]:
    """x, y, width, height of a mask in pixels."""
    return coco_mask.toBbox(rle).tolist()


def encoded(masks: NDArray[np.bool_]) -> list[Rle]:
    """Run lengths of (n, H, W) masks."""
    columns = np.ascontiguousarray(masks.transpose(0, 2, 1), np.uint8)  # (n, W, H)
    if not len(masks):
        return []
    return cast("list[Rle]", coco_mask.encode(np.transpose(columns, (2, 1, 0))))
