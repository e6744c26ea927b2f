"""Options that several commands share, and what they lead to: a configuration and a run."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from concat_cli.console import Console

if TYPE_CHECKING:
    from concat_cli.core.config import Config
    from concat_cli.core.runs import Run


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
    Path | None,
    typer.Option("--config", "-c", help="A shipped configuration, such as demo, or a YAML file."),
]
Name = Annotated[
    str | None,
    typer.Option(help="Run folder below runs/. Default: the config's name."),
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


def open_run(
    stage: str, config: Path | None, name: str | None, overrides: list[str] | None, console: Console
) -> tuple[Config, Run]:
    """The run and the configuration of a stage.

    Without `-c`, a later stage takes the configuration of the stage before it in the same run;
    where there is none, the reference configuration of the method is taken.
    """
    from concat_cli.core.config_file import find_config, load_config
    from concat_cli.core.method import stage_named
    from concat_cli.core.runs import Run, relevant_diff

    method, wanted = stage_named(stage)
    chosen = find_config(config or method.reference)
    run = Run(name or chosen.stem)
    earlier = [run.stage(s.name).config_yaml for s in method.stages[: method.stages.index(wanted)]]
    saved = next((path for path in reversed(earlier) if path.exists()), None)
    if config is None:
        return load_config(saved or chosen, overrides or ()), run
    cfg = load_config(chosen, overrides or ())
    if saved is not None:
        lines = relevant_diff(method.stages[0].name, load_config(saved), cfg)
        if lines:
            console.warn(f"unlike {saved}: {'; '.join(lines)}")
    return cfg, run
