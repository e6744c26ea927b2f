"""The frozen CLIP: loading, towers, errors, and the built-in tiny model's knowledge."""

from __future__ import annotations

import pytest
import torch
from clip_helpers import random_clip, write_model

from benchmarks.tiny_clip.captions import Concepts, all_captions, known_words
from benchmarks.tiny_clip.train import contrastive_loss, evaluate, save_tiny
from benchmarks.tiny_clip.views import Job, Sampler, draw_scenes, roughen, take_pictures
from concat_cli.core.clip import prompts, tiny
from concat_cli.core.clip.encoder import load_clip
from concat_cli.core.clip.prompts import TEMPLATES, check_words
from concat_cli.core.config import ClipConfig
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.shapes_scene import CLASSES, scene_seed
from concat_cli.core.progress import Silent
from concat_cli.core.vocabulary import ClassEntry, Vocabulary

SHIPPED = [pytest.param(name, id=name) for name in tiny.FILES]


@pytest.fixture(scope="module")
def tiny_clip():
    return load_clip(ClipConfig())


def test_real_models_take_the_same_path(tmp_path):
    clip = random_clip(tmp_path)
    assert (clip.image_size, clip.embed_dim) == (32, 16)
    for size in ((32, 32), (50, 70), (20, 9)):
        tokens = clip.encode_image(torch.rand(2, 3, *size))
        torch.testing.assert_close(tokens.norm(dim=1), torch.ones(2))
    texts = clip.encode_text(["a cat", "a dog " * 40])
    assert texts.shape == (2, 16) and texts.dtype == torch.float32
    torch.testing.assert_close(texts.norm(dim=1), torch.ones(2))
    assert not clip.train().training and not any(p.requires_grad for p in clip.parameters())


def test_saved_open_clip_weights_load(tmp_path):
    clip = random_clip(tmp_path)
    torch.save(clip.model.state_dict(), tmp_path / "model.pth")
    again = load_clip(ClipConfig(model=f"local-dir:{tmp_path}"))
    assert again.identity.sha256 == clip.identity.sha256
    torch.testing.assert_close(again.encode_text(["a"]), clip.encode_text(["a"]))


def test_without_the_image_tower_no_image_weights_are_kept(tmp_path):
    whole, text_only = random_clip(tmp_path), random_clip(tmp_path, image_tower=False)
    assert text_only.identity == whole.identity
    assert not any("visual" in name for name in text_only.state_dict())
    assert sum(p.numel() for p in text_only.parameters()) < sum(
        p.numel() for p in whole.parameters()
    )
    torch.testing.assert_close(text_only.encode_text(["a cat"]), whole.encode_text(["a cat"]))


def test_random_weights_are_seeded_and_said_and_leave_the_generator_alone(tmp_path):
    said = []

    class Lines(Silent):
        def say(self, message):
            said.append(message)

    cfg = ClipConfig(model=write_model(tmp_path), pretrained="random")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load_clip(cfg, progress=Lines())
    assert torch.equal(torch.get_rng_state(), before)
    assert "random" in said[0]
    assert load_clip(cfg).identity == first.identity


@pytest.mark.parametrize(
    ("cfg", "what", "hint"),
    [
        (ClipConfig(model="ViT-B-16"), "clip.pretrained is empty", "laion2b_s34b_b88k"),
        (ClipConfig(model="ViT-B16"), "'ViT-B16'", "ViT-B-16"),
        (ClipConfig(model="ViT-B-16", pretrained="opeani"), "opeani", "openai"),
        (ClipConfig(model="local-dir:/no/such/place"), "/no/such/place", "open_clip_config.json"),
    ],
)
def test_what_cannot_be_loaded_says_what_to_do(cfg, what, hint):
    with pytest.raises(UserError) as caught:
        load_clip(cfg)
    assert what in caught.value.what and hint in caught.value.hint


def test_offline_names_model_tag_and_how_to_fetch(monkeypatch):
    def refuse(*_args, **_kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("open_clip.factory.download_pretrained", refuse)
    with pytest.raises(UserError) as caught:
        load_clip(ClipConfig(model="ViT-B-16", pretrained="laion2b_s34b_b88k"))
    assert "ViT-B-16" in caught.value.what and "laion2b_s34b_b88k" in caught.value.what
    assert "open_clip.create_model('ViT-B-16'" in caught.value.hint
    assert "local-dir:" in caught.value.hint


def test_a_folder_without_weights_is_an_error(tmp_path):
    with pytest.raises(UserError, match="cannot be loaded"):
        load_clip(ClipConfig(model=write_model(tmp_path)))


def test_missing_and_broken_tiny_weights(tmp_path):
    with pytest.raises(UserError, match="missing") as caught:
        tiny.load_tiny(tmp_path / "none.safetensors")
    assert "make tiny-clip" in caught.value.hint
    (tmp_path / "cut.safetensors").write_bytes(tiny.FILES["tiny"].read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        tiny.load_tiny(tmp_path / "cut.safetensors")


@pytest.mark.parametrize("model", SHIPPED)
def test_shipped_files_are_small_and_load(model):
    assert tiny.FILES[model].stat().st_size <= 4.5e6
    clip = load_clip(ClipConfig(model=model))
    assert (clip.embed_dim, clip.image_size) == (128, 64)
    assert len(clip.identity.sha256) == 64


def test_shipped_file_names_held_out_segments(tiny_clip):
    """90% of the seen and 88% of the unseen things is the bar; here on a small sample."""
    scenes = draw_scenes("clip_test", 0, 80)
    for cfg in (ClipConfig(), ClipConfig(templates="imagenet_select")):
        top1 = evaluate(tiny_clip, scenes, cfg)
        assert top1.seen >= 0.9 and top1.unseen_things >= 0.88, top1


def test_weak_file_is_weak():
    top1 = evaluate(load_clip(ClipConfig(model="tiny-weak")), draw_scenes("clip_test", 0, 40))
    assert 0.4 <= top1.all <= 0.6


def test_tiny_knows_the_world_and_nothing_else():
    words = prompts.known_words("tiny")
    assert words is not None and sorted(words) == known_words(CLASSES)
    assert check_words(CLASSES, words) == ()
    with pytest.raises(UserError, match="'giraffe'"):
        check_words(Vocabulary((ClassEntry("striped giraffe", 1),)), words)


def test_every_caption_fits_and_is_known_to_the_table(tiny_clip):
    tokenize = tiny_clip._tokenize
    rows = set(tokenize(all_captions(Concepts.of(CLASSES))).unique().tolist())
    longest = "a scene with " + ", ".join(["a checkered crescent"] * 3) + " and a outlined crescent"
    known = [t for name, ts in TEMPLATES.items() for t in ts if name != "vild"]  # of real CLIPs
    for text in [longest, *(template.format("checkered ring") for template in known)]:
        tokens = tokenize([text])[0]
        assert set(tokens.tolist()) <= rows
        assert 49407 in tokens.tolist(), "cut off"


def test_unknown_rows_are_the_same_everywhere():
    rows = tiny.unknown_rows(3, 2)
    expected = [[-0.02, 0.01533], [-0.0027, -0.0189], [0.0188, -0.0157]]
    torch.testing.assert_close(rows, torch.tensor(expected), atol=1e-4, rtol=0)


def test_saving_and_loading_keeps_state(tmp_path):
    state = {
        tiny.TABLE: torch.randn(10, 4),
        "a.weight": torch.randn(3, 4),
        "a.bias": torch.randn(3),
        "n": torch.tensor(7),
    }
    save_tiny(tmp_path / "w.safetensors", state, torch.tensor([2, 5]), ["star"])
    loaded = tiny.load_tiny(tmp_path / "w.safetensors")
    assert loaded.words == {"star"} and loaded.state["n"] == 7
    assert torch.equal(loaded.state["a.bias"], state["a.bias"])
    torch.testing.assert_close(loaded.state["a.weight"], state["a.weight"], atol=0.02, rtol=0)
    kept = loaded.state[tiny.TABLE]
    torch.testing.assert_close(kept[[2, 5]], state[tiny.TABLE][[2, 5]], atol=0.02, rtol=0)
    assert kept.shape == (10, 4) and torch.equal(kept[0], tiny.unknown_rows(10, 4)[0])


def test_contrastive_loss_against_a_loop():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(4, 3, generator=generator)
    match = torch.tensor([[1, 0, 0], [0, 1, 1], [1, 0, 0], [0, 0, 1.0]])
    unsure = torch.zeros(4, 3, dtype=torch.bool)
    unsure[0, 2] = True
    total = 0.0
    for side, truth, skip in ((logits, match, unsure), (logits.T, match.T, unsure.T)):
        for row, true, out in zip(side, truth, skip, strict=True):
            below = sum(float(v.exp()) for v, o in zip(row, out, strict=True) if not o)
            terms = [float(v.exp()) / below for v, t in zip(row, true, strict=True) if t]
            value = -sum(torch.tensor(terms).log()) / len(terms)
            total = total + value / len(side) / 2
    torch.testing.assert_close(contrastive_loss(logits, match, unsure), total)


def test_training_views_and_their_captions():
    mean, std = (0.4509804,) * 3, (0.25,) * 3
    pictures = take_pictures(Job("clip", 0, 0, 12, 64, mean, std))
    concepts = Concepts.of(CLASSES)
    values = (torch.tensor(v).view(3, 1, 1) for v in (mean, std))
    views = Sampler(pictures, concepts, *values, seed=0).batch(64)
    assert views.crops.shape == (64, 3, 64, 64)
    assert views.match.shape == views.unsure.shape == (64, len(views.texts))
    assert views.match.amax(1).min() == 1 and views.match.amax(0).min() == 1
    assert not (views.match.bool() & views.unsure).any()
    background = pictures.masked[pictures.masked.float().amax((1, 2, 3)) > 0][:, :, 0, 0]
    assert (background == 115).all(1).any(), "the mean colour surrounds masks"
    assert concepts.held([0])[[0, concepts.index["circle"]]].all()


def test_rough_masks_stay_near():
    masks = torch.zeros(8, 32, 32, dtype=torch.bool)
    masks[:, 8:20, 8:24] = True
    rough = roughen(masks, torch.arange(8))
    areas = rough.flatten(1).sum(1).tolist()
    assert areas[0] == 14 * 18 and areas[1] == 10 * 14 and areas[4:] == [12 * 16] * 4
    tiny_mask = torch.zeros(1, 32, 32, dtype=torch.bool)
    tiny_mask[0, 3, 3] = True
    assert torch.equal(roughen(tiny_mask, torch.tensor([1])), tiny_mask)


def test_clip_scenes_are_no_data_sets_scenes():
    parts = ("train", "dev", "val", "clip", "clip_test")
    seeds = {scene_seed(part, seed, i) for part in parts for seed in (0, 1) for i in range(50)}
    assert len(seeds) == 500
