"""The losses of CLIP-ZSS against loops over images, classes and pixels."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from concat_cli.methods.clip_zss.module import (
    centroids,
    nel,
    pixel_cross_entropy,
    pixel_logits,
    pooled_by_cls,
    present_channels,
    prototype_bce,
)

SHAPES = st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 7))  # B, C, P


def rows(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def drawn_targets(images: int, channels: int, positions: int, seed: int) -> tuple[Tensor, Tensor]:
    """Targets with void, and active channels that hold them."""
    generator = torch.Generator().manual_seed(seed)
    active = torch.rand(images, channels, generator=generator) < 0.6
    targets = torch.randint(-1, channels, (images, positions), generator=generator)
    held = active.gather(1, targets.clamp(min=0)) & (targets >= 0)
    return torch.where(held, targets, -1), active


def cosine(a: Tensor, b: Tensor) -> float:
    return float(a @ b / a.norm() / b.norm())


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


# --- NEL ----------------------------------------------------------------------------------------


def naive_nel(logits: Tensor, targets: Tensor, active: Tensor) -> tuple[float, float]:
    focal = dice = 0.0
    for b in range(len(logits)):
        known = [p for p in range(targets.shape[1]) if targets[b, p] >= 0]
        for c in range(logits.shape[1]):
            probability = [sigmoid(float(logits[b, c, p])) for p in known]
            truth = [int(targets[b, p]) == c for p in known]
            if active[b, c]:
                for prob, is_true in zip(probability, truth, strict=True):
                    right = prob if is_true else 1 - prob
                    weight = 0.25 if is_true else 0.75
                    focal += weight * (1 - right) ** 2 * -math.log(right) / len(known)
            if any(truth):
                hit = sum(p for p, t in zip(probability, truth, strict=True) if t)
                dice += 1 - (2 * hit + 1) / (sum(probability) + sum(truth) + 1)
    return focal, dice


@settings(max_examples=40, deadline=None)
@given(SHAPES, st.integers(0, 1000))
def test_nel_against_loops(shape: tuple[int, int, int], seed: int) -> None:
    logits = rows(*shape, seed=seed)
    targets, active = drawn_targets(*shape, seed=seed)
    focal, dice = naive_nel(logits, targets, active)
    found = nel(logits, targets, active, 3.0)
    assert found.focal.item() == pytest.approx(focal / 3, abs=1e-9)
    assert found.dice.item() == pytest.approx(dice / 3, abs=1e-9)


def test_nel_is_zegclips_where_nothing_is_void() -> None:
    """The formula of its code, with one-hot targets over whole images."""
    logits, channels = rows(2, 4, 30), 4
    targets = torch.randint(0, channels, (2, 30), generator=torch.Generator().manual_seed(5))
    one_hot = F.one_hot(targets, channels).transpose(1, 2).double()  # (B, C, P)
    bce = F.binary_cross_entropy_with_logits(logits, one_hot, reduction="none")
    right = logits.sigmoid() * one_hot + (1 - logits.sigmoid()) * (1 - one_hot)
    each = (0.25 * one_hot + 0.75 * (1 - one_hot)) * (1 - right) ** 2 * bce
    prob, held = logits.sigmoid()[one_hot.any(-1)], one_hot[one_hot.any(-1)]
    dice = 1 - (2 * (prob * held).sum(-1) + 1) / (prob.sum(-1) + held.sum(-1) + 1)
    masks = len(held)
    found = nel(logits, targets, torch.ones(2, 4, dtype=torch.bool), masks)
    torch.testing.assert_close(found.focal, each.flatten(0, 1).mean(1).sum() / masks)
    torch.testing.assert_close(found.dice, dice.sum() / masks)


def test_void_and_channels_that_are_not_active_carry_no_signal() -> None:
    logits = rows(2, 4, 9).requires_grad_()
    targets, active = drawn_targets(2, 4, 9, seed=3)
    assert (targets < 0).any() and (~active).any()
    found = nel(logits, targets, active, 1.0)
    cross = pixel_cross_entropy(logits, targets, active, 1.0)
    (gradient,) = torch.autograd.grad(found.focal + found.dice + cross, logits)
    assert gradient.transpose(1, 2)[targets < 0].abs().max() == 0
    assert gradient[~active].abs().max() == 0
    moved = gradient.abs().sum(1)[targets >= 0]
    assert (moved > 0).all()


def test_present_channels() -> None:
    targets = torch.tensor([[0, -1, 2, 2], [-1, -1, -1, -1]])
    assert present_channels(targets, 3).tolist() == [[True, False, True], [False] * 3]


def test_everything_void_is_no_loss_and_finite() -> None:
    logits = rows(2, 3, 4).requires_grad_()
    targets = torch.full((2, 4), -1)
    active = torch.ones(2, 3, dtype=torch.bool)
    found = nel(logits, targets, active, 1.0)
    total = found.focal + found.dice + pixel_cross_entropy(logits, targets, active, 1.0)
    (gradient,) = torch.autograd.grad(total, logits)
    assert total.item() == 0 and gradient.abs().max() == 0


# --- cross-entropy and the logits -----------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.integers(0, 1000))
def test_cross_entropy_against_loops(shape: tuple[int, int, int], seed: int) -> None:
    logits = rows(*shape, seed=seed)
    targets, active = drawn_targets(*shape, seed=seed)
    want = 0.0
    for b in range(shape[0]):
        for p in range(shape[2]):
            if targets[b, p] >= 0:
                there = [float(logits[b, c, p]) for c in range(shape[1]) if active[b, c]]
                own = float(logits[b, targets[b, p], p])
                want += math.log(sum(map(math.exp, there))) - own
    got = pixel_cross_entropy(logits, targets, active, 4.0)
    assert got.item() == pytest.approx(want / 4, abs=1e-9)


def test_logits_are_scaled_cosines_to_texts_then_to_the_images_own_prototypes() -> None:
    features, text, pseudo = rows(2, 6, 5), rows(3, 6, seed=1), rows(2, 2, 6, seed=2)
    got = pixel_logits(features, text, pseudo, torch.tensor(7.0, dtype=torch.float64))
    assert got.shape == (2, 5, 5)
    for b in range(2):
        for c, vector in enumerate([*text, *pseudo[b]]):
            for p in range(5):
                want = 7 * cosine(features[b, :, p], vector)
                assert got[b, c, p].item() == pytest.approx(want)
    plain = pixel_logits(features, text, None, torch.tensor(7.0, dtype=torch.float64))
    torch.testing.assert_close(plain, got[:, :3])
    apart = pixel_logits(features, text, pseudo, torch.tensor(7.0, dtype=torch.float64), 3.5)
    torch.testing.assert_close(apart, torch.cat((got[:, :3], got[:, 3:] / 2), 1))


@settings(max_examples=30, deadline=None)
@given(SHAPES, st.integers(0, 1000))
def test_centroids_against_loops(shape: tuple[int, int, int], seed: int) -> None:
    images, channels, positions = shape
    features = rows(images, 6, positions, seed=seed)
    targets, _ = drawn_targets(images, channels, positions, seed=seed)
    found = centroids(features, targets, channels)
    for b in range(images):
        for c in range(channels):
            inside = [features[b, :, p] for p in range(positions) if targets[b, p] == c]
            want = torch.stack(inside).mean(0) if inside else torch.zeros(6, dtype=torch.float64)
            torch.testing.assert_close(found[b, c], want)


# --- the global module ----------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [0.0, 0.2])
def test_pooling_by_the_cls_token_against_a_loop(temperature: float) -> None:
    features, cls = rows(3, 6, 5), F.normalize(rows(3, 6, seed=1), dim=-1)
    valid = torch.tensor([[1, 1, 0, 1, 1], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    found = pooled_by_cls(features, cls, valid, temperature)
    for b in range(3):
        columns = [features[b, :, p] for p in range(5) if valid[b, p]]
        if temperature:
            columns = [column / column.norm() for column in columns]
        scores = [float(cls[b] @ column) / (temperature or 6**0.5) for column in columns]
        total = sum(map(math.exp, scores))
        want = sum(math.exp(s) / total * c for s, c in zip(scores, columns, strict=True))
        torch.testing.assert_close(found[b], want)


def test_padding_takes_no_part_in_the_pooling() -> None:
    features, cls = rows(1, 6, 5), F.normalize(rows(1, 6, seed=1), dim=-1)
    valid = torch.tensor([[True, True, True, False, False]])
    small = pooled_by_cls(features[..., :3], cls, None, 0.0)
    torch.testing.assert_close(pooled_by_cls(features, cls, valid, 0.0), small)


# --- prototypes -----------------------------------------------------------------------------------


def test_prototype_bce_against_loops() -> None:
    prototypes, text = rows(2, 4, 6), rows(4, 6, seed=1)
    present = torch.tensor([[True, False, True, True], [False, False, False, True]])
    want = 0.0
    for b in range(2):
        for k in range(4):
            if not present[b, k]:
                continue
            likely = [sigmoid(5 * cosine(prototypes[b, k], t)) for t in text]
            want -= math.log(likely[k])
            want -= sum(math.log(1 - p) for j, p in enumerate(likely) if j != k) / 3
    got = prototype_bce(prototypes, present, text, 5.0, 4.0)
    assert got.item() == pytest.approx(want / 4)


def test_prototype_bce_of_one_class_and_of_none() -> None:
    one = prototype_bce(rows(1, 1, 6), torch.tensor([[True]]), rows(1, 6, seed=1), 5.0, 1.0)
    want = -math.log(sigmoid(5 * cosine(rows(1, 1, 6)[0, 0], rows(1, 6, seed=1)[0])))
    assert one.item() == pytest.approx(want)
    prototypes = torch.zeros(2, 3, 6, requires_grad=True)  # what absent centroids are
    none = prototype_bce(prototypes, torch.zeros(2, 3).bool(), rows(3, 6).float(), 5.0, 1.0)
    none.backward()
    assert none.item() == 0 and torch.isfinite(prototypes.grad).all()  # type: ignore[arg-type]
