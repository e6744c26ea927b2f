"""What `concat evaluate` does between its options and the core."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from concat_cli.console import Console, relative
from concat_cli.core.errors import UserError

if TYPE_CHECKING:
    from concat_cli.core.evaluate.report import Report, Split
    from concat_cli.core.evaluate.weights import Candidates


@dataclass(frozen=True)
class Asked:
    """How to score, as the options say it; `tasks` separated by commas."""

    split: Split
    official: bool = False
    bootstraps: int = 0
    tasks: str | None = None
    candidates: Candidates = "all"
    calibrate: bool = False
    diagnostics: bool = False

    def task_names(self) -> list[str] | None:
        """The tasks as a list; None where nothing was asked for."""
        if self.tasks is None:
            return None
        return [word.strip() for word in self.tasks.split(",") if word.strip()]


def score_weights(
    weights: Path,
    overrides: Sequence[str],
    asked: Asked,
    device: str,
    save: Path | None,
    console: Console,
) -> Report:
    """Scores weights on val; every process of a `torchrun` takes its share of the images."""
    from concat_cli.commands.shares import open_shares
    from concat_cli.core.evaluate.weights import evaluate_weights

    if asked.official:
        _check_official(asked.task_names())
    place, shares = open_shares(device, console)
    with ExitStack() as stack:
        truth = None
        if asked.official:  # the truth as it was scored, whatever format it is kept in
            own = stack.enter_context(TemporaryDirectory())
            truth = Path(shares["gather"](own)[0])  # one folder for all processes
            save = save or truth / "predictions"
        report = evaluate_weights(
            weights, overrides, split=asked.split, candidates=asked.candidates,
            tasks=asked.task_names(), bootstraps=asked.bootstraps, calibrate=asked.calibrate,
            diagnostics=asked.diagnostics,
            device=place, save_dir=save, truth_dir=truth, progress=console.progress, **shares,
        )  # fmt: skip
        if truth is not None and save is not None and shares["rank"] == 0:
            _say_official(
                report, save / "panoptic.json", truth / "panoptic.json", None, None, console
            )
    return report


def score_files(
    predictions: Path | None,
    truth: Path | None,
    predictions_dir: Path | None,
    truth_dir: Path | None,
    class_split: str | None,
    asked: Asked,
    console: Console,
) -> Report:
    """Scores COCO panoptic files."""
    if predictions is None or truth is None:
        raise UserError("--predictions and --truth belong together.", "Give both.")
    if asked.tasks is not None or asked.candidates != "all" or asked.calibrate or asked.diagnostics:
        raise UserError(
            "--tasks, --candidates, --calibrate and --diagnostics need weights; files hold "
            "panoptic segments, from which PQ and mIoU are counted.",
            "Leave them out, or score --weights.",
        )
    from concat_cli.core.evaluate.files import evaluate_files

    if asked.official:
        _check_official(None)
    class_split, unseen = _unseen_of(truth, class_split, console)
    report = evaluate_files(
        predictions, truth, predictions_dir, truth_dir, unseen=unseen, split=asked.split,
        bootstraps=asked.bootstraps, protocol={"class_split": class_split},
        progress=console.progress,
    )  # fmt: skip
    if asked.official:
        _say_official(report, predictions, truth, predictions_dir, truth_dir, console)
    return report


def _unseen_of(
    truth: Path, class_split: str | None, console: Console
) -> tuple[str | None, tuple[str, ...] | None]:
    """The split's name and unseen classes: as asked, else as the truth's data set says; else None.

    A `dataset.json` counts if it stands a folder above the truth and fits the truth's classes.
    """
    from concat_cli.core.data.class_split import load_class_split
    from concat_cli.core.evaluate.panoptic_json import category_names, read_truth

    if not truth.is_file():  # which is said when it is scored
        return class_split, None
    names = list(category_names(truth, read_truth(truth)).values())
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


def _check_official(tasks: Sequence[str] | None) -> None:
    """UserError before any work if panopticapi is not installed or has nothing to score."""
    from concat_cli.core.evaluate.official import INSTALL

    if tasks is not None and "panoptic" not in tasks:
        raise UserError("--official scores panoptic segments.", "Add panoptic to --tasks.")
    if find_spec("panopticapi") is None:
        raise UserError("--official needs panopticapi, which is not installed.", INSTALL)


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


def show_weights(console: Console, weights: Path, overrides: Sequence[str], asked: Asked) -> None:
    """What would be scored."""
    from concat_cli.core.checkpoint import Weights, read_meta
    from concat_cli.core.config_file import from_dict, override
    from concat_cli.core.data.dataset import read_dataset_info
    from concat_cli.core.evaluate.weights import able_tasks, check_segments, divided, tasks_of

    meta = read_meta(weights)
    own = from_dict(meta["config"])
    cfg = override(own, overrides)
    # the tensors play no part in it
    info, _ = divided(read_dataset_info(Path(cfg.data.root)), Weights({}, meta, weights, ""))
    able = able_tasks(meta["stage"], own)
    tasks = tasks_of(info, asked.task_names(), able)
    check_segments(able, tasks, asked.diagnostics, asked.official)
    seen, classes = len(info.vocabulary.seen_indices), len(info.vocabulary)
    console.table(
        ["what", "value"],
        [
            ("stage", meta["stage"]),
            ("data", f"{cfg.data.root}, part val"),
            ("classes", f"{seen} seen, {classes - seen} unseen ({info.class_split})"),
            ("tasks", ", ".join(tasks)),
        ],
    )
    console.dry_run()
