"""Pseudo labels of unannotated pixels: CLIP-ZSS's Pixel Learning Module (arXiv 2310.02296).

Dense CLIP tokens are clustered at several scales from the means of windows, and clusters that mean
the same are joined [paper]. What the paper leaves open is chosen here and marked [ours]. No step
loops over images or clusters, but for the merging, which is one loop over clusters.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import (  # pyright: ignore[reportMissingTypeStubs]
    ModifiedResNet,
)
from open_clip.transformer import (  # pyright: ignore[reportMissingTypeStubs]
    ResidualAttentionBlock,
    VisionTransformer,
)
from timm.layers.pos_embed import resample_abs_pos_embed
from torch import Tensor

from concat_cli.core.clip.encoder import Clip
from concat_cli.core.errors import UserError
from concat_cli.methods.clip_zss.config import ClipZssConfig

_RESNET_STRIDE = 32


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
    tokens = dense_tokens(clip, images, padding, cfg.dense_size)
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


@torch.no_grad()
def dense_tokens(clip: Clip, images: Tensor, padding: Tensor | None, size: int) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, h, w, E) fp32, L2-normalised; the grid covers the image, pads too.

    The last attention is replaced by its value and output projections, so that a token keeps its
    place (MaskCLIP, arXiv 2112.01071, 3.2).

    Args:
        padding: (B, H, W) bool or None; CLIP is shown its mean colour there.
        size: side in pixels of the square that the images are resized to, not only the model's own.
    UserError for a tower that has no such tokens, and for a size that its patches do not fill.
    """
    side = patch_side(clip)
    if size % side:
        near = max(side, round(size / side) * side)
        raise UserError(
            f"CLIP {clip.identity.model} has patches of {side} pixels, which do not fill a side of "
            f"{size}.",
            f"Take a multiple of {side}, such as {near}.",
        )
    with clip.precision():
        tokens = tower_tokens(clip.model.visual, _square(clip, images, padding, size))
    grid = (len(tokens), size // side, size // side, -1)
    return F.normalize(tokens.float(), dim=-1).reshape(grid)


def patch_side(clip: Clip) -> int:
    """Pixels along a side of the patch of one token; UserError for a tower without dense tokens."""
    visual = clip.model.visual
    if isinstance(visual, ModifiedResNet):
        return _RESNET_STRIDE
    if isinstance(visual, VisionTransformer) and visual.attn_pool is None:
        height, width = visual.conv1.kernel_size
        plain = isinstance(visual.transformer.resblocks[-1], ResidualAttentionBlock)
        if plain and height == width:
            return height
    raise UserError(
        f"CLIP {clip.identity.model} has no dense tokens here: its image tower is neither a plain "
        "vision transformer nor a ResNet of open_clip.",
        "Take another, for example clip.model=ViT-B-16.",
    )


def tower_tokens(visual: Any, pixels: Tensor) -> Tensor:
    """(B, 3, size, size) normalised -> (B, T, E): the patches by rows."""
    if isinstance(visual, ModifiedResNet):
        return _resnet_tokens(visual, pixels)
    return _transformer_tokens(visual, pixels)


def _square(clip: Clip, images: Tensor, padding: Tensor | None, size: int) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, size, size) normalised; pads become 0, the mean colour."""
    pixels = images.float() / 255
    if padding is not None:
        pixels = torch.where(padding[:, None], clip.mean, pixels)
    if pixels.shape[-2:] != (size, size):
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return clip.normalise(pixels)


def _transformer_tokens(visual: Any, pixels: Tensor) -> Tensor:
    """As `VisionTransformer.forward`, with every token kept and positions for any grid."""
    x = visual.conv1(pixels)  # (B, D, h, w)
    table = visual.positional_embedding[None]
    positions = resample_abs_pos_embed(table, list(x.shape[-2:]), visual.grid_size).to(x.dtype)
    x = x.flatten(2).transpose(1, 2)  # (B, T, D)
    cls = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
    x = visual.ln_pre(torch.cat((cls, x), 1) + positions)
    assert visual.transformer.batch_first, "open_clip's image towers have the batch first"
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = block(x)
    x = visual.ln_post(_value_block(last, x)[:, 1:])
    return x if visual.proj is None else x @ visual.proj


def _value_block(block: Any, x: Tensor) -> Tensor:
    """The block as if each token attended to itself only (MaskCLIP's code, `return_qkv`)."""
    attention, start = block.attn, 2 * x.shape[-1]  # its rows are query, key, value
    weight, bias = attention.in_proj_weight[start:], attention.in_proj_bias[start:]
    value = F.linear(block.ln_1(x), weight, bias)
    x = x + block.ls_1(attention.out_proj(value))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _resnet_tokens(visual: Any, pixels: Tensor) -> Tensor:
    """As `ModifiedResNet.forward`, with the pool's output for every place, not for the mean only.

    The pool's positions are left out, as MaskCLIP does: they would only say where a token is, and
    not what.
    """
    x = visual.stem(pixels)
    x = visual.layer4(visual.layer3(visual.layer2(visual.layer1(x))))  # (B, D, h, w)
    pool = visual.attnpool
    return pool.c_proj(pool.v_proj(x.flatten(2).transpose(1, 2)))
