"""Losses on tokens against naive loops."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from mini import scene

from concat_cli.core.data.loader import collate
from concat_cli.core.model.layers import area_mean
from concat_cli.methods.concat import con_module as dense


def test_coverage_and_classes_of_tokens():
    torch.manual_seed(0)
    batch = collate([scene([4, 5], 16, 1), scene([6], 16, 2)], [0, 1], 16)
    masks, labels = batch.masks(), batch.labels
    masks[0, 0, :4, :4], masks[0, 1, :4, :4] = True, False  # one token that is full
    share = area_mean(masks, (4, 4))
    classes = dense.token_classes(share, labels)
    for b, y, x in np.ndindex(2, 4, 4):
        cell = masks[b, :, 4 * y : 4 * y + 4, 4 * x : 4 * x + 4].float().mean((1, 2))
        torch.testing.assert_close(share[b, :, y, x], cell)
        best = int(cell.argmax())
        expected = int(labels[b, best]) if cell[best] > 0.5 else -1
        assert classes[b, 4 * y + x] == expected
    assert classes[0, 0] == 4
    unknown = dense.token_classes(share, torch.full_like(labels, -1))
    assert (unknown == -1).all()


@pytest.mark.parametrize("size", [(12, 24), (6, 12), (4, 8), (5, 7)])
def test_means_of_areas_are_those_of_torch(size: tuple[int, int]):
    maps = torch.rand(2, 3, 12, 24)
    wanted = F.interpolate(maps, size=size, mode="area")
    torch.testing.assert_close(area_mean(maps, size), wanted)
    masks = maps > 0.5
    wanted = F.interpolate(masks.float(), size=size, mode="area")
    torch.testing.assert_close(area_mean(masks, size), wanted)


def test_seeds_lie_inside_their_segments():
    masks = torch.zeros(1, 3, 40, 40, dtype=torch.bool)
    masks[0, 0, 4:36, :20] = True  # a large one
    masks[0, 1, :8, 32:] = True  # a small one in a corner
    share = area_mean(masks, (10, 10))
    target = dense.seed_tokens(share, torch.tensor([[7, 8, -1]]))
    places = target[0].nonzero()[:, 0].tolist()
    assert len(places) == 2 and target.max() == 1
    for place in places:
        assert share[0, :2, place // 10, place % 10].max() == 1
    inner = [place for place in places if place % 10 < 5]
    assert len(inner) == 1 and 2 <= inner[0] // 10 <= 7  # away from the large one's border


def test_token_losses_are_naive_means():
    torch.manual_seed(0)
    logits, target = torch.randn(2, 5), (torch.rand(2, 5) < 0.3).float()
    valid = torch.rand(2, 5) < 0.7
    terms = []
    for b, t in np.ndindex(2, 5):
        p = torch.sigmoid(logits[b, t])
        loss = -(5.0 * target[b, t] * p.log() + (1 - target[b, t]) * (1 - p).log())
        terms.append((loss, bool(valid[b, t])))
    everywhere = torch.stack([loss for loss, _ in terms]).mean()
    inside = torch.stack([loss for loss, ok in terms if ok]).mean()
    classes = torch.zeros(2, 5, dtype=torch.int64)
    for usable, expected in ((torch.ones_like(valid), everywhere), (valid, inside)):
        targets = dense.TokenTargets(target, usable, classes)
        found = dense.objectness_loss(logits, targets, 5.0, usable.sum())
        torch.testing.assert_close(found, expected)
    class_logits, classes = torch.randn(2, 5, 4), torch.tensor([[0, -1, 2, 1, -1], [-1] * 5])
    naive = [
        -class_logits[b, t].log_softmax(-1)[classes[b, t]]
        for b, t in np.ndindex(2, 5)
        if classes[b, t] >= 0
    ]
    torch.testing.assert_close(
        dense.token_class_loss(class_logits, classes, torch.tensor(3)), torch.stack(naive).mean()
    )
    nothing = torch.full((2, 5), -1)
    assert dense.token_class_loss(class_logits, nothing, torch.tensor(1)) == 0
