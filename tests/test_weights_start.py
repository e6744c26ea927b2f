"""Segmentors and backbones that start from weights made elsewhere."""

from __future__ import annotations

import pickle
import re
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import timm
import torch
from mini import Heard
from safetensors.torch import save_file
from swin_helpers import TOY, toy_of_timm
from torch import Tensor, nn

from concat_cli.core.build import build_segmentor, check_start
from concat_cli.core.config import ModelConfig
from concat_cli.core.config_file import load_config
from concat_cli.core.errors import UserError
from concat_cli.core.model.backbone import Backbone
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.model.swin import SWINS
from concat_cli.core.runs import Run
from concat_cli.core.weights_from import hub
from concat_cli.core.weights_from.names import rename

pytest.importorskip("transformers", reason="transformers is a development package")
import mask2former_helpers as m2f  # which needs transformers


@pytest.fixture(scope="module", autouse=True)
def toy_swin():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SWINS, "swin_toy", TOY)
        yield


@pytest.fixture(scope="module")
def theirs() -> nn.Module:
    return m2f.their_model(m2f.swin_config())


@pytest.fixture(scope="module")
def published(theirs: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as `transformers` writes it, with the names of published files."""
    folder = tmp_path_factory.mktemp("published")
    theirs.save_pretrained(folder)
    return folder


def _expected(theirs: nn.Module) -> dict[str, Tensor]:
    renamed = rename(theirs.state_dict())
    assert renamed is not None
    return renamed.tensors


def _holds(segmentor: Segmentor, tensors: dict[str, Tensor]) -> None:
    state = segmentor.state_dict()
    wrong = [n for n, t in tensors.items() if not torch.equal(state[n], t)]
    assert tensors and not wrong, wrong


def _zoo(path: Path, tensors: dict[str, Tensor]) -> str:
    """A file of detectron2's model zoo."""
    arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "somebody"}, 4))
    return str(path)


def test_transformers_files_and_folders(theirs: nn.Module, published: Path) -> None:
    expected = _expected(theirs)
    for source in (published, published / "model.safetensors"):
        _holds(m2f.started(m2f.model_config("swin_toy", init=str(source))), expected)


@pytest.mark.parametrize("kind", ["swin", "resnet"])
def test_detectron2_files_give_the_same_outputs(
    kind: str, theirs: nn.Module, tmp_path: Path
) -> None:
    """Through an independent table of names; .pkl of the model zoo and .pth of a training."""
    other = theirs if kind == "swin" else m2f.their_model(m2f.resnet_config((2, 2, 2, 2)))
    names = m2f.detectron2_names(other.state_dict())
    sources = [_zoo(tmp_path / "model.pkl", names)]
    if kind == "swin":
        torch.save({"model": names, "iteration": 10, "optimizer": {}}, tmp_path / "model.pth")
        sources.append(str(tmp_path / "model.pth"))
    backbone = "swin_toy" if kind == "swin" else "resnet26"
    images, text = torch.rand(1, 3, 64, 96), torch.randn(3, 16)
    for source in sources:
        ours = m2f.started(m2f.model_config(backbone, init=source))
        with torch.no_grad():
            output = ours(images, None, text, last_only=True)
            expected = other(ours.backbone.normalised(images, None))
        classes = other.class_predictor(output.vision_queries[-1])
        torch.testing.assert_close(classes, expected.class_queries_logits, atol=1e-4, rtol=1e-4)
        masks = expected.masks_queries_logits
        torch.testing.assert_close(
            output.mask_logits[-1], masks, rtol=0, atol=1e-4 * float(masks.abs().max())
        )


def test_the_report_tells_what_was_used_ignored_and_missing(
    theirs: nn.Module, tmp_path: Path
) -> None:
    source = _zoo(tmp_path / "zoo.pkl", m2f.detectron2_names(theirs.state_dict()))
    heard = Heard()
    build_segmentor(m2f.model_config("swin_toy", init=source), 16, pretrained=True, progress=heard)
    used, ignored, missing = heard.lines
    counted = len(_expected(theirs))
    assert "detectron2 names" in used and f": {counted} tensors used" in used
    assert [int(n) for n in re.findall(r"(?:backbone|decoder) (\d+)", used)] and counted == sum(
        int(n) for n in re.findall(r"(?:backbone|decoder) (\d+)", used)
    )
    assert "class head 3 (sem_seg_head.predictor.class_embed" in ignored
    assert "told by text" in ignored and "other" not in ignored
    assert "projector 2 (" in missing and "classifier 2 (" in missing
    # what is ours besides: queries out of tokens take the place of the learned ones
    cfg = m2f.model_config(
        "swin_toy", init=source, token_queries=True, mask_pooling=True, queries=5,
        backbone_weights="timm",
    )  # fmt: skip
    heard = Heard()
    build_segmentor(cfg, 16, pretrained=True, progress=heard)
    assert "query_decoder 2 (query_decoder.query_" in heard.lines[2]
    assert "mask_pool " in heard.lines[3] and "query_decoder " in heard.lines[3]
    assert heard.lines[0] == "model.backbone_weights=timm is not read: model.init brings them."


def test_a_file_that_does_not_fit_names_the_keys_that_would(
    theirs: nn.Module, published: Path
) -> None:
    wrong = ModelConfig(backbone="swin_toy", init=str(published))
    with pytest.raises(UserError) as caught:
        build_segmentor(wrong, 16, pretrained=True)
    keys = caught.value.hint.removeprefix("Set ").split()
    assert "model.width=64" in keys and "model.pixel_decoder=deformable" in keys
    assert "model.width is 128, there 64" in caught.value.what
    assert not any(key.startswith("model.queries") for key in keys), "they are not learned here"
    model = load_config(None, [f"model.init={published}", "model.backbone=swin_toy", *keys]).model
    segmentor = build_segmentor(model, 16, pretrained=True)
    kept = {n: t for n, t in _expected(theirs).items() if ".query_" not in n}
    _holds(segmentor, kept)


def test_a_dry_run_says_what_it_would_start_from(published: Path, no_network: Path) -> None:
    from concat_cli.core.train.plan import describe

    def start(model: ModelConfig) -> str:
        cfg = replace(load_config(None, ["data.root=/no/data"]), model=model)
        return describe("con", cfg, Run("try", no_network))["starts from"]

    assert "tensors used: backbone" in start(m2f.model_config("swin_toy", init=str(published)))
    with pytest.raises(UserError, match="of another shape"):
        start(m2f.model_config("swin_toy", init=str(published), width=32))
    hub_id = "hf-hub:facebook/mask2former-swin-base-coco-panoptic"
    assert start(m2f.model_config("swin_toy", init=hub_id)).endswith("a download of about 430 MB")
    assert "100 MB" in start(m2f.model_config("resnet50", backbone_weights="timm"))


@pytest.mark.parametrize("name", sorted(SWINS))
def test_every_published_swin_is_told_by_its_shapes(name: str) -> None:
    from concat_cli.core.weights_from.files import backbone_of

    with torch.device("meta"):
        state = Backbone(name).state_dict()
    assert backbone_of({f"backbone.{k}": v for k, v in state.items()}) == name
    with torch.device("meta"):
        state = Backbone("resnet50").state_dict()
    assert backbone_of({f"backbone.{k}": v for k, v in state.items()}) == "resnet50"


def test_a_wrong_backbone_is_named(tmp_path: Path) -> None:
    with torch.device("meta"):
        theirs = m2f.their_model(m2f.swin_config(SWINS["swin_tiny_patch4_window7_224"]))
    tensors = {n: torch.zeros(t.shape) for n, t in theirs.state_dict().items()}
    save_file(tensors, tmp_path / "tiny.safetensors")
    cfg = m2f.model_config("resnet50", init=str(tmp_path / "tiny.safetensors"))
    with pytest.raises(UserError) as caught:
        build_segmentor(cfg, 16, pretrained=True)
    assert caught.value.hint == "Set model.backbone=swin_tiny_patch4_window7_224"


def test_what_is_no_mask2former_is_told(theirs: nn.Module, tmp_path: Path) -> None:
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    names = theirs.state_dict()
    cut = {n: t.clone() for n, t in names.items() if "decoder.layers.1.fc1" not in n}
    save_file(cut, tmp_path / "cut.safetensors")
    half = {n: t.clone() for n, t in names.items() if "k_proj" not in n}
    save_file(half, tmp_path / "half.safetensors")
    for name, what in (("other", "no Mask2Former"), ("cut", "a part"), ("half", "a part")):
        cfg = m2f.model_config("swin_toy", init=str(tmp_path / f"{name}.safetensors"))
        with pytest.raises(UserError, match=what):
            build_segmentor(cfg, 16, pretrained=True)
    for source in ("/no/such/file.pkl", str(tmp_path)):
        cfg = m2f.model_config("swin_toy", init=source)
        with pytest.raises(UserError, match=re.escape(source)):
            build_segmentor(cfg, 16, pretrained=True)
        with pytest.raises(UserError, match=re.escape(source)):
            check_start(cfg)


def _fake_cache(folder: Path, repository: str, file: Path) -> None:
    """The layout of the hub's cache."""
    root = folder / f"models--{repository.replace('/', '--')}"
    snapshot = root / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    (root / "refs").mkdir()
    (root / "refs" / "main").write_text("abc")
    (snapshot / file.name).write_bytes(file.read_bytes())


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty cache of the hub, and no network; returns the cache."""

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", refuse)
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


def test_a_hub_id_is_taken_from_the_cache(
    theirs: nn.Module, published: Path, no_network: Path
) -> None:
    _fake_cache(no_network, "org/name", published / "model.safetensors")
    ours = m2f.started(m2f.model_config("swin_toy", init="hf-hub:org/name"))
    _holds(ours, _expected(theirs))


def test_what_is_not_cached_is_told_at_once_without_a_network(no_network: Path) -> None:
    start = time.monotonic()
    repository = "facebook/mask2former-swin-tiny-coco-panoptic"
    with pytest.raises(UserError) as caught:
        hub.weights_file(f"hf-hub:{repository}", download=True)
    assert "cannot be reached" in caught.value.what and "190 MB" in caught.value.what
    assert f"concat weights get hf-hub:{repository}" in caught.value.hint
    assert time.monotonic() - start < 6
    assert not huggingface_hub.constants.HF_HUB_OFFLINE, "as before"
    for name in ("resnet50", "swin_tiny_patch4_window7_224"):
        with pytest.raises(UserError, match=r"of about 1[01]0 MB") as caught:
            Backbone(name, pretrained=True)
        assert f"timm.create_model('{name}'" in caught.value.hint


def test_sizes_of_downloads_are_those_of_the_parameters() -> None:
    for name in ("resnet50", "swin_tiny_patch4_window7_224", "swin_large_patch4_window12_384"):
        with torch.device("meta"):
            count = sum(p.numel() for p in timm.create_model(name).parameters())
        assert hub.SIZES[name] == pytest.approx(count * 4e-9, rel=0.05)


def _resnet_of_detectron2(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision's R-50 as detectron2 ships it."""
    found = {}
    for name, tensor in state.items():
        stage = re.match(r"layer(\d)\.", name)
        new = name if stage is None else f"res{int(stage[1]) + 1}." + name[len("layer0.") :]
        new = re.sub(r"bn(\d)", r"conv\1.norm", new)
        new = new.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
        if not name.endswith("num_batches_tracked"):
            found[new if stage is not None else f"stem.{new}"] = tensor
    return found


def test_a_backbone_starts_from_files_of_several_namings(tmp_path: Path) -> None:
    state = timm.create_model("resnet26", pretrained=False).state_dict()
    files = {"r26.pkl": _zoo(tmp_path / "r26.pkl", _resnet_of_detectron2(state))}
    save_file(state, tmp_path / "r26.safetensors")
    files["r26.safetensors"] = str(tmp_path / "r26.safetensors")
    for source in files.values():
        heard = Heard()
        cfg = m2f.model_config("resnet26", backbone_weights=source)
        ours = build_segmentor(cfg, 16, pretrained=True, progress=heard)
        found = ours.backbone.body.state_dict()
        assert all(torch.equal(found[f"body.{n}"], t) for n, t in state.items() if "fc" not in n)
        assert "fc." in heard.lines[1]
    wrong = m2f.model_config("resnet50", backbone_weights=files["r26.pkl"])
    with pytest.raises(UserError, match="does not hold the weights of 'resnet50'"):
        build_segmentor(wrong, 16, pretrained=True)


def test_a_swin_starts_from_files_of_timm_and_of_its_authors(tmp_path: Path) -> None:
    state = toy_of_timm().state_dict()
    save_file(state, tmp_path / "timm.safetensors")
    # its authors end a stage with the merging, timm begins the next one with it
    authors = {re.sub(r"layers\.(\d)\.downsample",
                      lambda m: f"layers.{int(m[1]) - 1}.downsample", n): t
               for n, t in state.items()}  # fmt: skip
    torch.save({"model": authors}, tmp_path / "authors.pth")
    for name in ("timm.safetensors", "authors.pth"):
        cfg = m2f.model_config("swin_toy", backbone_weights=str(tmp_path / name))
        heard = Heard()
        ours = build_segmentor(cfg, 16, pretrained=True, progress=heard).backbone.body
        found = ours.state_dict()
        body = [n for n in found if not n.startswith("norms.")]
        assert all(torch.equal(found[n], state[n]) for n in body) and len(body) > 100
        assert "norms 8" in heard.lines[-1]
