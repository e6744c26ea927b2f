"""ZegFormer's own section of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from concat_cli.core.config import Below1, Share


@dataclass(frozen=True)
class ZegFormerConfig:
    """ZegFormer; its loss weights are those of `loss` (classes, mask, dice, no_object).

    A maskformer takes of `model` the backbone, width, mask_width, heads, decoder_*, queries,
    projector_* and the scale of the logits; `loss.mask` is then the weight of focal losses.
    """

    segmentor: Literal["maskformer", "mask2former"] = "maskformer"  # the latter: as CON's [ours]
    targets: Literal["category", "segment"] = "category"  # a mask per class present [code], or each
    raw_no_object: bool = True  # no_object logit: raw dot product [code], or cosine [paper]
    branch: Literal["segment", "image", "fusion"] = "fusion"  # what names the segments at test
    exponent: Share = 2 / 3  # lambda of the fusion [paper]
    crop: Literal["crop", "mask", "cropmask"] = "cropmask"  # what CLIP's image encoder is shown
    image_prompts: Literal["same", "masked"] = "masked"  # clip.templates, or the 32 [code]
    skip_below: Below1 = 1e-3  # not sent: queries by which CLIP changes no pixel more [ours]
