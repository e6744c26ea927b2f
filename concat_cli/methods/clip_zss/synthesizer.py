"""The synthesizer of CLIP-ZSS: from centroids of regions to prototypes; for training alone."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.model.query_decoder import DecoderLayer


class Synthesizer(nn.Module):
    """A transformer decoder: centroids as queries, CLS tokens as keys and values [paper].

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


def unit_variance(vectors: Tensor) -> Tensor:
    """Vectors (..., E), scaled so that an entry has a variance of about 1."""
    return F.normalize(vectors, dim=-1) * vectors.shape[-1] ** 0.5
