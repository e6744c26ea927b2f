from typing import Any

from torch import nn

class AttentionPool2d(nn.Module):
    def __getattr__(self, name: str) -> Any: ...

class ModifiedResNet(nn.Module):
    def __getattr__(self, name: str) -> Any: ...
