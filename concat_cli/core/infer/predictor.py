"""A picture in, a panoptic prediction out."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from concat_cli.core.checkpoint import Weights
from concat_cli.core.config import Config, InferConfig, ZegFormerConfig
from concat_cli.core.data.transforms import resize_short
from concat_cli.core.infer.instances import Instance, instances
from concat_cli.core.infer.outputs import Picture, Prediction, Raw, RawOutput, to_array
from concat_cli.core.infer.postprocess import PanopticResult, Size, calibrated, panoptic, semantic
from concat_cli.core.method import TASKS
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.vocabulary import Vocabulary

DIVISOR = 32  # the coarsest stride of a model


class Predictor:
    """A segmentor with the vocabulary it names segments by.

    Predictors of other kinds of models (`zegformer.py`, `dense.py`) change what `_run` gives and
    what is made of it.

    Args:
        model: a segmentor in evaluation mode.
        text: (K, E) normalised text embeddings of the vocabulary.
        vocabulary: K classes; their `seen` says which logits `cfg.seen_offset` is taken off.
        dtype: of autocast in the model; None: fp32.
        meta: what the weights file says about itself.
    """

    tasks: tuple[str, ...] = TASKS  # that it can be scored for
    needs_clip_image = False  # whether CLIP's image encoder runs at test
    semantic_from = "queries"

    def __init__(
        self,
        model: nn.Module,
        text: Tensor,
        vocabulary: Vocabulary,
        cfg: InferConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        assert len(text) == len(vocabulary), (len(text), len(vocabulary))
        self.device = torch.device(device)
        self.model = model.to(self.device)
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
        overrides: Config | None = None,
        infer: InferConfig | None = None,
        zegformer: ZegFormerConfig | None = None,
        precision: str = "auto",
        force: bool = False,
        cache_dir: Path | None = None,
        progress: Progress = SILENT,
    ) -> Predictor:
        """From weights of any kind (a file; None: the built-in ones) and a vocabulary (a file;
        None: the classes of the data set that the weights were trained on).

        Args:
            infer: thresholds and sizes; None: those of the weights' configuration.
            zegformer: the branch of a ZegFormer; None: that of the weights' configuration.
            precision: auto (fp32 on the CPU, the best the GPU has otherwise), fp32, bf16 or fp16.
            force: allow names with words that the built-in CLIP never saw.
            cache_dir: where text embeddings are kept between runs.
        """
        from concat_cli.core.infer.load import load_predictor  # which imports every kind of them

        if overrides is not None:
            infer, zegformer = overrides.infer, overrides.own(ZegFormerConfig)
        return load_predictor(
            weights,
            vocabulary,
            device,
            infer=infer,
            zegformer=zegformer,
            precision=precision,
            force=force,
            cache_dir=cache_dir,
            progress=progress,
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
            results = self.segments(raw)
            post = (time.perf_counter() - start) * 1000 / len(results)
            times = {"load": load, "model": raw.milliseconds, "post": post}
            for row, (position, result) in enumerate(zip(raw.positions, results, strict=True)):
                found[position] = Prediction(
                    result.panoptic_map,
                    result.segments,
                    self.vocabulary,
                    {name: round(value, 2) for name, value in times.items()},
                    self._later(raw, row),
                    "panoptic" in self.tasks,
                )
        return [found[position] for position in range(len(images))]

    @torch.inference_mode()
    def raw(self, images: Sequence[np.ndarray]) -> Iterator[Raw]:
        """Runs the model on (H, W, 3) uint8 images, in batches of one padded size."""
        resized = [resize_short(image, self.cfg.size, self.cfg.max_size) for image in images]
        groups: dict[Size, list[int]] = defaultdict(list)
        for position, image in enumerate(resized):
            height, width = image.shape[:2]
            groups[-(-height // DIVISOR) * DIVISOR, -(-width // DIVISOR) * DIVISOR].append(position)
        for padded, members in groups.items():
            for first in range(0, len(members), self.cfg.batch):
                positions = members[first : first + self.cfg.batch]
                start = time.perf_counter()
                sizes = [(images[p].shape[0], images[p].shape[1]) for p in positions]
                valid = [(resized[p].shape[0], resized[p].shape[1]) for p in positions]
                raw = self._run(*self._batch([resized[p] for p in positions], padded), valid)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)  # or the next step would be booked for it
                elapsed = (time.perf_counter() - start) * 1000 / len(positions)
                yield replace(
                    raw, positions=positions, sizes=sizes, valid=valid, milliseconds=elapsed
                )

    def segments(self, raw: Raw) -> list[PanopticResult]:
        """What `Prediction` holds of raw outputs, in the order of `raw.positions`."""
        return self.panoptic(raw)

    @torch.inference_mode()
    def panoptic(self, raw: Raw, offset: float | None = None) -> list[PanopticResult]:
        """Panoptic maps; `offset` on the seen logits, by default that of the configuration."""
        raw, probabilities = self._named(raw, offset)
        return panoptic(
            probabilities, raw.mask_logits, raw.sizes, self.is_thing, self.cfg, raw.valid
        )

    @torch.inference_mode()
    def semantic(self, raw: Raw, offset: float | None = None) -> list[NDArray[np.int32]]:
        """(H, W) class indices of raw outputs, in the order of `raw.positions`."""
        raw, probabilities = self._named(raw, offset)
        return semantic(probabilities, raw.mask_logits, raw.sizes, raw.valid)

    @torch.inference_mode()
    def instances(self, raw: Raw, offset: float | None = None) -> list[list[Instance]]:
        """Instances of things, which may overlap, in the order of `raw.positions`."""
        raw, probabilities = self._named(raw, offset)
        return instances(probabilities, raw.mask_logits, raw.sizes, self.is_thing, raw.valid)

    @property
    def offset_scale(self) -> float:
        """What offsets are measured against: the scale of the class logits."""
        scale = self.model.get_submodule("classifier").scale
        assert isinstance(scale, Tensor)
        return scale.item()

    @property
    def parameters(self) -> int:
        """How many parameters run at test; text embeddings are made before, once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def probabilities(self, raw: RawOutput, offset: float) -> Tensor:
        """(B, Q, K+1) of the classes and no_object, with `offset` taken off the seen ones."""
        return calibrated(raw.class_logits, self.is_seen, offset).softmax(-1)

    def _named(self, raw: Raw, offset: float | None) -> tuple[RawOutput, Tensor]:
        assert isinstance(raw, RawOutput)
        return raw, self.probabilities(raw, self.cfg.seen_offset if offset is None else offset)

    def _batch(self, images: list[np.ndarray], padded: Size) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, H, W) uint8 on the device, and where they are padding, if anywhere."""
        batch = torch.zeros(len(images), 3, *padded, dtype=torch.uint8)
        padding = torch.ones(len(images), *padded, dtype=torch.bool)
        for row, image in enumerate(images):
            height, width = image.shape[:2]
            batch[row, :, :height, :width] = torch.tensor(image).permute(2, 0, 1)
            padding[row, :height, :width] = False
        pads = padding.to(self.device) if bool(padding.any()) else None
        return batch.to(self.device), pads

    def _run(self, images: Tensor, padding: Tensor | None, valid: list[Size]) -> Raw:
        """The model's output for a batch; whose images they are is filled in by `raw`."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            output = self.model(images, padding, self.text, last_only=True)
        classes, masks = output.class_logits[-1].float(), output.mask_logits[-1].float()
        return RawOutput([], [], valid, 0.0, classes, masks)

    def _later(self, raw: Raw, row: int) -> Callable[[], NDArray[np.int32]]:
        one = row_of(raw, row)
        return lambda: self.semantic(one)[0]


def row_of(raw: Raw, row: int) -> Raw:
    """The output for one of the pictures; it does not keep the whole batch alive."""
    own: dict[str, Any] = {}
    for each in fields(raw):
        value = getattr(raw, each.name)
        if isinstance(value, Tensor):
            own[each.name] = value[row : row + 1].clone()
        elif isinstance(value, list):
            own[each.name] = [value[row]]
    return replace(raw, **own)
