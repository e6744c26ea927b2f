"""Pseudo labels of unannotated pixels: CLIP-ZSS's Pixel Learning Module (arXiv 2310.02296).

Dense CLIP tokens are clustered at several scales from the means of windows, and clusters that mean
the same are joined [paper]. What the paper leaves open is chosen here and marked [ours]. No step
loops over images or clusters, but for the merging, which is one loop over clusters.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from concat_cli.core.clip.encoder import Clip
from concat_cli.methods.clip_zss.config import ClipZssConfig
from concat_cli.methods.clip_zss.dense_tokens import dense_tokens


@dataclass(frozen=True)
class PseudoLabels:
    """Regions of unannotated pixels, numbered in each image from the largest on.

    labels: (B, H, W) int64, k = pseudo class k of that image, -1 = none, annotated, or a pad.
    count: (B,) int64, pseudo classes of each image; a small one may have no pixel left, where its
    tokens are annotated in part.
    """

    labels: Tensor
    count: Tensor


def pseudo_labels(
    clip: Clip, images: Tensor, truth: Tensor, padding: Tensor | None, cfg: ClipZssConfig
) -> PseudoLabels:
    """Pseudo labels of a batch: images (B, 3, H, W) uint8; the rest as in `cluster_tokens`."""
    tokens = dense_tokens(clip, images, padding, cfg.dense_size, cfg.dense_path)
    return cluster_tokens(tokens, truth, padding, cfg)


@torch.no_grad()
def cluster_tokens(
    tokens: Tensor, truth: Tensor, padding: Tensor | None, cfg: ClipZssConfig
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
    view, valid = _covered(inside, grid, cfg.covered), _covered(free, grid, cfg.covered)
    with torch.autocast(tokens.device.type, enabled=False):
        tokens = _centred(tokens.float(), view) if cfg.centre else tokens.float()
        scales = [
            kmeans(tokens.flatten(1, 2), valid.flatten(1), *seeds, cfg.iterations)
            for seeds in (window_seeds(tokens, valid, n, cfg.stride) for n in cfg.windows)
        ]
        sizes = torch.cat([scale.sizes for scale in scales], 1)  # (B, S)
        centroids = torch.cat([scale.centroids for scale in scales], 1)  # (B, S, E)
        leader = merge(centroids, sizes, cfg.merge)
    region = _vote(scales, leader)  # (B, T)
    least = cfg.min_share * view.flatten(1).sum(1)
    number, count = _numbered(region, leader.shape[1], least, cfg.most)
    labels = number.gather(1, region.clamp(min=0)).masked_fill(region < 0, -1)
    labels = _enlarged(labels.view(-1, *grid), cfg.most, (truth.shape[1], truth.shape[2]))
    return PseudoLabels(labels.masked_fill(~free, -1), count)


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


def _vote(scales: list[Clusters], leader: Tensor) -> Tensor:
    """(B, T) int64: the leader of the region of each token, -1 for none."""
    found: list[Tensor] = []
    start = 0
    for scale in scales:
        leaders = leader[:, start : start + scale.sizes.shape[1]]
        found.append(leaders.gather(1, scale.assignment.clamp(min=0)))
        start += scale.sizes.shape[1]
    regions = torch.stack(found, -1)  # (B, T, scales)
    votes = (regions[..., None] == regions[..., None, :]).sum(-1)
    finer = torch.arange(len(scales), device=votes.device)
    best = (votes * len(scales) + finer).argmax(-1, keepdim=True)
    return regions.gather(-1, best)[..., 0].masked_fill(scales[0].assignment < 0, -1)


def _numbered(region: Tensor, count: int, least: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Numbers regions by area, and drops those below `least` (B,) tokens and beyond the `most`.

    region (B, T) in 0..`count` - 1 or -1. Returns the number of each region (B, count), -1 for
    dropped ones, and how many are left (B,).
    """
    index = torch.arange(count, device=region.device)
    areas = (region[..., None] == index).sum(1)  # (B, count)
    kept = (areas > 0) & (areas >= least[:, None])
    order = areas.masked_fill(~kept, -1).argsort(dim=1, descending=True, stable=True)
    total = kept.sum(1).clamp(max=most)
    places = torch.where(index < total[:, None], index, -1)
    return torch.empty_like(order).scatter_(1, order, places), total


def _enlarged(labels: Tensor, most: int, size: tuple[int, int]) -> Tensor:
    """(B, h, w) int64 -> (B, H, W): each pixel gets the region that is strongest around it [ours].

    Regions are enlarged bilinearly, which follows borders better than the tokens' squares do.
    """
    index = torch.arange(most, device=labels.device)[:, None, None]
    masks = (labels[:, None] == index).float()  # (B, most, h, w)
    share, best = F.interpolate(masks, size, mode="bilinear").max(1)
    return best.masked_fill(share == 0, -1)


@dataclass(frozen=True)
class Clusters:
    """What spherical K-Means found.

    assignment: (B, T) int64, the cluster of each token, -1 where the token is not valid.
    centroids: (B, S, E), L2-normalised. sizes: (B, S) int64, tokens of a cluster; 0: it is empty.
    """

    assignment: Tensor
    centroids: Tensor
    sizes: Tensor


@torch.no_grad()
def kmeans(
    tokens: Tensor, valid: Tensor, seeds: Tensor, seed_valid: Tensor, iterations: int
) -> Clusters:
    """Clusters by cosine: each step assigns tokens to centroids, then moves these to their means.

    The result is the assignment to the centroids of the last step; the first of equally near ones
    wins. A cluster without tokens stays where it is. The sums are matrix products, so that the
    result is the same each time on a GPU too.

    Args:
        tokens: (B, T, E) L2-normalised; valid: (B, T) bool, others belong nowhere.
        seeds: (B, S, E) L2-normalised; seed_valid: (B, S) bool, others get no token.
    """
    with torch.autocast(tokens.device.type, enabled=False):
        tokens, centroids = tokens.float(), seeds.float()
        for _ in range(iterations):
            members = _members(_nearest(tokens, valid, centroids, seed_valid), seeds.shape[1])
            sums = members.float().transpose(1, 2) @ tokens  # (B, S, E)
            moved = members.any(1)[..., None]
            centroids = torch.where(moved, F.normalize(sums, dim=-1), centroids)
        assignment = _nearest(tokens, valid, centroids, seed_valid)
        return Clusters(assignment, centroids, _members(assignment, seeds.shape[1]).sum(1))


def _nearest(tokens: Tensor, valid: Tensor, centroids: Tensor, there: Tensor) -> Tensor:
    """(B, T) index of the centroid of the greatest cosine, -1 where token or image has none."""
    cosine = tokens @ centroids.transpose(1, 2)  # (B, T, S)
    nearest = cosine.masked_fill(~there[:, None], -torch.inf).argmax(-1)
    return nearest.masked_fill(~(valid & there.any(1, keepdim=True)), -1)


def _members(assignment: Tensor, count: int) -> Tensor:
    """(B, T) with -1 for none -> (B, T, S) bool."""
    return assignment[..., None] == torch.arange(count, device=assignment.device)
