"""Tokens of masks from one CLIP pass, against open_clip and timm with one mask at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from tower_helpers import OTHERS, STRIDES, TOWERS, naive_shares, naive_token, tower_clip

from concat_cli.core.clip.encoder import Clip
from concat_cli.core.clip.pooling import MaskPooling, belongs, between_cells
from concat_cli.core.errors import UserError
from concat_cli.core.infer.pooled import mask_shares, overlaps, pool_segments

VALID = [(64, 96), (51, 70), (38, 96)]  # of three pictures, padded to the first one's size


@pytest.fixture(scope="module", params=TOWERS)
def clip(request: Any, tmp_path_factory: Any) -> Clip:
    return tower_clip(tmp_path_factory.mktemp("clip"), request.param)


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, mask logits and what is selected of six masks each; none of the third image."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (3, 3, 64, 96), generator=generator, dtype=torch.uint8)
    logits = torch.full((3, 6, 16, 24), -4.0)
    logits[:, 0] = 1  # the whole picture
    logits[:, 1, 2:8, 3:11] = 2
    logits[:, 2] = torch.randn(3, 16, 24, generator=generator)
    logits[:, 3, 5, 7] = 1  # smaller than any cell of CLIP's map
    logits[:, 4, 9:, 12:] = 3
    select = torch.ones(3, 6, dtype=torch.bool)
    select[1, 1] = select[0, 5] = select[1, 5] = False
    select[2] = False
    return images, logits, select


def test_shares_of_cells() -> None:
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(3, 16, 24, generator=generator) > 0.5
    for valid in VALID:
        for grid in (1, 3, 7, 40):
            found = mask_shares(masks, valid, grid)
            for mask, shares in zip(masks, found, strict=True):
                np.testing.assert_allclose(shares, naive_shares(mask, valid, grid), atol=1e-5)
            whole = mask_shares(torch.ones(1, 16, 24).bool(), valid, grid)
            torch.testing.assert_close(whole, torch.ones(1, grid, grid))
    assert overlaps(24, 70, 7).shape == (7, 24)


def test_which_cells_stand_for_a_mask() -> None:
    shares = torch.tensor([[0.5, 0.4, 0.9], [0.1, 0.3, 0.3], [0.0, 0.0, 0.0]])
    assert belongs(shares).tolist() == [
        [True, False, True], [False, True, True], [True, True, True],
    ]  # fmt: skip
    assert between_cells(shares).tolist() == [False, True, False]


def test_tokens_are_those_of_one_mask_at_a_time(clip: Clip, batch: Any) -> None:
    images, logits, select = batch
    pooling = MaskPooling(clip)
    tokens, shares = pool_segments(pooling, images, logits, VALID, select)
    assert len(tokens) == int(select.sum()) == 9 and shares.shape == (9, pooling.grid**2)
    small: list[bool] = []
    for token, (b, q) in zip(tokens, select.nonzero().tolist(), strict=True):
        height, width = VALID[b]
        view = clip.normalise(clip.resize(images[b : b + 1, :, :height, :width] / 255))
        covered = naive_shares(logits[b, q] > 0, VALID[b], pooling.grid)
        torch.testing.assert_close(token, naive_token(clip, view, covered), rtol=0, atol=1e-5)
        small.append(bool(covered.max() < 0.49))
    assert between_cells(shares).tolist() == small and sum(small) >= 2
    assert (tokens[:5] @ tokens[:5].T).fill_diagonal_(0).max() < 1 - 1e-5, "they differ"


def test_the_mask_of_everything_has_the_pictures_own_token(clip: Clip, batch: Any) -> None:
    images, logits, _ = batch
    whole = torch.zeros(3, 6, dtype=torch.bool)
    whole[:, 0] = True
    tokens, _ = pool_segments(MaskPooling(clip), images, logits, [(64, 96)] * 3, whole)
    torch.testing.assert_close(tokens, clip.encode_image(images / 255), rtol=0, atol=1e-5)


def test_a_batch_gives_what_its_pictures_give_alone(clip: Clip, batch: Any) -> None:
    images, logits, select = batch
    pooling = MaskPooling(clip)
    together, _ = pool_segments(pooling, images, logits, VALID, select)
    alone = [
        pool_segments(pooling, images[b : b + 1, :, :h, :w], logits[b : b + 1, :, : -(-h // 4)],
                      [(h, w)], select[b : b + 1])[0]
        for b, (h, w) in enumerate(VALID)
    ]  # fmt: skip
    assert [len(tokens) for tokens in alone] == [5, 4, 0]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["vit", "siglip", "convnext", "resnet"])
def test_another_side_has_positions_as_the_libraries_make_them(
    name: str, batch: Any, tmp_path: Any
) -> None:
    clip = tower_clip(tmp_path, name)
    side = 2 * clip.image_size
    images, logits, select = batch
    whole = torch.zeros_like(select)
    whole[:, 0] = True
    pooling = MaskPooling(clip, side)
    assert pooling.grid == side // STRIDES[name]
    found, _ = pool_segments(pooling, images, logits, [(64, 96)] * 3, whole)
    view = clip.normalise(clip.resize(images / 255, side))
    if name == "siglip":
        clip.model.visual.set_input_size(side)
    elif name != "convnext":
        larger = open_clip.create_model(
            clip.identity.model, load_weights=False, force_image_size=side
        ).eval()
        state = clip.model.state_dict()
        if name == "vit":
            open_clip.model.resize_pos_embed(state, larger)
        else:  # which open_clip does not know for its ResNets: as timm does it
            from timm.layers import resample_abs_pos_embed

            key = "visual.attnpool.positional_embedding"
            state[key] = resample_abs_pos_embed(state[key][None], (side // 32, side // 32))[0]
        larger.load_state_dict(state)
        clip.model = larger
    torch.testing.assert_close(found, clip.encode_normalised(view), rtol=0, atol=1e-5)


def test_sides_that_do_not_fit(tmp_path: Any) -> None:
    with pytest.raises(UserError, match="cannot be shown 33 pixels") as caught:
        MaskPooling(tower_clip(tmp_path, "vit"), 33)
    assert "multiple of 8" in caught.value.hint


@pytest.mark.parametrize("name", OTHERS)
def test_towers_that_cannot_be_pooled(name: str, tmp_path: Any) -> None:
    clip = tower_clip(tmp_path, name)
    with pytest.raises(UserError, match="cannot be pooled under masks") as caught:
        MaskPooling(clip)
    assert "borrowed.naming=crops" in caught.value.hint
