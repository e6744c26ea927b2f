"""What `concat predict` does between its options and the core, and how it shows predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from concat_cli.console import Console, relative

if TYPE_CHECKING:
    from concat_cli.core.infer.predict import PicturePrediction


def run_predictor(
    paths: Sequence[Path],
    weights: Path,
    vocabulary: Path | None,
    out: Path,
    min_score: float | None,
    device: str,
    force: bool,
    console: Console,
) -> list[PicturePrediction]:
    """Predicts pictures; every process of a `torchrun` takes its share of them."""
    from concat_cli.commands.shares import open_shares
    from concat_cli.core.infer.predict import predict_paths
    from concat_cli.core.infer.predictor import Predictor

    place, shares = open_shares(device, console)
    predictor = Predictor.load(weights, vocabulary, place, force=force, progress=console.progress)
    if min_score is not None:
        predictor.cfg = replace(predictor.cfg, min_score=min_score)
    if knows_shapes_alone(weights):
        console.warn(
            "these weights know drawn shapes and some 25 words; in a photo they find nothing "
            "sensible. Train with a real CLIP for that (configs/concat_coco_119_14.yaml)."
        )
    return predict_paths(predictor, paths, out, progress=console.progress, **shares)


def knows_shapes_alone(weights: Path) -> bool:
    """True for weights trained with the built-in CLIP."""
    from concat_cli.core.checkpoint import read_meta

    return str(read_meta(weights)["clip"]["model"]).startswith("tiny")


def show_predictions(
    console: Console, predicted: Sequence[PicturePrediction], most: int = 40
) -> None:
    """A row for each picture: what was found, and the milliseconds it took."""
    rows = [
        [one.path.name, len(one.segments), _found(one.segments), sum(one.milliseconds.values())]
        for one in predicted
    ]
    console.table(["picture", "segments", "found", "ms"], rows[:most])
    if len(rows) > most:
        console.say(f"... and {len(rows) - most} more pictures")


def _found(segments: Sequence[dict[str, Any]]) -> str:
    if not segments:
        return "nothing above --min-score"
    return ", ".join(f"{segment['name']} {segment['score']:.2f}" for segment in segments)


def to_json(predicted: Sequence[PicturePrediction], weights: Path, out: Path) -> dict[str, Any]:
    """What `--json` prints."""
    return {
        "weights": str(weights),
        "panoptic_json": relative(out / "panoptic.json"),
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
            for one in predicted
        ],
    }
