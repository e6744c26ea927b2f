"""From queries to panoptic and semantic maps, without a loop over queries or classes.

The algorithm is Mask2Former's panoptic and semantic inference (Cheng et al., CVPR 2022). Masks are
bilinearly resized to the padded input, cropped to its valid part and resized to the photo. As all
of this is linear and separable, it is done by one small matrix for rows and one for columns.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from concat_cli.core.config import InferConfig
from concat_cli.core.data.image_io import looked_up, strips

Size = tuple[int, int]
MASK_STRIDE = 4  # mask logits are at a quarter of the padded input
BUDGET = 2**24  # mask values held at once (counts of pixels in fp32 stay exact up to here)
GROUP = 5  # queries that a CPU compares at a time
BLOCK = 128  # columns that a CPU resizes at a time
ON_CPU = 2**21  # of which a CPU is given fewer: as many as its caches hold take two thirds the time


@dataclass(frozen=True)
class Segment:
    """One segment of a panoptic map; `bbox` is x, y, width, height in pixels."""

    id: int
    class_index: int
    score: float
    area: int
    bbox: tuple[int, int, int, int]


@dataclass(frozen=True)
class PanopticResult:
    """panoptic_map (H, W) int32: 0 = no segment, else a segment's id; ids are 1..N in order."""

    panoptic_map: NDArray[np.int32]
    segments: tuple[Segment, ...]


def calibrated(class_logits: Tensor, seen: Tensor | None, seen_offset: float) -> Tensor:
    """(..., K+1) logits in fp32 with `seen_offset` taken off those of seen classes (K,)."""
    logits = class_logits.float()
    if not seen_offset or seen is None:
        return logits
    return logits - F.pad(seen.to(logits), (0, 1)) * seen_offset  # no_object keeps its logit


def resize_matrix(source: int, padded: int, valid: int, target: int, like: Tensor) -> Tensor:
    """(target, source) weights: linear resize to `padded`, crop to `valid`, resize to `target`."""
    eye = torch.eye(source, device=like.device, dtype=torch.float32)[None]  # (1, source, source)
    up = F.interpolate(eye, size=padded, mode="linear", align_corners=False)[..., :valid]
    if target != valid:
        up = F.interpolate(up, size=target, mode="linear", align_corners=False)
    return up[0].T.contiguous()


def panoptic(
    probabilities: Tensor,
    mask_logits: Tensor,
    sizes: Sequence[Size],
    is_thing: Tensor,
    cfg: InferConfig,
    valid: Sequence[Size] | None = None,
) -> list[PanopticResult]:
    """Panoptic maps of B images.

    probabilities (B, Q, K+1) of the classes and no_object, mask_logits (B, Q, h, w) at stride 4 of
    the padded input; sizes: the photos' (H, W); valid: the parts of the padded input that hold the
    photos (default: all of it); is_thing: (K,) bool.
    """
    scores, labels = probabilities.max(-1)  # (B, Q)
    no_object = probabilities.shape[-1] - 1
    keep = (labels != no_object) & (scores > cfg.min_score)
    stuff = F.pad(~is_thing.to(labels.device).bool(), (0, 1))  # (K+1,), no_object is neither
    results: list[PanopticResult | None] = [None] * len(sizes)
    for (size, inner), members in _alike(mask_logits, sizes, valid).items():
        rows = torch.tensor(members, device=keep.device)
        found = _panoptic_alike(
            scores[rows],
            labels[rows],
            keep[rows],
            mask_logits[rows].float(),
            size,
            inner,
            stuff,
            cfg,
        )
        for index, result in zip(members, found, strict=True):
            results[index] = result
    return [result for result in results if result is not None]


def semantic(
    probabilities: Tensor,
    mask_logits: Tensor,
    sizes: Sequence[Size],
    valid: Sequence[Size] | None = None,
    taken_off: Tensor | None = None,
) -> list[NDArray[np.int32]]:
    """(H, W) class indices of B images: argmax over classes of sum_q p_q(class) * sigmoid(mask_q).

    Arguments as in `panoptic`; no_object takes no part. `taken_off` (K,): what is subtracted from
    the sums of each class.
    """
    maps: dict[int, NDArray[np.int32]] = {}
    for members, parts in _pixel_scores(probabilities, mask_logits, sizes, valid, taken_off):
        whole = (len(members), *sizes[members[0]])
        labels, top = torch.empty(whole, dtype=torch.int32, device=mask_logits.device), 0
        for scores in parts:
            labels[:, top : (top := top + scores.shape[2])] = scores.max(1).indices
        maps |= zip(members, labels.cpu().numpy(), strict=True)
    return [maps[index] for index in range(len(sizes))]


def semantic_shares(
    probabilities: Tensor,
    mask_logits: Tensor,
    sizes: Sequence[Size],
    valid: Sequence[Size] | None = None,
    taken_off: Tensor | None = None,
) -> list[tuple[NDArray[np.integer], NDArray[np.float32]]]:
    """`semantic`, in the type of `index_type`, and (H, W) how much of the sums of all classes the
    named one has, 0-1."""
    maps: dict[int, tuple[NDArray[np.integer], NDArray[np.float32]]] = {}
    kind, place = index_type(probabilities.shape[-1]), mask_logits.device
    for members, parts in _pixel_scores(probabilities, mask_logits, sizes, valid, taken_off):
        whole = (len(members), *sizes[members[0]])
        labels, top = torch.empty(whole, dtype=kind, device=place), 0
        shares = torch.empty(whole, device=place)
        for scores in parts:
            rows = slice(top, top := top + scores.shape[2])
            best, labels[:, rows] = scores.max(1)
            total = scores.clamp(min=0).sum(1).clamp(min=torch.finfo(scores.dtype).tiny)
            shares[:, rows] = best.clamp(min=0) / total
        maps |= zip(
            members, zip(labels.cpu().numpy(), shares.cpu().numpy(), strict=True), strict=True
        )
    return [maps[index] for index in range(len(sizes))]


def index_type(classes: int) -> torch.dtype:
    """The smallest type of a map of class indices; a picture may have a hundred million pixels."""
    return torch.int16 if classes < 1 << 15 else torch.int32


def _pixel_scores(
    probabilities: Tensor,
    mask_logits: Tensor,
    sizes: Sequence[Size],
    valid: Sequence[Size] | None,
    taken_off: Tensor | None,
) -> Iterator[tuple[list[int], Iterator[Tensor]]]:
    """The sums of `semantic` for images of like size: which ones, and strips (b, K, rows, W)."""
    probabilities = probabilities[..., :-1]
    like = probabilities.new_zeros(probabilities.shape[-1])
    start = like if taken_off is None else -taken_off.to(like)  # of the sums; costs no pass
    for (size, inner), members in _alike(mask_logits, sizes, valid).items():
        weights = probabilities[members].transpose(1, 2)  # (B, Q, K) -> (b, K, Q)
        strips = resized_strips(
            mask_logits[members].float(), size, inner, width=sum(weights.shape[1:])
        )
        yield members, (_summed(weights, masks, start) for masks in strips)


def _summed(weights: Tensor, mask_logits: Tensor, start: Tensor) -> Tensor:
    """(b, K, Q) times the sigmoid of (b, Q, rows, W), plus start (K,) -> (b, K, rows, W)."""
    scores = torch.baddbmm(start[None, :, None], weights, mask_logits.sigmoid().flatten(2))
    return scores.view(*scores.shape[:2], *mask_logits.shape[2:])


def resized_strips(
    mask_logits: Tensor, size: Size, valid: Size, width: int | None = None
) -> Iterator[Tensor]:
    """Mask logits (B, n, h, w) resized to a photo's size, in strips (B, n, rows, W) from the top.

    `width`: values per pixel and image that the caller will hold, to bound memory (default n).
    """
    b, n, h, w = mask_logits.shape
    down = resize_matrix(h, MASK_STRIDE * h, valid[0], size[0], mask_logits)  # (H, h)
    across = resize_matrix(w, MASK_STRIDE * w, valid[1], size[1], mask_logits)  # (W, w)
    on_cpu = mask_logits.device.type == "cpu"
    budget = ON_CPU if on_cpu else BUDGET
    step = max(1, budget // max(1, b * (width or n) * size[1]))
    blocks = [(*place, across[place[0], place[1]].T) for place in _bands(across, BLOCK)]
    for out, source in _bands(down, step):
        rows = torch.matmul(down[out, source], mask_logits[:, :, source])  # (B, n, rows, w)
        if not on_cpu:  # which multiplies by zeros sooner than it starts a block
            yield torch.matmul(rows, across.T)
            continue
        strip = rows.new_empty(b, n, rows.shape[2], size[1])
        for columns, taken, weights in blocks:
            strip[..., columns] = torch.matmul(rows[..., taken], weights)
        yield strip


def _bands(matrix: Tensor, step: int) -> list[tuple[slice, slice]]:
    """Each `step` rows of a matrix, and the columns that they have weights in: few of a resize."""
    found: list[tuple[slice, slice]] = []
    for top in range(0, len(matrix), step):
        out = slice(top, min(top + step, len(matrix)))
        used = (matrix[out] != 0).any(0).nonzero()
        found.append((out, slice(int(used.min()), int(used.max()) + 1)))
    return found


def _alike(
    mask_logits: Tensor, sizes: Sequence[Size], valid: Sequence[Size] | None
) -> dict[tuple[Size, Size], list[int]]:
    """Positions of the images that share photo size and valid part, so that they run together."""
    padded = (MASK_STRIDE * mask_logits.shape[-2], MASK_STRIDE * mask_logits.shape[-1])
    inner = [padded] * len(sizes) if valid is None else valid
    groups: dict[tuple[Size, Size], list[int]] = defaultdict(list)
    for index, key in enumerate(zip(sizes, inner, strict=True)):
        groups[key].append(index)
    return groups


def _panoptic_alike(
    scores: Tensor,
    labels: Tensor,
    keep: Tensor,
    mask_logits: Tensor,
    size: Size,
    valid: Size,
    stuff: Tensor,
    cfg: InferConfig,
) -> list[PanopticResult]:
    """`panoptic` for images of one size; scores, labels, keep (B, Q)."""
    n = max(1, int(keep.sum(1).max()))  # most candidates of an image: the others pad up to it
    # Kept queries first, in their order.
    order = torch.sort((~keep).int(), dim=1, stable=True).indices[:, :n]
    scores, labels, keep = (x.gather(1, order) for x in (scores, labels, keep))
    masks = mask_logits[torch.arange(len(order), device=order.device)[:, None], order]
    as_one = _leaders(labels, keep, stuff) if cfg.joint_stuff else None
    contest = _compete(scores.masked_fill(~keep, -1.0), masks, size, valid, cfg, as_one)
    claimed, final, own = contest.claimed, contest.final, contest.own
    # Mask2Former: a segment must keep most of its own mask, or it is hidden by others.
    good = keep & (final > 0) & (claimed / own.clamp(min=1) >= cfg.overlap)
    leader = _leaders(labels, good, stuff)
    ids, counts = _number(good, leader)
    segment_map = torch.empty_like(contest.winner, dtype=torch.int32)
    for rows in strips(*size):
        winner = contest.winner[:, rows].long()
        found = ids.gather(1, winner.flatten(1)).view_as(winner)
        segment_map[:, rows] = torch.where(contest.inside[:, rows], found, 0).int()
    area = torch.zeros_like(final).scatter_add_(1, leader, torch.where(good, final, 0))
    # A merged stuff segment has the score of its best query.
    best = torch.zeros_like(scores).scatter_reduce_(
        1, leader, torch.where(good, scores, scores.new_zeros(())), "amax"
    )
    table = torch.stack([ids, labels, area], -1).cpu().numpy()  # (B, n, 3)
    first = (good & (leader == torch.arange(n, device=leader.device))).cpu().numpy()
    values, maps = best.cpu().numpy(), segment_map.cpu().numpy()
    return [
        _result(maps[b], table[b][first[b]], values[b][first[b]], int(counts[b]))
        for b in range(len(maps))
    ]


@dataclass(frozen=True)
class _Contest:
    """Who wins the pixels of B images with n queries.

    winner (B, H, W) int16: the query of highest score * mask; inside (B, H, W): whether its own
    mask covers the pixel. (B, n): pixels that a query has `claimed` so, of which its mask covers
    `final`, and those of its `own` whole mask. Of queries that count as one, `claimed` and `own`
    are those of all, where their masks overlap once.
    """

    winner: Tensor
    inside: Tensor
    claimed: Tensor
    final: Tensor
    own: Tensor


def _compete(
    scores: Tensor,
    masks: Tensor,
    size: Size,
    valid: Size,
    cfg: InferConfig,
    as_one: Tensor | None,
) -> _Contest:
    """scores (B, n), -1 of queries that are out of it; as_one (B, n): the first of those that a
    query counts as one with, itself where it is alone."""
    b, n = scores.shape
    if as_one is not None and bool((as_one == torch.arange(n, device=scores.device)).all()):
        as_one = None
    winners = torch.empty(b, *size, dtype=torch.int16, device=scores.device)
    insides = torch.empty(b, *size, dtype=torch.bool, device=scores.device)
    claimed, final, own = (torch.zeros_like(scores, dtype=torch.int64) for _ in range(3))
    top = 0
    for strip in resized_strips(masks, size, valid):
        mask = strip.sigmoid_()  # (B, n, rows, W)
        winner = _highest(mask * scores[..., None, None])  # (B, rows, W)
        covers = torch.ge(mask, cfg.min_mask, out=mask)  # as numbers: to be added
        own += _jointly(covers, scores >= 0, as_one).flatten(2).sum(-1).long()
        inside = covers.gather(1, winner[:, None])[:, 0] > 0
        counts = _count(2 * winner + inside, 2 * n).view(b, n, 2)
        claimed += counts.sum(2)
        final += counts[..., 1]
        rows = slice(top, top := top + winner.shape[1])
        winners[:, rows], insides[:, rows] = winner, inside
    if as_one is not None:
        some = claimed.masked_fill(scores < 0, 0)
        claimed = torch.zeros_like(claimed).scatter_add_(1, as_one, some).gather(1, as_one)
        own = own.gather(1, as_one)
    return _Contest(winners, insides, claimed, final, own)


def _jointly(covers: Tensor, keep: Tensor, as_one: Tensor | None) -> Tensor:
    """Which pixels masks (B, n, rows, W) cover; of those that count as one, the first has what any
    of them covers."""
    if as_one is None:
        return covers
    there = covers * keep[..., None, None]
    first = as_one[..., None, None].expand_as(covers)
    return torch.zeros_like(covers).scatter_reduce_(1, first, there, "amax")


def _highest(values: Tensor) -> Tensor:
    """`values.max(1).indices` of (B, n, rows, W), for which a CPU takes half the time: the highest
    of each GROUP first, then which group, then which of it."""
    n = values.shape[1]
    whole = n - n % GROUP
    if values.device.type != "cpu" or not whole:
        return values.max(1).indices
    groups = torch.unflatten(values[:, :whole], 1, (-1, GROUP))
    best, group = groups.amax(2).max(1)  # (B, rows, W)
    where = group[:, None, None].expand(-1, 1, GROUP, -1, -1)
    winner = group * GROUP + groups.gather(1, where)[:, 0].max(1).indices
    if whole == n:
        return winner
    rest, last = values[:, whole:].max(1)
    return torch.where(rest > best, last + whole, winner)


def _count(index_map: Tensor, n: int) -> Tensor:
    """(B, n) pixels of each index 0..n-1 in (B, H, W) maps."""
    b = len(index_map)
    shifted = index_map.flatten(1) + n * torch.arange(b, device=index_map.device)[:, None]
    return torch.bincount(shifted.flatten(), minlength=b * n).view(b, n)


def _leaders(labels: Tensor, good: Tensor, stuff: Tensor) -> Tensor:
    """(B, n) the query that gets a query's pixels: of stuff the first of its class, else itself."""
    position = torch.arange(labels.shape[1], device=labels.device)
    same = (labels[:, :, None] == labels[:, None, :]) & stuff[labels][:, :, None] & good[:, None, :]
    first = torch.where(same, position, labels.shape[1]).amin(-1)  # (B, n)
    return torch.where(first < labels.shape[1], first, position)


def _number(good: Tensor, leader: Tensor) -> tuple[Tensor, Tensor]:
    """Segment ids (B, n), 0 for queries without a segment; number of segments (B,)."""
    position = torch.arange(good.shape[1], device=good.device)
    own = good & (leader == position)
    ids = torch.where(own, own.cumsum(1), 0).gather(1, leader)
    return torch.where(good, ids, 0), own.sum(1)


def _result(
    segment_map: NDArray[np.int32], rows: NDArray[np.int64], scores: NDArray[np.float32], count: int
) -> PanopticResult:
    """One image's result; rows (N, 3): id, class index, area, in order of ids."""
    boxes = bounding_boxes(segment_map, count)
    segments = tuple(
        Segment(int(i), int(c), float(s), int(a), (int(x), int(y), int(w), int(h)))
        for (i, c, a), s, (x, y, w, h) in zip(rows, scores, boxes, strict=True)
    )
    return PanopticResult(segment_map, segments)


def bounding_boxes(segment_map: NDArray[np.int32], count: int) -> NDArray[np.int64]:
    """(count, 4) x, y, width, height of segments 1..count of a map (H, W); zeros where absent."""
    height, width = segment_map.shape
    low = np.tile([width, height], (count + 1, 1))  # x, y of the first pixel
    high = np.zeros_like(low)  # and of the one after the last
    for strip in strips(height, width):
        flat = np.ravel(segment_map[strip])
        start = np.empty(flat.shape, bool)  # of a run of equal ids in a row
        np.not_equal(flat[1:], flat[:-1], out=start[1:])
        start[::width] = True
        (first,) = start.nonzero()
        ids, (y, x) = flat[first], np.divmod(first, width)
        length = np.diff(first, append=flat.size)
        y += strip.start
        np.minimum.at(low, ids, np.stack([x, y], 1))
        np.maximum.at(high, ids, np.stack([x + length, y + 1], 1))
    boxes = np.concatenate([low, high - low], 1)[1:]
    return np.where(high[1:].any(1, keepdims=True), boxes, 0)


def regions(labels: NDArray[np.integer], sure: NDArray[np.float32]) -> PanopticResult:
    """Everything of one class as one segment, in the order of the classes.

    labels (H, W); sure (H, W) in 0-1, whose mean is a segment's score.
    """
    count = int(labels.max()) + 1
    areas, sums = np.zeros(count, np.int64), np.zeros(count)
    for rows in strips(*labels.shape):
        flat = labels[rows].ravel()
        areas += np.bincount(flat, minlength=count)
        np.add.at(sums, flat, sure[rows].ravel().astype(np.float64))  # pixel by pixel
    classes = areas.nonzero()[0]
    segment_map = looked_up((areas > 0).cumsum(dtype=np.int32), labels)
    boxes = bounding_boxes(segment_map, len(classes))
    rows = zip(classes, sums[classes] / areas[classes], areas[classes], boxes, strict=True)
    segments = (
        Segment(number, int(label), float(score), int(area), (int(x), int(y), int(w), int(h)))
        for number, (label, score, area, (x, y, w, h)) in enumerate(rows, 1)
    )
    return PanopticResult(segment_map, tuple(segments))
