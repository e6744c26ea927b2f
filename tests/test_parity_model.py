"""The segmentor against `transformers`' Mask2Former with the same random weights, fp32."""

from __future__ import annotations

import pytest
import torch
from swin_helpers import TOY
from torch import Tensor, nn

pytest.importorskip("transformers", reason="transformers is a development package")
from mask2former_helpers import (  # which needs transformers
    LAYERS,
    model_config,
    resnet_config,
    swin_config,
    their_model,
)

from concat_cli.core.build import build_segmentor
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.model.swin import SWINS
from concat_cli.core.weights_from.names import rename

RELATIVE = 1e-4
SIZES = [(64, 96), (128, 128), (100, 75), (61, 130)]  # the last two are no multiples of anything


@pytest.fixture(scope="module", autouse=True)
def toy_swin():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SWINS, "swin_toy", TOY)
        yield


@pytest.fixture(scope="module")
def swins() -> tuple[nn.Module, Segmentor]:
    theirs = their_model(swin_config())
    return theirs, _with_their_weights("swin_toy", theirs)


def _with_their_weights(backbone: str, theirs: nn.Module) -> Segmentor:
    ours = build_segmentor(model_config(backbone), 16).eval()
    renamed = rename(theirs.state_dict())
    assert renamed is not None
    missing, unexpected = ours.load_state_dict(renamed.tensors, strict=False)
    assert not unexpected
    assert all(name.startswith(("projector.", "classifier.")) for name in missing), missing
    return ours


def _images(size: tuple[int, int], batch: int = 2) -> Tensor:
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(1))


def _close(ours: Tensor, theirs: Tensor, what: str) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert ours.shape == theirs.shape and error < RELATIVE, f"{what}: {error:.1e}"


def _check_outputs(ours: Segmentor, theirs: nn.Module, images: Tensor) -> None:
    """Backbone, pixel decoder, queries and masks of each layer, and classes by their own head."""
    with torch.no_grad():
        normalised = ours.backbone.normalised(images, None)
        expected = theirs(normalised, output_hidden_states=True, output_auxiliary_logits=True)
        output = ours(images, None, torch.randn(5, 16))
        classes = theirs.class_predictor(output.vision_queries[-1])
    for index, features in enumerate(expected.encoder_hidden_states):
        _close(output.features[index], features, f"backbone, stage {index}")
    pixel = output.pixel
    _close(pixel.mask_features, expected.pixel_decoder_last_hidden_state, "mask features")
    for index, level in enumerate(expected.pixel_decoder_hidden_states):
        _close(pixel.levels[index], level, f"level {index}")
    masks = [aux["masks_queries_logits"] for aux in expected.auxiliary_logits]
    for index, layer in enumerate([*masks, expected.masks_queries_logits]):
        _close(output.mask_logits[index], layer, f"masks of layer {index}")
    assert len(output.mask_logits) == LAYERS + 1 == len(masks) + 1
    queries = ours.query_decoder.norm(expected.transformer_decoder_last_hidden_state)
    _close(output.vision_queries[-1], queries, "queries")
    _close(classes, expected.class_queries_logits, "class logits")


@pytest.mark.parametrize("size", SIZES)
def test_whole_segmentor_agrees_with_a_small_swin(
    swins: tuple[nn.Module, Segmentor], size: tuple[int, int]
) -> None:
    theirs, ours = swins
    _check_outputs(ours, theirs, _images(size))


def test_whole_segmentor_agrees_with_swin_tiny() -> None:
    name = "swin_tiny_patch4_window7_224"
    theirs = their_model(swin_config(SWINS[name]))
    _check_outputs(_with_their_weights(name, theirs), theirs, _images((150, 110), 1))


@pytest.mark.parametrize("size", [(96, 64), (100, 75)])
def test_whole_segmentor_agrees_with_resnet50(size: tuple[int, int]) -> None:
    theirs = their_model(resnet_config())
    _check_outputs(_with_their_weights("resnet50", theirs), theirs, _images(size, 1))
