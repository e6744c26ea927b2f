"""From vision queries into the CLIP space, and there to class logits."""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_SCALE = 100.0  # CLIP's own ceiling of the logit scale


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
        self.no_object = nn.Parameter(torch.randn(clip_width) / math.sqrt(clip_width))
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
