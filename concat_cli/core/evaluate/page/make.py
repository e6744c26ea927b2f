"""A report as one HTML file: plain data, and the page that shows it."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from itertools import pairwise
from pathlib import Path
from typing import Any

from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.page.curves import Training, training_of
from concat_cli.core.evaluate.page.findings import SIZES, Findings, Shown
from concat_cli.core.evaluate.page.outcomes import HALLUCINATED, IGNORED, MEANING, OUTCOMES
from concat_cli.core.evaluate.page.words import sentences
from concat_cli.core.evaluate.report import Report
from concat_cli.core.files import write_text
from concat_cli.core.infer.colours import usual
from concat_cli.core.vocabulary import Vocabulary

GROUPS = ("all", "seen", "unseen", "harmonic", "things", "stuff")
PAIRS = 200  # of confused classes
GRID = 16  # classes of the confusion matrix
Plain = dict[str, Any]


def write_page(report: Report, path: Path, title: str, run: Path | None = None) -> None:
    """Writes the page of a report that was made with `Scoring(look=True)`.

    run: the folder of a run, whose curves and previews are shown.
    """
    write_text(path, page_of(report, title, [] if run is None else training_of(run)))


def check_page(path: Path) -> None:
    """UserError for a name that no page should have, before anything is scored."""
    if path.suffix.lower() not in (".html", ".htm") or path.is_dir():
        raise UserError(f"{path} is not the name of a page.", "Give a file, as report.html.")


def run_of(weights: Path) -> Path | None:
    """The folder of the run that weights lie in, by what lies beside them; None for others."""
    beside = weights.absolute().parent
    return beside.parent if (beside / "metrics.jsonl").is_file() else None


def page_of(report: Report, title: str, training: Sequence[Training] = ()) -> str:
    """The page of a report."""
    return filled(page_data(report, title, training))


def filled(data: Plain) -> str:
    """The page of some data: it names no address and runs nothing but its own script."""
    parts = resources.files("concat_cli.core.evaluate.page")
    page, style, script = (
        (parts / f"page.{kind}").read_text(encoding="utf-8") for kind in ("html", "css", "js")
    )
    page = page.replace("/* style */", style).replace("/* script */", script)
    head, _, tail = page.partition("null/* data */")
    return head + _escaped(data) + tail


def page_data(report: Report, title: str, training: Sequence[Training] = ()) -> Plain:
    """What the page shows, as plain values; figures in 0-1."""
    found = report.findings
    tasks = report.protocol["tasks"]
    data: Plain = {
        "title": title,
        "facts": sentences(report),
        "images": report.images,
        "tasks": tasks,
        "groups": [one for name in GROUPS if (one := _group(report, name))],
        "classes": _classes(report, found),
        "training": [
            {
                "title": one.title,
                "curves": [asdict(curve) for curve in one.curves],
                "preview": _uri(one.preview),
                "previewName": one.preview_name,
            }
            for one in training
        ],
    }
    if found is not None and found.outcomes.any():
        data |= classes_of(found.vocabulary) | {
            "regions": "panoptic" not in tasks,
            "outcomes": _outcomes(found),
            "meaning": MEANING,
            "sizes": _sizes(found),
            "confusion": _confusion(found),
            "worst": [image_data(one) for one in found.worst],
            "best": [
                image_data(one) for one in found.best if one.number not in _numbers(found.worst)
            ],
        }
    return data


def classes_of(vocabulary: Vocabulary) -> Plain:
    """By index: the names of classes, whether they are things, and the colours that some usually
    have."""
    known = usual(vocabulary)
    colours = [known.get(name) for name in vocabulary.names]
    return {"names": vocabulary.names, "things": vocabulary.is_thing, "colours": colours}


def _escaped(data: Plain) -> str:
    """JSON that ends no script and starts no comment, whatever names are in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)  # in ASCII: no U+2028
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _group(report: Report, name: str) -> Plain | None:
    """The figures of a group of classes with their intervals; None where it has none."""
    figures: Plain = {}
    for task in (report.panoptic, report.semantic, report.instance):
        if (one := task.get(name)) is not None:
            own = asdict(one)
            figures["n"] = own.pop("n", figures.get("n"))
            figures |= {key: _rounded(own[key]) for key in own if key != "absent"}
    if not figures:
        return None
    drawn = report.intervals
    low_high = {} if drawn is None else {"pq": drawn.pq.get(name), "miou": drawn.miou.get(name)}
    ranges = {key: [_rounded(b) for b in one] for key, one in low_high.items() if one}
    return {"name": name, "ranges": ranges} | figures


def _classes(report: Report, found: Findings | None) -> list[Plain]:
    rows: list[Plain] = []
    for one in report.per_class:
        plain = {key: _rounded(value) for key, value in asdict(one).items()}
        if found is not None:
            place = found.vocabulary.index_of_name[one.name]
            plain |= dict(zip(OUTCOMES, found.outcomes[:, place].tolist(), strict=True))
        rows.append(plain)
    return rows


def _outcomes(found: Findings) -> list[Plain]:
    """How many segments came to what, seen and unseen apart."""
    vocabulary = found.vocabulary
    groups = {"seen": vocabulary.seen_indices, "unseen": vocabulary.unseen_indices}
    return [
        {"name": name, "predicted": kind >= HALLUCINATED, "count": int(found.outcomes[kind].sum())}
        | {group: int(found.outcomes[kind][list(own)].sum()) for group, own in groups.items()}
        for kind, name in enumerate(OUTCOMES)
        if kind != IGNORED
    ]


def _sizes(found: Findings) -> list[Plain]:
    """PQ over all segments of a size at once."""
    borders = [f"{100 * one:g}%" for one in SIZES]
    labels = [f"below {borders[0]}"]
    labels += [f"{a} to {b}" for a, b in pairwise(borders)]
    labels += [f"{borders[-1]} and more"]
    rows: list[Plain] = []
    for number, label in enumerate(labels):
        iou, tp, fp, fn = (float(found.sizes[row, number]) for row in range(4))
        whole = tp + fp / 2 + fn / 2
        row = {"label": label, "tp": int(tp), "fp": int(fp), "fn": int(fn)}
        rows.append(row | {"pq": _rounded(iou / whole) if whole else None})
    return rows


def _confusion(found: Findings) -> Plain:
    """Matched segments: pairs of unlike classes, most frequent first, and a matrix of the classes
    that are confused most."""
    wrong = {pair: n for pair, n in found.confusion.items() if pair[0] != pair[1]}
    pairs = sorted(wrong.items(), key=lambda one: (-one[1], one[0]))
    part: dict[int, int] = {}
    of_class: dict[int, int] = {}
    for (true, named), count in found.confusion.items():
        of_class[true] = of_class.get(true, 0) + count
        for one in (true, named) if true != named else ():
            part[one] = part.get(one, 0) + count
    chosen = sorted(sorted(part, key=lambda c: (-part[c], c))[:GRID])
    return {
        "matched": sum(found.confusion.values()),
        "wrong": sum(wrong.values()),
        "pairs": [[*pair, count, of_class[pair[0]]] for pair, count in pairs[:PAIRS]],
        "left": max(0, len(pairs) - PAIRS),
        "grid": chosen,
        "cells": [[found.confusion[one, other] for other in chosen] for one in chosen],
    }


def image_data(one: Shown) -> Plain:
    """An image of the page, its segments in the order of their ids."""
    iou = one.outcome.iou
    best = iou.argmax(0) if len(iou) else None
    picture = one.picture
    return {
        "name": one.name,
        "score": _rounded(one.score),
        "photo": _uri(picture.photo),
        "truth": {
            "size": picture.size,
            "runs": picture.truth,
            "segments": [
                [int(label), _word(kind)]
                for label, kind in zip(one.image.labels, one.outcome.true, strict=True)
            ],
        },
        "found": {
            "size": picture.size,
            "runs": picture.found,
            "segments": [
                [
                    int(label),
                    _word(kind),
                    _rounded(one.scores[i]) if one.scores else None,
                    None if best is None else _rounded(float(iou[best[i], i])),
                ]
                for i, (label, kind) in enumerate(
                    zip(one.image.named, one.outcome.found, strict=True)
                )
            ],
        },
    }


def _word(kind: int) -> str:
    return OUTCOMES[kind] if kind >= 0 else "crowd"


def _numbers(kept: Sequence[Shown]) -> set[int]:
    return {one.number for one in kept}


def _rounded(value: Any) -> Any:
    """Six digits behind the point, so that what is shown is rounded once; None for no number."""
    if not isinstance(value, float):
        return value
    return round(value, 6) if math.isfinite(value) else None


def _uri(data: bytes | None) -> str | None:
    return None if data is None else f"data:image/webp;base64,{base64.b64encode(data).decode()}"
