"""What `concat evaluate` does between its options and the core, and how it shows a report."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from concat_cli.console import Cell, Console, duration, relative
from concat_cli.core.errors import UserError

if TYPE_CHECKING:
    from concat_cli.core.evaluate.report import Report, Split


def score_weights(
    weights: Path,
    overrides: Sequence[str],
    split: Split,
    device: str,
    save: Path | None,
    official: bool,
    console: Console,
) -> Report:
    """Scores weights on val; every process of a `torchrun` takes its share of the images."""
    from concat_cli.commands.shares import open_shares
    from concat_cli.core.evaluate.weights import evaluate_weights

    if official:
        _check_official()
    place, shares = open_shares(device, console)
    with ExitStack() as stack:
        if official and save is None:
            save = Path(stack.enter_context(TemporaryDirectory()))
        report = evaluate_weights(
            weights, overrides, split=split, device=place, save_dir=save,
            progress=console.progress, **shares,
        )  # fmt: skip
        if official and save is not None and shares["rank"] == 0:
            _compare(report, save, weights, overrides, console)
    return report


def score_files(
    predictions: Path | None,
    truth: Path | None,
    predictions_dir: Path | None,
    truth_dir: Path | None,
    class_split: str | None,
    split: Split,
    official: bool,
    console: Console,
) -> Report:
    """Scores COCO panoptic files."""
    if predictions is None or truth is None:
        raise UserError("--predictions and --truth belong together.", "Give both.")
    from concat_cli.core.evaluate.files import evaluate_files

    if official:
        _check_official()
    class_split, unseen = _unseen_of(truth, class_split, console)
    report = evaluate_files(
        predictions, truth, predictions_dir, truth_dir, unseen=unseen, split=split,
        protocol={"class_split": class_split}, progress=console.progress,
    )  # fmt: skip
    if official:
        _say_official(report, predictions, truth, predictions_dir, truth_dir, console)
    return report


def _unseen_of(
    truth: Path, class_split: str | None, console: Console
) -> tuple[str | None, tuple[str, ...] | None]:
    """The split's name and unseen classes: as asked, else as the truth's data set says; else None.

    A `dataset.json` counts if it stands a folder above the truth and fits the truth's classes.
    """
    from concat_cli.core.data.class_split import load_class_split
    from concat_cli.core.data.dataset import read_panoptic_json

    if not truth.is_file():  # which is said when it is scored
        return class_split, None
    names = [str(c["name"]) for c in read_panoptic_json(truth)["categories"]]
    if class_split is not None:
        return class_split, load_class_split(class_split, names)
    path = truth.absolute().parent.parent / "dataset.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        found, name = tuple(map(str, raw["unseen"])), str(raw["class_split"])
    except (OSError, ValueError, KeyError, TypeError):
        found, name = None, None
    if found is None or not set(found) <= set(names):
        console.say("no --class-split: classes are not divided")
        return None, None
    console.say(f"no --class-split: classes are divided as in {relative(path)} ({name})")
    return name, found


def _check_official() -> None:
    """UserError before any work if panopticapi is not installed."""
    from concat_cli.core.evaluate.official import INSTALL

    if find_spec("panopticapi") is None:
        raise UserError("--official needs panopticapi, which is not installed.", INSTALL)


def _compare(
    report: Report, save: Path, weights: Path, overrides: Sequence[str], console: Console
) -> None:
    """The official figures of the predictions that were just written."""
    from concat_cli.core.build import from_dict
    from concat_cli.core.checkpoint import read_meta
    from concat_cli.core.config_file import override
    from concat_cli.core.data.dataset import read_dataset_info

    cfg = override(from_dict(read_meta(weights)["config"]), overrides)
    part = read_dataset_info(Path(cfg.data.root)).part("val")
    _say_official(report, save / "panoptic.json", part.json, None, part.pngs, console)


def _say_official(
    report: Report,
    predictions: Path,
    truth: Path,
    predictions_dir: Path | None,
    truth_dir: Path | None,
    console: Console,
) -> None:
    from concat_cli.core.evaluate.official import compare_with_official, official_scores

    official = official_scores(predictions, truth, predictions_dir, truth_dir)
    difference = compare_with_official(report, official)
    console.say(
        f"panopticapi: PQ {100 * official['All']['pq']:.4f}, largest difference {difference:.1e}"
    )


def show_report(console: Console, report: Report) -> None:
    """The groups in percent, and the classes that are in no mean."""
    plain = report.to_json()
    rows = [
        [name, *_quality(plain["panoptic"][name]), _miou(plain["semantic"].get(name))]
        for name in plain["panoptic"]
        if plain["panoptic"][name] or plain["semantic"].get(name)
    ]
    console.table(["classes", "PQ", "SQ", "RQ", "n", "mIoU"], rows)
    shown = ("setting", "mode", "split", "class_split", "stage")
    facts = [f"{key} {plain['protocol'][key]}" for key in shown if plain["protocol"].get(key)]
    console.say(f"protocol: {', '.join(facts)}; {plain['protocol']['candidates']} candidates")
    if report.absent:
        console.say(f"in neither truth nor prediction, so in no mean: {', '.join(report.absent)}")
    seconds = report.seconds["total"]
    console.say(f"{report.images} images in {duration(seconds)}")


def _quality(group: dict[str, Any] | None) -> list[Cell]:
    if group is None:
        return [None, None, None, None]
    return [100 * group["pq"], 100 * group["sq"], 100 * group["rq"], group.get("n")]


def _miou(group: dict[str, Any] | None) -> Cell:
    return None if group is None else 100 * group["miou"]


def show_weights(console: Console, weights: Path, overrides: Sequence[str]) -> None:
    """What would be scored."""
    from concat_cli.core.checkpoint import read_meta
    from concat_cli.core.config_file import from_dict, override
    from concat_cli.core.data.dataset import read_dataset_info

    meta = read_meta(weights)
    cfg = override(from_dict(meta["config"]), overrides)
    info = read_dataset_info(Path(cfg.data.root))
    seen, classes = len(info.vocabulary.seen_indices), len(info.vocabulary)
    console.table(
        ["what", "value"],
        [
            ("stage", meta["stage"]),
            ("data", f"{cfg.data.root}, part val"),
            ("classes", f"{seen} seen, {classes - seen} unseen"),
        ],
    )
    console.dry_run()
