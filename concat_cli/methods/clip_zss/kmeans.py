"""Spherical K-Means of many images at once, without a loop over images or clusters."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Clusters:
    """What K-Means found.

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
