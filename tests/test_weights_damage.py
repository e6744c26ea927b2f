"""Weights that are damaged or made to do harm: one error that names the file and what is wrong."""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from concat_cli.core.build import restore_segmentor
from concat_cli.core.checkpoint import Weights, load_weights, read_meta
from concat_cli.core.errors import UserError
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.runs import BUILT_IN

Meta = dict[str, Any]
OWN = load_weights(BUILT_IN)


def write(path: Path, meta: Any, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    """A weights file with this metadata."""
    save_file(tensors or OWN.tensors, path, {"concat": json.dumps(meta)})
    return path


def spoilt(**keys: Any) -> Meta:
    """The metadata of the built-in weights with other values, `section__key` of its config."""
    meta = json.loads(json.dumps(OWN.meta))
    for name, value in keys.items():
        section, _, key = name.partition("__")
        if key:
            meta["config"][section][key] = value
        else:
            meta[name] = value
    return meta


ROW = OWN.meta["vocabulary"][0]
META: dict[str, tuple[Meta, str]] = {
    "stage of another kind": (spoilt(stage=["con"]), "stage"),
    "stage unknown": (spoilt(stage="con2"), "No method here has a stage 'con2'"),
    "format a dict": (spoilt(format={}), "format"),
    "config a list": (spoilt(config=[]), "config"),
    "config of lists": (spoilt(config={"model": [1]}), "config.model"),
    "config of another world": (spoilt(config={"a.b.c": {"d": 1}}), "unknown key"),
    "vocabulary a word": (spoilt(vocabulary="cat"), "vocabulary"),
    "class without name": (spoilt(vocabulary=[{"id": 1}]), "vocabulary.0.name"),
    "class with an empty name": (spoilt(vocabulary=[ROW | {"name": " "}]), "vocabulary.0"),
    "class of another kind": (spoilt(vocabulary=[ROW | {"kind": "animal"}]), "kind"),
    "id a float": (spoilt(vocabulary=[ROW | {"id": 1.5}]), "vocabulary.0.id"),
    "id huge": (spoilt(vocabulary=[ROW | {"id": 1 << 70}]), "vocabulary.0"),
    "id a dict": (spoilt(vocabulary=[ROW | {"id": {}}]), "vocabulary.0.id"),
    "classes twice": (spoilt(vocabulary=[ROW, ROW]), "two classes"),
    "trained a number": (spoilt(trained=5), "trained"),
    "trained of numbers": (spoilt(trained=[1]), "trained.0"),
    "half a character": (spoilt(trained=["\ud800"]), "not as it should be"),
    "clip incomplete": (spoilt(clip={"model": "tiny"}), "clip.pretrained"),
    "clip null": (spoilt(clip=None), "clip"),
    "data a list": (spoilt(data=[]), "data"),
    "published incomplete": (spoilt(published={"source": "x"}), "published.sha256"),
    "backbone unknown": (spoilt(model__backbone="resnet5000"), "no backbone 'resnet5000'"),
    "backbone of another kind": (spoilt(model__backbone=[]), "model.backbone"),
    "a list of numbers": (spoilt(optim__step_at=5), "optim.step_at"),
    "heads do not fit": (spoilt(model__heads=7), "width must be a multiple"),
    "scale too large": (spoilt(model__logit_scale=1e4), "model.logit_scale"),
    "another decoder": (spoilt(model__pixel_decoder="deformable"), "does not fit"),
    "fewer layers": (spoilt(model__decoder_layers=1), "has no place in it"),
    "more layers": (spoilt(model__decoder_layers=4), "is missing"),
    "a thousand layers": (spoilt(model__encoder_layers=1000), "far fewer than its configuration"),
    "more layers than any": (spoilt(model__decoder_layers=10**6), "model.decoder_layers"),
    "many queries": (
        spoilt(
            model__queries=1 << 24, model__token_queries=False, loss__denoising=0, loss__dense=0,
            warmup__masks=0,
        ), "does not fit",
    ),
    "wide": (spoilt(model__width=1 << 16, model__encoder_ffn=1 << 16), "does not fit"),
    "keys that do not fit together": (spoilt(model__mask_pooling=False), "mask_pooling"),
    "nan": (spoilt(model__width=float("nan")), "model.width"),
}  # fmt: skip


@pytest.mark.parametrize("name", META)
def test_metadata_that_cannot_be_is_refused_by_name(name: str, tmp_path: Path) -> None:
    meta, told = META[name]
    path = write(tmp_path / "w.safetensors", meta)
    peak, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(UserError) as caught:
        Predictor.load(path, device="cpu")
    assert told in caught.value.what and str(path) in caught.value.what, caught.value.what
    assert caught.value.hint
    assert time.process_time() - start < 10
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 500_000  # KiB


def test_metadata_that_is_no_object_or_nested_deeply(tmp_path: Path) -> None:
    for number, text in enumerate(("[]", "5", "null", '"x"', "{", "[" * 100_000)):
        path = tmp_path / f"{number}.safetensors"
        save_file({"x": torch.ones(2)}, path, {"concat": text})
        with pytest.raises(UserError, match=path.name):
            read_meta(path)


def _with(change: Callable[[dict[str, torch.Tensor]], object]) -> Weights:
    tensors = {name: tensor.clone() for name, tensor in OWN.tensors.items()}
    change(tensors)
    return Weights(tensors, OWN.meta, Path("mine.safetensors"), "")


BIAS = "segmentor.projector.layers.0.bias"
NO_OBJECT = "segmentor.classifier.no_object"
CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "missing": (lambda t: t.pop(BIAS), "is missing"),
    "left over": (lambda t: t.update({"segmentor.x": torch.ones(1)}), "has no place in it"),
    "misshapen": (lambda t: t.update({BIAS: torch.ones(1)}), "there and"),
    "of whole numbers": (lambda t: t.update({BIAS: t[BIAS].int()}), "holds int32"),
    "one NaN": (lambda t: t[BIAS][3:4].fill_(torch.nan), "no numbers"),
    "one infinity": (lambda t: t[BIAS][:1].fill_(-torch.inf), "no numbers"),
    "no width": (lambda t: t.pop(NO_OBJECT), f"{NO_OBJECT} is missing"),
    "no row": (lambda t: t.update({NO_OBJECT: torch.ones(0)}), "holds no row"),
    "no segmentor": (lambda t: t.clear(), "missing"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_tensors_that_are_not_the_model_s_are_refused(name: str) -> None:
    change, told = CHANGES[name]
    with pytest.raises(UserError, match=told) as caught:
        restore_segmentor(_with(change))
    assert "mine.safetensors" in caught.value.what


def test_large_but_finite_values_are_no_damage() -> None:
    """Their sum overflows, they do not."""

    def fill(tensors: dict[str, torch.Tensor]) -> None:
        tensors[BIAS][:2] = torch.finfo(torch.float32).max

    assert restore_segmentor(_with(fill)).projector.last.bias.abs().max() > 1e38


def test_weights_whose_predictions_are_no_numbers_are_told() -> None:
    """Finite values, but so large that the layers behind them overflow."""

    def fill(tensors: dict[str, torch.Tensor]) -> None:
        for name, tensor in tensors.items():
            if tensor.is_floating_point() and "backbone" in name:
                tensor.fill_(6e4)

    predictor = Predictor.load(_with(fill), device="cpu")
    with pytest.raises(UserError, match="NaN"):
        predictor(torch.full((3, 64, 64), 200, dtype=torch.uint8))
