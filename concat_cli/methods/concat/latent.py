"""Latent segments: what the pixels without a label may hold, without anybody's name for it [ours].

Where they are comes from the image alone: void falls into connected parts, and these into what the
segmentor would find again from its own features, as K-Means whose centroids are mask queries.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from concat_cli.core.losses import assigned, match_costs
from concat_cli.core.model.layers import area_mean, map_size
from concat_cli.core.model.pixel_decoder import PixelFeatures
from concat_cli.core.model.query_decoder import Denoising, QueryDecoder
from concat_cli.core.train.teacher import Truth
from concat_cli.methods.concat.latent_config import LatentConfig

WINDOWS = 8  # along a side, where the first mask queries come from
LEAST_SEED = 0.35  # of a window, that a part must fill to give a query
STEPS = 2  # of parting void anew by the masks found
BORDER = 1.0  # logits between which a mask is unsure of a cell
NOWHERE = -1e4  # logit of a mask outside of its part


Looks = tuple[QueryDecoder, PixelFeatures]  # what masks are made with, and of


@dataclass(frozen=True)
class Latent:
    """Latent segments of a batch: masks (B, M, H, W) bool, empty ones where there are fewer."""

    masks: Tensor

    @cached_property
    def labels(self) -> Tensor:
        """(B, M) int64: 0 where there is a segment, else -1, as labels tell it."""
        return self.masks.flatten(2).any(2).long() - 1

    @cached_property
    def quarter(self) -> Tensor:
        """(B, M, H/4, W/4) float: as `Truth.quarter`."""
        height, width = self.masks.shape[-2:]
        return area_mean(self.masks, (height // 4, width // 4))

    @staticmethod
    def of(regions: Tensor, cfg: LatentConfig) -> Latent:
        """The largest regions of maps, as masks; see `largest`."""
        numbers = torch.arange(cfg.most, device=regions.device)
        return Latent(largest(regions, cfg)[:, None] == numbers[:, None, None])


def largest(regions: Tensor, cfg: LatentConfig) -> Tensor:
    """Maps (B, H, W) of numbers, -1 for none -> the `most` largest regions of those that are not
    too small, numbered from the largest on."""
    flat = regions.flatten(1) + 1
    areas = flat.new_zeros(len(flat), int(flat.max()) + 1)
    areas = areas.scatter_add_(1, flat, torch.ones_like(flat))[:, 1:]  # (B, R)
    place = areas.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    kept = (areas >= max(1, cfg.least * regions[0].numel())) & (place < cfg.most)
    number = F.pad(torch.where(kept, place, -1), (1, 0), value=-1)
    return number.gather(1, flat).view_as(regions)


def latent_of(truth: Truth, looks: Looks | None, cfg: LatentConfig) -> Latent:
    """Of what void there is: its connected parts, split by the decoder's own masks where these are
    to be had and asked for."""
    void = torch.zeros_like(truth.batch.padding) if truth.void is None else truth.void
    regions = largest(connected(void.long() - 1), cfg)
    if cfg.split and looks is not None and looks[0].token_embedding is not None:
        regions = parted(regions, *looks, cfg)
    return Latent.of(regions, cfg)


def connected(regions: Tensor) -> Tensor:
    """Maps (B, H, W) of numbers, -1 for none -> their connected parts, numbered from 0 on in each
    image; pixels touch along their sides."""
    maps = regions.cpu().numpy()
    return torch.as_tensor(np.stack([_connected(one) for one in maps])).to(regions.device)


def _connected(regions: NDArray[np.int64]) -> NDArray[np.int64]:
    # here, as its import takes 0.3 s, and most stages look for no parts
    label: Any = import_module("scipy.ndimage").label
    found, count = np.full(regions.shape, -1, dtype=np.int64), 0
    for number in np.unique(regions[regions >= 0]):
        parts, more = label(regions == number)
        found[parts > 0] = parts[parts > 0] + count - 1
        count += more
    return found


@torch.no_grad()
def parted(parts: Tensor, decoder: QueryDecoder, pixel: PixelFeatures, cfg: LatentConfig) -> Tensor:
    """Parts of void (B, H, W), -1 elsewhere, split by the decoder's own masks.

    A query made of each window of the view in a part has a mask; of those that overlap the surest
    stays. Then, `STEPS` times, each cell goes to the mask that is strongest on it, of its own part,
    and queries are made anew of what each has. No mask reaches beyond its part.
    """
    size = map_size(pixel.mask_features)
    cells = _cells(parts, size)  # (B, h, w)
    if not bool((cells >= 0).any()):
        return parts
    seeds, owner = _windows(cells)  # (B, S, h, w), (B, S)
    logits = _masks(decoder, pixel, seeds)
    inside = _inside(cells, owner)
    sure = ((logits > BORDER) & inside).flatten(2).sum(2)
    unsure = ((logits > -BORDER) & inside).flatten(2).sum(2)
    rank = sure / unsure.clamp(min=1)
    logits, owner = _different(logits, owner, inside, rank, 2 * cfg.most, cfg.overlap)
    slots = torch.arange(owner.shape[1], device=owner.device)
    for _ in range(STEPS):
        inside = _inside(cells, owner)
        won = logits.masked_fill(~inside, NOWHERE).argmax(1)
        own = (won[:, None] == slots[:, None, None]) & inside
        owner = owner.masked_fill(~own.flatten(2).any(2), -1)
        logits = _masks(decoder, pixel, own.float())
        area = ((logits > 0) & inside).flatten(2).sum(2).float()
        logits, owner = _different(logits, owner, inside, area, owner.shape[1], cfg.overlap)
    large = F.interpolate(logits.float(), parts.shape[1:], mode="bilinear")
    inside = _inside(parts, owner)
    strength, won = large.masked_fill(~inside, NOWHERE).max(1)
    whole = parts + owner.shape[1]  # parts too small for a window
    return torch.where(parts < 0, -1, torch.where(strength > NOWHERE, won, whole))


def _inside(parts: Tensor, owner: Tensor) -> Tensor:
    """Maps of parts (B, h, w), and the part (B, S) of each mask or -1 -> where it may be, bool."""
    return (parts[:, None] == owner[..., None, None]) & (owner >= 0)[..., None, None]


def _cells(parts: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, H, W) -> (B, h, w): the part that a cell lies in by its middle."""
    step = parts.shape[1] // size[0], parts.shape[2] // size[1]
    return parts[:, step[0] // 2 :: step[0], step[1] // 2 :: step[1]]


def _windows(cells: Tensor) -> tuple[Tensor, Tensor]:
    """Windows of the view, each cut to the part that it has most of: masks (B, S, h, w) float, and
    the part (B, S), -1 where it fills too little of the window."""
    height, width = cells.shape[1:]
    rows, columns = (torch.arange(n, device=cells.device) for n in (height, width))
    number = (rows * WINDOWS // height)[:, None] * WINDOWS + columns * WINDOWS // width
    window = F.one_hot(number, WINDOWS**2).permute(2, 0, 1).float()  # (S, h, w)
    count = int(cells.max()) + 1
    part = F.one_hot(cells + 1, count + 1)[..., 1:].float()  # (B, h, w, P)
    filled = torch.einsum("shw,bhwp->bsp", window, part)
    most, owner = filled.max(-1)
    owner = owner.masked_fill(most < LEAST_SEED * window.sum((1, 2)).clamp(min=1), -1)
    return window * (cells[:, None] == owner[..., None, None]), owner


def _masks(decoder: QueryDecoder, pixel: PixelFeatures, masks: Tensor) -> Tensor:
    """Mask logits (B, S, h, w) of queries made of masks (B, S, h, w)."""
    valid = torch.ones(masks.shape[:2], dtype=torch.bool, device=masks.device)
    return decoder.masks_of(pixel, Denoising(masks, valid)).float()


def _different(
    logits: Tensor, owner: Tensor, inside: Tensor, rank: Tensor, most: int, overlap: float
) -> tuple[Tensor, Tensor]:
    """Of masks that share more than `overlap` of the smaller, those of the highest rank, in its
    order: logits (B, S', h, w) and parts (B, S'), -1 for dropped ones, S' at most `most`."""
    mask = ((logits > 0) & inside).flatten(2).float()  # (B, S, T)
    area = mask.sum(2)
    there = (owner >= 0) & (area > 1)
    order = rank.masked_fill(~there, -1).argsort(dim=1, descending=True, stable=True)
    mask = mask.gather(1, order[..., None].expand_as(mask))
    area, there = area.gather(1, order), there.gather(1, order)
    shared = mask @ mask.transpose(1, 2) > overlap * torch.minimum(area[:, :, None], area[:, None])
    unused, kept = there, torch.zeros_like(there)
    for place in range(order.shape[1]):
        kept[:, place] = unused[:, place]
        unused = unused & ~(shared[:, place] & unused[:, place, None])
    owner = owner.gather(1, order).masked_fill(~kept, -1)
    first = (~kept).long().argsort(dim=1, stable=True)[:, :most]  # kept ones to the front
    chosen = order.gather(1, first)[..., None, None].expand(-1, -1, *logits.shape[2:])
    return logits.gather(1, chosen), owner.gather(1, first)


@torch.no_grad()
def match_apart(
    mask_logits: Tensor,
    matched: Tensor,
    latent: Latent,
    weights: tuple[float, float],
    coords: Tensor,
) -> Tensor:
    """The query of each latent segment, (L, B, M) int64, of those that no labelled segment has.

    By masks alone; -1 for no segment and where no query is left.

    Args:
        mask_logits: (L, B, Q, h, w). matched: (L, B, N) queries of the labelled segments, or -1.
        weights: of mask and dice cost. coords: (B, P, 2), as of `match`.
    """
    nameless = mask_logits.new_zeros(*mask_logits.shape[:3], 2)
    costs = match_costs(nameless, mask_logits, latent.labels, latent.masks, (0.0, *weights), coords)
    taken = held(matched, mask_logits.shape[2])
    found = assigned(costs.masked_fill(taken[..., None], torch.inf), latent.labels >= 0)
    free = ~taken.gather(2, found.clamp(min=0))
    return found.masked_fill(~free, -1)


def held(matched: Tensor, queries: int) -> Tensor:
    """Matched queries (L, B, N) or -1 -> which queries hold a segment, (L, B, Q) bool."""
    slots = torch.zeros(*matched.shape[:2], queries + 1, dtype=torch.bool, device=matched.device)
    return slots.scatter(2, matched.masked_fill(matched < 0, queries), True)[..., :queries]
