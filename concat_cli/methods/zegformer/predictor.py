"""ZegFormer at test: segments are named by the segment branch, by CLIP's image encoder, or by both.

The image encoder is the cost of ZegFormer. It is spared the queries that cannot matter, is shown
the empty masks of an image once, and takes the segments of all images of a batch together. Unlike
the teacher's crops (`clip/tokens.py`), what it is shown are tight boxes, so that shapes are
distorted.

How its opinion and that of the segment branch become one is plain arithmetic on scores (B, Q, K+1)
whose last column is no_object. The segment branch gives class logits (B, Q, K+1), the image branch
image logits (B, Q, K), -inf where a query was not sent to CLIP, which then says that it is of no
class. All of this follows ZegFormer where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import (  # pyright: ignore[reportMissingTypeStubs]
    roi_align,  # pyright: ignore[reportUnknownVariableType]
)

from concat_cli.core.clip.encoder import Clip
from concat_cli.core.clip.tokens import extent
from concat_cli.core.infer.postprocess import (
    MASK_STRIDE,
    PanopticResult,
    Size,
    regions,
    semantic,
    semantic_shares,
)
from concat_cli.core.infer.predictor import Loading, Predictor, Raw, RawOutput
from concat_cli.methods.zegformer import tasks_of
from concat_cli.methods.zegformer.config import MASKED_PROMPTS, ZegFormerConfig

Branch = Literal["segment", "image", "fusion"]
Crop = Literal["crop", "mask", "cropmask"]
AT_MOST = 128  # segments encoded at a time
_PIXELS = 1 << 22  # masked pixels in memory at a time, at least of one segment


class ZegFormerPredictor(Predictor):
    """A ZegFormer; the first arguments as of `Predictor`.

    `cfg.seen_offset` is ZegFormer's gamma: it is taken off the scores of the pixels, or off the
    probabilities of the segments, not off logits.

    Args:
        way: how segments are named.
        clip, image_text: for the image branch, CLIP with its image encoder, and (K, E) normalised
            text embeddings; not needed by the segment branch alone.
    """

    def __init__(
        self,
        *common: Any,
        way: ZegFormerConfig,
        clip: Clip | None = None,
        image_text: Tensor | None = None,
    ) -> None:
        super().__init__(*common)
        self.zegformer, self.tasks = way, tasks_of(way.targets)
        self.needs_clip_image = way.branch != "segment"
        self.clip = clip
        if self.needs_clip_image:
            assert clip is not None and image_text is not None, "CLIP is needed"
            self.image_text = image_text.to(self.device)

    @property
    def parameters(self) -> int:
        """Those of CLIP's image encoder, too, where it runs."""
        own = super().parameters
        if self.clip is None or not self.needs_clip_image:
            return own
        return own + sum(parameter.numel() for parameter in self.clip.model.visual.parameters())

    @property
    def offset_scale(self) -> float:
        """Offsets are taken off probabilities."""
        return 1.0

    def scores(self, raw: RawOutput) -> Tensor:
        """(B, Q, K+1) scores of the branch, before any offset; see `class_scores`."""
        way = self.zegformer
        return class_scores(
            way.branch, raw.class_logits, raw.image_logits, self.is_seen, way.exponent
        )

    def probabilities(self, raw: RawOutput, offset: float) -> Tensor:
        """(B, Q, K+1) of the classes and no_object, with `offset` taken off the seen ones."""
        return distribution(self.scores(raw), self.is_seen, offset)

    @torch.inference_mode()
    def semantic(self, raw: Raw, offset: float | None = None) -> list[NDArray[np.int32]]:
        """(H, W) class indices; `offset` is taken off the seen classes' scores of each pixel."""
        return semantic(*self._summed(raw, offset))

    @torch.inference_mode()
    def segments(self, raw: Raw) -> list[PanopticResult]:
        """Panoptic maps; of a ZegFormer with one mask a class, everything of a class is a segment,
        and its score the mean share of its pixels' scores."""
        if "panoptic" in self.tasks:
            return self.panoptic(raw)
        return [regions(*both) for both in semantic_shares(*self._summed(raw, None))]

    def _summed(
        self, raw: Raw, offset: float | None
    ) -> tuple[Tensor, Tensor, list[Size], list[Size], Tensor]:
        """The arguments of `semantic`."""
        assert isinstance(raw, RawOutput)
        taken_off = self.is_seen * (self.cfg.seen_offset if offset is None else offset)
        return self.scores(raw), raw.mask_logits, raw.sizes, raw.valid, taken_off

    def sent(self, raw: RawOutput) -> Tensor:
        """(B, Q) bool: the queries that CLIP is asked about. The others, of all queries of an
        image, change no pixel's score by more than `skip_below` together, whatever CLIP says."""
        assert self.clip is not None
        way = self.zegformer
        highest = highest_scores(
            way.branch, raw.class_logits, self.is_seen, way.exponent, self.clip.logit_scale
        )
        return ~left_out(highest * peaks(raw.mask_logits, raw.valid).sigmoid(), way.skip_below)

    def _run(self, images: Tensor, padding: Tensor | None, valid: list[Size]) -> Raw:
        raw = super()._run(images, padding, valid)
        if self.clip is None or not self.needs_clip_image:
            return raw
        assert isinstance(raw, RawOutput)
        sent = self.sent(raw)
        tokens = encode_alike(
            self.clip, images, raw.mask_logits, valid, sent.nonzero(), self.zegformer.crop
        )
        logits = raw.class_logits.new_full((*sent.shape, len(self.image_text)), -torch.inf)
        logits[sent] = self.clip.logit_scale * (tokens @ self.image_text.T).to(logits.dtype)
        return replace(raw, image_logits=logits)


def open_predictor(loading: Loading) -> ZegFormerPredictor:
    """The predictor of a weights file of stage `zegformer`."""
    way = loading.cfg.own(ZegFormerConfig)
    if way.branch == "segment":
        return loading.open(ZegFormerPredictor, way=way)
    clip = loading.clip(image_tower=True)
    image_text = loading.text(() if way.image_prompts == "same" else MASKED_PROMPTS)
    return loading.open(ZegFormerPredictor, way=way, clip=clip, image_text=image_text)


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
