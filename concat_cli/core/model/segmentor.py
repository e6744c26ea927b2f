"""The segmentor: an image and text embeddings in, class and mask logits per query out."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.model.backbone import Backbone
from concat_cli.core.model.layers import area_mean, drawn, map_size, resize_padding
from concat_cli.core.model.pixel_decoder import PixelFeatures
from concat_cli.core.model.query_decoder import (
    Decoded,
    Denoising,
    QueryDecoder,
    Tokens,
    average_weights,
)

MAX_SCALE = 100.0  # CLIP's own ceiling of the logit scale


@dataclass(frozen=True)
class QueryOutput:
    """Predictions of N queries at each layer.

    vision_queries (L+1, B, N, D), semantic_queries (L+1, B, N, E) not normalised,
    class_logits (L+1, B, N, K+1), mask_logits (L+1, B, N, H/4, W/4); index -1 is the final layer.
    """

    vision_queries: Tensor
    semantic_queries: Tensor
    class_logits: Tensor
    mask_logits: Tensor


@dataclass(frozen=True)
class DenseOutput:
    """Predictions of the T tokens that queries are selected from.

    vision (B, T, D), semantic (B, T, E), class_logits (B, T, K+1), objectness logits (B, T),
    padding (B, T) bool or None, size (h, w) with h*w = T.
    """

    vision: Tensor
    semantic: Tensor
    class_logits: Tensor
    objectness: Tensor
    padding: Tensor | None
    size: tuple[int, int]


@dataclass(frozen=True)
class SegmentorOutput(QueryOutput):
    """The ordinary queries' predictions, and what training may ask for besides.

    features: the backbone's maps. denoising: predictions of the M denoising queries. dense: of the
    tokens.
    """

    features: list[Tensor]
    pixel: PixelFeatures
    denoising: QueryOutput | None = None
    dense: DenseOutput | None = None


class Projector(nn.Module):
    """The semantic projector: `layers` linear layers (GELU between) from D to E.

    One layer is ZegFormer's `projection_layer`. `last` is what finetuning may train alone.
    """

    def __init__(self, width: int, clip_width: int, layers: int = 1, hidden: int = 256) -> None:
        super().__init__()
        assert layers >= 1
        sizes = [width, *[hidden] * (layers - 1), clip_width]
        self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))

    @property
    def last(self) -> nn.Linear:
        """The layer that ends in the CLIP space."""
        layer = self.layers[-1]
        assert isinstance(layer, nn.Linear)
        return layer

    def reset(self) -> None:
        """Draws all weights anew from torch's global generator."""
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            layer.reset_parameters()

    def forward(self, vision_queries: Tensor) -> Tensor:
        """(..., D) -> (..., E), not normalised."""
        features = vision_queries
        for layer in self.layers[:-1]:
            features = F.gelu(layer(features))
        return self.last(features)


class Scaled(nn.Module):
    """A module with a factor on its cosines, fixed or learned as exp(log_scale)."""

    log_scale: Tensor

    def set_scale(self, scale: float, learn: bool) -> None:
        """The factor to begin with, in (0, 100]."""
        assert 0 < scale <= MAX_SCALE
        log_scale = torch.tensor(math.log(scale))
        if learn:
            self.log_scale = nn.Parameter(log_scale)
        else:
            self.register_buffer("log_scale", log_scale)

    @property
    def scale(self) -> Tensor:
        """The factor on the cosines, a scalar tensor in (0, 100]."""
        return self.log_scale.exp().clamp(max=MAX_SCALE)


class Classifier(Scaled):
    """Scaled cosine to text embeddings and to one learned no-object embedding [ZegFormer].

    The scale (1 / temperature) is fixed, or learned as exp(log_scale) and then at most 100.

    Args:
        raw_no_object: take the no-object embedding as it is, so that its length counts, as
            ZegFormer's code does; the paper has a cosine for it, too.
    """

    def __init__(
        self,
        clip_width: int,
        scale: float = 100.0,
        learn_scale: bool = False,
        raw_no_object: bool = False,
    ) -> None:
        super().__init__()
        self.raw_no_object = raw_no_object
        no_object = drawn(clip_width)
        if not no_object.is_meta:  # as in `drawn`
            no_object /= math.sqrt(clip_width)
        self.no_object = nn.Parameter(no_object)
        self.set_scale(scale, learn_scale)

    def forward(self, semantic_queries: Tensor, text: Tensor) -> Tensor:
        """(..., E), text embeddings (K, E) -> class logits (..., K + 1), fp32 even in autocast."""
        with torch.autocast(semantic_queries.device.type, enabled=False):
            no_object = self.no_object.float()[None]
            classes = F.normalize(torch.cat((text.float(), no_object)), dim=-1)  # (K + 1, E)
            if self.raw_no_object:
                classes = torch.cat((classes[:-1], no_object))
            products = F.normalize(semantic_queries.float(), dim=-1) @ classes.T
            return self.scale * products


def sum_cells(weights: Tensor, size: tuple[int, int]) -> Tensor:
    """(B, N, h, w) -> (B, N, *size), fewer and larger cells with the same total."""
    height, width = weights.shape[-2:]
    if height == 2 * size[0] and width == 2 * size[1]:
        return F.avg_pool2d(weights, 2) * 4
    return F.adaptive_avg_pool2d(weights, size) * (height * width / (size[0] * size[1]))


class MaskPool(nn.Module):
    """Features of all stages averaged under a mask, then an MLP: what a segment looks like [ours].

    Args:
        channels: of the maps that are pooled (the backbone's four, then the finest level's).
        width: D.
    """

    def __init__(self, channels: Sequence[int], width: int) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(c) for c in channels)
        self.first = nn.Linear(sum(channels), 2 * width)
        self.second = nn.Linear(2 * width, width)

    def forward(self, maps: list[Tensor], masks: Tensor, padding: Tensor | None) -> Tensor:
        """Maps (B, C, h, w), masks (B, N, h, w) in 0-1, padding (B, H, W) -> (B, N, D).

        A map coarser than the weights meets their sums over its cells, which equals upsampling it.
        """
        finest = map_size(maps[0])
        weights = average_weights(masks, finest, resize_padding(padding, finest))  # sum to 1
        made = [torch.unflatten(weights, 2, finest).to(maps[0].dtype)]
        pooled: list[Tensor] = []
        for norm, features in zip(self.norms, maps, strict=True):
            size = map_size(features)
            weights = next((known for known in made if map_size(known) == size), None)
            if weights is None:
                weights = sum_cells(made[-1], size)  # (B, N, h, w)
                made.append(weights)
            tokens = features.flatten(2).transpose(1, 2)
            pooled.append(norm(weights.flatten(2) @ tokens))
        return self.mix(torch.cat(pooled, -1))

    def grid(self, maps: list[Tensor], size: tuple[int, int]) -> Tensor:
        """The same for each cell of a grid: (B, h*w, D)."""
        cells = [
            norm(area_mean(x, size).to(x.dtype).flatten(2).transpose(1, 2))
            for norm, x in zip(self.norms, maps, strict=True)
        ]
        return self.mix(torch.cat(cells, -1))

    def mix(self, pooled: Tensor) -> Tensor:
        """(..., sum of channels) -> (..., D)."""
        return self.second(F.gelu(self.first(pooled)))


class Segmentor(nn.Module):
    """Backbone -> pixel decoder -> query decoder -> projector -> scaled cosine to text.

    Args:
        mask_pool: if given, the class path sees, besides the decoder's query, features pooled under
            the query's own mask; the mask path does not [ours].
        detach_class_path: with mask_pool, class gradients reach the backbone through the pooled
            features only, not the decoder's queries [ours].
    """

    def __init__(
        self,
        backbone: Backbone,
        pixel_decoder: nn.Module,
        query_decoder: QueryDecoder,
        projector: Projector,
        classifier: Classifier,
        mask_pool: MaskPool | None = None,
        detach_class_path: bool = False,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.pixel_decoder = pixel_decoder
        self.query_decoder = query_decoder
        self.projector = projector
        self.classifier = classifier
        self.mask_pool = mask_pool
        self.vision_norm = nn.LayerNorm(query_decoder.width) if mask_pool is not None else None
        # what is pooled comes first: it may be warmed up when the decoder's queries are still noise
        self.query_gate = (
            nn.Parameter(torch.full((query_decoder.width,), 0.1)) if mask_pool is not None else None
        )
        self.detach_class_path = detach_class_path

    def forward(
        self,
        images: Tensor,
        padding: Tensor | None,
        text: Tensor,
        denoising: Denoising | None = None,
        dense: bool = False,
        last_only: bool = False,
    ) -> SegmentorOutput:
        """Images (B, 3, H, W) uint8 or float in 0-1, padding (B, H, W), text (K, E) -> output.

        Sides are multiples of 32. `last_only` keeps the final layer alone (first dimension 1).
        `dense` asks for the tokens' predictions (needs token queries).
        """
        features, pixel = self.features(images, padding)
        decoded = self.query_decoder(pixel, denoising, last_only)
        vision = self._vision_queries(decoded, features, pixel, padding)
        semantic, class_logits = self.classify(vision, text)
        parts = (vision, semantic, class_logits, decoded.mask_logits.float())
        count = self.query_decoder.queries
        return SegmentorOutput(
            *(part[:, :, :count] for part in parts),
            features=features,
            pixel=pixel,
            denoising=None
            if denoising is None
            else QueryOutput(*(part[:, :, count:] for part in parts)),
            dense=self._dense(decoded.tokens, features, pixel, text) if dense else None,
        )

    def features(
        self, images: Tensor, padding: Tensor | None
    ) -> tuple[list[Tensor], PixelFeatures]:
        """Backbone maps and pixel features of the images."""
        images = self.backbone.normalised(images, padding)
        features = self.backbone(images, padding)
        return features, self.pixel_decoder(features, padding)

    def classify(self, vision_queries: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
        """Vision queries (..., D), text (K, E) -> semantic queries (..., E), logits (..., K+1)."""
        semantic = self.projector(vision_queries)
        return semantic, self.classifier(semantic, text)

    def mask_queries(
        self,
        features: list[Tensor],
        pixel: PixelFeatures,
        masks: Tensor,
        padding: Tensor | None = None,
    ) -> Tensor:
        """Vision embeddings (B, N, D) of given masks (B, N, h, w), without the query decoder."""
        assert self.mask_pool is not None and self.vision_norm is not None, "no mask_pool"
        return self.vision_norm(self.mask_pool([*features, pixel.levels[-1]], masks, padding))

    def _vision_queries(
        self,
        decoded: Decoded,
        features: list[Tensor],
        pixel: PixelFeatures,
        padding: Tensor | None,
    ) -> Tensor:
        """What is projected: the decoder's query, plus what lies under its mask if built so."""
        if self.mask_pool is None or self.vision_norm is None or self.query_gate is None:
            return decoded.queries
        layers, _, count = decoded.queries.shape[:3]
        # squared probabilities keep a large faint background from outweighing a small segment
        soft = decoded.mask_logits.detach().float().sigmoid().square()
        soft = soft.transpose(0, 1).flatten(1, 2)  # (B, L * N, h, w)
        pooled = self.mask_pool([*features, pixel.levels[-1]], soft, padding)
        pooled = pooled.unflatten(1, (layers, count)).transpose(0, 1)  # (L, B, N, D)
        queries = decoded.queries.detach() if self.detach_class_path else decoded.queries
        return self.vision_norm(self.query_gate * queries + pooled)

    def _dense(
        self, tokens: Tokens | None, features: list[Tensor], pixel: PixelFeatures, text: Tensor
    ) -> DenseOutput:
        """Classes of single tokens through the same class path."""
        embedding = self.query_decoder.token_embedding
        assert tokens is not None and embedding is not None, "built without token queries"
        vision = embedding(tokens.features)
        if self.mask_pool and self.vision_norm and self.query_gate is not None:
            pooled = self.mask_pool.grid([*features, pixel.levels[-1]], tokens.size)
            vision = vision.detach() if self.detach_class_path else vision
            vision = self.vision_norm(self.query_gate * vision + pooled)
        semantic, class_logits = self.classify(vision, text)
        return DenseOutput(
            vision, semantic, class_logits, tokens.objectness, tokens.padding, tokens.size
        )
