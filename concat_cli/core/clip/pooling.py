"""CLIP's tokens of many masks from one pass over a picture, for each kind of image tower.

The picture is shown as a square, as CLIP was trained: no padding reaches it, and pictures of all
shapes make one batch. A mask comes as its share (0-1) of each cell of the tower's last map. What
the tower does with the whole map at its end is then done with the part under the mask:

- a map that is averaged (ConvNeXt and others of timm): the average under the mask, then the head
  (FC-CLIP, Yu et al., NeurIPS 2023, "out-of-vocabulary" branch).
- OpenAI's ResNets, and SigLIP's ViTs: the query of the attention pool sees the cells of the mask.
- ViTs with a CLS token: more CLS tokens, each of which attends to the patches of its mask and to
  itself, while patches and CLIP's own CLS token attend as ever (MaskCLIP, Ding et al., ICML 2023).

To attend, a cell belongs to a mask by at least half; where none does, the cell that is covered most
stands for the mask (`belongs`). Averages need no such rule: they are weighted by the shares.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from open_clip.modified_resnet import AttentionPool2d, ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import ResidualAttentionBlock, VisionTransformer
from timm.layers.attention_pool import AttentionPoolLatent
from timm.layers.classifier import ClassifierHead, NormMlpClassifierHead
from timm.models.vision_transformer import VisionTransformer as TimmViT
from torch import Tensor

from concat_cli.core.clip.encoder import Clip
from concat_cli.core.errors import UserError

Tower = Callable[[Tensor, Tensor], Tensor]  # images, shares -> (B, M, E)
_HALF = 0.5 - 1e-5  # shares are sums of fractions


class MaskPooling:
    """A CLIP whose image tower gives tokens of masks.

    side: of the square that CLIP is shown, in pixels; 0: its own. Positions are then interpolated.
    UserError for a tower of another kind, and for a side that is no multiple of its stride.

    Attributes:
        grid: cells of the tower's last map along a side.
        attends: False where the map is averaged, which masks between cells do not harm.
    """

    def __init__(self, clip: Clip, side: int = 0) -> None:
        self.clip, self.side = clip, side or clip.image_size
        stride = _stride(clip)
        if self.side % stride:
            raise UserError(
                f"CLIP {clip.identity.model} cannot be shown {self.side} pixels: a cell of its map "
                f"is {stride} pixels wide.",
                f"Take a multiple of {stride}, or 0 for its own {clip.image_size}.",
            )
        self.grid = self.side // stride
        self._tower = _tower(clip.model.visual, self.grid)
        self.attends = not isinstance(self._tower, _Average)

    @torch.no_grad()
    def tokens(self, images: Tensor, shares: Tensor) -> Tensor:
        """(B, 3, h, w) floats in [0, 1] and (B, M, grid, grid) shares in 0-1 -> (B, M, E),
        normalised."""
        views = self.clip.normalise(self.clip.resize(images, self.side))
        with self.clip.precision():
            found = self._tower(views, shares)
        return F.normalize(found.float(), dim=-1)


def belongs(shares: Tensor) -> Tensor:
    """(..., N) shares of a mask in N cells -> bool: the cells that stand for it, at least one."""
    inside = shares >= _HALF
    return inside | (~inside.any(-1, keepdim=True) & (shares >= shares.amax(-1, keepdim=True)))


def between_cells(shares: Tensor) -> Tensor:
    """(..., N) shares -> (...) bool: masks with pixels that hold no cell by half."""
    return (shares > 0).any(-1) & ~(shares >= _HALF).any(-1)


def attend(own: tuple[Tensor, ...], cells: tuple[Tensor, Tensor], allowed: Tensor) -> Tensor:
    """Attention of M queries to the N cells that each is allowed, and to itself.

    own: queries (B, heads, M, d), and, where a query sees itself, its key and value, alike;
    cells: keys and values (B, heads, N, d); allowed (B, M, N) bool. Returns (B, M, heads * d).
    """
    query, (keys, values) = own[0] * own[0].shape[-1] ** -0.5, cells
    scores = (query @ keys.mT).masked_fill(~allowed[:, None], -torch.inf)  # (B, heads, M, N)
    if len(own) == 1:
        found = scores.softmax(-1) @ values
    else:
        itself = (query * own[1]).sum(-1, keepdim=True)
        weights = torch.cat((scores, itself), -1).softmax(-1)
        found = weights[..., :-1] @ values + weights[..., -1:] * own[2]
    return found.transpose(1, 2).flatten(2)


def resampled(positions: Tensor, grid: int, prefix: int) -> Tensor:
    """(prefix + n * n, D) learned positions -> (prefix + grid * grid, D), as open_clip does it."""
    cells = positions[prefix:]
    before = round(len(cells) ** 0.5)
    if before == grid:
        return positions
    square = cells.T.reshape(1, -1, before, before)
    size = (grid, grid)
    square = F.interpolate(square, size, mode="bicubic", antialias=True, align_corners=False)
    return torch.cat((positions[:prefix], square[0].flatten(1).T))


class _Average:
    """A map that is averaged, then goes through a head."""

    def __init__(self, visual: Any) -> None:
        self.visual = visual

    def __call__(self, images: Tensor, shares: Tensor) -> Tensor:
        cells = self.visual.trunk.forward_features(images)  # (B, C, g, g)
        weights = shares / shares.sum((2, 3), keepdim=True).clamp(min=1e-12)
        pooled = torch.einsum("bmhw,bchw->bmc", weights.to(cells.dtype), cells)
        alone = pooled.flatten(0, 1)[..., None, None]  # maps of one cell
        found = self.visual.head(self.visual.trunk.forward_head(alone))
        return found.unflatten(0, shares.shape[:2])


class _ResNet:
    """OpenAI's: the mean of the map asks, and it and the cells answer."""

    def __init__(self, visual: Any, grid: int) -> None:
        self.visual = visual
        self.positions = resampled(visual.attnpool.positional_embedding, grid, 1)

    def __call__(self, images: Tensor, shares: Tensor) -> Tensor:
        visual, pool = self.visual, self.visual.attnpool
        cells = visual.stem(images)
        for layer in (visual.layer1, visual.layer2, visual.layer3, visual.layer4):
            cells = layer(cells)
        cells = cells.flatten(2).mT  # (B, N, C)
        allowed = belongs(shares.flatten(2))
        weights = allowed / allowed.sum(-1, keepdim=True)
        mean = weights.to(cells.dtype) @ cells + self.positions[0]
        cells = cells + self.positions[1:]
        query, *itself = (_heads(p(mean), pool.num_heads) for p in _projections(pool))
        keys, values = (_heads(p(cells), pool.num_heads) for p in _projections(pool)[1:])
        return pool.c_proj(attend((query, *itself), (keys, values), allowed))


class _ViT:
    """open_clip's, with a CLS token."""

    def __init__(self, visual: Any, grid: int) -> None:
        self.visual = visual
        self.positions = resampled(visual.positional_embedding, grid, 1)

    def __call__(self, images: Tensor, shares: Tensor) -> Tensor:
        visual, count = self.visual, shares.shape[1]
        allowed = belongs(shares.flatten(2))  # (B, M, N)
        patches = visual.conv1(images).flatten(2).mT  # (B, N, D)
        cls = visual.class_embedding.to(patches.dtype).expand(len(images), 1, -1)
        tokens = visual.ln_pre(torch.cat((cls, patches), 1) + self.positions)
        tokens = torch.cat((tokens, tokens[:, :1].expand(-1, count, -1)), 1)  # (B, 1+N+M, D)
        *blocks, last = visual.transformer.resblocks
        for block in blocks:
            tokens = _block(block, tokens, allowed)
        return visual.ln_post(_block(last, tokens, allowed, is_last=True)) @ visual.proj


def _block(block: Any, tokens: Tensor, allowed: Tensor, is_last: bool = False) -> Tensor:
    """One layer on (B, 1+N+M, D): CLIP's CLS token, patches, and the masks' tokens; of the last one
    only the latter (B, M, D), as nothing asks for the others."""
    attention, whole = block.attn, tokens.shape[1] - allowed.shape[1]
    width, heads = tokens.shape[-1], attention.num_heads
    weight, bias = attention.in_proj_weight, attention.in_proj_bias
    normed = block.ln_1(tokens)
    asking = normed[:, whole:] if is_last else normed
    query = _heads(F.linear(asking, weight[:width], bias[:width]), heads)
    key, value = _heads(F.linear(normed, weight[width:], bias[width:]), 2 * heads).chunk(2, 1)
    own = (query[:, :, -allowed.shape[1] :], key[:, :, whole:], value[:, :, whole:])
    mixed = attend(own, (key[:, :, 1:whole], value[:, :, 1:whole]), allowed)
    if is_last:
        tokens = tokens[:, whole:]
    else:
        query, key, value = (part[:, :, :whole] for part in (query, key, value))
        plain = F.scaled_dot_product_attention(query, key, value)
        mixed = torch.cat((plain.transpose(1, 2).flatten(2), mixed), 1)
    tokens = tokens + block.ls_1(attention.out_proj(mixed))
    return tokens + block.ls_2(block.mlp(block.ln_2(tokens)))


class _Latent:
    """SigLIP's ViT of timm: a learned query asks the patches."""

    def __init__(self, visual: Any, grid: int) -> None:
        self.visual = visual
        self.positions = resampled(visual.trunk.pos_embed[0], grid, 0)

    def __call__(self, images: Tensor, shares: Tensor) -> Tensor:
        trunk, pool = self.visual.trunk, self.visual.trunk.attn_pool
        patches = trunk.patch_embed.norm(trunk.patch_embed.proj(images).flatten(2).mT)
        patches = trunk.norm(trunk.blocks(trunk.norm_pre(patches + self.positions)))  # (B, N, D)
        keys, values = _heads(pool.kv(patches), 2 * pool.num_heads).chunk(2, 1)
        query = pool.q_norm(_heads(pool.q(pool.latent), pool.num_heads))  # (1, heads, 1, d)
        query = query.expand(len(images), -1, shares.shape[1], -1)
        allowed = belongs(shares.flatten(2))
        found = pool.proj(attend((query,), (pool.k_norm(keys), values), allowed))
        found = found + pool.mlp(pool.norm(found))
        return self.visual.head(trunk.head(trunk.fc_norm(found)))


def _heads(values: Tensor, heads: int) -> Tensor:
    """(B, N, heads * d) -> (B, heads, N, d)"""
    return values.reshape(*values.shape[:-1], heads, -1).transpose(1, 2)


def _projections(pool: AttentionPool2d) -> tuple[Any, Any, Any]:
    return pool.q_proj, pool.k_proj, pool.v_proj


def _kind(visual: Any) -> str:
    """Which of the towers above it is; empty: none."""
    if isinstance(visual, ModifiedResNet):
        return "resnet"
    if isinstance(visual, VisionTransformer):
        plain = all(type(b) is ResidualAttentionBlock for b in visual.transformer.resblocks)
        return "vit" if plain and visual.attn_pool is None and visual.pool_type == "tok" else ""
    trunk = visual.trunk if isinstance(visual, TimmModel) else None
    if isinstance(trunk, TimmViT) and isinstance(trunk.attn_pool, AttentionPoolLatent):
        pool = trunk.attn_pool
        one = pool.latent_len == 1 and pool.pool == "token" and pool.pos_embed is None
        return "latent" if one and pool.mlp is not None and not trunk.num_prefix_tokens else ""
    head = getattr(trunk, "head", None)
    averaged = isinstance(head, (ClassifierHead, NormMlpClassifierHead))
    if averaged and head.global_pool.pool_type == "avg" and not hasattr(visual.head, "pool"):
        return "average" if getattr(head, "input_fmt", "NCHW") == "NCHW" else ""
    return ""


def _stride(clip: Clip) -> int:
    """Pixels of a cell of the tower's last map."""
    visual: Any = clip.model.visual
    match _kind(visual):
        case "resnet":
            return 32
        case "vit":
            return visual.patch_size[0]
        case "latent":
            return visual.trunk.patch_embed.patch_size[0]
        case "average":
            return visual.trunk.feature_info[-1]["reduction"]
        case _:
            raise UserError(
                f"The image encoder of CLIP {clip.identity.model} ({type(visual).__name__}) cannot "
                "be pooled under masks: known are ViTs with a CLS token, SigLIP's, ConvNeXts and "
                "OpenAI's ResNets.",
                "Set borrowed.naming=crops, which is slower and suits every CLIP.",
            )


def _tower(visual: Any, grid: int) -> Tower:
    match _kind(visual):
        case "resnet":
            return _ResNet(visual, grid)
        case "vit":
            return _ViT(visual, grid)
        case "latent":
            return _Latent(visual, grid)
        case _:
            return _Average(visual)
