"""Views of a sample: augmentation for training, resizing for inference. Image and segments move
together; padding is added later, by `loader.collate`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from concat_cli.core.config import DataConfig
from concat_cli.core.data.dataset import Sample, keep_segments

Box = tuple[float, float, float, float]  # left, top, right, bottom in pixels
SampleOrImage = TypeVar("SampleOrImage", Sample, np.ndarray)


class Augment:
    """Random views: large-scale jitter, crop, flip, colours (Mask2Former, LSJ).

    A sample is scaled so that its long side (or its short one: `scale_side`) is `crop` times a
    random scale in `scale_min`-`scale_max`, cropped to `crop` at a random place where it is larger,
    flipped, and its colours are jittered.
    Segments without pixels in the view are dropped.
    """

    def __init__(self, data: DataConfig) -> None:
        self._crop = data.crop
        self._scales = (data.scale_min, data.scale_max)
        self._side = max if data.scale_side == "long" else min
        self._flip = data.flip
        self._colour = data.colour

    def __call__(self, sample: Sample, rng: np.random.Generator) -> Sample:
        scale, left, top, flip = rng.random(4)
        height, width = sample.segment_map.shape
        low, high = self._scales
        factor = (low + (high - low) * scale) * self._crop / self._side(height, width)
        scaled = (max(1, round(height * factor)), max(1, round(width * factor)))
        size = (min(scaled[0], self._crop), min(scaled[1], self._crop))
        y = int(top * (scaled[0] - size[0] + 1))
        x = int(left * (scaled[1] - size[1] + 1))
        fy, fx = height / scaled[0], width / scaled[1]
        box = (x * fx, y * fy, min((x + size[1]) * fx, width), min((y + size[0]) * fy, height))
        view = _view(sample, size, box)
        if flip < self._flip:
            view = flip_sample(view)
        if self._colour > 0:
            view = replace(view, image=jitter_colours(view.image, self._colour, rng))
        return view


def flip_sample(sample: Sample) -> Sample:
    """The sample mirrored left to right."""
    return replace(
        sample,
        image=np.ascontiguousarray(sample.image[:, ::-1]),
        segment_map=np.ascontiguousarray(sample.segment_map[:, ::-1]),
    )


def jitter_colours(image: np.ndarray, strength: float, rng: np.random.Generator) -> np.ndarray:
    """(H, W, 3) uint8 with brightness, contrast and saturation scaled by 1 +- `strength` each."""
    brightness, contrast, saturation = 1 + strength * (2 * rng.random(3) - 1)
    pixels: Any = image.astype(np.float32) * np.float32(brightness)
    grey = pixels @ np.array([0.299, 0.587, 0.114], dtype=np.float32)  # (H, W), ITU-R 601
    mean = grey.mean()
    pixels = grey[..., None] + np.float32(saturation) * (pixels - grey[..., None])  # (H, W, 3)
    pixels = mean + np.float32(contrast) * (pixels - mean)
    return pixels.round().clip(0, 255).astype(np.uint8)


def short_size(height: int, width: int, size: int, max_size: int) -> tuple[int, int]:
    """(height, width) with the short side at `size`, unless the long one would pass `max_size`."""
    factor = min(size / min(height, width), max_size / max(height, width))
    return max(1, round(height * factor)), max(1, round(width * factor))


def resize_short(sample: SampleOrImage, size: int, max_size: int) -> SampleOrImage:
    """A sample, or an (H, W, 3) uint8 image, scaled as `short_size` says."""
    if isinstance(sample, np.ndarray):
        height, width = sample.shape[:2]
        return _resize(sample, short_size(height, width, size, max_size), (0, 0, width, height))
    height, width = sample.segment_map.shape
    return _view(sample, short_size(height, width, size, max_size), (0, 0, width, height))


def _view(sample: Sample, size: tuple[int, int], box: Box) -> Sample:
    """The part of a sample in `box`, scaled to `size` (height, width)."""
    segment_map = _resize(sample.segment_map, size, box)
    if segment_map is sample.segment_map:
        return sample
    count = np.bincount(segment_map.ravel(), minlength=len(sample.labels) + 1)
    view = replace(sample, image=_resize(sample.image, size, box), segment_map=segment_map)
    return keep_segments(view, count[1:] > 0)


def _resize(array: np.ndarray, size: tuple[int, int], box: Box) -> np.ndarray:
    """Bilinear with antialiasing for uint8 images, nearest for int32 maps; pixel centres agree."""
    height, width = size
    left, top, right, bottom = box
    if (right - left, bottom - top) == (width, height) and left == int(left) and top == int(top):
        if array.shape[:2] == size:
            return array
        return array[int(top) : int(top) + height, int(left) : int(left) + width]
    nearest = array.ndim == 2
    method = Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR
    return np.array(Image.fromarray(array).resize((width, height), method, box))
