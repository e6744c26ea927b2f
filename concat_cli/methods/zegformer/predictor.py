"""ZegFormer at test: segments are named by the segment branch, by CLIP's image encoder, or by both.

The image encoder is the cost of ZegFormer. It is spared the queries that cannot matter, is shown
the empty masks of an image once, and takes the segments of all images of a batch together
(`infer/crops.py`).

How its opinion and that of the segment branch become one is plain arithmetic on scores (B, Q, K+1)
whose last column is no_object. The segment branch gives class logits (B, Q, K+1), the image branch
image logits (B, Q, K), -inf where a query was not sent to CLIP, which then says that it is of no
class. All of this follows ZegFormer where nothing else is said.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from concat_cli.core.clip.encoder import Clip
from concat_cli.core.infer.crops import encode_alike, peaks
from concat_cli.core.infer.postprocess import (
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
