"""The student of CLIP-ZSS, every position of which lies in CLIP's space, and its synthesizer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.build import clip_width_of, config_of, filled, load_backbone
from concat_cli.core.checkpoint import Weights
from concat_cli.core.errors import UserError
from concat_cli.core.model.backbone import Backbone
from concat_cli.core.model.layers import map_size, resize_features, resize_padding, unit_variance
from concat_cli.core.model.query_decoder import DecoderLayer
from concat_cli.core.model.segmentor import Scaled
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.weights_from.hub import weights_file
from concat_cli.methods.clip_zss.config import ClipZssConfig


class AllMlpHead(nn.Module):
    """SegFormer's all-MLP head (NeurIPS 2021, sec. 3.2), from the maps of four strides to one.

    A linear layer for each map, bilinear resizing to the first one's size, a linear layer over all
    of them, norm, ReLU. Resizing and the second layer commute, so each map meets its columns of
    that layer before it grows: the same result for a quarter of the multiplications.

    Args:
        channels: of the maps, finest first. width: of the result.
    """

    def __init__(self, channels: Sequence[int], width: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.linears = nn.ModuleList(nn.Conv2d(c, width, 1) for c in channels)
        self.fuse = nn.Conv2d(len(channels) * width, width, 1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.dropout = nn.Dropout2d(dropout)

    def forward(self, maps: Sequence[Tensor], padding: Tensor | None = None) -> Tensor:
        """Maps (B, C, h, w), padding (B, H, W) of the images -> (B, width, H/4, W/4)."""
        size = map_size(maps[0])
        columns = self.fuse.weight.chunk(len(maps), dim=1)
        total: Tensor | None = None
        for features, linear, weight in zip(maps, self.linears, columns, strict=True):
            part = F.conv2d(linear(features), weight)
            if map_size(part) != size:
                part = resize_features(part, size, resize_padding(padding, map_size(part)))
            total = part if total is None else total + part
        assert total is not None, "no maps"
        return self.dropout(F.relu(self.norm(total)))


class Student(Scaled):
    """Encoder -> all-MLP head -> CLIP's space; text embeddings classify each position.

    The paper's students (SegFormer, SegNeXt, Swin) are any encoder with maps at strides 4 to 32.
    timm has no MiT and no MSCAN; `pvt_v2_b0` to `pvt_v2_b2` are the nearest to MiT-B0 to B2.

    Args:
        clip_width: E. head_width: of the head. scale: first factor on the cosines, at most 100.
        learn_scale: learn it, as exp(log_scale).
    """

    def __init__(
        self,
        encoder: Backbone,
        clip_width: int,
        head_width: int = 256,
        dropout: float = 0.1,
        scale: float = 1 / 0.07,
        learn_scale: bool = True,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = AllMlpHead(encoder.channels, head_width, dropout)
        self.projection = nn.Conv2d(head_width, clip_width, 1)
        self.set_scale(scale, learn_scale)

    def forward(self, images: Tensor, padding: Tensor | None = None) -> Tensor:
        """Images (B, 3, H, W) uint8 or float in 0-1, padding (B, H, W) bool -> (B, E, H/4, W/4).

        Sides are multiples of 32. Not normalised; what lies at the padding means nothing.
        """
        images = self.encoder.normalised(images, padding)
        return self.projection(self.head(self.encoder(images, padding), padding))


class Synthesizer(nn.Module):
    """Prototypes of regions, for training alone: a transformer decoder with the regions' centroids
    as queries and CLS tokens as keys and values [paper].

    A prototype is its centroid plus what the decoder adds, which is nothing before the first step
    [ours]: training starts at the centroids themselves. Order of attention and post-norm are those
    of `DecoderLayer` [ours].

    Args:
        width: E. layers, heads: of the decoder. ffn: width of its feed-forward blocks, in E.
    """

    def __init__(self, width: int, layers: int, heads: int, ffn: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList(DecoderLayer(width, heads, ffn * width) for _ in range(layers))
        self.out = nn.Linear(width, width)
        nn.init.zeros_(self.out.weight)
        nn.init.zeros_(self.out.bias)

    def forward(self, centroids: Tensor, present: Tensor, tokens: Tensor, valid: Tensor) -> Tensor:
        """Centroids (B, N, E), present (B, N), tokens (B, T, E), valid (B, T) -> (B, N, E).

        Lengths of inputs and outputs mean nothing. Labels that are not present are read by no other
        and give nothing useful. Each image has at least one valid token.
        """
        starts = unit_variance(centroids)
        memory = unit_variance(tokens)
        readable = valid[:, None].expand(-1, centroids.shape[1], -1)  # (B, N, T)
        own = torch.eye(centroids.shape[1], dtype=torch.bool, device=present.device)
        others = present[:, None] | own  # (B, N, N); oneself, or a row might be empty
        nowhere = starts.new_zeros(1, 1, starts.shape[-1])
        queries = starts
        for layer in self.layers:
            queries = layer(queries, nowhere, (memory, memory), readable, others)
        return starts + self.out(queries)


def check_student_start(cfg: ClipZssConfig) -> None:
    """As `check_start`, of a student."""
    if cfg.encoder_weights not in ("", "timm"):
        weights_file(cfg.encoder_weights)


def build_student(
    cfg: ClipZssConfig, clip_width: int, *, pretrained: bool = False, progress: Progress = SILENT
) -> Student:
    """A dense encoder into CLIP's space; `pretrained`: with clip_zss.encoder_weights."""
    weights = cfg.encoder_weights if pretrained else ""
    encoder = Backbone(cfg.encoder, weights == "timm")
    load_backbone(encoder, weights, cfg.encoder, progress)
    return Student(
        encoder, clip_width, cfg.head_width, cfg.dropout, cfg.logit_scale, cfg.learn_scale
    )


def build_synthesizer(cfg: ClipZssConfig, clip_width: int) -> Synthesizer | None:
    """What makes prototypes of centroids; None where they are taken as they are."""
    if not cfg.synthesizer:
        return None
    if clip_width % cfg.heads:
        raise UserError(
            f"clip_zss.heads={cfg.heads} does not divide CLIP's width, {clip_width}.",
            "Take a number that does, such as 8.",
        )
    return Synthesizer(clip_width, cfg.synthesizer, cfg.heads)


def restore_student(weights: Weights) -> Student:
    """The student of a weights file of stage `clip_zss`, in evaluation mode."""
    width = clip_width_of(weights, "student.projection.weight")
    cfg = config_of(weights).own(ClipZssConfig)
    return filled(lambda: build_student(cfg, width), weights, "student")
