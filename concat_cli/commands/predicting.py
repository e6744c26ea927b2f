"""What `concat predict` does between its options and the core, and how it shows predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from concat_cli.console import Console, relative
from concat_cli.core.errors import UserError

if TYPE_CHECKING:
    from concat_cli.core.checkpoint import Weights
    from concat_cli.core.config import Config
    from concat_cli.core.infer.predict import PicturePrediction, Predicted


def run_predictor(
    paths: Sequence[Path],
    weights: Path,
    vocabulary: Path | None,
    out: Path,
    overrides: Sequence[str],
    device: str,
    force: bool,
    console: Console,
) -> Predicted:
    """Predicts pictures; every process of a `torchrun` takes its share of them."""
    from concat_cli.commands.options import open_share
    from concat_cli.core.checkpoint import load_weights
    from concat_cli.core.infer.predict import predict_paths
    from concat_cli.core.infer.predictor import Predictor

    loaded = load_weights(weights)
    cfg = used_config(loaded, overrides)
    place, share = open_share(device, console)
    predictor = Predictor.load(
        loaded, vocabulary, place, infer=cfg.infer, zegformer=cfg.zegformer, force=force,
        progress=console.progress,
    )  # fmt: skip
    words = known_words(weights)
    if words:
        console.warn(
            f"these weights know drawn shapes and {words} words; in a photo they find nothing "
            "sensible. Train with a real CLIP for that (configs/concat_coco_119_14.yaml)."
        )
    return predict_paths(
        predictor, paths, out, rank=share.rank, world=share.world, gather=share.gather,
        progress=console.progress,
    )  # fmt: skip


def used_config(loaded: Weights, overrides: Sequence[str]) -> Config:
    """What the weights carry, with keys on top that say how to predict; UserError for others."""
    from concat_cli.core.build import config_of
    from concat_cli.core.config_file import diff, override
    from concat_cli.core.stages import ZEGFORMER_TRAINED

    before = config_of(loaded)
    cfg = override(before, overrides)
    allowed = [f"infer.{field.name}" for field in fields(cfg.infer)]
    if loaded.stage == "zegformer":
        names = (field.name for field in fields(cfg.zegformer))
        allowed += [f"zegformer.{name}" for name in names if name not in ZEGFORMER_TRAINED]
    keys = [line.split(":")[0] for line in diff(before, cfg)]
    others = [key for key in keys if key not in allowed]
    if others:
        raise UserError(
            f"{', '.join(others)} cannot be changed in these weights.",
            f"--set takes keys that say how they predict: {', '.join(allowed)}.",
        )
    return cfg


def known_words(weights: Path) -> int:
    """How many words the built-in CLIP that the weights were trained with knows; 0: a real CLIP."""
    from concat_cli.core.checkpoint import read_meta
    from concat_cli.core.clip import tiny

    model = str(read_meta(weights)["clip"]["model"])
    return len(tiny.load_tiny(tiny.FILES[model]).words) if model in tiny.FILES else 0


def check_inputs(paths: Sequence[Path], weights: Path, vocabulary: Path | None) -> None:
    """UserError, before anything slow, for weights or a class list that are not there, and where
    no picture can be read."""
    from concat_cli.core.vocabulary_file import parse_vocabulary

    if not weights.is_file():
        raise UserError(
            f"There is no file {weights}.",
            "Make weights with `concat train-con`, or leave --weights out.",
        )
    if vocabulary is not None:
        parse_vocabulary(vocabulary)
    broken = unreadable_pictures(paths)
    if len(broken) == len(paths):
        raise unreadable(broken)


def unreadable_pictures(paths: Sequence[Path]) -> list[UserError]:
    """An error for each picture whose header cannot be read."""
    from concat_cli.core.data.image_io import check_image

    broken: list[UserError] = []
    for path in paths:
        try:
            check_image(path)
        except UserError as error:
            broken.append(error)
    return broken


def unreadable(errors: Sequence[UserError], written: int = 0) -> UserError:
    """One error that names every picture that could not be read."""
    if len(errors) == 1 and not written:
        return errors[0]
    lines = "\n".join(f"- {error.what}" for error in errors)
    pictures = "1 picture" if len(errors) == 1 else f"{len(errors)} pictures"
    rest = f" The other {written} are written." if written else ""
    return UserError(f"{pictures} could not be read.{rest}\n{lines}", errors[0].hint)


def show_prediction_plan(
    console: Console,
    paths: Sequence[Path],
    weights: Path,
    vocabulary: Path | None,
    out: Path,
    overrides: Sequence[str],
    force: bool,
) -> None:
    """What would be predicted; UserError for what would stop it."""
    from concat_cli.core.checkpoint import load_weights
    from concat_cli.core.clip import tiny
    from concat_cli.core.clip.encoder import load_clip
    from concat_cli.core.clip.prompts import check_words
    from concat_cli.core.infer.restore import seen_by, vocabulary_of
    from concat_cli.core.vocabulary_file import parse_vocabulary

    broken = unreadable_pictures(paths)
    if broken:
        raise unreadable(broken)
    loaded = load_weights(weights)
    known, clip = vocabulary_of(loaded), used_config(loaded, overrides).clip
    given = parse_vocabulary(vocabulary, known) if vocabulary is not None else known
    classes = seen_by(given, loaded)
    if clip.model in tiny.FILES:  # a real CLIP knows any word
        check_words(classes, load_clip(clip, image_tower=False), force)
    seen = len(classes.seen_indices)
    rows = {
        "stage": loaded.stage,
        "pictures": str(len(paths)),
        "classes": f"{len(classes)} of {vocabulary or 'the weights'}; trained with labels: {seen}",
        "names": ", ".join(classes.names),
        "would write to": relative(out),
    }
    console.table(["what", "value"], list(rows.items()))
    console.dry_run()


def show_predictions(
    console: Console, predicted: Sequence[PicturePrediction], most: int = 40
) -> None:
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


def to_json(predicted: Predicted, weights: Path) -> dict[str, Any]:
    """What `--json` prints; the key of the index is `panoptic_json` or `semantic_json`."""
    return {
        "weights": str(weights),
        f"{predicted.index.stem}_json": relative(predicted.index),
        "images": [
            {
                "file": str(one.path),
                "id": one.written.image["id"],
                "height": one.written.image["height"],
                "width": one.written.image["width"],
                "png": relative(one.written.png),
                "overlay": relative(one.written.overlay) if one.written.overlay else None,
                "segments": one.segments,
                "milliseconds": one.milliseconds,
            }
            for one in predicted.pictures
        ],
    }
