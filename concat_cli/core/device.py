"""Which device and which precision to compute with, each with the reason for the choice."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from concat_cli.core.errors import UserError


def _alone(value: Any) -> list[Any]:
    return [value]


@dataclass(frozen=True)
class Share:
    """A process's share of many pictures: every `world`-th of them, from `rank` on.

    gather: (a picklable value of this process) -> those of all, in rank order, on every process.
    """

    rank: int = 0
    world: int = 1
    gather: Callable[[Any], list[Any]] = _alone

    def of(self, count: int) -> range:
        """The numbers of the pictures that are this process's."""
        return range(self.rank, count, self.world)


ALONE = Share()


def choose_device(name: str = "auto") -> tuple[torch.device, str]:
    """The device and why; UserError where the one asked for is not there."""
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    reason = "as asked"
    if name == "auto":
        name = next(device for device, found in there.items() if found)
        reason = {"cuda": "the first choice", "mps": "no CUDA GPU found", "cpu": "no GPU found"}[
            name
        ]
    if name not in there:
        raise UserError(f"Unknown device '{name}'.", f"Choose one of auto, {', '.join(there)}.")
    if not there[name]:
        found = ", ".join(device for device, is_there in there.items() if is_there)
        raise UserError(
            f"There is no {name} device here (found: {found}).", "Leave --device out to use those."
        )
    if name == "cuda":
        reason = f"{torch.cuda.get_device_name()}, {reason}"
    elif name == "cpu":
        reason = f"{torch.get_num_threads()} threads, {reason}"
    return torch.device(name), reason


def choose_precision(name: str, device: torch.device) -> tuple[torch.dtype | None, str]:
    """The autocast dtype (None: plain fp32) and why; `name` is `optim.precision`."""
    if name != "auto":
        return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[name], "as asked"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU has native bf16"
        return torch.float16, "the GPU has no native bf16"
    if device.type == "cpu" and has_native_bf16():
        return torch.bfloat16, "the CPU has native bf16 matrix instructions"
    if device.type == "cpu":
        return None, "the CPU has no native bf16"
    return None, f"autocast is not used on {device.type}"


def has_native_bf16() -> bool:
    """True where the CPU multiplies bf16 matrices itself (AMX tiles or AVX-512 BF16)."""
    checks = ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    return any(getattr(torch.cpu, check, bool)() for check in checks)


@contextmanager
def cpu_threads(count: int = 1) -> Generator[None, None, None]:
    """Computes on so many threads of the CPU for a while; 0: on as many as torch chose.

    Steps of many small operations are up to twice as fast on one thread as on two, which spend
    their time waiting for each other, and many times as fast where other programs run.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(count or threads)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
