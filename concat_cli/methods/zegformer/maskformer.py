"""MaskFormer with a semantic head, ZegFormer's segmentor: one scale of tokens, learned queries."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.model.backbone import Backbone
from concat_cli.core.model.layers import (
    Attention,
    FeedForward,
    map_size,
    resize_padding,
    sine_positions,
)
from concat_cli.core.model.segmentor import Classifier, Projector, QueryOutput
from concat_cli.methods.zegformer.maskformer_pixel import MaskFormerPixelDecoder

DROPOUT = 0.1  # [ZegFormer, code]


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
        self.query_position = nn.Parameter(torch.randn(queries, width))
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
        queries, states = torch.zeros_like(position), []
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
