"""`concat report`: weights scored, as a page to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from concat_cli.commands.evaluate import DRAWS, Options, score
from concat_cli.commands.options import (
    Device,
    DeviceOption,
    DryRun,
    Force,
    Overrides,
    RunName,
    WeightsFile,
)


def report(
    overrides: Overrides = None,
    name: RunName = None,
    out: Annotated[Path, typer.Option(metavar="FILE.html", help="The page.")] = Path("report.html"),
    bootstrap: Annotated[
        int, typer.Option(min=10, metavar="N", help="95% intervals from N draws of the images.")
    ] = DRAWS,
    force: Force = False,
    weights: WeightsFile = None,
    device: DeviceOption = Device.auto,
    dry_run: DryRun = False,
) -> None:
    """Score a run's weights as a web page."""
    score(
        Options(
            overrides, report=out, bootstraps=bootstrap, force=force, name=name, weights=weights,
            device=device, dry_run=dry_run,
        )
    )  # fmt: skip
