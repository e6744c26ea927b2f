"""Options that several commands share, and what they lead to: a configuration and a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from enum import Enum
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar, get_type_hints

import typer

from concat_cli.console import Console

if TYPE_CHECKING:
    import torch

    from concat_cli.core.config import Config
    from concat_cli.core.device import Share
    from concat_cli.core.runs import Run

T = TypeVar("T")


class Device(str, Enum):
    """Where to compute."""

    auto = "auto"
    cuda = "cuda"
    mps = "mps"
    cpu = "cpu"


Overrides = Annotated[
    list[str] | None,
    typer.Argument(metavar="KEY=VALUE", help="Config keys, e.g. optim.steps=500."),
]
ConfigFile = Annotated[
    Path | None, typer.Option("--config", "-c", help="YAML with deltas from the defaults.")
]
Name = Annotated[
    str | None,
    typer.Option(help="Run folder below runs/. Default: the config's stem."),
]
RunName = Annotated[str | None, typer.Option("--name", help="Run below runs/. Default: shapes.")]
DeviceOption = Annotated[Device, typer.Option("--device", help="auto: cuda, else mps, else cpu.")]
Fresh = Annotated[bool, typer.Option("--fresh", help="Start again; the old folder is kept.")]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Only show the configuration and what would be done.")
]
WeightsFile = Annotated[
    Path | None, typer.Option("--weights", help="Weights to use instead of the run's.")
]
Force = Annotated[bool, typer.Option("--force", help="Allow words the built-in CLIP never saw.")]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on stdout.")]


_PACKAGE = Path(__file__).parents[1]
REFERENCES = {  # the same as in configs/
    "zegformer": _PACKAGE / "shapes_zegformer.yaml",
    "clip_zss": _PACKAGE / "shapes_clip_zss.yaml",
}
REFERENCE = _PACKAGE / "shapes.yaml"


def open_run(
    stage: str, config: Path | None, name: str | None, overrides: list[str] | None, console: Console
) -> tuple[Config, Run]:
    """The run and the configuration of a stage.

    Without `-c`, a later stage takes the configuration of the stage before it in the same run;
    where there is none, the reference configuration of the built-in world is taken.
    """
    from concat_cli.core.config_file import load_config
    from concat_cli.core.runs import Run
    from concat_cli.core.stages import STAGES, relevant_diff

    reference = REFERENCES.get(stage, REFERENCE)
    run = Run(name or (config or reference).stem)
    before = STAGES[: STAGES.index(stage)] if stage in STAGES else ()
    earlier = [run.stage(s).config_yaml for s in before]
    saved = next((path for path in reversed(earlier) if path.exists()), None)
    cfg = load_config(config or saved or reference, overrides or ())
    if config is not None and saved is not None:
        lines = relevant_diff("con", load_config(saved), cfg)
        if lines:
            console.warn(f"unlike {saved}: {'; '.join(lines)}")
    return cfg, run


def with_options(kind: type[T]) -> Callable[[Callable[[T], None]], Callable[..., None]]:
    """A command of a function that takes one dataclass, whose fields are the command's options."""
    types = get_type_hints(kind, include_extras=True)
    parameters = [
        Parameter(
            one.name,
            Parameter.KEYWORD_ONLY,
            default=Parameter.empty if one.default is MISSING else one.default,
            annotation=types[one.name],
        )
        for one in fields(kind)  # type: ignore[arg-type]
    ]

    def command_of(function: Callable[[T], None]) -> Callable[..., None]:
        def command(**given: Any) -> None:
            function(kind(**given))

        command.__doc__ = function.__doc__
        vars(command)["__signature__"] = Signature(parameters)  # which typer reads
        return command

    return command_of


def open_share(device: str, console: Console) -> tuple[torch.device, Share]:
    """The device, and this process's share of the pictures under `torchrun`."""
    import torch

    from concat_cli.core.device import Share, choose_device
    from concat_cli.core.train.distributed import gather_objects, join

    chosen, why = choose_device(device)
    console.say(f"device {chosen} ({why})")
    processes = join(chosen.type)
    if chosen.type == "cuda":
        chosen = torch.device("cuda", processes.local_rank)
        torch.cuda.set_device(chosen)
    return chosen, Share(processes.rank, processes.world, gather_objects)
