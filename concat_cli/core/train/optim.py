"""Optimiser, learning-rate schedule and the moving average of the weights."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from concat_cli.core.config import OptimConfig

DECAYED = (nn.Linear, nn.Conv2d)


def parameter_groups(
    module: nn.Module, lr: float, weight_decay: float, factors: dict[str, float]
) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and decay.

    Only the weights of linear layers and convolutions are decayed: no norms, embeddings, learned
    queries, biases and scalars (Mask2Former's recipe). `factors` maps a prefix of the parameter's
    name to a factor on the learning rate.
    """
    decayed = {
        id(p)
        for m in module.modules()
        if isinstance(m, DECAYED)
        for p in m.parameters(recurse=False)
        if p.ndim >= 2
    }
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = next((f for prefix, f in factors.items() if name.startswith(prefix)), 1.0)
        decay = weight_decay if id(parameter) in decayed else 0.0
        groups.setdefault((lr * factor, decay), []).append(parameter)
    return [{"params": p, "lr": lr, "weight_decay": d} for (lr, d), p in groups.items()]


def lr_factor(step: int, optim: OptimConfig) -> float:
    """The factor on the learning rate at a step (0-based)."""
    if step < optim.warmup:
        return (step + 1) / optim.warmup
    done = step / max(1, optim.steps)
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "poly":
        return (1 - done) ** 0.9
    if optim.schedule == "step":
        return 0.1 ** sum(done >= at for at in optim.step_at)
    past = max(0.0, (done - optim.decay_from) / max(1e-9, 1 - optim.decay_from))
    return 0.5 * (1 + math.cos(math.pi * min(1.0, past)))


class MovingAverage:
    """Exponential moving average of a module's floating-point state; other buffers are copied."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {k: v.detach().clone() for k, v in module.state_dict().items()}
        self.updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Moves the average towards the module; early updates move faster."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        for key, value in module.state_dict().items():
            if value.is_floating_point():
                self.state[key].lerp_(value, 1 - decay)
            else:
                self.state[key].copy_(value)
