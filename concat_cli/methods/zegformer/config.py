"""ZegFormer's own section of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from concat_cli.core.config import Below1, Share

# The 32 that say what CLIP's image encoder is shown of a segment [Ding et al., CVPR 2022].
MASKED_PROMPTS = (
    "a bad photo of the {}.",
    "a photo of the large {}.",
    "a photo of the small {}.",
    "a cropped photo of a {}.",
    "This is a photo of a {}",
    "This is a photo of a small {}",
    "This is a photo of a medium {}",
    "This is a photo of a large {}",
    "This is a masked photo of a {}",
    "This is a masked photo of a small {}",
    "This is a masked photo of a medium {}",
    "This is a masked photo of a large {}",
    "This is a cropped photo of a {}",
    "This is a cropped photo of a small {}",
    "This is a cropped photo of a medium {}",
    "This is a cropped photo of a large {}",
    "A photo of a {} in the scene",
    "a bad photo of the {} in the scene",
    "a photo of the large {} in the scene",
    "a photo of the small {} in the scene",
    "a cropped photo of a {} in the scene",
    "a photo of a masked {} in the scene",
    "There is a {} in the scene",
    "There is the {} in the scene",
    "This is a {} in the scene",
    "This is the {} in the scene",
    "This is one {} in the scene",
    "There is a masked {} in the scene",
    "There is the masked {} in the scene",
    "This is a masked {} in the scene",
    "This is the masked {} in the scene",
    "This is one masked {} in the scene",
)


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
