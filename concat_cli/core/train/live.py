"""The metrics of a run sent to a tracker while it trains.

Each tracker is a context whose value takes the folder of a stage, or of a part of it, and a row of
its `metrics.jsonl`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

from concat_cli.core.errors import UserError
from concat_cli.core.runs import numbers

Listener = Callable[[Path, dict[str, Any]], None]


@contextmanager
def tensorboard(run: str) -> Generator[Listener]:
    """Events in the folder `tensorboard` beside each `metrics.jsonl`; those of steps that a resumed
    loop does again are dropped. UserError where the package is not installed."""
    try:
        from torch.utils.tensorboard.writer import SummaryWriter
    except ImportError as error:
        raise _absent("tensorboard", error) from error
    writers: dict[Path, SummaryWriter] = {}

    def write(folder: Path, row: dict[str, Any]) -> None:
        if folder not in writers:
            writers[folder] = SummaryWriter(folder / "tensorboard", purge_step=row["step"])
        for name, value in numbers(row).items():
            writers[folder].add_scalar(name, value, row["step"])

    try:
        yield write
    finally:
        for writer in writers.values():
            writer.close()


@contextmanager
def wandb(run: str) -> Generator[Listener]:
    """A run for each stage, resumed by its name; where to, `wandb login` and the
    environment (WANDB_MODE, WANDB_PROJECT) say. UserError where the package is not installed."""
    try:
        import wandb as package  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise _absent("wandb", error) from error
    opened: dict[Path, Any] = {}

    def write(folder: Path, row: dict[str, Any]) -> None:
        if folder not in opened:
            close()  # one at a time
            name = "-".join((run, *folder.parts[folder.parts.index(run) + 1 :]))
            opened[folder] = package.init(name=name, id=name, resume="allow", dir=folder)
        opened[folder].log(numbers(row), step=row["step"])

    def close() -> None:
        for one in opened.values():
            one.finish()
        opened.clear()

    try:
        yield write
    finally:
        close()


LOGS: Mapping[str, Callable[[str], AbstractContextManager[Listener]]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
}


def _absent(package: str, error: ImportError) -> UserError:
    return UserError(
        f"--log {package} needs the package {package}, which cannot be imported: {error}.",
        f"pip install {package}, or leave --log out: metrics.jsonl has every figure.",
    )
