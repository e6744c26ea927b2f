"""A second opinion on panoptic files: that of panopticapi, where it is installed."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import tempfile
from collections.abc import Generator, Mapping
from importlib.util import find_spec
from pathlib import Path

from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.panoptic_json import PanopticFiles
from concat_cli.core.evaluate.report import Report

# It asks for numpy < 2 and runs with 2 as well; all that it imports is here already.
INSTALL = "pip install --no-deps 'panopticapi-lite>=0.2'"
TOLERANCE = 1e-9  # between panopticapi and us


def need_official() -> None:
    """UserError with the command that installs panopticapi, where it is not there."""
    if find_spec("panopticapi") is None:
        raise UserError("--official needs panopticapi, which is not installed.", INSTALL)


def ask_official(
    report: Report,
    predictions: PanopticFiles,
    truth: PanopticFiles,
    of_truth: Mapping[str, str] | None = None,
) -> str:
    """What the installed panopticapi says of these files and how far it is from the report, in one
    line; UserError where any figure differs by more than 1e-9."""
    evaluation = importlib.import_module("panopticapi.evaluation")
    try:
        with (
            _as_numbered(predictions, truth, of_truth) as path,
            contextlib.redirect_stdout(io.StringIO()),  # it prints its own table
        ):
            official = evaluation.pq_compute(
                str(truth.json),
                str(path),
                gt_folder=str(truth.pngs),
                pred_folder=str(predictions.pngs),
            )
    except ZeroDivisionError as error:  # of an empty mean
        raise UserError(
            "panopticapi cannot score files without any thing or without any stuff segment.",
            "Leave --official out.",
        ) from error
    except Exception as error:  # it raises the base class, and others for what it does not expect
        raise UserError(
            f"panopticapi cannot score these files: {type(error).__name__}: {error!s:.300}",
            "Leave --official out, or write the files as it expects them.",
        ) from error
    ours = report.to_json()
    pairs: list[tuple[str, float, float]] = []
    for group in ("all", "things", "stuff"):
        mine, theirs = ours["panoptic"][group], official[group.capitalize()]
        if mine is not None:
            pairs += [(f"{group} {k}", mine[k], theirs[k]) for k in ("pq", "sq", "rq", "n")]
    for row in ours["per_class"]:
        theirs = official["per_class"].get(row["id"])
        if theirs is not None and row["pq"] is not None:
            pairs += [(f"{row['name']} {k}", row[k], theirs[k]) for k in ("pq", "sq", "rq")]
    name, mine, theirs = max(pairs, key=lambda pair: abs(pair[1] - pair[2]))
    if abs(mine - theirs) > TOLERANCE:
        raise UserError(
            f"panopticapi disagrees: {name} is {theirs!r} there and {mine!r} here.",
            "Please report it with the two JSON files; a truth JSON whose `area` is not the number "
            "of pixels in its PNG is a known cause, which --as-panopticapi counts as it does.",
        )
    whole, difference = 100 * official["All"]["pq"], abs(mine - theirs)
    return f"panopticapi: PQ {whole:.4f}, largest difference {difference:.1e}"


@contextlib.contextmanager
def _as_numbered(
    predictions: PanopticFiles, truth: PanopticFiles, of_truth: Mapping[str, str] | None
) -> Generator[Path, None, None]:
    """The predictions' JSON; where they were matched by name, a copy with the truth's ids."""
    if of_truth is None:
        yield predictions.json
        return
    told, said = (json.loads(one.json.read_bytes()) for one in (truth, predictions))
    ids = {of_truth[str(one["image_id"])]: one["image_id"] for one in told["annotations"]}
    rows = [row for row in said["annotations"] if str(row["image_id"]) in ids]
    for row in rows:
        row["image_id"] = ids[str(row["image_id"])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "predictions.json"
        path.write_text(json.dumps(said | {"annotations": rows}), encoding="utf-8")
        yield path
