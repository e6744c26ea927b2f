"""Matcher and losses agree with transformers' Mask2Former on the same sampling points (fp32)."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from concat_cli.core.config import LossConfig
from concat_cli.core.losses import (
    class_loss,
    mask_losses,
    match,
    match_costs,
    uncertain_points,
)

peer = pytest.importorskip("transformers.models.mask2former.modeling_mask2former")

WEIGHTS = (2.0, 5.0, 5.0)
POINTS, QUERIES, CLASSES = 112, 12, 7
COUNTS = (6, 4, 1)


class Fixed:
    """Truth, predictions of two layers, and the same random points for both programs."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
        g = torch.Generator().manual_seed(seed)
        batch, most = len(COUNTS), max(COUNTS)
        blocks = torch.randint(0, most + 1, (batch, 8, 8), generator=g, dtype=torch.int32)
        segment_map = blocks.repeat_interleave(8, 1).repeat_interleave(8, 2)  # (B, 64, 64)
        count = torch.tensor(COUNTS)
        segment_map = segment_map * (segment_map <= count[:, None, None])
        self.masks = torch.stack([segment_map == i + 1 for i in range(most)], dim=1)
        self.labels = torch.randint(0, CLASSES, (batch, most), generator=g)
        self.labels = self.labels.masked_fill(torch.arange(most)[None] >= count[:, None], -1)
        self.class_logits = 2 * torch.randn(2, batch, QUERIES, CLASSES + 1, generator=g)
        self.mask_logits = 4 * torch.randn(2, batch, QUERIES, 16, 16, generator=g)
        self.shared = torch.rand(1, 3 * POINTS, 2, generator=g)
        monkeypatch.setattr(peer.torch, "rand", self.rand)

    def rand(self, rows: int, count: int, two: int, **options: object) -> Tensor:
        """Stands for torch.rand: the first points of one list, whichever rows are asked for."""
        return self.shared[:, :count].expand(rows, -1, -1).clone()

    @property
    def coords(self) -> Tensor:
        return self.rand(len(COUNTS), POINTS, 2)

    def truth(self) -> tuple[list[Tensor], list[Tensor]]:
        """Masks (n, H, W) and labels (n,) of each image, as the peer wants them."""
        found = [own[:n].float() for own, n in zip(self.masks, COUNTS, strict=True)]
        return found, [own[:n] for own, n in zip(self.labels, COUNTS, strict=True)]

    def match(self) -> Tensor:
        return match(
            self.class_logits,
            self.mask_logits,
            self.labels,
            self.masks,
            WEIGHTS,
            self.coords,
        )

    def loss(self) -> torch.nn.Module:
        config = SimpleNamespace(
            num_labels=CLASSES,
            no_object_weight=0.1,
            train_num_points=POINTS,
            oversample_ratio=3.0,
            importance_sample_ratio=0.75,
            class_weight=WEIGHTS[0],
            mask_weight=WEIGHTS[1],
            dice_weight=WEIGHTS[2],
        )
        return peer.Mask2FormerLoss(config, {})


seeds = pytest.mark.parametrize("seed", [0, 1, 2])


@seeds
def test_matcher_costs(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    fixed = Fixed(monkeypatch, seed)
    seen: list[Tensor] = []

    def remember(costs: Tensor) -> tuple[list[int], list[int]]:
        seen.append(costs)
        return [0], [0]

    monkeypatch.setattr(peer, "linear_sum_assignment", remember)
    matcher = peer.Mask2FormerHungarianMatcher(*WEIGHTS, num_points=POINTS)
    ours = match_costs(
        fixed.class_logits,
        fixed.mask_logits,
        fixed.labels,
        fixed.masks,
        WEIGHTS,
        fixed.coords,
    )
    for layer in range(2):
        seen.clear()
        matcher(fixed.mask_logits[layer], fixed.class_logits[layer], *fixed.truth())
        assert len(seen) == len(COUNTS)
        for image, theirs in enumerate(seen):
            got = ours[layer, image, :, : COUNTS[image]]
            torch.testing.assert_close(got, theirs, rtol=1e-4, atol=1e-5)


@seeds
def test_matches(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    fixed = Fixed(monkeypatch, seed)
    matcher = peer.Mask2FormerHungarianMatcher(*WEIGHTS, num_points=POINTS)
    ours = fixed.match()
    for layer in range(2):
        theirs = matcher(fixed.mask_logits[layer], fixed.class_logits[layer], *fixed.truth())
        for image, (queries, segments) in enumerate(theirs):
            assert torch.equal(ours[layer, image, segments], queries)


def test_uncertain_points(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = Fixed(monkeypatch, 0)
    logits, loss = fixed.mask_logits[0, 0], fixed.loss()
    theirs = loss.sample_points_using_uncertainty(
        logits[:, None], loss.calculate_uncertainty, POINTS, 3.0, 0.75
    )
    ours = uncertain_points(logits, POINTS, 3.0, 0.75)
    for one, other in zip(ours.tolist(), theirs.tolist(), strict=True):
        assert sorted(one) == sorted(other)  # in any order


@seeds
def test_losses(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    fixed = Fixed(monkeypatch, seed)
    matched, loss = fixed.match(), fixed.loss()
    total: dict[str, Tensor] = {}
    for layer in range(2):
        masks, classes = fixed.mask_logits[layer], fixed.class_logits[layer]
        for name, value in loss(masks, classes, *fixed.truth()).items():
            total[name] = total.get(name, torch.zeros(())) + value
    bce, dice = mask_losses(
        fixed.mask_logits,
        matched,
        fixed.masks,
        sum(COUNTS),
        LossConfig(points=POINTS),
    )
    ours = {
        "loss_mask": bce,
        "loss_dice": dice,
        "loss_cross_entropy": class_loss(fixed.class_logits, matched, fixed.labels, 0.1),
    }
    assert set(total) == set(ours)
    for name, theirs in total.items():
        torch.testing.assert_close(ours[name], theirs, rtol=1e-4, atol=0)


def test_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = Fixed(monkeypatch, 3)
    matched, loss = fixed.match(), fixed.loss()
    masks = fixed.mask_logits[0].clone().requires_grad_()
    classes = fixed.class_logits[0].clone().requires_grad_()
    theirs = torch.autograd.grad(
        sum(loss(masks, classes, *fixed.truth()).values()), (masks, classes)
    )
    bce, dice = mask_losses(
        masks[None], matched[:1], fixed.masks, sum(COUNTS), LossConfig(points=POINTS)
    )
    by_class = class_loss(classes[None], matched[:1], fixed.labels, 0.1)
    ours = torch.autograd.grad(bce + dice + by_class, (masks, classes))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)
