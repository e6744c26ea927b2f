"""MaskFormer with a semantic head, ZegFormer's segmentor: one scale of tokens, learned queries."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.build import (
    build_segmentor,
    check_own_masks,
    clip_width_of,
    config_of,
    filled,
    load_backbone,
)
from concat_cli.core.checkpoint import Weights
from concat_cli.core.config import Config
from concat_cli.core.errors import UserError
from concat_cli.core.model.backbone import Backbone
from concat_cli.core.model.layers import (
    Attention,
    FeedForward,
    drawn,
    map_size,
    resize_padding,
    sine_positions,
    zero_padding,
)
from concat_cli.core.model.pixel_decoder import NormedConvolution
from concat_cli.core.model.segmentor import Classifier, Projector, QueryOutput, Segmentor
from concat_cli.core.progress import SILENT, Progress
from concat_cli.methods.zegformer.config import ZegFormerConfig

DROPOUT = 0.1  # [ZegFormer, code]
GROUPS = 32  # of the group norms [ZegFormer, code]


class MaskFormerPixelDecoder(nn.Module):
    """From the coarsest map down: doubled by its nearest neighbours, a finer map added, smoothed.

    The coarsest map itself has a 3x3 convolution and no lateral one [ZegFormer, code].

    Args:
        channels: of the backbone's maps at strides 4, 8, 16, 32.
        width: D, channels of the pyramid, a multiple of 32. mask_width: Dm.
    """

    def __init__(self, channels: Sequence[int], width: int = 256, mask_width: int = 256) -> None:
        super().__init__()
        *finer, coarsest = channels
        self.coarsest = NormedConvolution(coarsest, width, 3, False, GROUPS)
        self.laterals = nn.ModuleList(
            NormedConvolution(c, width, 1, False, GROUPS) for c in reversed(finer)
        )
        self.smooth = nn.ModuleList(
            NormedConvolution(width, width, 3, False, GROUPS) for _ in finer
        )
        self.mask_out = nn.Conv2d(width, mask_width, 3, padding=1)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_uniform_(module.weight, a=1)  # as detectron2 fills them
        assert self.mask_out.bias is not None
        nn.init.zeros_(self.mask_out.bias)

    def forward(self, features: list[Tensor], padding: Tensor | None = None) -> Tensor:
        """Four backbone maps, fine to coarse, padding (B, H, W) -> (B, Dm, H/4, W/4)."""
        paddings = [resize_padding(padding, map_size(x)) for x in features]
        merged = F.relu(self.coarsest(features[-1], paddings[-1]))
        finer = zip(features[-2::-1], paddings[-2::-1], strict=True)
        for lateral, smooth, (fine, pad) in zip(self.laterals, self.smooth, finer, strict=True):
            added = lateral(fine, pad)
            added = added + F.interpolate(merged, size=map_size(added), mode="nearest")
            merged = F.relu(smooth(added, pad))
        return self.mask_out(zero_padding(merged, paddings[0]))


class MaskFormerLayer(nn.Module):
    """Self-attention, cross-attention, feed-forward; post-norm, with dropout in each [DETR]."""

    def __init__(self, width: int, heads: int, ffn: int, dropout: float) -> None:
        super().__init__()
        self.self_attention = Attention(width, heads, dropout)
        self.cross_attention = Attention(width, heads, dropout)
        self.feed_forward = FeedForward(width, ffn)
        self.self_norm = nn.LayerNorm(width)
        self.cross_norm = nn.LayerNorm(width)
        self.feed_forward_norm = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        queries: Tensor,
        position: Tensor,
        memory: tuple[Tensor, Tensor],
        allowed: Tensor | None,
    ) -> Tensor:
        """Queries, position (B, Q, D), keys, values (B, T, D), allowed pixels bool (B, 1, T)."""
        keys, values = memory
        placed = queries + position
        shared = self.self_attention(placed, placed, queries)
        queries = self.self_norm(queries + self.dropout(shared))
        read = self.cross_attention(queries + position, keys, values, allowed)
        queries = self.cross_norm(queries + self.dropout(read))
        hidden = self.dropout(F.relu(self.feed_forward.first(queries)))
        return self.feed_forward_norm(queries + self.dropout(self.feed_forward.second(hidden)))


class MaskFormerDecoder(nn.Module):
    """Q learned positions, with contents of zero at first, read the coarsest map L times.

    There is no encoder, and a query sees the whole image in every layer [ZegFormer, code].

    Args:
        channels: of the backbone's coarsest map.
        width: D. ffn: hidden width of the feed-forward blocks. layers: L. queries: Q.
    """

    def __init__(
        self,
        channels: int,
        width: int = 256,
        heads: int = 8,
        layers: int = 6,
        ffn: int = 2048,
        queries: int = 100,
        dropout: float = DROPOUT,
    ) -> None:
        super().__init__()
        self.width, self.queries = width, queries
        self.input = nn.Conv2d(channels, width, 1)
        nn.init.kaiming_uniform_(self.input.weight, a=1)
        self.query_position = nn.Parameter(drawn(queries, width))
        self.layers = nn.ModuleList(
            MaskFormerLayer(width, heads, ffn, dropout) for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)

    def forward(
        self, coarsest: Tensor, padding: Tensor | None = None, last_only: bool = False
    ) -> Tensor:
        """Map (B, C, h, w), padding (B, H, W) -> queries after the shared norm (L, B, Q, D)."""
        padding = resize_padding(padding, map_size(coarsest))
        places = sine_positions(map_size(coarsest), self.width, padding, coarsest.device)
        values = self.input(coarsest).flatten(2).transpose(1, 2).contiguous()  # (B, T, D)
        memory = (values + places.to(values.dtype), values)
        allowed = None if padding is None else ~padding.flatten(1)[:, None]  # (B, 1, T)
        position = self.query_position.expand(len(coarsest), -1, -1)
        queries, states = torch.zeros_like(position), list[Tensor]()
        for layer in self.layers:
            queries = layer(queries, position, memory, allowed)
            states.append(queries)
        return self.norm(torch.stack(states[-1:] if last_only else states))


class MaskFormer(nn.Module):
    """Backbone -> pixel decoder and query decoder -> masks, and scaled cosine to text.

    Used as `Segmentor` is; its output has a prediction after each layer and none before the first.
    """

    def __init__(
        self,
        backbone: Backbone,
        pixel_decoder: MaskFormerPixelDecoder,
        query_decoder: MaskFormerDecoder,
        projector: Projector,
        classifier: Classifier,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pixel_decoder = pixel_decoder
        self.query_decoder = query_decoder
        self.projector = projector
        self.classifier = classifier
        width = query_decoder.width
        self.mask_embedding = nn.Sequential(
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, pixel_decoder.mask_out.out_channels),
        )

    def forward(
        self, images: Tensor, padding: Tensor | None, text: Tensor, last_only: bool = False
    ) -> QueryOutput:
        """Images (B, 3, H, W) uint8 or float in 0-1, padding (B, H, W), text (K, E) -> output.

        Sides are multiples of 32. `last_only` keeps the final layer alone (first dimension 1).
        """
        images = self.backbone.normalised(images, padding)
        features = self.backbone(images, padding)
        pixels = self.pixel_decoder(features, padding)  # (B, Dm, H/4, W/4)
        vision = self.query_decoder(features[-1], padding, last_only)  # (L, B, Q, D)
        masks = torch.einsum("lbqd,bdhw->lbqhw", self.mask_embedding(vision), pixels)
        semantic = self.projector(vision)
        return QueryOutput(vision, semantic, self.classifier(semantic, text), masks.float())


def build_zegformer(
    cfg: Config, clip_width: int, *, pretrained: bool = False, progress: Progress = SILENT
) -> MaskFormer | Segmentor:
    """ZegFormer's segmentor as published, or this project's own in its place.

    pretrained: as in `build_segmentor`; a MaskFormer starts from model.backbone_weights alone.
    """
    model, way = cfg.model, cfg.own(ZegFormerConfig)
    if way.segmentor == "mask2former":
        segmentor = build_segmentor(model, clip_width, pretrained=pretrained, progress=progress)
        segmentor.classifier.raw_no_object = way.raw_no_object
        return segmentor
    weights = model.backbone_weights if pretrained else ""
    backbone = Backbone(model.backbone, weights == "timm", model.frozen_bn)
    load_backbone(backbone, weights, model.backbone, progress)
    return MaskFormer(
        backbone,
        MaskFormerPixelDecoder(backbone.channels, model.width, model.mask_width),
        MaskFormerDecoder(
            backbone.channels[-1],
            model.width,
            model.heads,
            model.decoder_layers,
            model.decoder_ffn,
            model.queries,
        ),
        Projector(model.width, clip_width, model.projector_layers),
        Classifier(clip_width, model.logit_scale, model.learn_scale, way.raw_no_object),
    )


def check_keys(cfg: Config) -> None:
    """UserError for keys that ask for what the chosen segmentor or ZegFormer does not have."""
    check_own_masks(cfg, "ZegFormer")
    if cfg.align.image or cfg.align.instance:
        raise UserError(
            "ZegFormer aligns nothing with CLIP's image encoder: align.image and align.instance "
            "are CON's.",
            "Set both to 0, or train CON with `concat train-con`.",
        )
    if cfg.own(ZegFormerConfig).segmentor == "mask2former":
        return
    asked = {
        "model.init": cfg.model.init,
        "warmup.steps": cfg.warmup.steps,
        "loss.dense": cfg.loss.dense,
        "loss.denoising": cfg.loss.denoising,
        "loss.truth": cfg.loss.truth,
    }
    beyond = [key for key, value in asked.items() if value]
    if cfg.model.width % GROUPS:
        raise UserError(
            f"model.width={cfg.model.width} does not divide into the {GROUPS} groups of a "
            "MaskFormer's norms.",
            f"Make it a multiple of {GROUPS}, or set zegformer.segmentor=mask2former.",
        )
    if beyond:
        raise UserError(
            f"zegformer.segmentor=maskformer has no {' and no '.join(beyond)}.",
            "Leave them out, or set zegformer.segmentor=mask2former.",
        )


def restore_zegformer(weights: Weights) -> MaskFormer | Segmentor:
    """The segmentor of a weights file of stage `zegformer`, in evaluation mode."""
    cfg, width = config_of(weights), clip_width_of(weights)
    return filled(lambda: build_zegformer(cfg, width), weights, "segmentor")
