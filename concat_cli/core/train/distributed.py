"""Several processes under `torchrun`: found from the environment, no flag."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NamedTuple

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


def join(device: torch.device) -> tuple[torch.device, Processes]:
    """Joins the group that `torchrun` describes in the environment, or stays alone without one;
    of several CUDA GPUs, each process of a machine takes its own."""
    processes = _joined(device)
    if device.type == "cuda":
        device = torch.device("cuda", processes.local_rank)
        torch.cuda.set_device(device)
    return device, processes


def _joined(device: torch.device) -> Processes:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return Processes()
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
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


class Count(NamedTuple):
    """How many of something losses are a mean over, as a mean over the processes: in the forwards
    at hand, and in all forwards of the step. Divided by `whole`, the losses of a batch that is
    split over forwards and processes add up to those of the whole batch."""

    here: Tensor
    whole: Tensor

    def of_whole(self, found: Tensor) -> Tensor:
        """The like for a denominator that a forward finds out only with its results, such as the
        weights of all queries but those on void: its mean over the processes, brought to the whole
        batch by this count. Exact in one forward, or where the two are proportional."""
        return mean_over_processes(found) * (self.whole / self.here)


Counts = Mapping[str, Count]


def of_the_step(forwards: Sequence[Mapping[str, Tensor]]) -> list[Counts]:
    """The counts of this process's forwards of a step, by name -> those of the whole batch.

    Nothing is counted as less than one in the whole batch, so that it can be divided by.
    """
    names = list(forwards[0])
    if not names:
        return [{} for _ in forwards]
    own = torch.stack([torch.stack([each[name].float() for name in names]) for each in forwards])
    world = dist.get_world_size() if dist.is_initialized() else 1
    here = mean_over_processes(own)  # (forwards, names)
    whole = here.mean(0).clamp(min=1 / (world * len(forwards)))
    here = here.clamp(min=1 / (world * len(forwards)))
    return [{n: Count(row[i], whole[i]) for i, n in enumerate(names)} for row in here]


def largest(value: int, device: torch.device) -> int:
    """The largest of a number over the processes."""
    if not dist.is_initialized():
        return value
    found = torch.tensor(value, device=device)
    dist.all_reduce(found, dist.ReduceOp.MAX)
    return int(found)


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
