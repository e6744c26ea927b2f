"""FC-CLIP's decoder by the names and shapes of its published file, and a small CLIP under it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import open_clip
import torch
from torch import Tensor

from concat_cli.core.clip.encoder import Clip, load_clip
from concat_cli.core.config import ClipConfig

PUBLISHED = {"channels": (192, 384, 768, 1536), "embed": 768, "queries": 250, "layers": 9}
SMALL = {"channels": (40, 80, 160, 320), "embed": 64, "queries": 5, "layers": 2}


def shapes(
    channels: tuple[int, ...], embed: int, queries: int, layers: int, encoder: int = 6
) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the published file, written down from its public code."""
    head, pixel = "sem_seg_head.predictor.", "sem_seg_head.pixel_decoder."
    found: dict[str, tuple[int, ...]] = {"void_embedding.weight": (1, embed)}

    def linear(name: str, inputs: int, outputs: int) -> None:
        found[f"{name}.weight"], found[f"{name}.bias"] = (outputs, inputs), (outputs,)

    def norm(name: str) -> None:
        found[f"{name}.weight"] = found[f"{name}.bias"] = (256,)

    for i, inputs in enumerate(reversed(channels[1:])):
        found[f"{pixel}input_proj.{i}.0.weight"] = (256, inputs, 1, 1)
        found[f"{pixel}input_proj.{i}.0.bias"] = (256,)
        norm(f"{pixel}input_proj.{i}.1")
    found[f"{pixel}transformer.level_embed"] = (3, 256)
    for i in range(encoder):
        layer = f"{pixel}transformer.encoder.layers.{i}."
        linear(f"{layer}self_attn.sampling_offsets", 256, 8 * 3 * 4 * 2)
        linear(f"{layer}self_attn.attention_weights", 256, 8 * 3 * 4)
        linear(f"{layer}self_attn.value_proj", 256, 256)
        linear(f"{layer}self_attn.output_proj", 256, 256)
        linear(f"{layer}linear1", 256, 1024)
        linear(f"{layer}linear2", 1024, 256)
        norm(f"{layer}norm1")
        norm(f"{layer}norm2")
    found[f"{pixel}adapter_1.weight"] = (256, channels[0], 1, 1)
    found[f"{pixel}layer_1.weight"] = (256, 256, 3, 3)
    norm(f"{pixel}adapter_1.norm")
    norm(f"{pixel}layer_1.norm")
    found[f"{pixel}mask_features.weight"] = (256, 256, 1, 1)
    found[f"{pixel}mask_features.bias"] = (256,)
    for i in range(layers):
        for kind, part in (("self", "self_attn"), ("cross", "multihead_attn")):
            attention = f"{head}transformer_{kind}_attention_layers.{i}."
            found[f"{attention}{part}.in_proj_weight"] = (768, 256)
            found[f"{attention}{part}.in_proj_bias"] = (768,)
            linear(f"{attention}{part}.out_proj", 256, 256)
            norm(f"{attention}norm")
        linear(f"{head}transformer_ffn_layers.{i}.linear1", 256, 2048)
        linear(f"{head}transformer_ffn_layers.{i}.linear2", 2048, 256)
        norm(f"{head}transformer_ffn_layers.{i}.norm")
    norm(f"{head}decoder_norm")
    found[f"{head}query_feat.weight"] = found[f"{head}query_embed.weight"] = (queries, 256)
    found[f"{head}level_embed.weight"] = (3, 256)
    for i in range(3):
        linear(f"{head}mask_embed.layers.{i}", 256, 256)
    norm(f"{head}_mask_pooling_proj.0")
    linear(f"{head}_mask_pooling_proj.1", 256, 256)
    for i, outputs in enumerate((256, 256, embed)):
        linear(f"{head}class_embed.layers.{i}", 256, outputs)
    found[f"{head}logit_scale"] = ()
    return found


def tensors(sizes: dict[str, Any] = SMALL) -> dict[str, Tensor]:
    """Random values of these shapes."""
    source = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(shape, generator=source) * 0.1 for name, shape in shapes(**sizes).items()
    }


def clip_of(folder: Path) -> Clip:
    """A small ConvNeXt CLIP of open_clip with random weights."""
    config = {
        "embed_dim": 64,
        "vision_cfg": {
            "timm_model_name": "convnext_atto",
            "timm_model_pretrained": False,
            "timm_pool": "",
            "timm_proj": "linear",
            "image_size": 64,
        },
        "text_cfg": {
            "context_length": 77,
            "vocab_size": 49408,
            "width": 64,
            "heads": 2,
            "layers": 1,
        },
    }
    folder.mkdir()
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    torch.save(model.state_dict(), folder / "open_clip_pytorch_model.bin")
    return load_clip(ClipConfig(f"local-dir:{folder}"))
