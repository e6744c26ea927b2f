"""Weights of `transformers`' Mask2Former under this project's names."""

from collections.abc import Mapping

import torch
from torch import Tensor

PIXEL = "model.pixel_level_module.decoder."
QUERY = "model.transformer_module."
DECODER = QUERY + "decoder."
RESNET = "model.pixel_level_module.encoder."
PAIR = ("weight", "bias")
NORM = (*PAIR, "running_mean", "running_var", "num_batches_tracked")


def mask2former_weights(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`Mask2FormerForUniversalSegmentation` tensors -> `Segmentor` tensors.

    Covers "pixel_decoder.*" (deformable), "query_decoder.*" and, where it is a ResNet,
    "backbone.*". The class head is left out: a cosine to text takes its place.
    """
    ours = {**_pixel_decoder(theirs), **_query_decoder(theirs)}
    if f"{RESNET}embedder.embedder.convolution.weight" in theirs:
        ours |= _resnet(theirs)
    return ours


def _count(theirs: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered parts there are under a prefix."""
    return 1 + max(
        int(name[len(prefix) :].split(".")[0]) for name in theirs if name.startswith(prefix)
    )


def _copy(theirs: Mapping[str, Tensor], names: Mapping[str, str]) -> dict[str, Tensor]:
    """All tensors of layers: our name -> their name."""
    return {
        f"{ours}.{part}": theirs[f"{name}.{part}"]
        for ours, name in names.items()
        for part in NORM
        if f"{name}.{part}" in theirs
    }


def _pixel_decoder(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "lateral.conv": "adapter_1.0",
        "lateral.norm": "adapter_1.1",
        "smooth.conv": "layer_1.0",
        "smooth.norm": "layer_1.1",
        "mask_out": "mask_projection",
    }
    for level in range(3):
        names[f"inputs.{level}.conv"] = f"input_projections.{level}.0"
        names[f"inputs.{level}.norm"] = f"input_projections.{level}.1"
    for index in range(_count(theirs, PIXEL + "encoder.layers.")):
        ours, layer = f"layers.{index}.", f"encoder.layers.{index}."
        names |= {
            ours + "attention.offsets": layer + "self_attn.sampling_offsets",
            ours + "attention.weights": layer + "self_attn.attention_weights",
            ours + "attention.value": layer + "self_attn.value_proj",
            ours + "attention.out": layer + "self_attn.output_proj",
            ours + "attention_norm": layer + "self_attn_layer_norm",
            ours + "feed_forward.first": layer + "fc1",
            ours + "feed_forward.second": layer + "fc2",
            ours + "feed_forward_norm": layer + "final_layer_norm",
        }
    ours = _copy(theirs, {f"pixel_decoder.{a}": PIXEL + b for a, b in names.items()})
    ours["pixel_decoder.level_embedding"] = theirs[PIXEL + "level_embed"]
    return ours


def _query_decoder(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    head = "mask_predictor.mask_embedder."
    names = {"norm": "layernorm"}
    names |= {f"mask_embedding.{2 * index}": f"{head}{index}.0" for index in range(3)}
    ours: dict[str, Tensor] = {}
    for index in range(_count(theirs, DECODER + "layers.")):
        mine, layer = f"layers.{index}.", f"layers.{index}."
        names |= {
            mine + "self_attention.query": layer + "self_attn.q_proj",
            mine + "self_attention.key": layer + "self_attn.k_proj",
            mine + "self_attention.value": layer + "self_attn.v_proj",
            mine + "self_attention.out": layer + "self_attn.out_proj",
            mine + "cross_attention.out": layer + "cross_attn.out_proj",
            mine + "self_norm": layer + "self_attn_layer_norm",
            mine + "cross_norm": layer + "cross_attn_layer_norm",
            mine + "feed_forward.first": layer + "fc1",
            mine + "feed_forward.second": layer + "fc2",
            mine + "feed_forward_norm": layer + "final_layer_norm",
        }
        for part in PAIR:  # query, key and value in one tensor there
            packed = theirs[f"{DECODER}{layer}cross_attn.in_proj_{part}"]
            for name, piece in zip(("query", "key", "value"), packed.chunk(3), strict=True):
                ours[f"query_decoder.{mine}cross_attention.{name}.{part}"] = piece.clone()
    ours |= _copy(theirs, {f"query_decoder.{a}": DECODER + b for a, b in names.items()})
    ours["query_decoder.level_embedding"] = theirs[QUERY + "level_embed.weight"]
    ours["query_decoder.query_content"] = theirs[QUERY + "queries_features.weight"]
    ours["query_decoder.query_position"] = theirs[QUERY + "queries_embedder.weight"]
    return ours


def _resnet(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their ResNet -> timm's."""
    stem = "embedder.embedder."
    names = {"conv1": stem + "convolution", "bn1": stem + "normalization"}
    for stage in range(4):
        prefix = f"encoder.stages.{stage}.layers."
        for block in range(_count(theirs, RESNET + prefix)):
            ours, block_name = f"layer{stage + 1}.{block}.", f"{prefix}{block}."
            names[ours + "downsample.0"] = block_name + "shortcut.convolution"
            names[ours + "downsample.1"] = block_name + "shortcut.normalization"
            for index in range(3):
                names[f"{ours}conv{index + 1}"] = f"{block_name}layer.{index}.convolution"
                names[f"{ours}bn{index + 1}"] = f"{block_name}layer.{index}.normalization"
    return _copy(theirs, {f"backbone.body.body.{a}": RESNET + b for a, b in names.items()})


def load_mask2former(segmentor: torch.nn.Module, theirs: Mapping[str, Tensor]) -> list[str]:
    """Loads what `mask2former_weights` covers; returns the names that kept their values."""
    missing, unexpected = segmentor.load_state_dict(mask2former_weights(theirs), strict=False)
    assert not unexpected, unexpected
    return missing
