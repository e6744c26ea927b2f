"""`concat predict`: its options, what it does between them and the core, and how it shows it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
from concat_cli.console import Console, relative
from concat_cli.core.errors import UserError
from concat_cli.core.infer.pictures import expand_inputs

if TYPE_CHECKING:
    from concat_cli.core.infer.files import PicturePrediction, Predicted

SHOWN = ("infer.size", "infer.max_size", "infer.min_score", "infer.overlap", "infer.seen_offset")


@dataclass(frozen=True)
class Asked:
    """What to predict, and how, as the options say it."""

    paths: Sequence[Path]
    weights: Path
    vocabulary: Path | None
    out: Path
    overrides: Sequence[str]
    device: str
    force: bool


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
    keys = [*(overrides or []), *([] if min_score is None else [f"infer.min_score={min_score}"])]
    asked = Asked(paths, found.path, vocab, out, keys, device.value, force)
    broken = _check(asked)
    if dry_run:
        if broken:
            raise _unreadable(broken)
        return _show_plan(console, asked)
    predicted = _predicted(console, asked)
    if as_json:
        console.json(_to_json(predicted, found.path))
    else:
        _show(console, predicted.pictures)
        overlays = relative(out) + "/*.overlay.png"
        console.done({"pictures": overlays, "segments": relative(predicted.index)})
    if predicted.unreadable:
        raise _unreadable(predicted.unreadable, written=len(predicted.pictures))


def _check(asked: Asked) -> list[UserError]:
    """An error for each picture whose header cannot be read; UserError, before anything slow, where
    none can, and for weights or a class list that are not there."""
    from concat_cli.core.data.image_io import check_image
    from concat_cli.core.vocabulary_file import parse_vocabulary

    if not asked.weights.is_file():
        raise UserError(
            f"There is no file {asked.weights}.",
            "Make weights with `concat train-con`, or leave --weights out.",
        )
    if asked.vocabulary is not None:
        parse_vocabulary(asked.vocabulary)
    broken: list[UserError] = []
    for path in asked.paths:
        try:
            check_image(path)
        except UserError as error:
            broken.append(error)
    if len(broken) == len(asked.paths):
        raise _unreadable(broken)
    return broken


def _unreadable(errors: Sequence[UserError], written: int = 0) -> UserError:
    """One error that names every picture that could not be read."""
    if len(errors) == 1 and not written:
        return errors[0]
    lines = "\n".join(f"- {error.what}" for error in errors)
    pictures = "1 picture" if len(errors) == 1 else f"{len(errors)} pictures"
    rest = f" The other {written} are written." if written else ""
    return UserError(f"{pictures} could not be read.{rest}\n{lines}", errors[0].hint)


def _predicted(console: Console, asked: Asked) -> Predicted:
    """Predicts; every process of a `torchrun` takes its share of the pictures."""
    from concat_cli.commands.shares import open_shares
    from concat_cli.core.checkpoint import load_weights
    from concat_cli.core.clip.prompts import known_words
    from concat_cli.core.infer.files import predict_paths
    from concat_cli.core.infer.predictor import Predictor, at_test

    weights = load_weights(asked.weights)
    at_test(weights, asked.overrides)  # a wrong key is told before anything else
    place, shares = open_shares(asked.device, console)
    predictor = Predictor.load(
        weights, asked.vocabulary, place, overrides=asked.overrides, force=asked.force,
        progress=console.progress,
    )  # fmt: skip
    words = known_words(weights.meta["clip"]["model"])
    if words is not None:
        console.warn(
            f"these weights know drawn shapes and {len(words)} words; in a photo they find nothing "
            "sensible. Train with a real CLIP for that (configs/concat_coco_119_14.yaml)."
        )
    return predict_paths(predictor, asked.paths, asked.out, progress=console.progress, **shares)


def _show_plan(console: Console, asked: Asked) -> None:
    """What would be predicted; UserError for what would stop it."""
    from concat_cli.core.checkpoint import load_weights
    from concat_cli.core.clip.prompts import check_words, known_words
    from concat_cli.core.config_file import to_dict
    from concat_cli.core.infer.predictor import at_test, named_by
    from concat_cli.core.method import stage_named

    weights = load_weights(asked.weights)
    classes, cfg = named_by(weights, asked.vocabulary), at_test(weights, asked.overrides)
    check_words(classes, known_words(cfg.clip.model), asked.force)
    method, stage = stage_named(weights.stage)
    values = {f"{part}.{key}": v for part, keys in to_dict(cfg).items() for key, v in keys.items()}
    seen, source = len(classes.seen_indices), asked.vocabulary or "the weights"
    rows = {
        "stage": stage.name,
        "pictures": str(len(asked.paths)),
        "classes": f"{len(classes)} of {source}; trained with labels: {seen}",
        "names": ", ".join(classes.names),
        **{key: str(values[key]) for key in (*SHOWN, *method.at_test)},
        "would write to": relative(asked.out),
    }
    console.table(["what", "value"], list(rows.items()))
    console.dry_run()


def _show(console: Console, predicted: Sequence[PicturePrediction], most: int = 40) -> None:
    """A row for each picture with what was found, then the mean milliseconds of a picture."""
    rows = [[one.path.name, len(one.segments), _found(one.segments)] for one in predicted]
    console.table(["picture", "segments", "found"], rows[:most])
    if len(rows) > most:
        console.say(f"... and {len(rows) - most} more pictures")
    if rows:
        parts = ("load", "model", "post")
        means = [sum(one.milliseconds[p] for one in predicted) / len(rows) for p in parts]
        shown = " / ".join(f"{p} {mean:.1f}" for p, mean in zip(parts, means, strict=True))
        console.say(f"ms a picture: {shown}")


def _found(segments: Sequence[dict[str, Any]]) -> str:
    if not segments:
        return "no segment"
    return ", ".join(f"{segment['name']} {segment['score']:.2f}" for segment in segments)


def _to_json(predicted: Predicted, weights: Path) -> dict[str, Any]:
    """What `--json` prints; the key of the index is `panoptic_json` or `semantic_json`."""
    return {
        "weights": str(weights),
        f"{predicted.index.stem}_json": relative(predicted.index),
        "images": [
            {
                "file": str(one.path),
                "id": one.id,
                "height": one.size[0],
                "width": one.size[1],
                "png": relative(one.png),
                "overlay": relative(one.overlay),
                "segments": one.segments,
                "milliseconds": one.milliseconds,
            }
            for one in predicted.pictures
        ],
    }
