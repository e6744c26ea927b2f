"""`concat evaluate`."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from concat_cli.commands.options import (
    Device,
    DeviceOption,
    DryRun,
    Json,
    Overrides,
    RunName,
    WeightsFile,
)
from concat_cli.commands.report_view import show_report
from concat_cli.commands.scoring import Asked, score_files, score_weights, show_weights
from concat_cli.console import Console, relative


class SplitChoice(str, Enum):
    """Which classes are reported."""

    all = "all"
    seen = "seen"
    unseen = "unseen"


class CandidateChoice(Enum):
    """Which classes compete."""

    all = "all"
    split = "split"


def evaluate(
    overrides: Overrides = None,
    split: Annotated[
        SplitChoice, typer.Option(help="Classes to report; candidates stay all.")
    ] = SplitChoice.all,
    candidates: Annotated[
        CandidateChoice,
        typer.Option(help="Classes that compete; split: those of --split, the easier protocol."),
    ] = CandidateChoice.all,
    tasks: Annotated[
        str | None,
        typer.Option(help="Of panoptic,semantic,instance. Default: the first two."),
    ] = None,
    panoptic: Annotated[
        bool, typer.Option("--panoptic", help="The same as --tasks panoptic.")
    ] = False,
    bootstrap: Annotated[
        int,
        typer.Option(min=0, metavar="N", help="95% intervals from N draws of the images."),
    ] = 0,
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Also try offsets on the seen logits.")
    ] = False,
    diagnostics: Annotated[
        bool, typer.Option("--diagnostics", help="Also how many segments get a mask, and a name.")
    ] = False,
    as_json: Json = False,
    save: Annotated[Path | None, typer.Option(help="Also write the predictions there.")] = None,
    name: RunName = None,
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
    """Score weights, or existing predictions."""
    console = Console(json_only=as_json)
    if panoptic:
        tasks = "panoptic" if tasks is None else f"panoptic,{tasks}"
    asked = Asked(split.value, official, bootstrap, tasks, candidates.value, calibrate, diagnostics)
    if predictions is not None or truth is not None:
        report = score_files(
            predictions, truth, predictions_dir, truth_dir, class_split, asked, console
        )
    else:
        from concat_cli.core.runs import find_weights

        found = find_weights(name, weights)
        console.say(f"weights {relative(found.path)} ({found.reason})")
        if dry_run:
            return show_weights(console, found.path, overrides or [], asked)
        report = score_weights(found.path, overrides or [], asked, device.value, save, console)
    if as_json:
        return console.json(report.to_json())
    show_report(console, report)
    if save is not None:
        console.done({"predictions": relative(save)})
