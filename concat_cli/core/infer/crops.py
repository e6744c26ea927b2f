"""Segments as CLIP's image encoder is shown them: cut out, one view for each.

Unlike the teacher's crops (`clip/tokens.py`) these are tight boxes, so that shapes are distorted.
All of this follows Ding et al., CVPR 2022.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import (  # pyright: ignore[reportMissingTypeStubs]
    roi_align,  # pyright: ignore[reportUnknownVariableType]
)

from concat_cli.core.clip.encoder import Clip
from concat_cli.core.clip.tokens import extent
from concat_cli.core.infer.postprocess import MASK_STRIDE, Size

Crop = Literal["crop", "mask", "cropmask"]
AT_MOST = 128  # segments encoded at a time
_PIXELS = 1 << 22  # masked pixels in memory at a time, at least of one segment


def peaks(mask_logits: Tensor, valid: Sequence[Size]) -> Tensor:
    """(B, Q): the masks of the pictures, `valid` parts of the padded input, rise no higher.

    mask_logits (B, Q, h, w) at stride 4; resizing them bilinearly never exceeds these values.
    """
    highest = [
        masks[:, : -(-height // MASK_STRIDE) + 1, : -(-width // MASK_STRIDE) + 1].amax((1, 2))
        for masks, (height, width) in zip(mask_logits, valid, strict=True)
    ]
    return torch.stack(highest)


def encode_alike(
    clip: Clip,
    images: Tensor,
    mask_logits: Tensor,
    valid: Sequence[Size],
    select: Tensor,
    crop: Crop,
) -> Tensor:
    """As `encode_segments`, with one view for all the empty masks of an image, who share it."""
    if not len(select):
        return torch.zeros(0, clip.embed_dim, device=clip.device)
    highest = peaks(mask_logits, valid)[select[:, 0], select[:, 1]]
    shared = torch.where(highest > 0, select[:, 1], -1)  # no logit above 0: surely empty
    shown = cast(Any, torch.stack((select[:, 0], shared), 1))
    views, which = shown.unique(dim=0, return_inverse=True)
    position = torch.arange(len(select), device=select.device)
    first = torch.full_like(views[:, 0], len(select)).scatter_reduce(0, which, position, "amin")
    return encode_segments(clip, images, mask_logits, valid, select[first], crop)[which]


@torch.no_grad()
def encode_segments(
    clip: Clip,
    images: Tensor,
    mask_logits: Tensor,
    valid: Sequence[Size],
    select: Tensor,
    crop: Crop,
    at_most: int = AT_MOST,
) -> Tensor:
    """CLS tokens (M, E) of segments, `at_most` of them encoded at a time, over all images.

    Args:
        images: (B, 3, H, W) uint8, padded at the right and below.
        mask_logits: (B, Q, h, w) at stride 4 of the images.
        valid: height and width of each image without its padding.
        select: (M, 2) int64, image and query of each segment.
        crop: see `segment_images`.
    """
    normalised = clip.normalise(images.float() / 255)
    limits = torch.tensor(valid, device=images.device).view(-1, 2)  # (B, 2)
    step = max(1, _PIXELS // (images.shape[-2] * images.shape[-1]))
    tokens: list[Tensor] = []
    for part in torch.split(select, at_most):
        crops: list[Tensor] = []
        for image, query in (torch.unbind(piece, 1) for piece in torch.split(part, step)):
            logits, inner = mask_logits[image, query], limits[image]
            masks = binary_masks(logits, (images.shape[-2], images.shape[-1]), inner)
            crops.append(segment_images(normalised, image, masks, inner, clip.image_size, crop))
        tokens.append(clip.encode_normalised(torch.cat(crops)))
    return torch.cat(tokens)


def binary_masks(mask_logits: Tensor, size: Size, valid: Tensor) -> Tensor:
    """(M, h, w) logits -> (M, H, W) bool: where, resized bilinearly, their probability is above 0.5
    and the picture is: valid (M, 2) holds height and width without padding."""
    logits = F.interpolate(mask_logits[None], size, mode="bilinear", align_corners=False)[0]
    rows = torch.arange(size[0], device=valid.device) < valid[:, :1]  # (M, H)
    columns = torch.arange(size[1], device=valid.device) < valid[:, 1:]  # (M, W)
    return (logits > 0) & rows[:, :, None] & columns[:, None]


def segment_images(
    images: Tensor, index: Tensor, masks: Tensor, valid: Tensor, size: int, crop: Crop
) -> Tensor:
    """(M, 3, size, size): "crop" is the box of the mask, "mask" the whole picture with the mean
    colour outside of the mask, "cropmask" the box of that.

    images (B, 3, H, W) normalised, so that the mean colour is 0; index (M,): whose the masks
    (M, H, W) and the valid sizes (M, 2) are. The box of an empty mask is the whole picture.
    """
    whole = F.pad(valid.flip(1).to(images.dtype), (2, 0))  # (M, 4): 0, 0, width, height
    boxes = whole if crop == "mask" else tight_boxes(masks, whole)
    if crop != "crop":
        images = images[index] * masks[:, None]
        index = torch.arange(len(masks), device=masks.device)
    regions = torch.cat((index[:, None].to(boxes.dtype), boxes), 1)
    return roi_align(images, regions, size, sampling_ratio=-1, aligned=True)


def tight_boxes(masks: Tensor, otherwise: Tensor) -> Tensor:
    """(M, H, W) bool -> (M, 4) float x0 y0 x1 y1 in pixel edges; of empty masks `otherwise`."""
    x0, x1 = extent(masks.any(1))
    y0, y1 = extent(masks.any(2))
    boxes = torch.stack((x0, y0, x1, y1), 1).to(otherwise.dtype)
    return torch.where(masks.flatten(1).any(1, keepdim=True), boxes, otherwise)
