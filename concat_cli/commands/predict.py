"""`concat predict`: its options, and how it shows what comes of them."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from concat_cli import __version__
from concat_cli.commands.options import (
    KEY_VALUE,
    Device,
    DeviceOption,
    DryRun,
    Force,
    Json,
    RunName,
    WeightsFile,
    open_share,
    refuse_given,
    with_options,
)
from concat_cli.console import Console, rank, relative
from concat_cli.core.errors import UserError

if TYPE_CHECKING:
    from concat_cli.core.checkpoint import Weights
    from concat_cli.core.config import Config
    from concat_cli.core.infer.files import Pictures, Predicted
    from concat_cli.core.infer.video import Video
    from concat_cli.core.vocabulary import Vocabulary

SHOWN = ("infer.size", "infer.max_size", "infer.min_score", "infer.overlap", "infer.seen_offset")
STDIN = Path("-")


@dataclass(frozen=True)
class Options:
    """What to predict, and how."""

    inputs: Annotated[
        list[str], typer.Argument(help="Pictures: files, folders, globs. Or a video.")
    ]
    classes: Annotated[
        str | None,
        typer.Option(help='Names: "dog; cat, kitten; grass : stuff". Default: the weights\' own.'),
    ] = None
    vocab: Annotated[
        Path | None, typer.Option(help="A file of names, a class a line; -: standard input.")
    ] = None
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("predictions")
    layout: Annotated[
        Literal["plain", "coco"],
        typer.Option(help="coco: as a COCO data set, with copies of the pictures."),
    ] = "plain"
    min_score: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="Least score of a segment. Default: that of the weights."),
    ] = None
    scale: Annotated[
        int, typer.Option(min=1, max=16, help="Overlays so many times as large as the pictures.")
    ] = 1
    every: Annotated[int, typer.Option(min=1, help="Of a video, each N-th frame.")] = 1
    overrides: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar=KEY_VALUE,
            help="A key of inference, e.g. infer.size=640; repeatable.",
        ),
    ] = None
    as_json: Json = False
    name: RunName = None
    weights: WeightsFile = None
    device: DeviceOption = Device.auto
    force: Force = False
    dry_run: DryRun = False

    @property
    def file(self) -> Path | None:
        """The vocabulary file, where there is one."""
        return None if self.vocab == STDIN else self.vocab

    def names(self, known: Vocabulary) -> Vocabulary | None:
        """The classes asked for; UserError for what names none. Standard input is read here."""
        from concat_cli.core.vocabulary_file import parse_classes, parse_vocabulary

        if self.classes is not None:
            return parse_classes(self.classes, known)
        if self.vocab is None:
            return None
        text = _standard_input() if self.vocab == STDIN else None
        return parse_vocabulary(self.file or "standard input", known, text=text)

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
    if asked.classes is not None and asked.vocab is not None:
        raise UserError("--classes and --vocab exclude each other.", "Give one of them.")
    paths = _video(asked, console) or expand_inputs(asked.inputs, console.progress)
    found = find_weights(asked.name, asked.weights, vocabulary=asked.file)
    console.say(f"weights {relative(found.path)} ({found.reason})")
    wide = list[int]()
    if isinstance(paths, list) and not rank():  # the first process checks for all
        wide = _check(paths, every=asked.dry_run)
    from concat_cli.core.checkpoint import open_weights  # torch: mistakes so far are told at once
    from concat_cli.core.infer.predictor import at_test

    weights = open_weights(found.path)
    cfg = at_test(weights, asked.keys())
    _tell_dim(console, wide, cfg.infer.white)
    if asked.dry_run:
        return _show_plan(console, asked, paths, weights, cfg)
    predicted = _predicted(console, asked, paths, weights, cfg)
    if asked.as_json:
        _show_json(console, predicted, found.path)
    else:
        _show(console, predicted.pictures)
        every = asked.out / "*.overlay.png"
        overlays = every if isinstance(paths, list) else paths.overlay(asked.out, 0)
        console.done({"pictures": relative(overlays), "segments": relative(predicted.index)})
    if predicted.unreadable:
        raise _unreadable(predicted.unreadable, written=len(predicted.pictures))


def _video(asked: Options, console: Console) -> Video | None:
    """The video asked for, looked through; None where it is pictures."""
    from concat_cli.core.infer.pictures import is_video

    found = [name for name in asked.inputs if is_video(Path(name))]
    if not found:
        where, hint = "no video is given", "Give a video, such as clip.mp4, or leave it out."
        refuse_given(asked, ("every",), where, hint)
        return None
    if len(asked.inputs) > 1:
        what = f"A video is predicted alone, and {len(asked.inputs)} inputs are given."
        raise UserError(what, f"Give {found[0]} by itself, and an --out of its own.")
    from concat_cli.core.infer.video import Video

    video = Video.opened(found[0], asked.every, console.progress)
    height, width = video.size
    console.say(f"video {found[0]}: {len(video)} frames of {width}x{height}, {video.seconds:.1f} s")
    return video


def _check(paths: Sequence[Path], every: bool) -> list[int]:
    """The largest value of each grey picture of 16 bits; UserError, before anything slow, where no
    picture can be read, or not every one."""
    from concat_cli.core.data.image_io import brightest, read_header
    from concat_cli.core.infer.pictures import check_name

    broken: list[UserError] = []
    wide: list[int] = []
    for path in paths:
        try:
            check_name(path)
            if read_header(path).wide:
                wide.append(brightest(path))
        except UserError as error:
            broken.append(error)
    if len(broken) == len(paths) or (broken and every):
        raise _unreadable(broken)
    return wide


def _tell_dim(console: Console, wide: Sequence[int], white: int) -> None:
    """Says where pictures of 16 bits use a small part of them."""
    from concat_cli.core.data.image_io import told_dim

    if told := told_dim([most for most in wide if most], white):
        console.warn(f"{told}: --set infer.white={max(wide)}, or what white is in them")


def _unreadable(errors: Sequence[UserError], written: int = 0) -> UserError:
    """One error that names every picture that could not be read."""
    if len(errors) == 1 and not written:
        return errors[0]
    lines = "\n".join(f"- {error.what}" for error in errors)
    pictures = "1 picture" if len(errors) == 1 else f"{len(errors)} pictures"
    rest = f" The other {written} are written." if written else ""
    return UserError(f"{pictures} could not be read.{rest}\n{lines}", errors[0].hint)


def _predicted(
    console: Console, asked: Options, paths: Sequence[Path] | Video, weights: Weights, cfg: Config
) -> Predicted:
    """Predicts; every process of a `torchrun` takes its share of the pictures."""
    from concat_cli.core.clip.prompts import only_drawn
    from concat_cli.core.config_file import to_dict
    from concat_cli.core.infer.files import predict_paths
    from concat_cli.core.infer.predictor import Predictor, vocabulary_of

    device, share = open_share(asked.device.value, console)
    names = asked.names(vocabulary_of(weights))
    predictor = Predictor.load(
        weights, names, device, overrides=cfg, force=asked.force, progress=console.progress
    )
    if warning := only_drawn(cfg.clip.model):
        console.warn(warning)
    settings = {
        "program": __version__,
        "weights": weights.sha256,
        "classes": predictor.vocabulary.to_json(),
        "keys": to_dict(cfg),
        "device": f"{device.type} {predictor.dtype}",
        "layout": asked.layout,
        "scale": asked.scale,
    }
    return predict_paths(
        predictor,
        paths,
        asked.out,
        layout=asked.layout,
        settings=settings,
        share=share,
        scale=asked.scale,
        progress=console.progress,
    )


def _show_plan(
    console: Console, asked: Options, paths: Sequence[Path] | Video, weights: Weights, cfg: Config
) -> None:
    """What would be predicted; UserError for what would stop it."""
    from concat_cli.core.clip.prompts import check_names
    from concat_cli.core.config_file import to_dict
    from concat_cli.core.infer.predictor import check_plan, named_by, vocabulary_of
    from concat_cli.core.method import stage_named
    from concat_cli.core.vocabulary_file import doubt

    classes, values = named_by(weights, asked.names(vocabulary_of(weights))), to_dict(cfg)
    if doubtful := doubt(classes):
        console.warn(doubtful)
    check_names(classes, cfg.clip, asked.force)
    check_plan(weights, cfg)
    keys = (key.partition(".") for key in (*SHOWN, *stage_named(weights.stage)[0].at_test))
    seen, source = len(classes.seen_indices), _source(asked)
    rows = [
        ("stage", weights.stage),
        ("pictures" if isinstance(paths, list) else "frames", str(len(paths))),
        ("classes", f"{len(classes)} of {source}; trained with labels: {seen}"),
        ("names", ", ".join(classes.names)),
        *((f"{section}.{key}", str(values[section][key])) for section, _, key in keys),
        ("would write to", relative(asked.out)),
    ]
    console.table(["what", "value"], rows)
    console.dry_run()


def _source(asked: Options) -> str:
    if asked.classes is not None:
        return "--classes"
    return "standard input" if asked.vocab == STDIN else str(asked.vocab or "the weights")


def _standard_input() -> str:
    """What stands there; UserError where it cannot be read by all who need it."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("Several processes cannot share --vocab -.", "Give a file.")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        what = f"Standard input is not UTF-8 (byte {error.start})."
        raise UserError(what, "Send UTF-8 text.") from error


def _show(console: Console, predicted: Pictures, most: int = 40) -> None:
    """A row for each picture with what was found, then the mean milliseconds of a picture."""
    rows: list[list[Any]] = []
    spent: Counter[str] = Counter()
    for one in predicted:
        spent.update(one.milliseconds)
        if len(rows) < most:
            rows.append([one.path.name, len(one.segments), _found(one.segments)])
    console.table(["picture", "segments", "found"], rows)
    if len(predicted) > most:
        console.say(f"... and {len(predicted) - most} more pictures")
    if rows:
        parts = ("load", "model", "post")
        shown = (f"{part} {spent[part] / len(predicted):.1f}" for part in parts)
        console.say(f"ms a picture: {' / '.join(shown)}")


def _found(segments: Sequence[dict[str, Any]]) -> str:
    found = (f"{segment['name']} {segment['score']:.2f}" for segment in segments)
    return ", ".join(found) or "no segment"


def _show_json(console: Console, predicted: Predicted, weights: Path) -> None:
    """What `--json` prints; the key of the index is `panoptic_json` or `semantic_json`."""
    about = {
        "weights": str(weights),
        f"{predicted.index.stem}_json": relative(predicted.index),
    }
    images = (
        {
            "file": str(one.path),
            "id": one.id,
            **one.about,
            "height": one.size[0],
            "width": one.size[1],
            "png": relative(one.png),
            "overlay": relative(one.overlay),
            "segments": one.segments,
            "milliseconds": one.milliseconds,
        }
        for one in predicted.pictures
    )
    console.json(about, images=images)
