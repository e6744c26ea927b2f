"""Semantic maps of a dense model: each pixel is named by its cosine to the text embeddings.

The classes are gone through in chunks with a running maximum, so that memory does not grow with
their number. CLIP's image encoder takes no part.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NoReturn

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from concat_cli.core.errors import UserError
from concat_cli.core.infer.postprocess import (
    PanopticResult,
    Size,
    index_type,
    regions,
    resized_strips,
)
from concat_cli.core.infer.predictor import Loading, Predictor, Raw

CHUNK = 32  # classes whose logits are held at a time


@dataclass(frozen=True)
class DenseRaw(Raw):
    """Of a dense model: normalised features (B, E, h, w) at stride 4."""

    features: Tensor


class DensePredictor(Predictor):
    """A dense student (`student.py`); arguments as of `Predictor`.

    The model maps images and padding to features (B, E, h, w) at stride 4 and has a `scale`.
    """

    tasks = ("semantic",)
    semantic_from = "pixels"
    chunk = CHUNK

    @property
    def offset_scale(self) -> float:
        """What offsets are measured against: the scale of the class logits."""
        scale = self.model.scale
        assert isinstance(scale, Tensor)
        return scale.item()

    @torch.inference_mode()
    def semantic(self, raw: Raw, offset: float | None = None) -> list[NDArray[np.int32]]:
        """(H, W) class indices of raw outputs, in the order of `raw.positions`."""
        return [labels.int().cpu().numpy() for labels, _ in self._classified(raw, offset, False)]

    @torch.inference_mode()
    def segments(self, raw: Raw) -> list[PanopticResult]:
        """Everything of one class is one segment; its score is the mean probability."""
        found: list[PanopticResult] = []
        for labels, sure in self._classified(raw, None, True):
            assert sure is not None
            found.append(regions(labels.cpu().numpy(), sure.cpu().numpy()))
        return found

    def _classified(
        self, raw: Raw, offset: float | None, with_confidence: bool
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        """Labels (H, W) and the probability of each pixel's label, picture by picture."""
        assert isinstance(raw, DenseRaw)
        taken = self.is_seen * (self.cfg.seen_offset if offset is None else offset)
        for row, size in enumerate(raw.sizes):
            yield classify_pixels(
                raw.features[row],
                self.text,
                self.offset_scale,
                taken.float(),
                size,
                raw.valid[row],
                self.chunk,
                with_confidence,
            )

    def _named(self, raw: Raw, offset: float | None) -> NoReturn:
        """UserError for panoptic segments and instances."""
        raise UserError(
            "These weights name every pixel and tell no segments of a class apart.",
            "Score them with --tasks semantic, or give weights of a method that finds segments.",
        )

    def _run(self, images: Tensor, padding: Tensor | None, valid: list[Size]) -> DenseRaw:
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            features = self.model(images, padding)
        return DenseRaw([], [], valid, 0.0, F.normalize(features.float(), dim=1))


def classify_pixels(
    features: Tensor,
    text: Tensor,
    scale: float,
    taken_off: Tensor,
    size: Size,
    valid: Size,
    chunk: int = CHUNK,
    with_confidence: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """Class index (H, W) of every pixel of a photo, in the type of `index_type`, and, if asked for,
    its probability.

    Args:
        features: (E, h, w), normalised, at stride 4 of the padded input.
        text: (K, E), normalised.
        taken_off: (K,), subtracted from the logits scale * cosine.
        size: of the photo; valid: its part of the padded input.
        chunk: classes at a time; the result does not depend on it.
    """
    best = torch.full(size, -torch.inf, device=features.device)
    kind = index_type(len(text))
    labels = torch.zeros(size, dtype=kind, device=features.device)
    total = torch.full(size, -torch.inf, device=features.device) if with_confidence else None
    for first in range(0, len(text), chunk):
        part = text[first : first + chunk]
        minus = taken_off[first : first + chunk, None, None]
        logits = scale * torch.einsum("ke,ehw->khw", part, features) - minus
        top = 0
        for (strip,) in resized_strips(logits[None], size, valid, 32 * len(part)):  # (k, rows, W)
            rows = slice(top, top + strip.shape[1])
            value, index = strip.max(0)
            higher = value > best[rows]
            best[rows] = torch.where(higher, value, best[rows])
            labels[rows] = torch.where(higher, index.to(kind) + first, labels[rows])
            if total is not None:
                total[rows] = torch.logaddexp(total[rows], strip.logsumexp(0))
            top = rows.stop
    return labels, None if total is None else best.sub_(total).exp_()


def open_predictor(loading: Loading) -> DensePredictor:
    """The predictor of a weights file of stage `clip_zss`."""
    return loading.open(DensePredictor)
