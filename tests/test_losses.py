"""Points, mask losses and class loss, each against a naive loop."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from concat_cli.core.config import LossConfig
from concat_cli.core.losses import (
    class_loss,
    mask_losses,
    point_bce,
    point_dice,
    query_targets,
    sample_at,
    sample_masks,
    sample_segments,
    uncertain_points,
)

pytestmark = pytest.mark.core


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def segment_maps(batch: int, segments: int, height: int, width: int) -> Tensor:
    shape = (batch, height, width)
    return torch.randint(0, segments + 1, shape, generator=seeded(), dtype=torch.int32)


def masks_of(segment_map: Tensor, segments: int) -> Tensor:
    return torch.stack([segment_map == i + 1 for i in range(segments)], dim=1)


def bilinear(mask: Tensor, x: float, y: float) -> float:
    """One value of an (H, W) map, zero outside, pixel centres at halves."""
    height, width = mask.shape
    x, y = x * width - 0.5, y * height - 0.5
    value = 0.0
    for row in (math.floor(y), math.floor(y) + 1):
        for column in (math.floor(x), math.floor(x) + 1):
            if 0 <= row < height and 0 <= column < width:
                share = (1 - abs(x - column)) * (1 - abs(y - row))
                value += share * float(mask[row, column])
    return value


def test_sample_at_is_bilinear() -> None:
    maps = torch.randn(2, 3, 5, 7, generator=seeded())
    coords = torch.rand(2, 11, 2, generator=seeded())
    got = sample_at(maps, coords)
    for b in range(2):
        for c in range(3):
            for p, (x, y) in enumerate(coords[b].tolist()):
                assert got[b, c, p].item() == pytest.approx(bilinear(maps[b, c], x, y), abs=1e-5)


def test_sample_at_of_half_precision_is_fp32() -> None:
    maps = torch.randn(1, 2, 4, 4, generator=seeded()).bfloat16()
    coords = torch.rand(1, 5, 2, generator=seeded())
    got = sample_at(maps, coords)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, sample_at(maps.float(), coords))


@pytest.mark.parametrize("coords_of", ["random", "corners"])
def test_sample_masks_equals_sampling_each_mask(coords_of: str) -> None:
    masks = masks_of(segment_maps(3, 4, 9, 6), 4)
    coords = torch.rand(3, 50, 2, generator=seeded(1))
    if coords_of == "corners":
        coords = coords.round()  # at and beyond the outermost pixel centres
    want = sample_at(masks.float(), coords)
    torch.testing.assert_close(sample_masks(masks, coords), want, atol=2e-6, rtol=0)
    torch.testing.assert_close(sample_masks(masks.byte(), coords), want, atol=2e-6, rtol=0)


def test_sample_segments_equals_sampling_one_mask_per_row() -> None:
    masks = masks_of(segment_maps(3, 4, 9, 6), 4)
    image, segment = torch.tensor([2, 0, 0, 1]), torch.tensor([3, 1, 0, 2])
    coords = torch.rand(4, 40, 2, generator=seeded(2))
    want = sample_at(masks[image, segment][:, None].float(), coords)[:, 0]
    got = sample_segments(masks, image, segment, coords)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=0)


def test_uncertain_points_lie_where_the_logit_is_small() -> None:
    ramp = torch.linspace(-8, 8, 32).expand(2, 32, 32)  # zero at x = 0.5
    torch.manual_seed(0)
    points = uncertain_points(ramp, 40, oversample=3, importance=0.75)
    assert points.shape == (2, 40, 2)
    assert points.min() >= 0 and points.max() <= 1
    near, anywhere = points[:, :30, 0] - 0.5, points[:, 30:, 0] - 0.5
    assert near.abs().max() < 0.25 < anywhere.abs().max()


def test_uncertain_points_are_the_best_of_the_candidates() -> None:
    logits = torch.randn(3, 8, 8, generator=seeded())
    torch.manual_seed(5)
    points = uncertain_points(logits, 10, oversample=4, importance=1.0)
    candidates = torch.rand(3, 40, 2, generator=seeded(5))
    for m in range(3):
        doubt = [abs(bilinear(logits[m], x, y)) for x, y in candidates[m].tolist()]
        best = sorted(range(40), key=doubt.__getitem__)[:10]
        assert sorted(points[m].tolist()) == sorted(candidates[m, best].tolist())


def test_point_losses_against_a_loop() -> None:
    logits = torch.randn(4, 9, generator=seeded())
    truth = torch.rand(4, 9, generator=seeded(1))
    bce, dice = point_bce(logits, truth), point_dice(logits, truth)
    for m in range(4):
        terms, overlap, total = [], 0.0, 0.0
        for x, y in zip(logits[m].tolist(), truth[m].tolist(), strict=True):
            p = 1 / (1 + math.exp(-x))
            terms.append(-(y * math.log(p) + (1 - y) * math.log(1 - p)))
            overlap, total = overlap + p * y, total + p + y
        assert bce[m].item() == pytest.approx(sum(terms) / 9, rel=1e-5)
        assert dice[m].item() == pytest.approx(1 - (2 * overlap + 1) / (total + 1), rel=1e-5)


def mask_case() -> tuple[Tensor, Tensor, Tensor]:
    """Logits (2, 2, 5, 8, 8), matches (2, 2, 3) padded, masks (2, 3, 16, 16)."""
    logits = torch.randn(2, 2, 5, 8, 8, generator=seeded())
    matched = torch.tensor([[[4, 0, 2], [1, 3, -1]], [[0, 1, 2], [2, 0, -1]]])
    return logits, matched, masks_of(segment_maps(2, 3, 16, 16), 3)


def test_mask_losses_against_a_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    logits, matched, masks = mask_case()
    shared = torch.rand(1, 30, 2, generator=seeded(3))
    monkeypatch.setattr(
        "concat_cli.core.losses.uncertain_points",
        lambda maps, *settings: shared.expand(len(maps), -1, -1),
    )
    bce, dice = mask_losses(logits, matched, masks, 2.5, LossConfig(points=30))
    want_bce = want_dice = torch.zeros(())
    for layer in range(2):
        for image in range(2):
            for segment in range(3):
                query = int(matched[layer, image, segment])
                if query < 0:
                    continue
                mask = masks[image, segment].float()
                x = sample_at(logits[layer, image, query][None, None], shared)[0]
                y = sample_at(mask[None, None], shared)[0]
                want_bce = want_bce + F.binary_cross_entropy_with_logits(x, y)
                p = x.sigmoid()
                want_dice = want_dice + 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
    torch.testing.assert_close(bce, want_bce / 2.5)
    torch.testing.assert_close(dice, want_dice / 2.5)


def test_mask_losses_reach_matched_queries_only_and_do_not_mind_padding() -> None:
    logits, matched, masks = mask_case()
    logits.requires_grad_()
    torch.manual_seed(0)
    losses = mask_losses(logits, matched, masks, 5, LossConfig(points=20))
    (gradient,) = torch.autograd.grad(sum(losses), logits)
    reached = gradient.abs().sum((-2, -1)) > 0
    want = torch.zeros(2, 2, 5, dtype=torch.bool)
    for layer in range(2):
        for image in range(2):
            for query in matched[layer, image].tolist():
                want[layer, image, query] |= query >= 0
    assert torch.equal(reached, want)
    wider = F.pad(matched, (0, 4), value=-1)
    more = F.pad(masks, (0, 0, 0, 0, 0, 4))
    torch.manual_seed(0)
    padded = mask_losses(logits, wider, more, 5, LossConfig(points=20))
    torch.testing.assert_close(losses, padded)


def test_mask_losses_without_segments_are_zero_with_a_gradient() -> None:
    logits = torch.randn(2, 1, 3, 4, 4, generator=seeded(), requires_grad=True)
    matched = torch.full((2, 1, 0), -1)
    bce, dice = mask_losses(
        logits,
        matched,
        torch.zeros(1, 8, 8, dtype=torch.int32),
        1.0,
        LossConfig(points=10),
    )
    (gradient,) = torch.autograd.grad(bce + dice, logits)
    assert bce == 0 and dice == 0 and not gradient.any()


def test_mask_losses_learn_a_mask() -> None:
    truth = torch.zeros(1, 16, 16, dtype=torch.int32)
    truth[:, 4:12, 2:9] = 1
    logits = torch.zeros(1, 1, 1, 16, 16, requires_grad=True)
    optimiser = torch.optim.Adam([logits], lr=0.3)
    torch.manual_seed(0)
    for _ in range(60):
        optimiser.zero_grad()
        sum(
            mask_losses(
                logits,
                torch.zeros(1, 1, 1, dtype=torch.int64),
                truth,
                1.0,
                LossConfig(points=200),
            )
        ).backward()
        optimiser.step()
    assert torch.equal(logits[0, 0, 0] > 0, truth[0] == 1)


def naive_targets(matched: Tensor, labels: Tensor, queries: int, classes: int) -> Tensor:
    targets = torch.full((*matched.shape[:2], queries), classes)
    for layer in range(matched.shape[0]):
        for image in range(matched.shape[1]):
            for segment, query in enumerate(matched[layer, image].tolist()):
                if query >= 0 and labels[image, segment] >= 0:
                    targets[layer, image, query] = labels[image, segment]
    return targets


def class_case() -> tuple[Tensor, Tensor, Tensor]:
    logits = torch.randn(3, 2, 5, 8, generator=seeded(), dtype=torch.float64)
    matched = torch.tensor([[[4, 0, 2], [1, 3, -1]], [[0, 1, 2], [2, 0, -1]], [[0, 4, 1]] * 2])
    return logits, matched, torch.tensor([[6, 0, 6], [3, 2, -1]])


def test_query_targets_against_a_loop() -> None:
    _, matched, labels = class_case()
    assert torch.equal(query_targets(matched, labels, 5, 7), naive_targets(matched, labels, 5, 7))


def test_query_targets_without_segments() -> None:
    targets = query_targets(torch.zeros(2, 1, 0, dtype=torch.int64), torch.zeros(1, 0).long(), 3, 4)
    assert torch.equal(targets, torch.full((2, 1, 3), 4))


def test_class_loss_against_cross_entropy() -> None:
    logits, matched, labels = class_case()
    weight = torch.ones(8, dtype=torch.float64)
    weight[-1] = 0.1
    want = torch.zeros((), dtype=torch.float64)
    for layer in range(3):
        targets = naive_targets(matched, labels, 5, 7)[layer]
        want = want + F.cross_entropy(logits[layer].flatten(0, 1), targets.flatten(), weight)
    torch.testing.assert_close(class_loss(logits, matched, labels, 0.1), want)


def test_ignored_queries_have_no_target_unless_matched() -> None:
    logits, matched, labels = class_case()
    ignore = torch.zeros(2, 5, dtype=torch.bool)
    ignore[0, 1] = ignore[0, 4] = True  # unmatched, matched in the first layer
    logits.requires_grad_()
    (gradient,) = torch.autograd.grad(class_loss(logits, matched, labels, 0.1, ignore), logits)
    assert not gradient[0, 0, 1].any() and gradient[0, 0, 4].any()
    targets = naive_targets(matched, labels, 5, 7)
    weight = torch.ones(8, dtype=torch.float64)
    weight[-1] = 0.1
    want = torch.zeros((), dtype=torch.float64)
    for layer in range(3):
        keep = ~(ignore & (targets[layer] == 7)).flatten()
        want = want + F.cross_entropy(
            logits[layer].flatten(0, 1)[keep], targets[layer].flatten()[keep], weight
        )
    torch.testing.assert_close(class_loss(logits, matched, labels, 0.1, ignore), want)


def test_class_loss_is_zero_when_everything_is_ignored() -> None:
    logits = torch.randn(1, 1, 3, 5, generator=seeded(), requires_grad=True)
    nothing = torch.full((1, 1, 2), -1)
    loss = class_loss(logits, nothing, nothing[0], 0.1, torch.ones(1, 3, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss == 0 and not gradient.any()


def test_class_loss_split_over_processes_averages_to_the_whole() -> None:
    logits, matched, labels = class_case()
    norms = [
        torch.where(naive_targets(matched, labels, 5, 7)[:, i] == 7, 0.1, 1.0).sum(-1)
        for i in range(2)
    ]
    mean = torch.stack(norms).mean(0).double()
    halves = [
        class_loss(logits[:, i : i + 1], matched[:, i : i + 1], labels[i : i + 1], 0.1,
                   average=lambda norm: mean)
        for i in range(2)
    ]  # fmt: skip
    torch.testing.assert_close(sum(halves) / 2, class_loss(logits, matched, labels, 0.1))


def test_class_loss_gradient() -> None:
    logits, matched, labels = class_case()
    logits.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: class_loss(x, matched, labels, 0.1), logits)
