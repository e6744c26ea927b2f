"""Tiny random segmentors of `transformers`, one of each kind, in folders as it saves them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mask2former_helpers as m2f
import pytest
import torch
import transformers
from swin_helpers import TOY
from torch import Tensor, nn

from concat_cli.core.model.swin import SWINS
from concat_cli.core.weights_from import files as weights_from

SWIN_TINY = "swin_tiny_patch4_window7_224"  # published
SWIN_TOY = "swin_toy_patch4_window4_128"  # much smaller, of no published shape
CLASSES, QUERIES = 7, 9
# "the task is panoptic" by transformers' CLIPTokenizer, before padding; tested there
TASK = [49406, 518, 10549, 533, 1072, 24755, 49407]


def tiny_swin() -> transformers.PretrainedConfig:
    """Of no published shape."""
    return transformers.SwinConfig(
        embed_dim=24, depths=[1, 2, 1, 1], num_heads=[2, 2, 4, 4], window_size=4,
        out_features=m2f.STAGES,
    )  # fmt: skip


def know_the_toy(patch: pytest.MonkeyPatch) -> None:
    """Makes the small Swin one that is built here."""
    patch.setitem(SWINS, SWIN_TOY, TOY)
    patch.setitem(weights_from._SWINS, (TOY.width, TOY.depths[2]), "toy")
    patch.setitem(weights_from._SIDES, TOY.window, 128)


def config_of(kind: str) -> Any:
    """A small configuration of a kind."""
    if kind == "eomt":
        return transformers.EomtConfig(
            hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=128,
            num_blocks=2, num_queries=QUERIES, num_labels=CLASSES,
        )  # fmt: skip
    if kind == "oneformer":
        return transformers.OneFormerConfig(
            backbone_config=tiny_swin(), num_queries=QUERIES, conv_dim=64, mask_dim=64,
            hidden_dim=64, encoder_feedforward_dim=64, encoder_layers=1, decoder_layers=3,
            num_attention_heads=4, dim_feedforward=64, query_dec_layers=1, is_training=True,
            text_encoder_width=64, text_encoder_num_layers=1, num_labels=CLASSES,
        )  # fmt: skip
    if kind == "maskformer":
        decoder = transformers.DetrConfig(
            num_queries=QUERIES, d_model=32, encoder_layers=1, decoder_layers=2,
            encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=32,
            decoder_ffn_dim=32,
        )  # fmt: skip
        return transformers.MaskFormerConfig(
            backbone_config=tiny_swin(), decoder_config=decoder, fpn_feature_size=64,
            mask_feature_size=32, num_labels=CLASSES,
        )  # fmt: skip
    raise AssertionError(kind)


MODELS = {
    "eomt": "EomtForUniversalSegmentation",
    "oneformer": "OneFormerForUniversalSegmentation",
    "maskformer": "MaskFormerForInstanceSegmentation",
}


def random_model(kind: str) -> nn.Module:
    """With no weight at a special value."""
    torch.manual_seed(0)
    if kind == "mask2former":
        return m2f.their_model(m2f.swin_config())
    model = getattr(transformers, MODELS[kind])(config_of(kind)).eval()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and name != "attn_mask_probs":
            tensor.add_(torch.randn_like(tensor) * 0.05)
    return model


def saved(model: Any, folder: Path, preprocessor: dict[str, Any] | None = None) -> Path:
    """A folder as a hub's repository has it."""
    model.save_pretrained(folder)
    if preprocessor is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(preprocessor))
    return folder


def their_outputs(kind: str, model: nn.Module, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mask and class logits of normalised pictures, by the library itself."""
    given: dict[str, Any] = {"pixel_values": pixels}
    if kind == "oneformer":
        # it would ask for the texts of training, and (5.24.0) drop features at random in `eval`
        for module in model.modules():
            if hasattr(module, "is_training"):
                module.is_training = False
        row = torch.tensor(TASK + [0] * (77 - len(TASK)))
        given["task_inputs"] = row.expand(len(pixels), -1)
    with torch.no_grad():
        out = model(**given)
    return out.masks_queries_logits, out.class_queries_logits
