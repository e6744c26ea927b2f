"""A report of `concat evaluate` as tables: figures in percent, then what they mean."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from concat_cli.console import Cell, Console, duration

if TYPE_CHECKING:
    from concat_cli.core.evaluate.report import ClassReport, Report

Plain = dict[str, Any]
MOST_NAMES = 8
FIGURES = {  # task -> column -> key
    "panoptic": {"PQ": "pq", "SQ": "sq", "RQ": "rq"},
    "semantic": {"mIoU": "miou", "fwIoU": "fwiou", "mACC": "macc", "pACC": "pacc"},
    "instance": {"AP": "ap", "AP50": "ap50", "AR": "ar"},
}


def show_report(console: Console, report: Report) -> None:
    """The groups in percent, and the classes that are in no mean."""
    plain = report.to_json()
    tasks = plain["protocol"]["tasks"]
    groups = list(dict.fromkeys(name for task in tasks for name in plain[task]))
    rows = [[name, *_row(plain, tasks, name)] for name in groups]
    columns = [column for task in tasks for column in (*FIGURES[task], "n")]
    console.table(
        ["classes", *columns], [row for row in rows if any(c is not None for c in row[1:])]
    )
    if plain["intervals"] is not None:
        _show_intervals(console, plain["intervals"])
    if plain["calibration"] is not None:
        _show_calibration(console, plain["calibration"])
    if plain["diagnostics"] is not None:
        _show_diagnostics(console, plain["diagnostics"])
    _show_protocol(console, plain["protocol"])
    for task, names in plain["absent"].items():
        if names:
            console.result(f"{_ABSENT[task]}, so in no mean: {len(names)} ({shorten(names)})")
    console.result(f"{report.images} images in {duration(report.seconds['total'])}")


def show_classes(console: Console, report: Report) -> None:
    """A row for each reported class in percent, the worst first by the first task's figure, and
    those that have none last."""
    tasks = report.protocol["tasks"]
    shown = [(c, key) for task in tasks for c, key in _CLASS_FIGURES[task].items()]

    def worst(row: ClassReport) -> tuple[bool, float]:
        value = getattr(row, shown[0][1])
        return value is None, value or 0.0

    rows: list[list[Cell]] = [
        [row.name, kind_of(row.thing, row.seen), *(_of_class(row, key) for _, key in shown)]
        for row in sorted(report.per_class, key=worst)
    ]
    console.table(["class", "kind", *(column for column, _ in shown)], rows)


_CLASS_FIGURES = {  # task -> column -> field of `ClassReport`
    "panoptic": {"PQ": "pq", "SQ": "sq", "RQ": "rq", "TP": "tp", "FP": "fp", "FN": "fn"},
    "semantic": {"IoU": "iou"},
    "instance": {"AP": "ap", "AP50": "ap50", "AR": "ar"},
}


def kind_of(thing: bool, seen: bool | None) -> str:
    """`thing, unseen`; without the latter where classes are not divided."""
    group = "" if seen is None else f", {'seen' if seen else 'unseen'}"
    return f"{'thing' if thing else 'stuff'}{group}"


def _of_class(row: ClassReport, key: str) -> Cell:
    value = getattr(row, key)
    return value if isinstance(value, int) else percent(value)


_ABSENT = {
    "panoptic": "in neither truth nor prediction",
    "semantic": "not in the semantic truth",
    "instance": "things without a true instance",
}


def _row(plain: Plain, tasks: Sequence[str], name: str) -> list[Cell]:
    row: list[Cell] = []
    for task in tasks:
        group: Plain = plain[task].get(name) or {}
        row += [percent(group.get(key)) for key in FIGURES[task].values()]
        row.append(group.get("n"))
    return row


def _show_intervals(console: Console, intervals: Plain) -> None:
    rows: list[list[Cell]] = [
        [group, _range(intervals["pq"][group]), _range(intervals["miou"][group])]
        for group in intervals["pq"]
        if intervals["pq"][group] or intervals["miou"][group]
    ]
    level, repeats = 100 * intervals["level"], intervals["repeats"]
    console.result(f"{level:.0f}% intervals over the images, drawn again {repeats} times:")
    console.table(*filled(["classes", "PQ", "mIoU"], rows))


def filled(
    columns: Sequence[str], rows: Sequence[Sequence[Cell]]
) -> tuple[list[str], list[list[Cell]]]:
    """A table without the columns that hold nothing, such as those of a task that is not scored."""
    kept = [i for i in range(len(columns)) if any(row[i] not in (None, "") for row in rows)]
    return [columns[i] for i in kept], [[row[i] for i in kept] for row in rows]


def _range(borders: Sequence[float] | None) -> str | None:
    return None if borders is None else f"{100 * borders[0]:.1f} to {100 * borders[1]:.1f}"


def _show_calibration(console: Console, found: Plain) -> None:
    keys = ("seen_pq", "unseen_pq", "hpq", "seen_miou", "unseen_miou", "hiou")
    console.result("offsets on the seen logits, on the same outputs of the model:")
    columns = ["offset", "seen PQ", "unseen PQ", "hPQ", "seen mIoU", "unseen mIoU", "hIoU", "note"]
    marks = {
        "as above": found["plain"],
        "chosen on dev": found["dev"],
        "oracle hPQ": found["oracle_pq"],
        "oracle hIoU": found["oracle_miou"],
    }
    rows: list[list[Cell]] = [
        [
            f"{row['offset']:.3g}",
            *(percent(row[key]) for key in keys),
            ", ".join(name for name, offset in marks.items() if offset == row["offset"]),
        ]
        for row in found["rows"]
    ]
    console.table(*filled(columns, rows))
    console.result("oracle: chosen on the scored images themselves, so no result")
    if found["dev"] is None:
        console.result("no offset was chosen on dev; finetune.calibrate=true chooses one")


def _show_diagnostics(console: Console, found: Plain) -> None:
    keys = ("mask_recall", "matched_accuracy")
    rows = [
        [group, *(percent(found[f"{key}{suffix}"]) for key in keys)]
        for group, suffix in (("all", ""), ("seen", "_seen"), ("unseen", "_unseen"))
    ]
    console.table(["true segments", "found by a mask", "of these, named right"], rows)


def _show_protocol(console: Console, protocol: Plain) -> None:
    shown = ("setting", "mode", "split", "class_split", "stage")
    facts = [f"{key} {protocol[key]}" for key in shown if protocol.get(key)]
    if protocol.get("seen_offset"):
        facts.append(f"seen_offset {protocol['seen_offset']:.3g}")
    console.result(f"protocol: {', '.join(facts)}; {protocol['candidates']} candidates")
    if protocol["setting"] == "restricted":
        console.result(
            "restricted: only the reported classes compete and all other truth is void, the easier "
            "protocol; not to be compared with generalised figures"
        )
    if protocol.get("unseen_with_labels"):
        console.result(
            f"not zero-shot: labels of {protocol['unseen_with_labels']} of the unseen classes were "
            "trained on"
        )
    overlap = protocol.get("overlap")
    if overlap is not None:
        names = f" ({shorten(overlap['names'])})" if overlap["names"] else ""
        console.result(
            f"another list of classes than the weights': labels of {overlap['count']} of its "
            f"{overlap['of']} were trained on, by name{names}"
        )
    if protocol.get("filtering"):
        console.result(f"training data, {filtered(protocol['filtering'])}")


def filtered(found: Mapping[str, Any]) -> str:
    """What the preparation took away from training and dev for the sake of unseen classes."""
    parts = [f"unseen pixels: {found.get('unseen_pixels', 'nothing said')}"]
    for what in ("images", "segments", "pixels"):
        listed = found.get(f"{what}_listed", 0)
        for how in ("dropped", "void"):
            number = found.get(f"{what}_{how}", 0)
            share = f" ({100 * number / listed:.1f}%)" if listed else ""
            if number:
                parts.append(f"{number:,} {what} {how}{share}")
    return ", ".join(parts)


def percent(value: float | None) -> float | None:
    """A figure in 0-1 as a cell."""
    return None if value is None else 100 * value


def shorten(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    rest = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return ", ".join(names[:MOST_NAMES]) + rest
