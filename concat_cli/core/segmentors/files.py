"""The files of a published segmentor: its weights, and what lies beside them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from torch import Tensor

from concat_cli.core.errors import UserError
from concat_cli.core.model.backbone import IMAGENET_MEAN, IMAGENET_STD
from concat_cli.core.segmentors import PublishedSegmentor
from concat_cli.core.segmentors.classes import own_classes
from concat_cli.core.weights_from.files import read_tensors
from concat_cli.core.weights_from.hub import beside, weights_file

Colour = tuple[float, ...]
_BYTE = 255.0
_MOST_PIXELS = 1 << 14  # of a side


@dataclass(frozen=True)
class Files:
    """A segmentor's weights and, where they lie beside them, its config and preprocessor as
    `transformers` writes them (empty otherwise)."""

    source: str
    path: Path
    config: dict[str, Any]
    preprocessor: dict[str, Any]

    @property
    def kind(self) -> str:
        """`model_type` of its config.json; empty without one."""
        return str(self.config.get("model_type", ""))

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """By name, fp32 whatever they are kept in."""
        found = read_tensors(self.path)
        return {n: t.float() if t.is_floating_point() else t for n, t in found.items()}

    @property
    def colours(self) -> tuple[Colour, Colour]:
        """Mean and deviation of the channels that it was trained with, of pixels in 0-1."""
        known = self.preprocessor
        mean, std = known.get("image_mean", IMAGENET_MEAN), known.get("image_std", IMAGENET_STD)
        if not known.get("do_normalize", True):
            mean, std = (0.0,) * 3, (1.0,) * 3
        scale = known.get("rescale_factor", 1 / _BYTE) if known.get("do_rescale", True) else 1.0
        try:  # (x * 255 * factor - mean) / std, of x in 0-1
            factor = _BYTE * float(scale)
            colours = _three(mean, factor), _three(std, factor)
            if not all(0 < abs(value) < 1e6 for value in colours[1]) or not all(
                abs(value) < 1e6 for value in colours[0]
            ):
                raise ValueError("beyond all colours")
        except (TypeError, ValueError, ArithmeticError) as error:
            raise UserError(
                f"preprocessor_config.json beside {self.path} has no sound mean and deviation: "
                f"image_mean {mean!r:.80}, image_std {std!r:.80}, rescale_factor {scale!r:.80}.",
                "They are three numbers each, of red, green and blue, and one.",
            ) from error
        return colours

    @property
    def sizes(self) -> tuple[int, int]:
        """Short side, and the most of the long one, that it is tested with."""
        if self.kind == "eomt":  # its positions are of one square
            side = self._side("image_size", self.config.get("image_size", 640))
            return side, side
        told = self.preprocessor.get("size")
        size = cast("dict[str, Any]", told) if isinstance(told, dict) else {"shortest_edge": told}
        short = size.get("shortest_edge") or size.get("height") or PublishedSegmentor.size
        long = size.get("longest_edge") or size.get("width") or self.preprocessor.get("max_size")
        shorter = self._side("size", short)
        return shorter, max(shorter, self._side("size", long or PublishedSegmentor.max_size))

    def _side(self, key: str, value: Any) -> int:
        """A side of pictures in pixels; UserError where it can be none."""
        if type(value) is int and 0 < value <= _MOST_PIXELS:
            return value
        raise UserError(
            f"What lies beside {self.path} gives {value!r:.80} for a side of pictures ({key}).",
            f"It is a whole number of pixels, at most {_MOST_PIXELS}.",
        )

    def describe(
        self, segmentor: PublishedSegmentor, classes: int, *, own_colours: bool = False
    ) -> None:
        """Fills in what the files say of a segmentor with so many classes; own_colours: it knows by
        itself how pictures are normalised."""
        metadata = self.preprocessor.get("metadata")  # OneFormer's, and what we export
        kept = cast("dict[str, Any]", metadata) if isinstance(metadata, dict) else {}
        things = kept.get("thing_ids")
        segmentor.source, segmentor.path = self.source, self.path
        segmentor.size, segmentor.max_size = self.sizes
        labels = self.config.get("id2label")
        segmentor.vocabulary, notes = own_classes(
            cast("dict[str, str]", labels) if isinstance(labels, dict) else {},
            classes,
            _indices(things, self.path),
        )
        if not self.preprocessor and not own_colours:
            notes.append(
                "No preprocessor_config.json lies beside it: colours are normalised as ImageNet's, "
                f"sides are {segmentor.size}-{segmentor.max_size}."
            )
        segmentor.notes = tuple(notes)


def find_files(source: str) -> Files:
    """The files of `hf-hub:ORG/NAME[@REVISION]`, a folder or a file; nothing is downloaded.

    UserError where there are none.
    """
    path = weights_file(source)
    config, preprocessor = (beside(path, n) for n in ("config.json", "preprocessor_config.json"))
    return Files(source, path, config, preprocessor)


def _indices(things: Any, path: Path) -> set[int] | None:
    """The indices of the countable classes; None where none are told."""
    if not isinstance(things, list):
        return None
    listed = cast("list[Any]", things)
    if not all(type(one) is int for one in listed):
        raise UserError(
            f"preprocessor_config.json beside {path} has thing_ids that are no whole numbers.",
            "They are the indices of the classes that can be counted.",
        )
    return set(listed)


def _three(values: Any, divisor: float) -> Colour:
    red, green, blue = (float(value) / divisor for value in values)
    return red, green, blue
