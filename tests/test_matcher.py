"""The matcher: costs against a loop, assignment against brute force, invariances, bad input."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from concat_cli.core.losses import match, match_costs, sample_at

pytestmark = pytest.mark.core

WEIGHTS = (2.0, 5.0, 5.0)


class Case:
    """Random predictions and truth; `counts` segments in each image."""

    def __init__(self, seed: int, counts: list[int], layers: int = 2, queries: int = 5) -> None:
        generator = torch.Generator().manual_seed(seed)
        batch, most, self.classes = len(counts), max(counts), 4
        self.class_logits = torch.randn(layers, batch, queries, 5, generator=generator)
        self.mask_logits = torch.randn(layers, batch, queries, 6, 6, generator=generator)
        segment_map = torch.randint(
            0, most + 1, (batch, 12, 12), generator=generator, dtype=torch.int32
        )
        count = torch.tensor(counts)[:, None, None]
        segment_map = segment_map * (segment_map <= count)
        self.masks = torch.stack([segment_map == i + 1 for i in range(most)], dim=1)
        self.labels = torch.randint(0, 4, (batch, most), generator=generator)
        self.valid = torch.arange(most)[None] < count[:, 0]
        self.labels = self.labels.masked_fill(~self.valid, -1)
        self.coords = torch.rand(batch, 20, 2, generator=generator)

    def costs(self) -> Tensor:
        return match_costs(
            self.class_logits, self.mask_logits, self.labels, self.masks, WEIGHTS, self.coords
        )

    def match(self) -> Tensor:
        return match(
            self.class_logits,
            self.mask_logits,
            self.labels,
            self.masks,
            WEIGHTS,
            self.coords,
        )


def naive_cost(case: Case, layer: int, image: int, query: int, segment: int) -> float:
    points = case.coords[image : image + 1]
    mask = case.masks[image, segment].float()
    x = sample_at(case.mask_logits[layer, image, query][None, None], points)[0, 0]
    y = sample_at(mask[None, None], points)[0, 0]
    p = x.sigmoid()
    bce = F.binary_cross_entropy_with_logits(x, y)
    dice = 1 - (2 * (p * y).sum() + 1) / (p.sum() + y.sum() + 1)
    label = case.labels[image, segment]
    probability = case.class_logits[layer, image, query].softmax(-1)[label]
    return float(-2 * probability + 5 * bce + 5 * dice)


def test_costs_against_a_loop() -> None:
    case = Case(0, [3, 2])
    costs = case.costs()
    assert costs.shape == (2, 2, 5, 3)
    for layer, image, query in itertools.product(range(2), range(2), range(5)):
        for segment in range(int(case.valid[image].sum())):
            want = naive_cost(case, layer, image, query, segment)
            assert costs[layer, image, query, segment].item() == pytest.approx(want, rel=1e-4)


def total(costs: Tensor, matched: Tensor) -> float:
    """Cost of the pairs of one image."""
    used = [(int(q), n) for n, q in enumerate(matched) if q >= 0]
    assert len({q for q, _ in used}) == len(used), "a query is matched twice"
    return sum(float(costs[q, n]) for q, n in used)


def cheapest(costs: Tensor) -> float:
    """Brute force over all assignments of a (Q, n) matrix."""
    costs = costs if costs.shape[0] >= costs.shape[1] else costs.T
    rows, columns = costs.shape
    return min(
        sum(float(costs[q, n]) for n, q in enumerate(order))
        for order in itertools.permutations(range(rows), columns)
    )


@settings(max_examples=25, deadline=None)
@given(
    st.integers(0, 10**6), st.lists(st.integers(0, 4), min_size=1, max_size=3), st.integers(1, 5)
)
def test_assignment_is_optimal(seed: int, counts: list[int], queries: int) -> None:
    case = Case(seed, [*counts, 1], queries=queries)
    costs, matched = case.costs(), case.match()
    for layer, (image, count) in itertools.product(range(2), enumerate([*counts, 1])):
        own = matched[layer, image]
        assert (own[count:] == -1).all()
        assert (own >= 0).sum() == min(count, queries)
        best = cheapest(costs[layer, image, :, :count])
        assert total(costs[layer, image], own) == pytest.approx(best, abs=1e-4)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.permutations(range(3)), st.permutations(range(5)))
def test_order_of_segments_and_queries_does_not_matter(
    seed: int, segments: list[int], queries: list[int]
) -> None:
    case = Case(seed, [3, 3])
    before = case.match()
    case.masks = case.masks[:, segments]
    case.labels = case.labels[:, segments]
    case.class_logits = case.class_logits[:, :, queries]
    case.mask_logits = case.mask_logits[:, :, queries]
    after = case.match()
    assert torch.equal(torch.tensor(queries)[after], before[..., segments])


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4))
def test_padding_does_not_matter(seed: int, more: int) -> None:
    case = Case(seed, [3, 1])
    before = case.match()
    case.labels = F.pad(case.labels, (0, more), value=-1)
    case.masks = F.pad(case.masks, (0, 0, 0, 0, 0, more))
    after = case.match()
    assert torch.equal(after[..., :3], before) and (after[..., 3:] == -1).all()


def test_valid_segments_need_not_come_first() -> None:
    case = Case(1, [3])
    case.labels[0, 1] = -1
    matched = case.match()
    assert (matched[..., 1] == -1).all() and (matched[..., [0, 2]] >= 0).all()
    best = cheapest(case.costs()[0, 0][:, [0, 2]])
    assert total(case.costs()[0, 0], matched[0, 0]) == pytest.approx(best, abs=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_costs_that_are_not_finite_are_avoided(bad: float) -> None:
    case = Case(4, [3, 2])
    case.mask_logits[:, :, 1] = bad
    case.class_logits[:, 0, 2] = bad
    matched = case.match()
    assert (matched >= 0).equal(case.valid.expand(2, -1, -1))
    if bad != float("-inf"):  # an empty mask is only a poor one
        assert not (matched == 1).any()
    assert not (matched[:, 0] == 2).any()  # softmax of equal infinities is not a number


def test_the_rest_stays_optimal_beside_a_cost_that_is_not_finite() -> None:
    case = Case(5, [3], layers=1, queries=3)
    case.mask_logits[0, 0, 1] = float("nan")
    (own,), costs = case.match()[0], case.costs()[0, 0]
    others = [n for n, q in enumerate(own.tolist()) if q != 1]
    chosen = sum(float(costs[own[n], n]) for n in others)
    swaps = itertools.permutations(range(3), 2)
    assert chosen == pytest.approx(
        min(float(costs[0, a] + costs[2, b]) for a, b in swaps), abs=1e-4
    )


@pytest.mark.parametrize(("queries", "segments"), [(0, 2), (3, 0)])
def test_nothing_to_match(queries: int, segments: int) -> None:
    matched = match(
        torch.zeros(1, 2, queries, 4),
        torch.zeros(1, 2, queries, 5, 5),
        torch.zeros(2, segments, dtype=torch.int64),
        torch.zeros(2, segments, 8, 8, dtype=torch.bool),
        WEIGHTS,
        torch.rand(2, 7, 2, generator=torch.Generator().manual_seed(0)),
    )
    assert matched.shape == (1, 2, segments) and (matched == -1).all()


def test_costs_stay_fp32_under_autocast() -> None:
    case = Case(6, [3, 2])
    want = case.costs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(case.costs(), want)
