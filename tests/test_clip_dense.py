"""Dense tokens: the model's own pass, explicit loops over tokens, and other grids."""

from __future__ import annotations

import copy
import json
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from clip_helpers import MODEL
from open_clip.model import resize_pos_embed

from concat_cli.core.clip.encoder import load_clip
from concat_cli.core.config import ClipConfig
from concat_cli.core.errors import UserError
from concat_cli.methods.clip_zss.pseudo_labels import dense_tokens, patch_side, tower_tokens


def build(folder, **vision):
    """A small transformer CLIP with seeded random weights and two blocks."""
    model = MODEL | {"vision_cfg": MODEL["vision_cfg"] | {"layers": 2} | vision}
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    clip = load_clip(ClipConfig(model=f"local-dir:{folder}", pretrained="random"))
    for name, tensor in clip.model.visual.named_parameters():
        if name.endswith("bias"):  # open_clip starts from 0, which would hide a forgotten one
            torch.nn.init.normal_(tensor.data, std=0.1, generator=torch.Generator().manual_seed(1))
    return clip


@pytest.fixture(scope="module")
def transformer(tmp_path_factory):
    return build(tmp_path_factory.mktemp("clip") / "vit")


@pytest.fixture(scope="module")
def resnet():
    return load_clip(ClipConfig())


@pytest.fixture(params=["transformer", "resnet"])
def clip(request):
    return request.getfixturevalue(request.param)


def random_images(count, height, width, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, 3, height, width), generator=generator, dtype=torch.uint8)


def caught(clip, module, pixels):
    """What goes into a module while the model encodes `pixels`."""
    inputs = []
    handle = module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    clip.encode_normalised(pixels)
    handle.remove()
    return inputs[0]


def test_a_transformers_value_path_runs_the_last_block_on_each_token_alone(transformer):
    images, size = random_images(2, 32, 32), transformer.image_size
    visual = transformer.model.visual
    *_, last = visual.transformer.resblocks
    inputs = caught(transformer, last, transformer.normalise(images.float() / 255))
    found = dense_tokens(transformer, images, None, size)
    assert found.shape == (2, 4, 4, 16)
    for b in range(2):
        for t in range(16):
            token = inputs[b, 1 + t][None, None]  # it can only attend to itself
            expected = F.normalize(visual.ln_post(last(token))[0, 0] @ visual.proj, dim=-1)
            torch.testing.assert_close(found[b, t // 4, t % 4], expected, atol=1e-5, rtol=0)


def test_a_resnets_value_path_projects_each_place_alone(resnet):
    images, size = random_images(2, 64, 64), resnet.image_size
    pool = resnet.model.visual.attnpool
    features = caught(resnet, pool, resnet.normalise(images.float() / 255))  # (B, D, 2, 2)
    found = dense_tokens(resnet, images, None, size)
    assert found.shape == (2, 2, 2, 128)
    for b in range(2):
        for y in range(2):
            for x in range(2):
                expected = pool.c_proj(pool.v_proj(features[b, :, y, x]))
                expected = F.normalize(expected, dim=-1)
                torch.testing.assert_close(found[b, y, x], expected, atol=1e-5, rtol=0)


def test_another_size_is_a_model_of_that_size_with_open_clips_positions(transformer, tmp_path):
    large = build(tmp_path / "large", image_size=56)
    state = copy.deepcopy(transformer.model.state_dict())
    resize_pos_embed(state, SimpleNamespace(visual=large.model.visual))
    large.model.load_state_dict(state)
    images = random_images(2, 40, 72)
    found = dense_tokens(transformer, images, None, 56)
    assert found.shape == (2, 7, 7, 16)
    torch.testing.assert_close(found, dense_tokens(large, images, None, 56))


def test_tokens_are_unit_vectors_without_gradients_on_any_grid(clip):
    images = random_images(1, 50, 70)
    tokens = dense_tokens(clip, images, None, 96)
    side = 96 // patch_side(clip)
    assert tokens.shape == (1, side, side, clip.embed_dim) and not tokens.requires_grad
    assert tokens.dtype == torch.float32
    torch.testing.assert_close(tokens.norm(dim=-1), torch.ones(1, side, side))
    assert torch.equal(tokens, dense_tokens(clip, images, None, 96))


def test_pads_are_the_mean_colour_whatever_they_hold(clip):
    images = random_images(2, 64, 64)
    padding = torch.zeros(2, 64, 64, dtype=torch.bool)
    padding[1, :, 32:] = True
    found = dense_tokens(clip, images, padding, 64)
    other = torch.where(padding[:, None], 255 - images, images)
    assert torch.equal(dense_tokens(clip, other, padding, 64), found)
    pixels = clip.normalise(images.float() / 255).masked_fill(padding[:, None], 0)
    expected = tower_tokens(clip.model.visual, pixels)
    torch.testing.assert_close(found.flatten(1, 2), F.normalize(expected, dim=-1))
    assert not torch.allclose(dense_tokens(clip, images, None, 64)[1], found[1])


def test_a_size_that_patches_do_not_fill_is_refused(clip):
    with pytest.raises(UserError, match="do not fill a side of 100") as error:
        dense_tokens(clip, random_images(1, 32, 32), None, 100)
    near = {8: 96, 32: 96}[patch_side(clip)]
    assert f"such as {near}." in error.value.hint


@pytest.mark.parametrize(
    "vision",
    [{"attentional_pool": True, "attn_pooler_heads": 2}, {"block_type": "custom", "qk_norm": True}],
)
def test_towers_without_dense_tokens_are_refused(tmp_path, vision):
    with pytest.raises(UserError, match="no dense tokens"):
        dense_tokens(build(tmp_path / "other", **vision), random_images(1, 32, 32), None, 32)
