"""Dense tokens of the frozen CLIP image encoder: an embedding for each patch, not one for all."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import (  # pyright: ignore[reportMissingTypeStubs]
    ModifiedResNet,
)
from open_clip.transformer import (  # pyright: ignore[reportMissingTypeStubs]
    ResidualAttentionBlock,
    VisionTransformer,
)
from torch import Tensor

from concat_cli.core.clip.encoder import Clip
from concat_cli.core.errors import UserError

TokenPath = Literal["value", "last"]
_RESNET_STRIDE = 32


@torch.no_grad()
def dense_tokens(
    clip: Clip, images: Tensor, padding: Tensor | None, size: int, path: TokenPath = "value"
) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, h, w, E) fp32, L2-normalised; the grid covers the image, pads too.

    Args:
        padding: (B, H, W) bool or None; CLIP is shown its mean colour there.
        size: side in pixels of the square that the images are resized to, not only the model's own.
        path: "value": the last attention is replaced by its value and output projections, so that
            a token keeps its place (MaskCLIP, arXiv 2112.01071, 3.2); "last": the plain tokens.
    UserError for a tower that has no such tokens, and for a size that its patches do not fill.
    """
    assert clip.has_image_tower, "loaded without the image tower"
    side = patch_side(clip)
    if size % side:
        near = max(side, round(size / side) * side)
        raise UserError(
            f"CLIP {clip.identity.model} has patches of {side} pixels, which do not fill a side of "
            f"{size}.",
            f"Take a multiple of {side}, such as {near}.",
        )
    with clip.precision():
        tokens = tower_tokens(clip.model.visual, _square(clip, images, padding, size), path)
    grid = (size // side, size // side)
    return F.normalize(tokens[:, 1:].float(), dim=-1).reshape(
        len(tokens), *grid, -1
    )  # (B, h, w, E)


def patch_side(clip: Clip) -> int:
    """Pixels along a side of the patch of one token; UserError for a tower without dense tokens."""
    visual = clip.model.visual
    if isinstance(visual, ModifiedResNet):
        return _RESNET_STRIDE
    if isinstance(visual, VisionTransformer) and visual.attn_pool is None:
        height, width = visual.conv1.kernel_size
        plain = isinstance(visual.transformer.resblocks[-1], ResidualAttentionBlock)
        if plain and height == width:
            return height
    raise UserError(
        f"CLIP {clip.identity.model} has no dense tokens here: its image tower is neither a plain "
        "vision transformer nor a ResNet of open_clip.",
        "Take another, for example clip.model=ViT-B-16.",
    )


def tower_tokens(visual: Any, pixels: Tensor, path: TokenPath) -> Tensor:
    """(B, 3, size, size) normalised -> (B, 1 + T, E): the CLS token, then the patches by rows."""
    if isinstance(visual, ModifiedResNet):
        return _resnet_tokens(visual, pixels, path)
    return _transformer_tokens(visual, pixels, path)


def _square(clip: Clip, images: Tensor, padding: Tensor | None, size: int) -> Tensor:
    """(B, 3, H, W) uint8 -> (B, 3, size, size) normalised; pads become 0, the mean colour."""
    pixels = images.float() / 255
    if padding is not None:
        pixels = torch.where(padding[:, None], clip.mean, pixels)
    if pixels.shape[-2:] != (size, size):
        pixels = F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(0, 1)
    return clip.normalise(pixels)


def _transformer_tokens(visual: Any, pixels: Tensor, path: TokenPath) -> Tensor:
    """As `VisionTransformer.forward`, with every token kept and positions for any grid."""
    x = visual.conv1(pixels)  # (B, D, h, w)
    grid = (x.shape[-2], x.shape[-1])
    positions = _positions(visual.positional_embedding, visual.grid_size, grid).to(x.dtype)
    x = x.flatten(2).transpose(1, 2)  # (B, T, D)
    cls = visual.class_embedding.to(x.dtype).expand(len(x), 1, -1)
    x = visual.ln_pre(torch.cat((cls, x), 1) + positions)
    assert visual.transformer.batch_first, "open_clip's image towers have the batch first"
    *blocks, last = visual.transformer.resblocks
    for block in blocks:
        x = block(x)
    x = last(x) if path == "last" else _value_block(last, x)
    x = visual.ln_post(x)
    return x if visual.proj is None else x @ visual.proj


def _value_block(block: Any, x: Tensor) -> Tensor:
    """The block as if each token attended to itself only (MaskCLIP's code, `return_qkv`)."""
    attention, start = block.attn, 2 * x.shape[-1]  # its rows are query, key, value
    weight, bias = attention.in_proj_weight[start:], attention.in_proj_bias[start:]
    value = F.linear(block.ln_1(x), weight, bias)
    x = x + block.ls_1(attention.out_proj(value))
    return x + block.ls_2(block.mlp(block.ln_2(x)))


def _resnet_tokens(visual: Any, pixels: Tensor, path: TokenPath) -> Tensor:
    """As `ModifiedResNet.forward`, with the pool's output for every place, not for the mean only.

    The value path leaves out the pool's positions, as MaskCLIP does: they would only say where a
    token is, and not what.
    """
    x = visual.stem(pixels)
    x = visual.layer4(visual.layer3(visual.layer2(visual.layer1(x))))  # (B, D, h, w)
    grid = (x.shape[-2], x.shape[-1])
    pool = visual.attnpool
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat((x.mean(1, keepdim=True), x), 1)  # (B, 1 + T, D)
    if path == "value":
        return pool.c_proj(pool.v_proj(x))
    side = round((len(pool.positional_embedding) - 1) ** 0.5)
    x = x + _positions(pool.positional_embedding, (side, side), grid).to(x.dtype)
    query, key, value = (
        projection(x).unflatten(-1, (pool.num_heads, -1)).transpose(1, 2)  # (B, heads, 1 + T, d)
        for projection in (pool.q_proj, pool.k_proj, pool.v_proj)
    )
    mixed = F.scaled_dot_product_attention(query, key, value)
    return pool.c_proj(mixed.transpose(1, 2).flatten(2))


def _positions(table: Tensor, old: tuple[int, int], new: tuple[int, int]) -> Tensor:
    """(1 + T, D) embeddings of CLS and a grid -> those of another grid, bicubic as open_clip's."""
    if old == new:
        return table
    grid = table[1:].float().reshape(*old, -1).permute(2, 0, 1)[None]  # (1, D, h, w)
    grid = F.interpolate(grid, new, mode="bicubic", antialias=True)[0]
    return torch.cat((table[:1].float(), grid.flatten(1).T))
