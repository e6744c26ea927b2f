"""`concat predict`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from concat_cli.commands.options import (
    Device,
    DeviceOption,
    DryRun,
    Force,
    Json,
    RunName,
    WeightsFile,
)
from concat_cli.commands.predicting import (
    check_inputs,
    run_predictor,
    show_prediction_plan,
    show_predictions,
    to_json,
    unreadable,
)
from concat_cli.console import Console, relative
from concat_cli.core.infer.inputs import expand_inputs


def predict(
    inputs: Annotated[list[str], typer.Argument(help="Files, folders or globs of pictures.")],
    vocab: Annotated[
        Path | None, typer.Option(help="Names, a class a line. Default: those of the weights.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("predictions"),
    min_score: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Least score of a segment. Default: that of the weights."),
    ] = None,
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A key of inference, e.g. infer.size=640; repeatable.",
        ),
    ] = None,
    as_json: Json = False,
    name: RunName = None,
    weights: WeightsFile = None,
    device: DeviceOption = Device.auto,
    force: Force = False,
    dry_run: DryRun = False,
) -> None:
    """Segment pictures, with any class names."""
    from concat_cli.core.runs import find_weights

    console = Console(json_only=as_json)
    paths = expand_inputs(inputs)
    found = find_weights(name, weights, vocabulary=vocab)
    console.say(f"weights {relative(found.path)} ({found.reason})")
    check_inputs(paths, found.path, vocab)
    keys = [*(overrides or []), *([] if min_score is None else [f"infer.min_score={min_score}"])]
    if dry_run:
        return show_prediction_plan(console, paths, found.path, vocab, out, keys, force)
    predicted = run_predictor(paths, found.path, vocab, out, keys, device.value, force, console)
    if as_json:
        console.json(to_json(predicted, found.path))
    else:
        show_predictions(console, predicted.pictures)
        overlays = relative(out) + "/*.overlay.png"
        console.done({"pictures": overlays, "segments": relative(predicted.index)})
    if predicted.unreadable:
        raise unreadable(predicted.unreadable, written=len(predicted.pictures))
