"""The segmentor against `transformers`' Mask2Former with the same random weights, fp32."""

import pytest
import torch
from torch import Tensor, nn

from concat_cli.core.model.backbone import Backbone
from concat_cli.core.model.convert import load_mask2former, mask2former_weights
from concat_cli.core.model.pixel_decoder import DeformablePixelDecoder
from concat_cli.core.model.projector import Classifier, Projector
from concat_cli.core.model.query_decoder import QueryDecoder
from concat_cli.core.model.segmentor import Segmentor

transformers = pytest.importorskip("transformers", reason="transformers is a development package")

WIDTH, MASK_WIDTH, HEADS, QUERIES, LAYERS = 64, 32, 4, 12, 4
RELATIVE = 1e-4


def _their_model(backbone: transformers.PretrainedConfig) -> nn.Module:
    """A small random Mask2Former in which no weight is left at a special value."""
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=WIDTH,
        mask_feature_size=MASK_WIDTH,
        hidden_dim=WIDTH,
        encoder_feedforward_dim=96,
        dim_feedforward=80,
        encoder_layers=2,
        decoder_layers=LAYERS + 1,
        num_attention_heads=HEADS,
        num_queries=QUERIES,
        num_labels=7,
    )
    torch.manual_seed(0)
    model = transformers.Mask2FormerForUniversalSegmentation(config).eval()
    for name, tensor in model.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5)
        elif tensor.is_floating_point():
            tensor.add_(torch.randn_like(tensor) * 0.05)
    return model


def _swin() -> transformers.PretrainedConfig:
    stages = [f"stage{i}" for i in range(1, 5)]
    return transformers.SwinConfig(
        embed_dim=16,
        depths=[1, 1, 1, 1],
        num_heads=[2, 2, 2, 2],
        window_size=4,
        out_features=stages,
    )


def _resnet(depths: list[int], sizes: list[int]) -> transformers.PretrainedConfig:
    stages = [f"stage{i}" for i in range(1, 5)]
    return transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=sizes, depths=depths, out_features=stages
    )


def _close(ours: Tensor, theirs: Tensor, what: str) -> None:
    error = (ours - theirs).abs().max() / theirs.abs().max()
    assert ours.shape == theirs.shape and error < RELATIVE, f"{what}: {error:.1e}"


def _our_parts(channels: list[int]) -> nn.ModuleDict:
    pixel_decoder = DeformablePixelDecoder(channels, WIDTH, MASK_WIDTH, HEADS, ffn=96, layers=2)
    query_decoder = QueryDecoder(WIDTH, HEADS, LAYERS, 80, QUERIES, MASK_WIDTH)
    return nn.ModuleDict({"pixel_decoder": pixel_decoder, "query_decoder": query_decoder}).eval()


@pytest.mark.parametrize("size", [(64, 96), (128, 128)])
def test_decoders_agree_from_swin_features(size: tuple[int, int]) -> None:
    theirs = _their_model(_swin())
    ours = _our_parts([16, 32, 64, 128])
    ours.load_state_dict(mask2former_weights(theirs.state_dict()))
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs.model(images, output_hidden_states=True)
        pixel = ours["pixel_decoder"](list(expected.encoder_hidden_states))
        decoded = ours["query_decoder"](pixel)
    _close(pixel.mask_features, expected.pixel_decoder_last_hidden_state, "mask features")
    for index, level in enumerate(expected.pixel_decoder_hidden_states):
        _close(pixel.levels[index], level, f"level {index}")
    layers = expected.transformer_decoder_intermediate_states
    assert len(layers) == len(decoded.queries) == LAYERS + 1
    for index, layer in enumerate(layers):
        _close(decoded.queries[index], layer.transpose(0, 1), f"queries of layer {index}")
        masks = expected.masks_queries_logits[index]
        _close(decoded.mask_logits[index], masks, f"masks of layer {index}")


def test_whole_segmentor_agrees_with_resnet50() -> None:
    theirs = _their_model(_resnet([3, 4, 6, 3], [256, 512, 1024, 2048]))
    backbone = Backbone("resnet50", pretrained=False, frozen_bn=True)
    parts = _our_parts(list(backbone.channels))
    projector, classifier = Projector(WIDTH, 16), Classifier(16)
    ours = Segmentor(backbone, *parts.values(), projector, classifier).eval()
    missing = load_mask2former(ours, theirs.state_dict())
    assert all(name.startswith(("projector.", "classifier.")) for name in missing), missing
    images = torch.rand(1, 3, 96, 64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = theirs((images - ours.mean) / ours.std)
        output = ours(images, None, torch.randn(5, 16), last_only=True)
    _close(output.mask_logits[-1], expected.masks_queries_logits, "mask logits")
    queries = expected.transformer_decoder_last_hidden_state
    _close(output.vision_queries[-1], ours.query_decoder.norm(queries), "queries")
