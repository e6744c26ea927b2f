"""Views of the built-in world for the tiny CLIP: masked crops, plain crops and whole scenes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from benchmarks.tiny_clip.captions import Concepts, scene_caption, segment_caption
from concat_cli.core.clip.tokens import masked_crops, square_boxes
from concat_cli.core.prepare.pool import mapper
from concat_cli.core.prepare.shapes_scene import draw_scene, scene_seed
from concat_cli.core.progress import SILENT, Progress

_SHARES = (0.74, 0.1, 0.16)  # of masked crops, plain crops and scenes in a batch
_LEAST_AREA = 24  # pixels that a roughened mask must keep


@dataclass(frozen=True)
class Scenes:
    """Drawn scenes and the list of their segments.

    images (S, H, W, 3) uint8; maps (S, H, W) uint8, i+1 = segment i; classes: labels of each scene;
    scene, segment, label: (N,) int64 for every segment of every scene.
    """

    images: NDArray[Any]
    maps: NDArray[Any]
    classes: list[NDArray[Any]]
    scene: NDArray[Any]
    segment: NDArray[Any]
    label: NDArray[Any]


def draw_scenes(part: str, seed: int, last: int, first: int = 0, size: int = 128) -> Scenes:
    """Scenes first..last-1 of a part, with every class."""
    count = last - first
    images = np.empty((count, size, size, 3), np.uint8)
    maps = np.empty((count, size, size), np.uint8)
    classes: list[NDArray[Any]] = []
    for i in range(count):
        scene = draw_scene(scene_seed(part, seed, first + i), size)
        images[i], maps[i] = scene.image, scene.segment_map
        classes.append(scene.labels)
    lengths = [len(labels) for labels in classes]
    return Scenes(
        images, maps, classes,
        scene=np.repeat(np.arange(count), lengths),
        segment=np.concatenate([np.arange(n) for n in lengths]),
        label=np.concatenate(classes),
    )  # fmt: skip


@dataclass(frozen=True)
class Pictures:
    """Every view the student may see, as (?, 3, s, s) uint8, the mean colour around masks.

    masked: one for each segment, with its `label` and `scene`; plain: one for each scene, the
    square around a random segment, whose class is `plain_label`; whole: the scenes themselves.
    """

    masked: Tensor
    label: NDArray[Any]
    scene: NDArray[Any]
    plain: Tensor
    plain_label: NDArray[Any]
    whole: Tensor
    classes: list[NDArray[Any]]


@dataclass(frozen=True)
class Job:
    """Scenes first..last-1 of a part, for one process."""

    part: str
    seed: int
    first: int
    last: int
    side: int  # of a view
    mean: tuple[float, ...]
    std: tuple[float, ...]


def take_pictures(job: Job) -> Pictures:
    """Draws the job's scenes and all views of them; depends on the job's scenes only."""
    scenes = draw_scenes(job.part, job.seed, job.last, first=job.first)
    rng = np.random.default_rng([job.seed, job.first])
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (job.mean, job.std))
    masked: list[Tensor] = []
    plain: list[Tensor] = []
    whole: list[Tensor] = []
    plain_label: list[int] = []
    for i, classes in enumerate(scenes.classes):
        image = torch.as_tensor(scenes.images[i]).permute(2, 0, 1).float() / 255
        ids = torch.arange(1, len(classes) + 1, dtype=torch.uint8)
        masks = torch.as_tensor(scenes.maps[i])[None] == ids[:, None, None]
        chosen = int(rng.integers(len(classes)))
        rough = roughen(masks, torch.as_tensor(rng.integers(0, 8, len(classes))))
        full = torch.ones_like(masks[:1])
        every = torch.cat([rough, _boxed(masks[chosen : chosen + 1]), full])
        crops = masked_crops(((image - mean) / std).expand(len(every), -1, -1, -1), every, job.side)
        pixels = ((crops * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
        masked.append(pixels[:-2])
        plain.append(pixels[-2])
        whole.append(pixels[-1])
        plain_label.append(int(classes[chosen]))
    return Pictures(
        torch.cat(masked), scenes.label, scenes.scene + job.first,
        torch.stack(plain), np.array(plain_label), torch.stack(whole), scenes.classes,
    )  # fmt: skip


def take_all(jobs: list[Job], processes: int, progress: Progress = SILENT) -> Pictures:
    """The pictures of all jobs, in order, taken by several processes."""
    with mapper(take_pictures, processes, partial(torch.set_num_threads, 1)) as work:
        parts = list(progress.track(work(jobs), "drawing scenes and views, parts", len(jobs)))
    return Pictures(
        torch.cat([p.masked for p in parts]),
        np.concatenate([p.label for p in parts]),
        np.concatenate([p.scene for p in parts]),
        torch.cat([p.plain for p in parts]),
        np.concatenate([p.plain_label for p in parts]),
        torch.cat([p.whole for p in parts]),
        [classes for p in parts for classes in p.classes],
    )


@dataclass(frozen=True)
class Views:
    """A batch of B views and T different captions.

    crops (B, 3, s, s) normalised; texts: T captions; match (B, T) 0/1 float: which captions are
    true; unsure (B, T) bool: pairs that are neither true nor surely false.
    """

    crops: Tensor
    texts: list[str]
    match: Tensor
    unsure: Tensor


class Sampler:
    """Draws batches of views; classes come up by the square root of their frequency."""

    def __init__(
        self, pictures: Pictures, concepts: Concepts, mean: Tensor, std: Tensor, seed: int
    ) -> None:
        self.pictures, self.concepts = pictures, concepts
        self.mean, self.std = mean, std
        self.rng = np.random.default_rng(seed)
        counts = np.bincount(pictures.label).astype(float)
        self._cumulative: NDArray[np.float64] = np.cumsum(1 / np.sqrt(counts[pictures.label]))

    def batch(self, size: int) -> Views:
        """`size` random views with a caption for each, equal captions merged."""
        counts: list[int] = self.rng.multinomial(size, _SHARES).tolist()
        masked, plain, whole = counts
        p = self.pictures
        total = float(self._cumulative[-1])
        at = np.searchsorted(self._cumulative, self.rng.random(masked) * total)
        at_plain = self.rng.integers(0, len(p.plain), plain)
        at_whole = self.rng.integers(0, len(p.whole), whole)
        scenes = [p.classes[int(i)] for i in at_whole]
        labels = [*p.label[at].tolist(), *p.plain_label[at_plain].tolist()]
        held = [self.concepts.held([k]) for k in labels]
        around = held[:masked] + [self.concepts.held(p.classes[int(i)]) for i in at_plain]
        held += [self.concepts.held(classes) for classes in scenes]
        asked = self._captions(labels, scenes)
        ask = np.stack(list(asked.values()))  # (T, C)
        match = _true(np.stack(held), ask)
        unsure = _true(np.stack(around + held[masked + plain :]), ask) & ~match
        pixels = torch.cat([p.masked[at], p.plain[at_plain], p.whole[at_whole]])
        match_values = torch.as_tensor(match.astype(np.float32))
        return Views(self._vary(pixels), list(asked), match_values, torch.as_tensor(unsure))

    def _captions(self, labels: list[int], scenes: list[NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Caption -> what it asks for, (C,); most segments of a class share one in a batch."""
        asked: dict[str, NDArray[Any]] = {}
        last: dict[int, tuple[str, NDArray[Any]]] = {}
        for k in labels:
            if k not in last or self.rng.random() < 0.2:
                last[k] = segment_caption(self.concepts, k, self.rng)
            asked[last[k][0]] = last[k][1]
        for classes in scenes:
            text, ask = scene_caption(self.concepts, classes, self.rng)
            asked[text] = ask
        return asked

    def _vary(self, pixels: Tensor) -> Tensor:
        """(B, 3, s, s) uint8 -> normalised, with other contrast and tint, mirrored or not; what is
        0, the mean colour, stays 0."""
        crops = (pixels.float() / 255 - self.mean) / self.std
        gain = self.rng.uniform(0.85, 1.15, (len(crops), 1, 1, 1))
        tint = self.rng.uniform(0.95, 1.05, (len(crops), 3, 1, 1))
        crops = crops * torch.as_tensor(gain * tint).float()
        flip = torch.as_tensor(self.rng.random(len(crops)) < 0.5)[:, None, None, None]
        return torch.where(flip, crops.flip(-1), crops)


def roughen(masks: Tensor, how: Tensor) -> Tensor:
    """(M, H, W) bool masks as a segmentor might predict them; `how` (M,): 0 a pixel wider, 1 a
    pixel narrower, 2-3 at a quarter of the resolution, else unchanged. Masks stay non-empty."""
    values = masks[:, None].float()
    wide = F.max_pool2d(values, 3, 1, 1)
    narrow = 1 - F.max_pool2d(1 - values, 3, 1, 1)
    coarse = F.interpolate(
        F.avg_pool2d(values, 4), masks.shape[-2:], mode="bilinear", align_corners=False
    )
    kind = how[:, None, None]
    rough = torch.where(kind == 0, wide[:, 0] > 0.5, masks)
    rough = torch.where(kind == 1, narrow[:, 0] > 0.5, rough)
    rough = torch.where((kind == 2) | (kind == 3), coarse[:, 0] > 0.5, rough)
    enough = rough.flatten(1).sum(1) >= _LEAST_AREA
    return torch.where(enough[:, None, None], rough, masks)


def _boxed(masks: Tensor) -> Tensor:
    """(M, H, W) bool: the whole square around each mask."""
    x0, y0, x1, y1 = square_boxes(masks)[:, :, None].unbind(1)  # (M, 1) each
    y = torch.arange(masks.shape[1]) + 0.5
    x = torch.arange(masks.shape[2]) + 0.5
    return ((y > y0) & (y < y1))[:, :, None] & ((x > x0) & (x < x1))[:, None, :]


def _true(held: NDArray[Any], asked: NDArray[Any]) -> NDArray[Any]:
    """(B, C) concepts held, (T, C) asked for -> (B, T) bool: which captions are true."""
    wanted: NDArray[Any] = np.transpose(asked).astype(np.float32)
    return ((~held).astype(np.float32) @ wanted) == 0
