"""Pseudo labels of unannotated pixels: CLIP-ZSS's Pixel Learning Module (arXiv 2310.02296).

Dense CLIP tokens are clustered at several scales from the means of windows, and clusters that mean
the same are joined [paper]. What the paper leaves open is chosen here and marked [ours].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from concat_cli.core.clip.encoder import Clip
from concat_cli.methods.clip_zss.dense_tokens import TokenPath, dense_tokens
from concat_cli.methods.clip_zss.kmeans import Clusters, kmeans


@dataclass(frozen=True)
class PseudoOptions:
    """How pseudo labels are made. The defaults suit the built-in world and its CLIP [ours].

    size: side of CLIP's input in pixels; see `dense_tokens`, as for `path`.
    windows: windows along a side, for each scale, the coarsest first; each gives a seed. (2, 4, 8)
        on 32 x 32 tokens are windows of 16, 8 and 4 tokens.
    stride: how far one window is from the next, in its width; below 1 there are more of them.
    covered: share of its pixels from which on a token is unannotated, or of the view.
    iterations: steps of K-Means at each scale.
    threshold: clusters of a greater cosine are joined (lambda of the paper).
    centre: take the mean token of the view off every token first, for a CLIP whose tokens are all
        alike.
    min_share: share of the view below which a region is dropped. most: regions kept of an image.
    """

    size: int = 256
    path: TokenPath = "value"
    windows: tuple[int, ...] = (2, 4, 8)
    stride: float = 1.0
    covered: float = 0.5
    iterations: int = 10
    threshold: float = 0.8
    centre: bool = False
    min_share: float = 0.01
    most: int = 16

    def __post_init__(self) -> None:
        assert self.windows and list(self.windows) == sorted(set(self.windows)), "coarse to fine"
        assert self.windows[0] >= 1 and self.most >= 1, "at least one seed and one region"


@dataclass(frozen=True)
class PseudoLabels:
    """Regions of unannotated pixels, numbered in each image from the largest on.

    labels: (B, H, W) int64, k = pseudo class k of that image, -1 = none, annotated, or a pad.
    count: (B,) int64, pseudo classes of each image; a small one may have no pixel left, where its
    tokens are annotated in part. centroids: (B, most, E), L2-normalised, in the space of the
    clustered tokens (centred or not), 0 beyond the count.
    """

    labels: Tensor
    count: Tensor
    centroids: Tensor


def pseudo_labels(
    clip: Clip, images: Tensor, truth: Tensor, padding: Tensor | None, options: PseudoOptions
) -> PseudoLabels:
    """Pseudo labels of a batch: images (B, 3, H, W) uint8; the rest as in `cluster_tokens`."""
    tokens = dense_tokens(clip, images, padding, options.size, options.path)
    return cluster_tokens(tokens, truth, padding, options)


@torch.no_grad()
def cluster_tokens(
    tokens: Tensor, truth: Tensor, padding: Tensor | None, options: PseudoOptions
) -> PseudoLabels:
    """Multi-scale K-Means on the unannotated tokens, then mask fusion, for all images at once.

    Each scale gives a token a cluster, and each cluster belongs to one region; the token goes to
    the region that most of its clusters belong to, of equals to that of the finest scale [ours].

    Args:
        tokens: (B, h, w, E) L2-normalised. truth: (B, H, W) int, negative where nothing is
            annotated. padding: (B, H, W) bool or None.
    """
    inside = torch.ones_like(truth, dtype=torch.bool) if padding is None else ~padding
    free = (truth < 0) & inside
    grid = (tokens.shape[1], tokens.shape[2])
    share = options.covered
    view, valid = _covered(inside, grid, share), _covered(free, grid, share)  # (B, h, w)
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = _centred(tokens.float(), view) if options.centre else tokens.float()
        scales = [
            kmeans(tokens.flatten(1, 2), valid.flatten(1), *seeds, options.iterations)
            for seeds in (window_seeds(tokens, valid, n, options.stride) for n in options.windows)
        ]
        sizes = torch.cat([scale.sizes for scale in scales], 1)  # (B, S)
        centroids = torch.cat([scale.centroids for scale in scales], 1)  # (B, S, E)
        leader = merge(centroids, sizes, options.threshold)
        joined = _joined(centroids, sizes, leader)
    region = _vote(scales, leader)  # (B, T)
    least = options.min_share * view.flatten(1).sum(1)
    number, order, count = _numbered(region, leader.shape[1], least, options.most)
    labels = number.gather(1, region.clamp(min=0)).masked_fill(region < 0, -1).unflatten(1, grid)
    labels = _enlarged(labels, options.most, (truth.shape[1], truth.shape[2]))
    there = torch.arange(order.shape[1], device=count.device) < count[:, None]
    kept = joined.gather(1, order[..., None].expand(-1, -1, joined.shape[-1])) * there[..., None]
    kept = F.pad(kept, (0, 0, 0, options.most - kept.shape[1]))
    return PseudoLabels(labels.masked_fill(~free, -1), count, kept)


def fuse(truth: Tensor, pseudo: PseudoLabels, classes: int) -> Tensor:
    """The paper's F, (B, H, W) int64: annotated pixels keep their class, others take `classes` + k.

    truth: (B, H, W) int, class indices below `classes`, -1 for none; -1 stays where `pseudo` has
    none either.
    """
    made = torch.where(pseudo.labels >= 0, classes + pseudo.labels, -1)
    return torch.where(truth >= 0, truth.long(), made)


def window_seeds(
    tokens: Tensor, valid: Tensor, count: int, stride: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The mean of the valid tokens in each of `count` x `count` windows, fewer on a smaller grid.

    tokens (B, h, w, E), valid (B, h, w) -> seeds (B, S, E), L2-normalised, and which of them have
    any token (B, S) bool. Below a `stride` of 1 the windows overlap, and there are more of them.
    """
    share = valid[..., None].float()
    sums = _windowed((tokens * share).permute(0, 3, 1, 2), count, stride)  # (B, E, n, m)
    there = _windowed(share.permute(0, 3, 1, 2), count, stride).flatten(1) > 0
    return F.normalize(sums.flatten(2).transpose(1, 2), dim=-1), there


def merge(centroids: Tensor, sizes: Tensor, threshold: float) -> Tensor:
    """Mask fusion: the cluster that leads the group of each, (B, S) int64; -1 for an empty one.

    From the largest cluster to the smallest, each that is not used yet leads a group and takes all
    unused ones whose cosine with it exceeds `threshold`; every cluster is used once [paper: merging
    and single use; ours: the order, and the leader's centroid as what is compared].

    centroids (B, S, E) L2-normalised; sizes (B, S) tokens, equal ones in their order.
    """
    order = sizes.argsort(dim=1, descending=True, stable=True)
    centroids = centroids.gather(1, order[..., None].expand_as(centroids))
    similar = centroids @ centroids.transpose(1, 2) > threshold  # (B, S, S)
    similar |= torch.eye(similar.shape[1], dtype=torch.bool, device=similar.device)
    unused = sizes.gather(1, order) > 0
    leader = torch.full_like(order, -1)
    for place in range(order.shape[1]):
        group = unused & similar[:, place] & unused[:, place, None]
        leader = torch.where(group, order[:, place, None], leader)
        unused &= ~group
    return torch.empty_like(leader).scatter_(1, order, leader)


def _windowed(maps: Tensor, count: int, stride: float) -> Tensor:
    """(B, C, h, w) -> (B, C, n, m): means of windows, up to a factor for those at the border."""
    sides = (maps.shape[2], maps.shape[3])
    if stride == 1:
        return F.adaptive_avg_pool2d(maps, (min(count, sides[0]), min(count, sides[1])))
    width = [-(-side // min(count, side)) for side in sides]
    step = [max(1, int(stride * one)) for one in width]
    return F.avg_pool2d(maps, width, step, ceil_mode=True)


def _covered(pixels: Tensor, grid: tuple[int, int], least: float) -> Tensor:
    """(B, H, W) bool -> (B, h, w) bool: tokens of whose pixels enough are true."""
    return F.adaptive_avg_pool2d(pixels[:, None].float(), grid)[:, 0] >= least


def _centred(tokens: Tensor, view: Tensor) -> Tensor:
    """Tokens (B, h, w, E) less their mean over the view (B, h, w), L2-normalised again."""
    share = view[..., None].float()
    mean = (tokens * share).sum((1, 2), keepdim=True) / share.sum((1, 2), keepdim=True).clamp(min=1)
    return F.normalize(tokens - mean, dim=-1)


def _joined(centroids: Tensor, sizes: Tensor, leader: Tensor) -> Tensor:
    """(B, S, E): at each leader the mean of its group's centroids, weighted by area, normalised."""
    index = torch.arange(leader.shape[1], device=leader.device)
    group = (leader[:, None] == index[:, None]).float()  # (B, leader, member)
    return F.normalize(group @ (centroids * sizes[..., None]), dim=-1)


def _vote(scales: list[Clusters], leader: Tensor) -> Tensor:
    """(B, T) int64: the leader of the region of each token, -1 for none."""
    found, start = [], 0
    for scale in scales:
        leaders = leader[:, start : start + scale.sizes.shape[1]]
        found.append(leaders.gather(1, scale.assignment.clamp(min=0)))
        start += scale.sizes.shape[1]
    regions = torch.stack(found, -1)  # (B, T, scales)
    votes = (regions[..., None] == regions[..., None, :]).sum(-1)
    finer = torch.arange(len(scales), device=votes.device)
    best = (votes * len(scales) + finer).argmax(-1, keepdim=True)
    return regions.gather(-1, best)[..., 0].masked_fill(scales[0].assignment < 0, -1)


def _numbered(
    region: Tensor, count: int, least: Tensor, most: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers regions by area, and drops those below `least` (B,) tokens and beyond the `most`.

    region (B, T) in 0..`count` - 1 or -1. Returns the number of each region (B, count), -1 for
    dropped ones; the regions in order (B, at most `most`); how many there are (B,).
    """
    index = torch.arange(count, device=region.device)
    areas = (region[..., None] == index).sum(1)  # (B, count)
    kept = (areas > 0) & (areas >= least[:, None])
    order = areas.masked_fill(~kept, -1).argsort(dim=1, descending=True, stable=True)
    total = kept.sum(1).clamp(max=most)
    places = torch.where(index < total[:, None], index, -1)
    return torch.empty_like(order).scatter_(1, order, places), order[:, :most], total


def _enlarged(labels: Tensor, most: int, size: tuple[int, int]) -> Tensor:
    """(B, h, w) int64 -> (B, H, W): each pixel gets the region that is strongest around it [ours].

    Regions are enlarged bilinearly, which follows borders better than the tokens' squares do.
    """
    index = torch.arange(most, device=labels.device)[:, None, None]
    masks = (labels[:, None] == index).float()  # (B, most, h, w)
    share, best = F.interpolate(masks, size, mode="bilinear").max(1)
    return best.masked_fill(share == 0, -1)
