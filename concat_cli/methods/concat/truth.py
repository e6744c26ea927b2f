"""Losses on features pooled under true masks, which need no queries [ours]."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from concat_cli.core.config import AlignConfig
from concat_cli.core.losses.alignment import Negatives, info_nce
from concat_cli.core.model.pixel_decoder import PixelFeatures
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.train.distributed import gather_rows, mean_over_processes, process_rank
from concat_cli.core.train.teacher import SegmentTokens

STRIDE = 4  # at which true masks are averaged


def truth_losses(
    segmentor: Segmentor,
    maps: tuple[list[Tensor], PixelFeatures],
    text: Tensor,
    labels: Tensor,
    masks: Tensor,
    padding: Tensor | None,
    target: SegmentTokens | None,
    align: AlignConfig,
) -> dict[str, Tensor]:
    """Cross-entropy of true segments over the trained classes, and their weighted alignment.

    Args:
        maps: backbone and pixel features. text: (K, E).
        labels: (B, N) among the trained classes, -1 for none; masks: (B, N, H, W) bool.
        target: CLS tokens of segments; None: no alignment.
    """
    valid = labels >= 0
    vision = segmentor.mask_queries(*maps, F.avg_pool2d(masks.float(), STRIDE), padding)
    semantic, logits = segmentor.classify(vision, text)
    count = mean_over_processes(valid.sum().float()).clamp(min=1)
    each = F.cross_entropy(logits[..., :-1][valid].float(), labels[valid], reduction="sum")
    losses = {"truth_class": each / count}
    if target is not None:
        if align.detach:
            semantic = segmentor.projector(vision.detach())
        groups = labels[target.image, target.segment].masked_fill(~target.valid, -1)
        every = Negatives(*(gather_rows(x) for x in (target.tokens, groups, target.valid)))
        losses["truth_align"] = align.instance * info_nce(
            semantic[target.image, target.segment],
            target.tokens,
            target.valid,
            align.temperature,
            groups,
            every.without_rows(process_rank() * len(groups), len(groups)),
            mean_over_processes(target.valid.sum().float()),
        )
    return losses
