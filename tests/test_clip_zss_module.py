"""The pixel module of CLIP-ZSS against loops over images, classes and pixels."""

from __future__ import annotations

import math
from typing import cast

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import sigmoid_focal_loss

from concat_cli.core.clip.encoder import Clip
from concat_cli.core.train.teacher import Teacher
from concat_cli.methods.clip_zss.config import ClipZssConfig
from concat_cli.methods.clip_zss.module import ClipZssModule, FusedLabels, without_missed
from concat_cli.methods.clip_zss.student import build_student, build_synthesizer

IMAGES, WIDTH, SEEN, PSEUDO = 3, 8, 3, 2
CHANNELS = SEEN + PSEUDO
GRID, FULL = (3, 4), (12, 16)


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def module(synthesizer: int = 1, full_size: bool = False) -> ClipZssModule:
    """With a weight of its own for each loss, and a bank of four rows, two of them used."""
    cfg = ClipZssConfig(
        head_width=8, logit_scale=6.0, focal=20.0, dice=3.0, classes=0.5, full_size=full_size,
        bank=4, pseudo=True, most=PSEUDO, synthesizer=synthesizer, heads=2, prototypes=0.7,
        prototype_scale=5.0,
    )  # fmt: skip
    torch.manual_seed(0)
    made = build_synthesizer(cfg, WIDTH)
    never_asked = Teacher(cast(Clip, None), 1)
    student, text = build_student(cfg, WIDTH), F.normalize(normal(SEEN, WIDTH, seed=1), dim=1)
    found = ClipZssModule(student, made, text, torch.arange(SEEN), cfg, never_asked).double()
    if found.synthesizer is not None:
        nn.init.normal_(found.synthesizer.out.weight, std=0.5)
        found.bank.tokens.copy_(normal(4, WIDTH, seed=2))
        found.bank.valid[:2] = True
    return found


def drawn(seed: int) -> FusedLabels:
    """A random label for each pixel: none, a seen class, or one of its image's pseudo classes; of
    those the first image has all, the last one none."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(-1, CHANNELS, (IMAGES, *FULL), generator=generator)
    counts = torch.tensor([PSEUDO, 1, 0])
    active = torch.arange(CHANNELS) < SEEN + counts[:, None]
    none = labels >= SEEN + counts[:, None, None]
    return FusedLabels(labels.masked_fill(none, -1), active)


def at_grid(labels: Tensor) -> Tensor:
    """(B, H, W) -> (B, h, w): what the centres of squares of 4x4 pixels hold."""
    return labels[:, 2::4, 2::4]


# --- pseudo classes without a position ------------------------------------------------------------


def naive_without_missed(fused: FusedLabels) -> FusedLabels:
    labels, active = fused.labels.clone(), fused.active.clone()
    for b, grid in enumerate(at_grid(fused.labels)):
        for channel in range(SEEN, CHANNELS):
            if channel not in grid.flatten().tolist():
                active[b, channel] = False
                labels[b][labels[b] == channel] = -1
    return FusedLabels(labels, active)


def planted() -> FusedLabels:
    """One image of seen class 0, 1 in a corner's pixel; pseudo classes: two, around one position
    each."""
    labels = torch.zeros(1, *FULL, dtype=torch.int64)
    labels[0, 0, 15] = 1  # which no position belongs to
    labels[0, 4:8, 4:8] = -1
    labels[0, 1:4, 1:4] = SEEN
    labels[0, 10, 10] = SEEN + 1
    return FusedLabels(labels, torch.ones(1, CHANNELS, dtype=torch.bool))


def test_a_pseudo_class_of_no_position_is_dropped() -> None:
    """One pixel off the centre of a position: the region has none. Seen classes stay."""
    hit = planted()
    labels = hit.labels.clone()
    labels[0, 10, 10], labels[0, 11, 10] = 0, SEEN + 1
    found = without_missed(FusedLabels(labels, hit.active), GRID, SEEN)
    assert found.active.tolist() == [[True, True, True, True, False]]
    assert found.labels[0, 11, 10] == -1 and found.labels[0, 0, 15] == 1
    changed = found.labels != labels
    assert changed.sum() == 1 and changed[0, 11, 10]


def test_regions_that_all_have_a_position_stay() -> None:
    hit = planted()
    found = without_missed(hit, GRID, SEEN)
    assert torch.equal(found.labels, hit.labels) and torch.equal(found.active, hit.active)


def test_missed_regions_against_a_loop() -> None:
    dropped = 0
    for seed in range(20):
        fused = drawn(seed)
        found, want = without_missed(fused, GRID, SEEN), naive_without_missed(fused)
        assert torch.equal(found.labels, want.labels) and torch.equal(found.active, want.active)
        dropped += int((fused.active & ~want.active).sum())
    assert dropped > 3


# --- prototypes -----------------------------------------------------------------------------------


def naive_prototypes(
    model: ClipZssModule, features: Tensor, fused: FusedLabels, cls: Tensor
) -> tuple[list[dict[int, Tensor]], float]:
    """Per image the prototypes of the channels that are there, and L_bce; the synthesizer is given
    one image at a time and nothing that it must not read."""
    prototypes: list[dict[int, Tensor]] = []
    loss, count = 0.0, 0
    used = [row for row, valid in zip(model.bank.tokens, model.bank.valid, strict=True) if valid]
    for image, labels, own in zip(features, at_grid(fused.labels), cls, strict=True):
        there = sorted(set(labels.flatten().tolist()) - {-1})
        made = torch.stack([image[:, labels == channel].mean(1) for channel in there])
        if model.synthesizer is not None:
            tokens, every = torch.stack([own, *used]), torch.ones(1, 9, dtype=torch.bool)
            made = model.synthesizer(
                made[None], every[:, : len(made)], tokens[None], every[:, : len(tokens)]
            )[0]
        prototypes.append(dict(zip(there, made, strict=True)))
        for channel, prototype in prototypes[-1].items():
            if channel < SEEN:
                likely = [
                    torch.sigmoid(5 * F.cosine_similarity(prototype, text, dim=0))
                    for text in model.text
                ]
                others = [math.log(1 - p) for k, p in enumerate(likely) if k != channel]
                loss -= math.log(likely[channel]) + sum(others) / len(others)
                count += 1
    return prototypes, loss / count


@torch.no_grad()
@pytest.mark.parametrize("seed", range(3))
def test_prototypes_against_a_loop(seed: int) -> None:
    """Only those that are there count, and the unused rows of the bank are not read."""
    model, fused = module(), naive_without_missed(drawn(seed))
    features = normal(IMAGES, WIDTH, *GRID, seed=seed)
    cls = F.normalize(normal(IMAGES, WIDTH, seed=seed + 100), dim=1)
    found, losses = model._prototypes(features, fused, cls)
    want, loss = naive_prototypes(model, features, fused, cls)
    assert losses.keys() == {"prototypes"} and found is not None
    assert losses["prototypes"].item() == pytest.approx(0.7 * loss, rel=1e-6)
    pseudo = {(b, c): made[c] for b, made in enumerate(want) for c in made if c >= SEEN}
    assert pseudo and found.shape == (IMAGES, PSEUDO, WIDTH)
    for (b, channel), prototype in pseudo.items():
        torch.testing.assert_close(found[b, channel - SEEN], prototype)


@torch.no_grad()
def test_without_a_synthesizer_centroids_are_the_prototypes() -> None:
    model, fused = module(synthesizer=0), naive_without_missed(drawn(0))
    features = normal(IMAGES, WIDTH, *GRID, seed=0)
    found, losses = model._prototypes(features, fused, None)
    want, _ = naive_prototypes(model, features, fused, torch.zeros(IMAGES, WIDTH))
    assert losses == {} and found is not None
    for b, made in enumerate(want):
        for channel in range(SEEN, CHANNELS):
            centroid = made.get(channel, torch.zeros(WIDTH, dtype=torch.float64))
            torch.testing.assert_close(found[b, channel - SEEN], centroid)


# --- losses of the pixels -------------------------------------------------------------------------


def naive_logits(model: ClipZssModule, image: Tensor, prototypes: dict[int, Tensor]) -> Tensor:
    """(C, h, w) of one image; a pseudo class that it has not got: 0."""
    logits = image.new_zeros(CHANNELS, *GRID)
    named = dict(enumerate(model.text)) | {c: p for c, p in prototypes.items() if c >= SEEN}
    for channel, vector in named.items():
        for y in range(GRID[0]):
            for x in range(GRID[1]):
                logits[channel, y, x] = 6 * F.cosine_similarity(image[:, y, x], vector, dim=0)
    return logits


def enlarged(grid: Tensor) -> Tensor:
    """(C, h, w) -> (C, H, W): pixel by pixel between the centres of the nearest positions."""
    found = grid.new_zeros(len(grid), *FULL)
    for row in range(FULL[0]):
        for column in range(FULL[1]):
            y = min(max((row + 0.5) / 4 - 0.5, 0), GRID[0] - 1)
            x = min(max((column + 0.5) / 4 - 0.5, 0), GRID[1] - 1)
            top, left = int(y), int(x)
            below, right = min(top + 1, GRID[0] - 1), min(left + 1, GRID[1] - 1)
            above = grid[:, top, left] * (left + 1 - x) + grid[:, top, right] * (x - left)
            under = grid[:, below, left] * (left + 1 - x) + grid[:, below, right] * (x - left)
            found[:, row, column] = above * (top + 1 - y) + under * (y - top)
    return found


def naive_losses(logits: list[Tensor], labels: Tensor, active: Tensor) -> dict[str, float]:
    """Pixel by pixel; each loss over what it is counted by."""
    focal = dice = cross = 0.0
    pixels = masks = 0
    for x, truth, there in zip(logits, labels, active, strict=True):
        known = [(x[:, p], int(truth[p])) for p in range(len(truth)) if truth[p] >= 0]
        for column, label in known:
            one_hot = F.one_hot(torch.tensor(label), CHANNELS).double()
            each = sigmoid_focal_loss(column[there], one_hot[there], 0.25, 2)
            focal += float(each.sum()) / len(known)
            cross += float(column[there].logsumexp(0) - column[label])
        pixels += len(known)
        for channel in {label for _, label in known}:
            likely = [float(column[channel].sigmoid()) for column, _ in known]
            own = [p for p, (_, label) in zip(likely, known, strict=True) if label == channel]
            dice += 1 - (2 * sum(own) + 1) / (sum(likely) + len(own) + 1)
            masks += 1
    return {"focal": 20 * focal / masks, "dice": 3 * dice / masks, "classes": 0.5 * cross / pixels}


@torch.no_grad()
@pytest.mark.parametrize("full_size", [False, True])
@pytest.mark.parametrize("seed", range(2))
def test_losses_of_pixels_against_a_loop(seed: int, full_size: bool) -> None:
    model, fused = module(full_size=full_size), naive_without_missed(drawn(seed))
    features = normal(IMAGES, WIDTH, *GRID, seed=seed)
    cls = F.normalize(normal(IMAGES, WIDTH, seed=seed + 100), dim=1)
    found = model._pixels(features, fused, model._prototypes(features, fused, cls)[0])
    prototypes, _ = naive_prototypes(model, features, fused, cls)
    logits = [naive_logits(model, *pair) for pair in zip(features, prototypes, strict=True)]
    logits = [enlarged(grid) if full_size else grid for grid in logits]
    labels = fused.labels if full_size else at_grid(fused.labels)
    assert (labels < 0).any() and not fused.active.all()
    want = naive_losses([x.flatten(1) for x in logits], labels.flatten(1), fused.active)
    assert {name: value.item() for name, value in found.items()} == pytest.approx(want, rel=1e-6)


@torch.no_grad()
@pytest.mark.parametrize("full_size", [False, True])
def test_where_nothing_is_known_losses_are_0(full_size: bool) -> None:
    model, features = module(full_size=full_size), normal(IMAGES, WIDTH, *GRID, seed=0)
    active = torch.arange(CHANNELS).expand(IMAGES, -1) < SEEN
    nothing = FusedLabels(torch.full((IMAGES, *FULL), -1), active)
    prototypes, losses = model._prototypes(features, nothing, features[..., 0, 0])
    losses |= model._pixels(features, nothing, prototypes)
    assert {name: value.item() for name, value in losses.items()} == dict.fromkeys(losses, 0.0)
    assert losses.keys() == {"prototypes", "focal", "dice", "classes"}
