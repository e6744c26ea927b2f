"""CAT: moment matching, query contrast and the cycle loss against naive loops."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from concat_cli.methods.concat.generator import (
    cycle_loss,
    mean_distance,
    moment_matching,
    query_contrast,
)

BANDWIDTHS = (0.25, 0.5, 1.0, 2.0, 4.0)


def rows(count: int, seed: int, width: int = 5) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator, dtype=torch.float64)


def cosine(a: Tensor, b: Tensor) -> float:
    a, b = a.detach(), b.detach()
    return float(a @ b / a.norm() / b.norm())


def naive_mmd(fake: Tensor, real: Tensor, sigmas: list[float]) -> float:
    def mean_kernel(a: Tensor, b: Tensor, sigma: float) -> float:
        kernels = [math.exp(-float((x - y).square().sum()) / (2 * sigma**2)) for x in a for y in b]
        return sum(kernels) / len(kernels)

    squared = sum(
        mean_kernel(fake, fake, s) - 2 * mean_kernel(fake, real, s) + mean_kernel(real, real, s)
        for s in sigmas
    )
    return math.sqrt(max(squared, 0.0))


def test_mean_distance_against_a_loop() -> None:
    real = rows(7, 0)
    pairs = [
        float((a - b).norm()) for i, a in enumerate(real) for j, b in enumerate(real) if i != j
    ]
    assert mean_distance(real).item() == pytest.approx(sum(pairs) / len(pairs))


def test_moment_matching_against_a_loop() -> None:
    fake, real = rows(6, 0) + 0.5, rows(9, 1)
    unit = mean_distance(real).item()
    want = naive_mmd(fake, real, [b * unit for b in BANDWIDTHS])
    assert moment_matching(fake, real, BANDWIDTHS).item() == pytest.approx(want, rel=1e-9)


def test_moment_matching_gradients() -> None:
    fake, real = (rows(5, 0) + 0.5).requires_grad_(), rows(6, 1)
    assert torch.autograd.gradcheck(lambda x: moment_matching(x, real, BANDWIDTHS), fake)


def test_moment_matching_of_equal_sets_is_zero_with_a_finite_gradient() -> None:
    for real in (rows(6, 1), rows(6, 1).float() * 100 + 1000, torch.ones(4, 3)):
        fake = real.clone().requires_grad_()
        loss = moment_matching(fake, real, BANDWIDTHS)
        (gradient,) = torch.autograd.grad(loss, fake)
        assert loss.item() == pytest.approx(0, abs=2e-3) and gradient.isfinite().all()


def test_moment_matching_keeps_its_gradient_near_zero() -> None:
    real = rows(6, 1)
    fake = (real + 1e-4 * rows(6, 2)).requires_grad_()
    loss = moment_matching(fake, real, BANDWIDTHS)
    (gradient,) = torch.autograd.grad(loss, fake)
    assert 0 < loss < 1e-3 and gradient.norm() > 1e-2


@settings(max_examples=20, deadline=None)
@given(st.floats(0.01, 100.0), st.floats(-50, 50))
def test_moment_matching_does_not_mind_scale_and_shift(scale: float, shift: float) -> None:
    fake, real = rows(6, 0) + 0.5, rows(9, 1)
    one = moment_matching(fake, real, BANDWIDTHS)
    other = moment_matching(fake * scale + shift, real * scale + shift, BANDWIDTHS)
    torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)


def test_moment_matching_pulls_mean_and_spread_to_the_real_ones() -> None:
    real = rows(100, 1).float() * torch.tensor([0.5, 1, 2, 1, 1]) + 3
    fake = (0.1 * rows(100, 2).float()).requires_grad_()
    optimiser = torch.optim.Adam([fake], lr=0.1)
    for _ in range(200):
        optimiser.zero_grad()
        moment_matching(fake, real, BANDWIDTHS).backward()
        optimiser.step()
    torch.testing.assert_close(fake.mean(0), real.mean(0), atol=0.2, rtol=0)
    ratio = fake.std(0) / real.std(0)
    assert ratio.min() > 0.7 and ratio.max() < 1.3


def naive_contrast(
    fake: Tensor,
    classes: list[int],
    real: Tensor,
    real_classes: list[int],
    unmatched: Tensor,
    temperature: float,
) -> float:
    losses = []
    for i, query in enumerate(fake):
        near = [math.exp(cosine(query, r) / temperature) for r in real]
        positives = [j for j, c in enumerate(real_classes) if c == classes[i]]
        if not positives:
            continue
        pull = sum(near[j] for j in positives) / len(positives)
        push = sum(math.exp(cosine(query, u) / temperature) for u in unmatched)
        losses.append(-math.log(pull / (pull + push)))
    return sum(losses) / max(len(losses), 1)


@settings(max_examples=40, deadline=None)
@given(st.data(), st.integers(1, 5), st.integers(1, 6), st.integers(0, 4))
def test_query_contrast_against_a_loop(
    data: st.DataObject, count: int, reals: int, empty: int
) -> None:
    label = st.integers(0, 3)
    classes = data.draw(st.lists(label, min_size=count, max_size=count))
    real_classes = data.draw(st.lists(label, min_size=reals, max_size=reals))
    fake, real, unmatched = rows(count, 0), rows(reals, 1), rows(empty, 2)
    of_fake, of_real = torch.tensor(classes), torch.tensor(real_classes)
    got = query_contrast(fake, of_fake, real, of_real, unmatched, 0.2)
    want = naive_contrast(fake, classes, real, real_classes, unmatched, 0.2)
    assert got.item() == pytest.approx(want, abs=1e-9)


def test_query_contrast_gradient() -> None:
    fake, real, unmatched = rows(4, 0).requires_grad_(), rows(4, 1), rows(3, 2)
    classes, real_classes = torch.tensor([0, 1, 1, 3]), torch.tensor([0, 1, 1, 2])

    def loss(x: Tensor) -> Tensor:
        return query_contrast(x, classes, real, real_classes, unmatched, 0.3)

    assert torch.autograd.gradcheck(loss, fake)


def test_query_contrast_without_positives_or_negatives_is_zero_with_a_finite_gradient() -> None:
    fake = rows(3, 0).float().requires_grad_()
    some, other = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5])
    real, empty = rows(3, 1).float(), rows(0, 2).float()
    for real_classes, unmatched in ((other, rows(4, 2).float()), (some, empty), (other, empty)):
        loss = query_contrast(fake, some, real, real_classes, unmatched, 0.1)
        (gradient,) = torch.autograd.grad(loss, fake)
        assert loss == 0 and not gradient.any()


def test_query_contrast_moves_to_the_class_and_away_from_empty_queries() -> None:
    real, unmatched = rows(8, 1).float(), rows(8, 2).float()
    classes = torch.arange(4).repeat(2)
    fake = rows(4, 3).float().requires_grad_()
    optimiser = torch.optim.Adam([fake], lr=0.05)
    before = query_contrast(fake, classes[:4], real, classes, unmatched, 0.1).item()
    for _ in range(60):
        optimiser.zero_grad()
        query_contrast(fake, classes[:4], real, classes, unmatched, 0.1).backward()
        optimiser.step()
    after = query_contrast(fake, classes[:4], real, classes, unmatched, 0.1).item()
    assert after < 0.2 * before
    for i in range(4):
        nearest = max(cosine(fake[i], real[j]) for j in (i, i + 4))
        assert nearest > max(cosine(fake[i], u) for u in unmatched)


def test_cycle_loss_against_a_loop() -> None:
    projected, text, labels = rows(6, 0), rows(4, 1), [3, 0, 1, 1, 2, 3]
    losses = []
    for query, label in zip(projected, labels, strict=True):
        logits = torch.tensor([7.0 * cosine(query, t) for t in text])
        losses.append(float(-F.log_softmax(logits, 0)[label]))
    got = cycle_loss(projected, text, torch.tensor(labels), 7.0)
    assert got.item() == pytest.approx(sum(losses) / 6, rel=1e-5)


def test_cycle_loss_gradient() -> None:
    projected, labels = rows(4, 0).requires_grad_(), torch.tensor([0, 2, 1, 1])
    assert torch.autograd.gradcheck(lambda x: cycle_loss(x, rows(3, 1), labels, 5.0), projected)


def test_losses_are_fp32_under_autocast() -> None:
    fake, real, unmatched = rows(6, 0).float(), rows(6, 1).float(), rows(4, 2).float()
    labels = torch.tensor([0, 1, 2, 0, 1, 2])

    def losses() -> list[Tensor]:
        return [
            moment_matching(fake, real, BANDWIDTHS),
            query_contrast(fake, labels, real, labels, unmatched, 0.1),
            cycle_loss(fake, real, labels),
        ]

    want = losses()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(a, b) for a, b in zip(losses(), want, strict=True))
