"""CLIPs of open_clip: CNN and ViT towers, tags, files, the cache, and no network."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import open_clip
import pytest
import torch
from open_clip.pretrained import _PRETRAINED
from safetensors.torch import save_file
from torch import nn

from concat_cli.core.clip.encoder import Clip, load_clip
from concat_cli.core.clip.source import is_cached
from concat_cli.core.config import ClipConfig
from concat_cli.core.errors import UserError
from concat_cli.core.weights_from import hub

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
TOWERS: dict[str, dict[str, Any]] = {
    "RN-toy": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
    "ViT-toy": {"image_size": 32, "layers": 1, "width": 64, "head_width": 16, "patch_size": 8},
    "convnext_toy": {
        "timm_model_name": "test_convnext", "timm_model_pretrained": False, "timm_pool": "",
        "timm_proj": "linear", "timm_drop": 0.0, "timm_drop_path": 0.1, "image_size": 64,
    },
}  # fmt: skip
GREY = {"mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
TAG = {"hf_hub": "org/toy/", "interpolation": "bicubic", "resize_mode": "squash"}


@pytest.fixture(autouse=True)
def toys(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The reduced models under names; an empty cache of the hub, and no network; the cache."""
    factory = open_clip.factory
    monkeypatch.setattr(factory, "_MODEL_CONFIG_PATHS", list(factory._MODEL_CONFIG_PATHS))
    monkeypatch.setattr(factory, "_MODEL_CONFIGS", dict(factory._MODEL_CONFIGS))
    for name, tower in TOWERS.items():
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps({"embed_dim": 16, "vision_cfg": tower, "text_cfg": TEXT}))
        open_clip.add_model_config(path)
    tags = {"openai": TAG | GREY | {"quick_gelu": True}, "other": TAG | GREY}
    monkeypatch.setitem(_PRETRAINED, "ViT-toy", tags)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    cache = str(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return Path(cache)


def random_clip(name: str) -> Clip:
    return load_clip(ClipConfig(model=name, pretrained="random"))


def put_into_cache(cache: Path, repository: str, name: str, data: bytes) -> None:
    """The layout of the hub's cache."""
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "snapshots" / "abc").mkdir(parents=True, exist_ok=True)
    (root / "refs").mkdir(exist_ok=True)
    (root / "refs" / "main").write_text("abc")
    (root / "snapshots" / "abc" / name).write_bytes(data)


@pytest.mark.parametrize("name", TOWERS)
def test_cnn_and_vit_towers_take_the_same_path(name: str) -> None:
    clip = random_clip(name)
    assert clip.image_size == TOWERS[name]["image_size"] and clip.embed_dim == 16
    for size in ((clip.image_size,) * 2, (50, 70)):
        images = torch.rand(2, 3, *size)
        tokens = clip.encode_image(images)
        torch.testing.assert_close(tokens.norm(dim=1), torch.ones(2))
        raw = clip.model.encode_image(clip.normalise(clip.resize(images)))
        torch.testing.assert_close(tokens, nn.functional.normalize(raw, dim=-1))
    assert clip.encode_text(["a cat"]).shape == (1, 16)
    assert not clip.train().training and not any(p.requires_grad for p in clip.parameters())
    assert not any(module.training for module in clip.model.modules())


@pytest.mark.parametrize("name", TOWERS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
def test_files_of_weights(name: str, suffix: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    model = open_clip.create_model(name, load_weights=False)
    path = tmp_path / f"w{suffix}"
    save = save_file if suffix == ".safetensors" else torch.save
    save(model.state_dict(), path)  # pyright: ignore
    clip = load_clip(ClipConfig(model=name, pretrained=str(path)))
    assert clip.identity.pretrained == str(path)
    assert clip.identity.sha256 != random_clip(name).identity.sha256
    images = torch.rand(1, 3, clip.image_size, clip.image_size)
    expected = nn.functional.normalize(model.eval().encode_image(clip.normalise(images)), dim=-1)
    torch.testing.assert_close(clip.encode_image(images), expected.detach())


def test_openais_weights_get_quick_gelu_and_their_colours(toys: Path, tmp_path: Path) -> None:
    """By the tag, whatever the model's name says; open_clip itself only warns."""
    model = open_clip.create_model("ViT-toy", load_weights=False)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    data = (tmp_path / "w.safetensors").read_bytes()
    put_into_cache(toys, "org/toy", "open_clip_model.safetensors", data)
    quick = load_clip(ClipConfig(model="ViT-toy", pretrained="openai"))
    plain = load_clip(ClipConfig(model="ViT-toy", pretrained="other"))
    assert quick.identity.sha256 != plain.identity.sha256, "or caches would mix them up"
    layers = [m for m in quick.model.modules() if type(m).__name__ in ("QuickGELU", "GELU")]
    assert {type(m).__name__ for m in layers} == {"QuickGELU"} and len(layers) == 2
    assert not [m for m in plain.model.modules() if type(m).__name__ == "QuickGELU"]
    assert not torch.allclose(quick.encode_text(["a cat"]), plain.encode_text(["a cat"]))
    for clip in (quick, plain):
        assert clip.mean.flatten().tolist() == [0.5] * 3
        assert clip.std.flatten().tolist() == [0.25] * 3
    # a file of the same model is normalised as its tags all are
    clip = load_clip(ClipConfig(model="ViT-toy", pretrained=str(tmp_path / "w.safetensors")))
    assert clip.mean.flatten().tolist() == [0.5] * 3


@pytest.mark.parametrize("name", ["RN50", "ViT-B-16", "ViT-L-14-336"])
def test_openais_tags_ask_for_quick_gelu(name: str) -> None:
    """What the test above stands for: so it is with the models that matter."""
    assert open_clip.get_pretrained_cfg(name, "openai")["quick_gelu"]
    assert not open_clip.get_model_config(name).get("quick_gelu", False)


def test_a_hub_id_from_the_cache(toys: Path, tmp_path: Path) -> None:
    model = open_clip.create_model("ViT-toy", load_weights=False)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    config = {"model_cfg": open_clip.get_model_config("ViT-toy"), "preprocess_cfg": GREY}
    put_into_cache(toys, "org/own", "open_clip_config.json", json.dumps(config).encode())
    data = (tmp_path / "w.safetensors").read_bytes()
    put_into_cache(toys, "org/own", "open_clip_model.safetensors", data)
    clip = load_clip(ClipConfig(model="hf-hub:org/own"))
    assert clip.mean.flatten().tolist() == [0.5] * 3 and clip.image_size == 32


@pytest.mark.parametrize(
    ("model", "tag", "size"),
    [
        ("ViT-B-16", "openai", "600 MB"), ("ViT-B-16-quickgelu", "openai", "600 MB"),
        ("RN50", "openai", "410 MB"), ("ViT-L-14-336", "openai", "1.7 GB"),
        ("convnext_large_d_320", "laion2b_s29b_b131k_ft_soup", "1.4 GB"),
        ("hf-hub:org/none", "", "unknown size"),
    ],
)  # fmt: skip
def test_what_is_not_cached_is_named_at_once(model: str, tag: str, size: str) -> None:
    start = time.monotonic()
    with pytest.raises(UserError) as caught:
        load_clip(ClipConfig(model=model, pretrained=tag), image_tower=False)
    assert time.monotonic() - start < 10
    assert model.removeprefix("hf-hub:") in caught.value.what and size in caught.value.what
    assert "cannot be reached" in caught.value.what
    assert f"open_clip.create_model('{model}'" in caught.value.hint
    assert not is_cached(ClipConfig(model=model, pretrained=tag))


def test_files_that_cannot_be_used(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="There is no file"):
        load_clip(ClipConfig(model="ViT-toy", pretrained=str(tmp_path / "none.pt")))
    torch.save({"a": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(UserError, match="cannot be loaded") as caught:
        load_clip(ClipConfig(model="ViT-toy", pretrained=str(tmp_path / "other.pt")))
    assert "clip.model=ViT-toy" in caught.value.hint


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return os.system, (f"touch {tmp_path / 'ran'}",)

    torch.save({"a": Runs()}, tmp_path / "evil.pt")
    with pytest.raises(UserError, match="refused"):
        load_clip(ClipConfig(model="ViT-toy", pretrained=str(tmp_path / "evil.pt")))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["RN50", "ViT-B-16", "ViT-L-14", "convnext_base_w"])
def test_sizes_of_downloads_are_those_of_the_parameters(name: str) -> None:
    with torch.device("meta"):
        config = open_clip.get_model_config(name)
        model = open_clip.model.CLIP(**config)
    count = sum(p.numel() for p in model.parameters())
    assert hub.SIZES[name] == pytest.approx(count * 4e-9, rel=0.05)
