"""What goes into a predictor and what comes out of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from concat_cli.core.data.image_io import read_image
from concat_cli.core.infer.postprocess import Segment, Size
from concat_cli.core.vocabulary import Vocabulary

Picture = np.ndarray | Path | str | Image.Image


@dataclass(frozen=True)
class Prediction:
    """What was found in one picture.

    panoptic_map (H, W) int32: 0 = nothing, else a segment's id. milliseconds: load, model, post.
    is_panoptic: False where the model tells no segments apart: then a segment is all that is of one
    class.
    """

    panoptic_map: NDArray[np.int32]
    segments: tuple[Segment, ...]
    vocabulary: Vocabulary
    milliseconds: dict[str, float]
    _semantic: Callable[[], NDArray[np.int32]] = field(repr=False, compare=False)
    is_panoptic: bool = True

    @cached_property
    def semantic_map(self) -> NDArray[np.int32]:
        """(H, W) class index of every pixel, made when first asked for."""
        return self._semantic()

    def name(self, segment: Segment) -> str:
        """The class name of a segment."""
        return self.vocabulary.names[segment.class_index]

    @property
    def names(self) -> tuple[str, ...]:
        """The class name of each segment."""
        return tuple(self.name(segment) for segment in self.segments)


@dataclass(frozen=True)
class Raw:
    """The model's output for some of the pictures given, which share one padded size.

    positions: which pictures; sizes: of the pictures; valid: their parts of the padded input;
    milliseconds per picture.
    """

    positions: list[int]
    sizes: list[Size]
    valid: list[Size]
    milliseconds: float


@dataclass(frozen=True)
class RawOutput(Raw):
    """Of a model with queries: its final layer.

    class_logits (B, Q, K+1); mask_logits (B, Q, h, w) at stride 4; image_logits (B, Q, K): what
    CLIP's image encoder says of the segments, where it was asked; else None.
    """

    class_logits: Tensor
    mask_logits: Tensor
    image_logits: Tensor | None = None


@dataclass(frozen=True)
class DenseRaw(Raw):
    """Of a dense model: normalised features (B, E, h, w) at stride 4."""

    features: Tensor


def to_array(picture: Picture) -> np.ndarray:
    """(H, W, 3) uint8 RGB of a path, a PIL image or an array; UserError for unreadable files."""
    if isinstance(picture, Image.Image):
        return np.array(picture.convert("RGB"))
    if isinstance(picture, (str, Path)):
        return read_image(Path(picture))
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3, (
        "an image array is (H, W, 3) uint8 RGB"
    )
    return picture
