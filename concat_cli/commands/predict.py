"""`concat predict`: its options, and how it shows what comes of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
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
    open_share,
    with_options,
)
from concat_cli.console import Console, relative
from concat_cli.core.errors import UserError

if TYPE_CHECKING:
    from concat_cli.core.checkpoint import Weights
    from concat_cli.core.config import Config
    from concat_cli.core.infer.files import PicturePrediction, Predicted

SHOWN = ("infer.size", "infer.max_size", "infer.min_score", "infer.overlap", "infer.seen_offset")


@dataclass(frozen=True)
class Options:
    """What to predict, and how."""

    inputs: Annotated[list[str], typer.Argument(help="Files, folders or globs of pictures.")]
    vocab: Annotated[
        Path | None, typer.Option(help="Names, a class a line. Default: those of the weights.")
    ] = None
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("predictions")
    min_score: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Least score of a segment. Default: that of the weights."),
    ] = None
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="A key of inference, e.g. infer.size=640; repeatable.",
        ),
    ] = None
    as_json: Json = False
    name: RunName = None
    weights: WeightsFile = None
    device: DeviceOption = Device.auto
    force: Force = False
    dry_run: DryRun = False

    def keys(self) -> list[str]:
        """The overrides; `--min-score` goes last."""
        last = [] if self.min_score is None else [f"infer.min_score={self.min_score}"]
        return [*(self.overrides or []), *last]


@with_options(Options)
def predict(asked: Options) -> None:
    """Segment pictures, with any class names."""
    from concat_cli.core.infer.pictures import expand_inputs
    from concat_cli.core.runs import find_weights

    console = Console(json_only=asked.as_json)
    paths = expand_inputs(asked.inputs)
    found = find_weights(asked.name, asked.weights, vocabulary=asked.vocab)
    console.say(f"weights {relative(found.path)} ({found.reason})")
    _check(paths, every=asked.dry_run)
    from concat_cli.core.checkpoint import load_weights  # torch: mistakes so far are told at once
    from concat_cli.core.infer.predictor import at_test

    weights = load_weights(found.path)
    cfg = at_test(weights, asked.keys())
    if asked.dry_run:
        return _show_plan(console, asked, paths, weights, cfg)
    predicted = _predicted(console, asked, paths, weights, cfg)
    if asked.as_json:
        console.json(_to_json(predicted, found.path))
    else:
        _show(console, predicted.pictures)
        overlays = relative(asked.out) + "/*.overlay.png"
        console.done({"pictures": overlays, "segments": relative(predicted.index)})
    if predicted.unreadable:
        raise _unreadable(predicted.unreadable, written=len(predicted.pictures))


def _check(paths: Sequence[Path], every: bool) -> None:
    """UserError, before anything slow, where no picture can be read, or not every one."""
    from concat_cli.core.data.image_io import check_image

    broken: list[UserError] = []
    for path in paths:
        try:
            check_image(path)
        except UserError as error:
            broken.append(error)
    if len(broken) == len(paths) or (broken and every):
        raise _unreadable(broken)


def _unreadable(errors: Sequence[UserError], written: int = 0) -> UserError:
    """One error that names every picture that could not be read."""
    if len(errors) == 1 and not written:
        return errors[0]
    lines = "\n".join(f"- {error.what}" for error in errors)
    pictures = "1 picture" if len(errors) == 1 else f"{len(errors)} pictures"
    rest = f" The other {written} are written." if written else ""
    return UserError(f"{pictures} could not be read.{rest}\n{lines}", errors[0].hint)


def _predicted(
    console: Console, asked: Options, paths: Sequence[Path], weights: Weights, cfg: Config
) -> Predicted:
    """Predicts; every process of a `torchrun` takes its share of the pictures."""
    from concat_cli.core.clip.prompts import known_words
    from concat_cli.core.infer.files import predict_paths
    from concat_cli.core.infer.predictor import Predictor

    device, share = open_share(asked.device.value, console)
    predictor = Predictor.load(
        weights, asked.vocab, device, overrides=cfg, force=asked.force, progress=console.progress
    )
    words = known_words(cfg.clip.model)
    if words is not None:
        console.warn(
            f"these weights know drawn shapes and {len(words)} words; in a photo they find nothing "
            "sensible. Train with a real CLIP for that (`-c concat_coco_119_14`)."
        )
    return predict_paths(predictor, paths, asked.out, share=share, progress=console.progress)


def _show_plan(
    console: Console, asked: Options, paths: Sequence[Path], weights: Weights, cfg: Config
) -> None:
    """What would be predicted; UserError for what would stop it."""
    from concat_cli.core.clip.prompts import check_words, known_words
    from concat_cli.core.config_file import to_dict
    from concat_cli.core.infer.predictor import named_by
    from concat_cli.core.method import stage_named

    classes, values = named_by(weights, asked.vocab), to_dict(cfg)
    check_words(classes, known_words(cfg.clip.model), asked.force)
    keys = (key.partition(".") for key in (*SHOWN, *stage_named(weights.stage)[0].at_test))
    seen, source = len(classes.seen_indices), asked.vocab or "the weights"
    rows = [
        ("stage", weights.stage),
        ("pictures", str(len(paths))),
        ("classes", f"{len(classes)} of {source}; trained with labels: {seen}"),
        ("names", ", ".join(classes.names)),
        *((f"{section}.{key}", str(values[section][key])) for section, _, key in keys),
        ("would write to", relative(asked.out)),
    ]
    console.table(["what", "value"], rows)
    console.dry_run()


def _show(console: Console, predicted: Sequence[PicturePrediction], most: int = 40) -> None:
    """A row for each picture with what was found, then the mean milliseconds of a picture."""
    rows = [[one.path.name, len(one.segments), _found(one.segments)] for one in predicted]
    console.table(["picture", "segments", "found"], rows[:most])
    if len(rows) > most:
        console.say(f"... and {len(rows) - most} more pictures")
    if rows:
        parts = ("load", "model", "post")
        means = (fmean(one.milliseconds[part] for one in predicted) for part in parts)
        shown = (f"{part} {mean:.1f}" for part, mean in zip(parts, means, strict=True))
        console.say(f"ms a picture: {' / '.join(shown)}")


def _found(segments: Sequence[dict[str, Any]]) -> str:
    found = (f"{segment['name']} {segment['score']:.2f}" for segment in segments)
    return ", ".join(found) or "no segment"


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
