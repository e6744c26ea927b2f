"""A picture in, a panoptic prediction out."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from concat_cli.core.checkpoint import Weights
from concat_cli.core.config import InferConfig
from concat_cli.core.data.image_io import read_image
from concat_cli.core.data.transforms import resize_short
from concat_cli.core.infer.postprocess import (
    PanopticResult,
    Segment,
    Size,
    calibrated,
    panoptic,
    semantic,
)
from concat_cli.core.infer.restore import restore
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.vocabulary import Vocabulary

Picture = np.ndarray | Path | str | Image.Image
DIVISOR = 32  # the segmentor's coarsest stride


@dataclass(frozen=True)
class Prediction:
    """What was found in one picture.

    panoptic_map (H, W) int32: 0 = nothing, else a segment's id. milliseconds: load, model, post.
    """

    panoptic_map: NDArray[np.int32]
    segments: tuple[Segment, ...]
    vocabulary: Vocabulary
    milliseconds: dict[str, float]
    _semantic: Callable[[], NDArray[np.int32]] = field(repr=False, compare=False)

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
class RawOutput:
    """The final layer's output for some of the pictures given, which share one padded size.

    positions: which pictures; class_logits (B, Q, K+1); mask_logits (B, Q, h, w) at stride 4;
    sizes: of the pictures; valid: their parts of the padded input; milliseconds per picture.
    """

    positions: list[int]
    class_logits: Tensor
    mask_logits: Tensor
    sizes: list[Size]
    valid: list[Size]
    milliseconds: float


class Predictor:
    """A segmentor with the vocabulary it names segments by.

    Args:
        segmentor: in evaluation mode.
        text: (K, E) normalised text embeddings of the vocabulary.
        vocabulary: K classes; their `seen` says which logits `cfg.seen_offset` is taken off.
        dtype: of autocast in the model; None: fp32.
        meta: what the weights file says about itself.
    """

    def __init__(
        self,
        segmentor: Segmentor,
        text: Tensor,
        vocabulary: Vocabulary,
        cfg: InferConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        assert len(text) == len(vocabulary), (len(text), len(vocabulary))
        self.device = torch.device(device)
        self.segmentor = segmentor.to(self.device)
        self.text = text.to(self.device)
        self.vocabulary, self.cfg, self.dtype = vocabulary, cfg, dtype
        self.meta = meta or {}
        self.is_thing = torch.tensor(vocabulary.is_thing, device=self.device)
        self.is_seen = torch.tensor(vocabulary.is_seen, device=self.device)

    @classmethod
    def load(
        cls,
        weights: Weights | Path | str | None = None,
        vocabulary: Vocabulary | Path | str | None = None,
        device: torch.device | str = "auto",
        *,
        infer: InferConfig | None = None,
        precision: str = "auto",
        force: bool = False,
        cache_dir: Path | None = None,
        progress: Progress = SILENT,
    ) -> Predictor:
        """From weights (a file; None: the built-in ones) and a vocabulary (a file; None: the
        classes of the data set that the weights were trained on).

        Args:
            infer: thresholds and sizes; None: those of the weights' configuration.
            precision: auto (fp32 on the CPU, the best the GPU has otherwise), fp32, bf16 or fp16.
            force: allow names with words that the built-in CLIP never saw.
            cache_dir: where text embeddings are kept between runs.
        """
        found = restore(
            weights,
            vocabulary,
            device,
            infer=infer,
            precision=precision,
            force=force,
            cache_dir=cache_dir,
            progress=progress,
        )
        return cls(
            found.segmentor,
            found.text,
            found.vocabulary,
            found.infer,
            found.device,
            found.dtype,
            found.weights.meta,
        )

    def __call__(self, picture: Picture) -> Prediction:
        """Predicts one picture: an (H, W, 3) uint8 RGB array, a path, or a PIL image."""
        return self.predict_batch([picture])[0]

    def predict_batch(self, pictures: Sequence[Picture]) -> list[Prediction]:
        """Predictions in the order of the pictures; those of like size run together."""
        start = time.perf_counter()
        images = [to_array(picture) for picture in pictures]
        load = (time.perf_counter() - start) * 1000 / max(1, len(images))
        found: dict[int, Prediction] = {}
        for raw in self.raw(images):
            start = time.perf_counter()
            results = self.panoptic(raw)
            post = (time.perf_counter() - start) * 1000 / len(results)
            times = {"load": load, "model": raw.milliseconds, "post": post}
            for row, (position, result) in enumerate(zip(raw.positions, results, strict=True)):
                found[position] = Prediction(
                    result.panoptic_map,
                    result.segments,
                    self.vocabulary,
                    {name: round(value, 2) for name, value in times.items()},
                    self._later(raw, row),
                )
        return [found[position] for position in range(len(images))]

    @torch.inference_mode()
    def raw(self, images: Sequence[np.ndarray]) -> Iterator[RawOutput]:
        """Runs the segmentor on (H, W, 3) uint8 images, in batches of one padded size."""
        resized = [resize_short(image, self.cfg.size, self.cfg.max_size) for image in images]
        groups: dict[Size, list[int]] = defaultdict(list)
        for position, image in enumerate(resized):
            height, width = image.shape[:2]
            groups[-(-height // DIVISOR) * DIVISOR, -(-width // DIVISOR) * DIVISOR].append(position)
        for padded, members in groups.items():
            for first in range(0, len(members), self.cfg.batch):
                positions = members[first : first + self.cfg.batch]
                start = time.perf_counter()
                class_logits, mask_logits = self._run([resized[p] for p in positions], padded)
                elapsed = (time.perf_counter() - start) * 1000 / len(positions)
                sizes = [(images[p].shape[0], images[p].shape[1]) for p in positions]
                valid = [(resized[p].shape[0], resized[p].shape[1]) for p in positions]
                yield RawOutput(positions, class_logits, mask_logits, sizes, valid, elapsed)

    @torch.inference_mode()
    def panoptic(self, raw: RawOutput) -> list[PanopticResult]:
        """Panoptic maps of raw outputs, in the order of `raw.positions`."""
        return panoptic(
            raw.class_logits, raw.mask_logits, raw.sizes, self.is_thing, self.cfg, self.is_seen,
            raw.valid,
        )  # fmt: skip

    @torch.inference_mode()
    def semantic(self, raw: RawOutput) -> list[NDArray[np.int32]]:
        """(H, W) class indices of raw outputs, in the order of `raw.positions`."""
        return semantic(
            raw.class_logits, raw.mask_logits, raw.sizes, self.cfg, self.is_seen, raw.valid
        )

    def offset_logits(self, class_logits: Tensor) -> Tensor:
        """Class logits (..., K+1) as they compete, with the seen offset taken off."""
        return calibrated(class_logits, self.is_seen, self.cfg.seen_offset)

    def _run(self, images: list[np.ndarray], padded: Size) -> tuple[Tensor, Tensor]:
        """Final class_logits (B, Q, K+1) and mask_logits (B, Q, h, w), fp32."""
        batch = torch.zeros(len(images), 3, *padded, dtype=torch.uint8)
        padding = torch.ones(len(images), *padded, dtype=torch.bool)
        for row, image in enumerate(images):
            height, width = image.shape[:2]
            batch[row, :, :height, :width] = torch.tensor(image).permute(2, 0, 1)
            padding[row, :height, :width] = False
        pads = padding.to(self.device) if bool(padding.any()) else None
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            output = self.segmentor(batch.to(self.device), pads, self.text, last_only=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # or the time would be booked on the next step
        return output.class_logits[-1].float(), output.mask_logits[-1].float()

    def _later(self, raw: RawOutput, row: int) -> Callable[[], NDArray[np.int32]]:
        one = RawOutput(
            [raw.positions[row]],
            raw.class_logits[row : row + 1].clone(),  # do not keep the whole batch alive
            raw.mask_logits[row : row + 1].clone(),
            [raw.sizes[row]],
            [raw.valid[row]],
            raw.milliseconds,
        )
        return lambda: self.semantic(one)[0]


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
