"""The official panopticapi as a second opinion on our own panoptic quality."""

from __future__ import annotations

import contextlib
import importlib
import io
from pathlib import Path
from typing import Any

from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.report import Report

INSTALL = "pip install git+https://github.com/cocodataset/panopticapi.git"
TOLERANCE = 1e-9


def official_scores(
    predictions: Path,
    truth: Path,
    predictions_dir: Path | None = None,
    truth_dir: Path | None = None,
) -> dict[str, Any]:
    """What the installed panopticapi's `pq_compute` returns for the files: All, Things, Stuff
    (pq, sq, rq, n in 0-1) and per_class by category id. UserError where it is not installed."""
    try:
        evaluation = importlib.import_module("panopticapi.evaluation")
    except ImportError as error:
        raise UserError("panopticapi is not installed.", f"Install it: {INSTALL}") from error
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # it prints its own table
            return evaluation.pq_compute(
                str(truth),
                str(predictions),
                gt_folder=str(truth_dir or truth.with_suffix("")),
                pred_folder=str(predictions_dir or predictions.with_suffix("")),
            )
    except ZeroDivisionError as error:  # of an empty mean
        raise UserError(
            "panopticapi cannot score files without any thing or without any stuff segment.",
            "Leave --official out.",
        ) from error


def compare_with_official(report: Report, official: dict[str, Any]) -> float:
    """The largest difference of any figure; UserError where it exceeds 1e-9."""
    ours = report.to_json()
    pairs: list[tuple[str, float, float]] = []
    for group, name in (("all", "All"), ("things", "Things"), ("stuff", "Stuff")):
        mine = ours["panoptic"][group]
        if mine is not None:
            pairs += [(f"{name} {k}", mine[k], official[name][k]) for k in ("pq", "sq", "rq", "n")]
    for row in ours["per_class"]:
        theirs = official["per_class"].get(row["id"])
        if theirs is not None:
            pairs += [(f"{row['name']} {k}", row[k], theirs[k]) for k in ("pq", "sq", "rq")]
    name, mine, theirs = max(pairs, key=lambda pair: abs(pair[1] - pair[2]))
    difference = abs(mine - theirs)
    if difference > TOLERANCE:
        raise UserError(
            f"panopticapi disagrees: {name} is {theirs!r} there and {mine!r} here.",
            "Please report it with the two JSON files; a truth JSON whose `area` is not the number "
            "of pixels in its PNG is a known cause.",
        )
    return difference
