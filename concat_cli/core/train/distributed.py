"""Several processes under `torchrun`: found from the environment, no flag."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

PATIENCE = timedelta(hours=6)  # how long processes wait for the one that writes a query bank


@dataclass(frozen=True)
class Processes:
    """This process's place among all."""

    rank: int = 0
    world: int = 1
    local_rank: int = 0

    @property
    def is_main(self) -> bool:
        """True for the one process that writes files."""
        return self.rank == 0


def join(device_type: str) -> Processes:
    """Joins the group that `torchrun` describes in the environment, or stays alone without one."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Processes()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo", timeout=PATIENCE)
    return Processes(dist.get_rank(), world, int(os.environ.get("LOCAL_RANK", "0")))


def leave() -> None:
    """Leaves the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def process_rank() -> int:
    """This process's rank, 0 when alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def gather_rows(rows: Tensor) -> Tensor:
    """Rows (M, ...) of every process, in rank order, without gradient; M is equal everywhere."""
    if not dist.is_initialized():
        return rows.detach()
    parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, rows.detach().contiguous())
    return torch.cat(parts)


def mean_over_processes(value: Tensor) -> Tensor:
    """The mean of a tensor over the processes, without gradient."""
    if not dist.is_initialized():
        return value.detach()
    total = value.detach().clone()
    dist.all_reduce(total)
    return total / dist.get_world_size()


def any_process(flag: bool, device: torch.device) -> bool:
    """True on every process if the flag is true on one."""
    if not dist.is_initialized():
        return flag
    return bool(mean_over_processes(torch.tensor(float(flag), device=device)) > 0)


def share_from_main(tensors: Iterable[Tensor]) -> None:
    """Overwrites tensors, which every process gives in the same order, by those of rank 0."""
    if dist.is_initialized():
        for tensor in tensors:
            dist.broadcast(tensor, 0)


def gather_objects(value: Any) -> list[Any]:
    """A picklable value of every process, in rank order, on every process."""
    if not dist.is_initialized():
        return [value]
    parts: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(parts, value)
    return parts


def wait() -> None:
    """Waits until every process is here."""
    if dist.is_initialized():
        dist.barrier()
