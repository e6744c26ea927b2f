"""The device of this process, and its share of the pictures under `torchrun`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from concat_cli.console import Console

if TYPE_CHECKING:
    import torch


def open_shares(device: str, console: Console) -> tuple[torch.device, dict[str, Any]]:
    """The device, and `rank`, `world`, `gather` as `evaluate_model` and `predict_paths` take."""
    import torch

    from concat_cli.core.device import choose_device
    from concat_cli.core.train.distributed import gather_objects, join

    chosen, why = choose_device(device)
    console.say(f"device {chosen} ({why})")
    processes = join(chosen.type)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", processes.local_rank)
        torch.cuda.set_device(chosen)
    return chosen, {"rank": processes.rank, "world": processes.world, "gather": gather_objects}
