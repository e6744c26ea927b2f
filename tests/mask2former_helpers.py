"""Random Mask2Formers of `transformers`, and ours of the same shape."""

from __future__ import annotations

import re
from typing import Any

import torch
import transformers
from swin_helpers import TOY
from torch import Tensor, nn

from concat_cli.core.build import build_segmentor
from concat_cli.core.config import ModelConfig
from concat_cli.core.model.segmentor import Segmentor
from concat_cli.core.model.swin import SwinShape

WIDTH, MASK_WIDTH, HEADS, QUERIES, LAYERS, ENCODER = 64, 32, 4, 12, 4, 2
STAGES = [f"stage{i}" for i in range(1, 5)]


def swin_config(shape: SwinShape = TOY) -> transformers.PretrainedConfig:
    """A Swin of theirs."""
    return transformers.SwinConfig(
        embed_dim=shape.width,
        depths=list(shape.depths),
        num_heads=list(shape.heads),
        window_size=shape.window,
        out_features=STAGES,
    )


def resnet_config(depths: tuple[int, ...] = (3, 4, 6, 3)) -> transformers.PretrainedConfig:
    """A ResNet of theirs, R-50 by default."""
    return transformers.ResNetConfig(
        embedding_size=64,
        hidden_sizes=[256, 512, 1024, 2048],
        depths=list(depths),
        out_features=STAGES,
    )


def their_model(backbone: transformers.PretrainedConfig) -> nn.Module:
    """A random Mask2Former, small but for its backbone, no weight of it at a special value."""
    config = transformers.Mask2FormerConfig(
        backbone_config=backbone,
        feature_size=WIDTH,
        mask_feature_size=MASK_WIDTH,
        hidden_dim=WIDTH,
        encoder_feedforward_dim=96,
        dim_feedforward=80,
        encoder_layers=ENCODER,
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


def model_config(backbone: str, **keys: Any) -> ModelConfig:
    """The keys that fit `their_model`."""
    fitting: dict[str, Any] = {
        "backbone": backbone, "pixel_decoder": "deformable", "width": WIDTH,
        "mask_width": MASK_WIDTH, "heads": HEADS, "encoder_layers": ENCODER, "encoder_ffn": 96,
        "decoder_layers": LAYERS, "decoder_ffn": 80, "queries": QUERIES,
        "token_queries": False, "mask_pooling": False, "frozen_bn": True,
    }  # fmt: skip
    return ModelConfig(**(fitting | keys))


def started(cfg: ModelConfig) -> Segmentor:
    """Our segmentor as a configuration starts it."""
    return build_segmentor(cfg, 16, pretrained=True).eval()


# Independent of the package's own tables: each step as detectron2's code names its modules.
_PIXEL, _QUERY = r"model\.pixel_level_module\.", r"model\.transformer_module\."
_HEAD = "sem_seg_head."
_DETECTRON2 = (
    (_PIXEL + r"decoder\.input_projections\.", _HEAD + "pixel_decoder.input_proj."),
    (_PIXEL + r"decoder\.(adapter_1|layer_1)\.0\.", _HEAD + r"pixel_decoder.\1."),
    (_PIXEL + r"decoder\.(adapter_1|layer_1)\.1\.", _HEAD + r"pixel_decoder.\1.norm."),
    (_PIXEL + r"decoder\.mask_projection\.", _HEAD + "pixel_decoder.mask_features."),
    (_PIXEL + r"decoder\.level_embed", _HEAD + "pixel_decoder.transformer.level_embed"),
    (_PIXEL + r"decoder\.encoder\.layers\.(\d+)\.self_attn_layer_norm\.",
     _HEAD + r"pixel_decoder.transformer.encoder.layers.\1.norm1."),
    (_PIXEL + r"decoder\.encoder\.layers\.(\d+)\.final_layer_norm\.",
     _HEAD + r"pixel_decoder.transformer.encoder.layers.\1.norm2."),
    (_PIXEL + r"decoder\.encoder\.layers\.(\d+)\.fc(\d)\.",
     _HEAD + r"pixel_decoder.transformer.encoder.layers.\1.linear\2."),
    (_PIXEL + r"decoder\.encoder\.", _HEAD + "pixel_decoder.transformer.encoder."),
    (_QUERY + r"queries_features\.", _HEAD + "predictor.query_feat."),
    (_QUERY + r"queries_embedder\.", _HEAD + "predictor.query_embed."),
    (_QUERY + r"level_embed\.", _HEAD + "predictor.level_embed."),
    (_QUERY + r"decoder\.layernorm\.", _HEAD + "predictor.decoder_norm."),
    (_QUERY + r"decoder\.mask_predictor\.mask_embedder\.(\d)\.0\.",
     _HEAD + r"predictor.mask_embed.layers.\1."),
    (_QUERY + r"decoder\.layers\.(\d+)\.self_attn_layer_norm\.",
     _HEAD + r"predictor.transformer_self_attention_layers.\1.norm."),
    (_QUERY + r"decoder\.layers\.(\d+)\.cross_attn_layer_norm\.",
     _HEAD + r"predictor.transformer_cross_attention_layers.\1.norm."),
    (_QUERY + r"decoder\.layers\.(\d+)\.final_layer_norm\.",
     _HEAD + r"predictor.transformer_ffn_layers.\1.norm."),
    (_QUERY + r"decoder\.layers\.(\d+)\.fc(\d)\.",
     _HEAD + r"predictor.transformer_ffn_layers.\1.linear\2."),
    (_QUERY + r"decoder\.layers\.(\d+)\.self_attn\.",
     _HEAD + r"predictor.transformer_self_attention_layers.\1.self_attn."),
    (_QUERY + r"decoder\.layers\.(\d+)\.cross_attn\.",
     _HEAD + r"predictor.transformer_cross_attention_layers.\1.multihead_attn."),
    (r"class_predictor\.", _HEAD + "predictor.class_embed."),
    # Swin
    (_PIXEL + r"encoder\.swin\.embeddings\.patch_embeddings\.projection\.",
     "backbone.patch_embed.proj."),
    (_PIXEL + r"encoder\.swin\.embeddings\.norm\.", "backbone.patch_embed.norm."),
    (_PIXEL + r"encoder\.swin\.encoder\.layers\.", "backbone.layers."),
    (r"(backbone\.layers\.\d\.blocks\.\d+\.)layernorm_before\.", r"\1norm1."),
    (r"(backbone\.layers\.\d\.blocks\.\d+\.)layernorm_after\.", r"\1norm2."),
    (r"(backbone\.layers\.\d\.blocks\.\d+\.)attention\.relative_position_bias\.", r"\1attn."),
    (r"(backbone\.layers\.\d\.blocks\.\d+\.)attention\.o_proj\.", r"\1attn.proj."),
    (r"(backbone\.layers\.\d\.blocks\.\d+\.)attention\.", r"\1attn."),
    (_PIXEL + r"encoder\.hidden_states_norms\.stage1", "backbone.norm0"),
    (_PIXEL + r"encoder\.hidden_states_norms\.stage2", "backbone.norm1"),
    (_PIXEL + r"encoder\.hidden_states_norms\.stage3", "backbone.norm2"),
    (_PIXEL + r"encoder\.hidden_states_norms\.stage4", "backbone.norm3"),
    # ResNet
    (_PIXEL + r"encoder\.embedder\.embedder\.convolution\.", "backbone.stem.conv1."),
    (_PIXEL + r"encoder\.embedder\.embedder\.normalization\.", "backbone.stem.conv1.norm."),
    (_PIXEL + r"encoder\.encoder\.stages\.0\.layers\.", "backbone.res2."),
    (_PIXEL + r"encoder\.encoder\.stages\.1\.layers\.", "backbone.res3."),
    (_PIXEL + r"encoder\.encoder\.stages\.2\.layers\.", "backbone.res4."),
    (_PIXEL + r"encoder\.encoder\.stages\.3\.layers\.", "backbone.res5."),
    (r"(backbone\.res\d\.\d\.)shortcut\.convolution\.", r"\1shortcut."),
    (r"(backbone\.res\d\.\d\.)shortcut\.normalization\.", r"\1shortcut.norm."),
    (r"(backbone\.res\d\.\d\.)layer\.0\.", r"\1conv1."),
    (r"(backbone\.res\d\.\d\.)layer\.1\.", r"\1conv2."),
    (r"(backbone\.res\d\.\d\.)layer\.2\.", r"\1conv3."),
    (r"(backbone\.res\d\.\d\.conv\d\.)convolution\.", r"\1"),
    (r"(backbone\.res\d\.\d\.conv\d\.)normalization\.", r"\1norm."),
)  # fmt: skip


def detectron2_names(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of `their_model` as a checkpoint of Mask2Former's authors names them."""
    found: dict[str, Tensor] = {}
    for name, tensor in theirs.items():
        for pattern, target in _DETECTRON2:
            name = re.sub(rf"^{pattern}", target, name)
        if name.endswith("num_batches_tracked") or ".swin.layernorm." in name:
            continue  # frozen batch norms have none; detectron2's Swin has no last norm
        found[name] = tensor
    for name in [n for n in found if re.search(r"\.(?:self_attn|attn)\.q_proj\.", n)]:
        pieces = [found.pop(name.replace("q_proj", f"{kind}_proj")) for kind in "qkv"]
        of_swin = ".attn.q_proj." in name
        packed = name.replace("q_proj.", "qkv." if of_swin else "in_proj_")
        found[packed] = torch.cat(pieces)
        if of_swin and name.endswith("weight"):
            found[name.replace("q_proj.weight", "relative_position_index")] = torch.zeros(1)
    found["criterion.empty_weight"] = torch.ones(8)
    return found
