"""`concat evaluate` and `concat predict`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from concat_cli.commands.options import (
    Device,
    DeviceOption,
    DryRun,
    Force,
    Json,
    Name,
    Overrides,
    WeightsFile,
)
from concat_cli.console import Cell, Console, duration, relative
from concat_cli.core.errors import UserError
from concat_cli.core.runs import find_weights

if TYPE_CHECKING:
    from concat_cli.core.evaluate.report import Report
    from concat_cli.core.infer.predict import PicturePrediction


class SplitChoice(str, Enum):
    """Which classes are reported."""

    all = "all"
    seen = "seen"
    unseen = "unseen"


def evaluate(
    overrides: Overrides = None,
    split: Annotated[
        SplitChoice, typer.Option(help="Classes to report; candidates stay all.")
    ] = SplitChoice.all,
    as_json: Json = False,
    save: Annotated[
        Path | None, typer.Option(help="Also write the predictions there (COCO panoptic).")
    ] = None,
    name: Name = None,
    weights: WeightsFile = None,
    device: DeviceOption = Device.auto,
    dry_run: DryRun = False,
    predictions: Annotated[
        Path | None,
        typer.Option(help="Score this COCO panoptic JSON.", rich_help_panel="Existing files"),
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(help="Against this one.", rich_help_panel="Existing files"),
    ] = None,
    predictions_dir: Annotated[
        Path | None,
        typer.Option(help="PNGs. Default: as the JSON.", rich_help_panel="Existing files"),
    ] = None,
    truth_dir: Annotated[
        Path | None,
        typer.Option(help="PNGs. Default: as the JSON.", rich_help_panel="Existing files"),
    ] = None,
    class_split: Annotated[
        str | None,
        typer.Option(help="Which classes are unseen.", rich_help_panel="Existing files"),
    ] = None,
    official: Annotated[
        bool,
        typer.Option("--official", help="Also run panopticapi.", rich_help_panel="Existing files"),
    ] = False,
) -> None:
    """Score weights on the val part, or existing predictions against a truth."""
    console = Console(json_only=as_json)
    if predictions is not None or truth is not None:
        if predictions is None or truth is None:
            raise UserError("--predictions and --truth belong together.", "Give both.")
        from concat_cli.commands.scores import score_files

        report = score_files(
            predictions, truth, predictions_dir, truth_dir, class_split, split.value, official,
            console,
        )  # fmt: skip
    else:
        found = find_weights(name, weights)
        console.say(f"weights {relative(found.path)} ({found.reason})")
        from concat_cli.commands.scores import score_weights
        report = score_weights(
            found.path, overrides or [], split.value, device.value, save, official, console,
        )
    if as_json:
        console.json(report.to_json())
    else:
        show_report(console, report)
