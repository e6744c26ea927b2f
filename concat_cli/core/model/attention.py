"""Multi-head attention and the feed-forward block, as both transformers here use them."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class TokenLinear(nn.Linear):
    """A linear layer over tokens (B, T, D); without gradients in fp32 on a CPU: a 1x1 convolution.

    The result is the same; the convolution's kernels (oneDNN) are up to twice as fast as the BLAS
    behind a linear layer on some processors, and not slower on others. Its backward is slower.
    """

    def forward(self, tokens: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D')."""
        plain = tokens.device.type != "cpu" or tokens.dtype != torch.float32
        plain = plain or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu")
        if plain or tokens.ndim != 3:
            return super().forward(tokens)
        image = tokens.contiguous().unsqueeze(1).permute(0, 3, 1, 2)  # (B, D, 1, T), channels last
        found = F.conv2d(image, self.weight[:, :, None, None], self.bias)
        return found.squeeze(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head attention with separate query, key and value inputs; `dropout` of its weights."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        assert width % heads == 0, "width must be a multiple of heads"
        self.heads, self.dropout = heads, dropout
        self.query = TokenLinear(width, width)
        self.key = TokenLinear(width, width)
        self.value = TokenLinear(width, width)
        self.out = TokenLinear(width, width)
        for layer in (self.query, self.key, self.value, self.out):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(layer.bias)

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (B, heads, n, d)

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, allowed: Tensor | None = None
    ) -> Tensor:
        """(B, Q, D), (B, T, D), (B, T, D), bool allowed (B or 1, Q or 1, T) -> (B, Q, D)."""
        mixed = F.scaled_dot_product_attention(
            self._split(self.query(query)),
            self._split(self.key(key)),
            self._split(self.value(value)),
            attn_mask=None if allowed is None else allowed[:, None],
            dropout_p=self.dropout if self.training else 0.0,
        )
        return self.out(mixed.transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    """Linear, ReLU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.first = TokenLinear(width, hidden)
        self.second = TokenLinear(hidden, width)
        for layer in (self.first, self.second):
            nn.init.xavier_uniform_(layer.weight)

    def forward(self, tokens: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.second(F.relu(self.first(tokens), inplace=True))


class EncoderLayer(nn.Module):
    """Self-attention over the tokens of one feature map, then feed-forward, post-norm."""

    def __init__(self, width: int, heads: int, ffn: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads)
        self.feed_forward = FeedForward(width, ffn)
        self.attention_norm = nn.LayerNorm(width)
        self.feed_forward_norm = nn.LayerNorm(width)

    def forward(self, tokens: Tensor, position: Tensor, padding: Tensor | None) -> Tensor:
        """(B, T, D), (B or 1, T, D), padding (B, T) -> (B, T, D)."""
        placed = tokens + position.to(tokens.dtype)
        allowed = None if padding is None else ~padding[:, None]  # (B, 1, T)
        tokens = self.attention_norm(tokens + self.attention(placed, placed, tokens, allowed))
        return self.feed_forward_norm(tokens + self.feed_forward(tokens))
