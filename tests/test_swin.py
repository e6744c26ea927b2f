"""The Swin backbone by itself: where it agrees with timm, padding, training, precision."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from swin_helpers import TOY, toy_of_timm

from concat_cli.core.model.backbone import Backbone
from concat_cli.core.model.swin import SWINS


@pytest.fixture
def backbone(monkeypatch: pytest.MonkeyPatch) -> Backbone:
    monkeypatch.setitem(SWINS, "swin_toy", TOY)
    torch.manual_seed(0)
    return Backbone("swin_toy")


def test_it_equals_timms_where_nothing_is_padded(backbone: Backbone) -> None:
    """And only there: timm pads after the shift; what we need is Mask2Former's way."""
    theirs = toy_of_timm(always_partition=True, strict_img_size=False).eval()
    ours = backbone.eval()
    norms: Any = ours.body.norms
    ours.body.load_state_dict(theirs.state_dict(), strict=False)
    layers: Any = theirs.layers
    for side, equal in ((128, True), (96, False)):
        images = torch.randn(1, 3, side, side)
        with torch.no_grad():
            maps, features = ours(images), theirs.patch_embed(images)
            same = []
            for norm, stage, found in zip(norms, layers, maps, strict=True):
                features = stage(features)
                difference = norm(features).permute(0, 3, 1, 2) - found
                same.append(bool(difference.abs().max() < 1e-4))
        assert all(same) == equal and same[0]


@pytest.mark.parametrize("size", [(32, 64), (33, 50), (1, 1)])
def test_maps_of_every_size_of_image(backbone: Backbone, size: tuple[int, int]) -> None:
    maps = backbone.eval()(torch.randn(1, 3, *size))
    expected = tuple(-(-side // 4) for side in size)
    for features, channels in zip(maps, backbone.channels, strict=True):
        assert features.shape == (1, channels, *expected)
        expected = tuple(-(-side // 2) for side in expected)


def test_images_of_a_batch_do_not_meet(backbone: Backbone) -> None:
    images = torch.randn(2, 3, 64, 64)
    backbone.eval()
    with torch.no_grad():
        together, alone = backbone(images), backbone(images[1:])
    for both, one in zip(together, alone, strict=True):
        torch.testing.assert_close(both[1:], one, atol=1e-5, rtol=1e-5)


def test_a_shift_does_not_join_the_ends_of_an_image(backbone: Backbone) -> None:
    """What happens at the right edge of a wide image is not seen at its left edge."""
    images = torch.randn(1, 3, 32, 512)
    other = images.clone()
    other[..., -16:] = 0
    backbone.eval()
    with torch.no_grad():
        first, changed = backbone(images)[0], backbone(other)[0]
    assert torch.allclose(first[..., :64], changed[..., :64], atol=1e-5)
    assert not torch.allclose(first[..., -4:], changed[..., -4:], atol=1e-2)


def test_every_weight_learns_and_blocks_drop_out_in_training(backbone: Backbone) -> None:
    images = torch.randn(2, 3, 64, 64)
    sum(features.square().mean() for features in backbone.eval()(images)).backward()
    dead = [n for n, p in backbone.named_parameters() if p.grad is None or not p.grad.any()]
    assert not dead
    backbone.train()
    assert not torch.equal(backbone(images)[-1], backbone(images)[-1])
    backbone.eval()
    assert torch.equal(backbone(images)[-1], backbone(images)[-1])


def test_half_precision_is_near(backbone: Backbone) -> None:
    images = torch.randn(1, 3, 64, 64)
    backbone.eval()
    with torch.no_grad():
        exact = backbone(images)
        with torch.autocast("cpu", torch.bfloat16):
            rough = backbone(images)
    for a, b in zip(exact, rough, strict=True):
        assert (a - b.float()).abs().mean() < 0.05 * a.abs().mean()
