"""Small CLIPs with random weights, one of each kind of image tower, through `local-dir:`; what they
say of one mask, by the libraries' own layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
import torch.nn.functional as F
from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer

from concat_cli.core.clip.encoder import Clip, load_clip
from concat_cli.core.config import ClipConfig

TEXT = {"context_length": 24, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}


@register_model
def toy_siglip(pretrained: bool = False, **keys: Any) -> VisionTransformer:
    """timm's ViT as SigLIP has it, but small."""
    keys = {k: v for k, v in keys.items() if not k.startswith(("pretrained", "cache_dir"))}
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
    return VisionTransformer(**shape, class_token=False, **keys)


def timm_tower(name: str, size: int, pool: str, proj: str) -> dict[str, Any]:
    """The configuration of a tower of timm."""
    return {
        "timm_model_name": name, "timm_model_pretrained": False, "timm_pool": pool,
        "timm_proj": proj, "image_size": size,
    }  # fmt: skip


VIT = {"image_size": 32, "layers": 3, "width": 32, "head_width": 8, "patch_size": 8}
TOWERS: dict[str, dict[str, Any]] = {
    "vit": VIT,
    "vit with scales": VIT | {"ls_init_value": 0.3},
    "siglip": timm_tower("toy_siglip", 32, "map", "none"),
    "convnext": timm_tower("test_convnext", 96, "", "linear"),
    "convnext with mlp": timm_tower("test_convnext2", 96, "", "mlp"),
    "resnet": {"image_size": 96, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None},
}
STRIDES = {name: 8 if "vit" in name or name == "siglip" else 32 for name in TOWERS}
OTHERS: dict[str, dict[str, Any]] = {  # that cannot be pooled under masks
    "average of patches": VIT | {"pool_type": "avg"},
    "CoCa": VIT | {"attentional_pool": True},
    "other blocks": VIT | {"qk_norm": True},
    "rotary pool": timm_tower("test_convnext", 96, "rot_attn", ""),
    "ResNet of timm": timm_tower("test_resnet", 96, "", "linear"),
    "CLS token of timm": timm_tower("test_vit", 160, "", "linear"),
}


def tower_clip(folder: Path, name: str) -> Clip:
    """The CLIP of a tower; no weight is at a special value."""
    tower = (TOWERS | OTHERS)[name]
    width = 32 if name == "siglip" else 16
    model = {"embed_dim": width, "vision_cfg": tower, "text_cfg": TEXT, "custom_text": True}
    folder = folder / name.replace(" ", "_")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": model}))
    clip = load_clip(ClipConfig(f"local-dir:{folder}", "random"))
    generator = torch.Generator().manual_seed(1)
    for name, tensor in clip.model.visual.state_dict().items():
        if name.endswith("running_var"):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.add_(0.05 * torch.randn(tensor.shape, generator=generator))
    return clip


def naive_shares(mask: torch.Tensor, valid: tuple[int, int], grid: int) -> np.ndarray:
    """(grid, grid): rectangle by rectangle."""
    height, width = valid
    found = np.zeros((grid, grid))
    for y, x in mask.nonzero().tolist():
        top, bottom = min(4 * y, height), min(4 * y + 4, height)
        left, right = min(4 * x, width), min(4 * x + 4, width)
        for i in range(grid):
            for j in range(grid):
                rows = min(bottom, (i + 1) * height / grid) - max(top, i * height / grid)
                columns = min(right, (j + 1) * width / grid) - max(left, j * width / grid)
                found[i, j] += max(rows, 0) * max(columns, 0)
    return found / (height / grid * width / grid)


def naive_cells(shares: np.ndarray) -> list[int]:
    """The cells that stand for a mask."""
    flat = shares.ravel()
    inside = [n for n, share in enumerate(flat) if share > 0.49999]
    return inside or [n for n, share in enumerate(flat) if share > flat.max() - 1e-9]


@torch.no_grad()
def naive_token(clip: Clip, view: torch.Tensor, shares: np.ndarray) -> torch.Tensor:
    """(E,) of one mask and one view (1, 3, side, side), by the libraries' own layers."""
    visual, cells = clip.model.visual, naive_cells(shares)
    if isinstance(visual, open_clip.transformer.VisionTransformer):
        tokens = visual._embeds(view)
        count = tokens.shape[1]
        tokens = torch.cat((tokens, tokens[:, :1]), 1)
        hidden = torch.full((count + 1, count + 1), -torch.inf)
        hidden[:count, :count] = 0
        hidden[count, [1 + n for n in cells]] = 0
        hidden[count, count] = 0
        for block in visual.transformer.resblocks:
            tokens = block(tokens, attn_mask=hidden)
        found = visual.ln_post(tokens[:, -1]) @ visual.proj
    elif isinstance(visual, open_clip.modified_resnet.ModifiedResNet):
        maps = visual.layer4(visual.layer3(visual.layer2(visual.layer1(visual.stem(view)))))
        pool, part = visual.attnpool, maps.flatten(2)[0].T[cells]  # (n, C)
        rows = torch.cat((part.mean(0, keepdim=True), part))[:, None]  # (1+n, 1, C)
        rows = rows + pool.positional_embedding[[0, *(1 + n for n in cells)]][:, None]
        bias = torch.cat([pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias])
        found = F.multi_head_attention_forward(
            rows[:1], rows, rows, rows.shape[-1], pool.num_heads, None, bias, None, None, False, 0,
            pool.c_proj.weight, pool.c_proj.bias, False, need_weights=False,
            use_separate_proj_weight=True, q_proj_weight=pool.q_proj.weight,
            k_proj_weight=pool.k_proj.weight, v_proj_weight=pool.v_proj.weight,
        )[0][0]  # fmt: skip
    elif hasattr(visual.trunk, "attn_pool"):
        tokens, trunk = visual.trunk.forward_features(view), visual.trunk
        seen = torch.zeros(1, 1, 1, tokens.shape[1], dtype=torch.bool)
        seen[..., cells] = True
        found = visual.head(trunk.head(trunk.fc_norm(trunk.attn_pool(tokens, attn_mask=seen))))
    else:
        maps = visual.trunk.forward_features(view)[0].numpy()
        pooled = (maps * shares).sum((1, 2)) / shares.sum()
        pooled = torch.from_numpy(pooled).float()[None, :, None, None]
        found = visual.head(visual.trunk.forward_head(pooled))
    return F.normalize(found[0], dim=0)
