"""Focal losses, costs and matching on whole masks: against loops, brute force and transformers."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from concat_cli.core.losses import class_loss, sigmoid_focal
from concat_cli.methods.zegformer.train import (
    focal_costs,
    match_whole_masks,
    whole_mask_costs,
    whole_mask_losses,
)

WEIGHTS = (1.0, 20.0, 1.0)
CLASSES, QUERIES = 4, 5


class Case:
    """Random predictions of two layers at stride 4 and truth; `counts` segments in each image."""

    def __init__(self, seed: int, counts: list[int], queries: int = QUERIES) -> None:
        g = torch.Generator().manual_seed(seed)
        batch, most = len(counts), max(counts)
        self.class_logits = 2 * torch.randn(2, batch, queries, CLASSES + 1, generator=g)
        self.mask_logits = 4 * torch.randn(2, batch, queries, 3, 5, generator=g)
        self.valid = torch.arange(most)[None] < torch.tensor(counts)[:, None]
        labels = torch.randint(0, CLASSES, (batch, most), generator=g)
        self.labels = labels.masked_fill(~self.valid, -1)
        self.masks = torch.rand(batch, most, 12, 20, generator=g) < 0.4
        self.masks &= self.valid[..., None, None]

    def costs(self) -> Tensor:
        return whole_mask_costs(
            self.class_logits, self.mask_logits, self.labels, self.masks, WEIGHTS
        )

    def match(self) -> Tensor:
        return match_whole_masks(
            self.class_logits, self.mask_logits, self.labels, self.masks, WEIGHTS
        )


def naive_focal(x: float, y: int) -> float:
    """The formula of RetinaNet, word for word, alpha 0.25 and gamma 2."""
    p = 1 / (1 + math.exp(-x))
    p_t, alpha_t = (p, 0.25) if y else (1 - p, 0.75)
    return -alpha_t * (1 - p_t) ** 2 * math.log(p_t)


def naive_dice(x: Tensor, y: Tensor) -> float:
    p = x.sigmoid()
    return float(1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1))


def naive_mask(x: Tensor, y: Tensor) -> float:
    pixels = zip(x.flatten().tolist(), y.flatten().tolist(), strict=True)
    return sum(naive_focal(a, int(b)) for a, b in pixels) / x.numel()


def test_focal_of_an_element() -> None:
    logits = torch.linspace(-9, 9, 37)
    for y in (0, 1):
        found = sigmoid_focal(logits, torch.full_like(logits, y))
        expected = torch.tensor([naive_focal(x, y) for x in logits.tolist()])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-9)
    # a hand value: p = 1/2, so (1 - p)^2 log 2 / 4
    assert sigmoid_focal(torch.zeros(1), torch.ones(1)).item() == pytest.approx(math.log(2) / 16)
    extreme = sigmoid_focal(torch.tensor([-1e4, 1e4]), torch.tensor([1.0, 0.0]))
    torch.testing.assert_close(extreme, torch.tensor([0.25e4, 0.75e4]))


def test_costs_of_pairs_are_losses_of_pairs() -> None:
    case = Case(0, [3, 2])
    logits, truth = case.mask_logits.flatten(3), case.masks[..., ::4, ::4].flatten(2).float()
    found = focal_costs(logits, truth)
    for layer, b, q, n in itertools.product(range(2), range(2), range(QUERIES), range(3)):
        one = sigmoid_focal(logits[layer, b, q], truth[b, n]).mean()
        torch.testing.assert_close(found[layer, b, q, n], one, rtol=1e-5, atol=1e-6)


def test_costs_against_a_loop() -> None:
    """Truth is taken at the nearest pixel, the top left one of each cell."""
    case = Case(1, [3, 2])
    costs = case.costs()
    assert costs.shape == (2, 2, QUERIES, 3)
    for layer, b, q, n in itertools.product(range(2), range(2), range(QUERIES), range(3)):
        if not case.valid[b, n]:
            continue
        x, y = case.mask_logits[layer, b, q], case.masks[b, n, ::4, ::4].float()
        p = case.class_logits[layer, b, q].softmax(-1)[case.labels[b, n]]
        want = -float(p) + 20 * naive_mask(x, y) + naive_dice(x, y)
        assert costs[layer, b, q, n].item() == pytest.approx(want, rel=1e-4)


@settings(max_examples=20, deadline=None)
@given(
    st.integers(0, 10**6), st.lists(st.integers(0, 3), min_size=1, max_size=3), st.integers(1, 5)
)
def test_matching_is_optimal(seed: int, counts: list[int], queries: int) -> None:
    case = Case(seed, [*counts, 1], queries)
    costs, matched = case.costs(), case.match()
    for layer, (b, count) in itertools.product(range(2), enumerate([*counts, 1])):
        own = matched[layer, b]
        pairs = [(int(q), n) for n, q in enumerate(own) if q >= 0]
        assert (own[count:] == -1).all() and len(pairs) == min(count, queries)
        assert len({q for q, _ in pairs}) == len(pairs)
        table = costs[layer, b, :, :count]
        table = table if queries >= count else table.T
        best = min(
            sum(float(table[row, column]) for column, row in enumerate(order))
            for order in itertools.permutations(range(len(table)), table.shape[1])
        )
        assert sum(float(costs[layer, b, q, n]) for q, n in pairs) == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_costs_that_are_not_finite_are_avoided(bad: float) -> None:
    case = Case(2, [3, 2])
    case.mask_logits[:, :, 1] = bad
    matched = case.match()
    assert (matched >= 0).equal(case.valid.expand(2, -1, -1)) and not (matched == 1).any()


def test_losses_against_a_loop() -> None:
    """Every matched mask of every layer, at the truth's size, over the number of segments."""
    case = Case(3, [3, 1])
    matched = case.match()
    matched[0, 0, 1] = -1
    focal = dice = 0.0
    for layer, b, n in itertools.product(range(2), range(2), range(3)):
        q = int(matched[layer, b, n])
        if q < 0:
            continue
        x = F.interpolate(case.mask_logits[layer, b, q][None, None], (12, 20), mode="bilinear")
        y = case.masks[b, n].float()
        focal, dice = focal + naive_mask(x, y), dice + naive_dice(x[0, 0], y)
    found = whole_mask_losses(case.mask_logits, matched, case.masks, torch.tensor(4.0))
    assert found[0].item() == pytest.approx(focal / 4, rel=1e-4)
    assert found[1].item() == pytest.approx(dice / 4, rel=1e-4)


def test_what_is_not_matched_learns_nothing() -> None:
    case = Case(4, [3, 0])
    logits = case.mask_logits.requires_grad_()
    matched = case.match()
    sum(whole_mask_losses(logits, matched, case.masks, 3.0), torch.zeros(())).backward()
    assert logits.grad is not None
    for layer, b, q in itertools.product(range(2), range(2), range(QUERIES)):
        assert bool(logits.grad[layer, b, q].any()) == bool((matched[layer, b] == q).any())
    nothing = whole_mask_losses(logits, torch.full_like(matched, -1), case.masks, 1.0)
    assert [value.item() for value in nothing] == [0.0, 0.0]
    torch.stack(nothing).sum().backward()  # a graph all the same: no process waits for another


def test_half_precision_is_matched_and_summed_in_fp32() -> None:
    case = Case(5, [3, 2])
    case.mask_logits = case.mask_logits.bfloat16()
    matched, costs = case.match(), case.costs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.costs(), costs) and costs.dtype == torch.float32
        lower = whole_mask_losses(case.mask_logits, matched, case.masks, 5.0)
    exact = whole_mask_losses(case.mask_logits.float(), matched, case.masks, 5.0)
    for one, other in zip(lower, exact, strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


# --- against transformers' MaskFormer ---------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_matching_losses_and_gradients_of_transformers(seed: int) -> None:
    peer = pytest.importorskip("transformers.models.maskformer.modeling_maskformer")
    counts = [3, 2, 1]
    case = Case(seed, counts)
    masks, classes = case.mask_logits.requires_grad_(), case.class_logits.requires_grad_()
    truth = [own[:n].float() for own, n in zip(case.masks, counts, strict=True)]
    labels = [own[:n] for own, n in zip(case.labels, counts, strict=True)]
    matcher = peer.MaskFormerHungarianMatcher(cost_class=1.0, cost_mask=20.0, cost_dice=1.0)
    loss = peer.MaskFormerLoss(CLASSES, matcher, {}, 0.1)
    matched = case.match()
    for layer in range(2):
        theirs = matcher(masks[layer], classes[layer], truth, labels)
        for b, (queries, segments) in enumerate(theirs):
            assert torch.equal(matched[layer, b, segments], queries)
    inner = [{"masks_queries_logits": masks[0], "class_queries_logits": classes[0]}]
    found = loss(masks[1], classes[1], truth, labels, inner)
    focal, dice = whole_mask_losses(masks, matched, case.masks, float(sum(counts)))
    ours = {
        "loss_mask": focal,
        "loss_dice": dice,
        "loss_cross_entropy": class_loss(classes, matched, case.labels, 0.1),
    }
    for name, value in ours.items():
        both = found[name] + found[f"{name}_0"]  # of the last layer and of the one before
        torch.testing.assert_close(value, both, rtol=1e-5, atol=1e-6)
    wanted = torch.autograd.grad(sum(found.values()), (masks, classes))
    got = torch.autograd.grad(sum(ours.values(), torch.zeros(())), (masks, classes))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)
