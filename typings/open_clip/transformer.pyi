from typing import Any

from torch import nn

class QuickGELU(nn.Module): ...

class ResidualAttentionBlock(nn.Module):
    attn: nn.MultiheadAttention
    ln_1: nn.Module
    ln_2: nn.Module
    ls_1: nn.Module
    ls_2: nn.Module
    mlp: nn.Module

class VisionTransformer(nn.Module):
    attn_pool: nn.Module | None
    def __getattr__(self, name: str) -> Any: ...
