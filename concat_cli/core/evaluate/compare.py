"""Several runs on the same images, side by side: how good with intervals, and at what cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from concat_cli.core.evaluate.bootstrap import mean_iou, mean_pq
from concat_cli.core.evaluate.comparable import Entry, check_comparable, differing_facts
from concat_cli.core.evaluate.cost import Cost, measure_cost
from concat_cli.core.evaluate.counts import SparseCounts
from concat_cli.core.evaluate.differences import (
    GROUPS,
    ClassSplit,
    Interval,
    Mean,
    paired_differences,
)
from concat_cli.core.evaluate.report import Report
from concat_cli.core.evaluate.weights import evaluate_weights
from concat_cli.core.progress import SILENT, Progress

Figures = dict[str, Interval | None]  # in 0-1 by group: seen, unseen, harmonic


@dataclass(frozen=True)
class Row:
    """What was found of a run.

    pq is None throughout where the weights tell no segments apart (`tasks_of_model`). mode: what
    was known of the names of unseen classes before the test.
    """

    label: str
    weights: str
    overrides: tuple[str, ...]
    stage: str
    mode: str | None
    pq: Figures
    miou: Figures
    cost: Cost


@dataclass(frozen=True)
class Difference:
    """A run minus the first one, the same images drawn again for both."""

    label: str
    minus: str
    pq: Figures
    miou: Figures


@dataclass(frozen=True)
class Comparison:
    """The table, and what has to be known to read it; `seen` and `unseen` are numbers of classes,
    `repeats` how often the images were drawn again for the intervals."""

    data: str
    class_split: str
    seen: int
    unseen: int
    images: int
    repeats: int
    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    notes: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def compare_runs(
    entries: Sequence[Entry],
    *,
    device: str = "auto",
    bootstraps: int = 1000,
    limit: int | None = None,
    progress: Progress = SILENT,
) -> Comparison:
    """Scores every run on val, measures what it costs, and sets it against the first one.

    UserError, before anything is scored, where the runs would not be scored on the same images with
    the same seen and unseen classes. `limit`: only the first so many images.
    """
    checked = check_comparable(entries)
    reports: list[Report] = []
    rows: list[Row] = []
    for entry in entries:
        progress.say(f"{entry.label}: scoring {entry.weights}")
        report = evaluate_weights(
            entry.weights, entry.overrides, bootstraps=bootstraps, with_counts=True, limit=limit,
            device=device, progress=progress,
        )  # fmt: skip
        progress.say(f"{entry.label}: measuring speed and memory")
        rows.append(_row(entry, report, measure_cost(entry.weights, entry.overrides, device)))
        reports.append(report)
    info = checked[0].info
    split = info.vocabulary.seen_indices, info.vocabulary.unseen_indices
    return Comparison(
        data=info.name,
        class_split=info.class_split,
        seen=len(split[0]),
        unseen=len(split[1]),
        images=reports[0].images,
        repeats=bootstraps,
        rows=tuple(rows),
        differences=tuple(
            _difference(rows[i].label, rows[0].label, reports[i], reports[0], split, bootstraps)
            for i in range(1, len(rows))
        ),
        notes=tuple(differing_facts(checked, [row.mode for row in rows])),
    )


def _row(entry: Entry, report: Report, cost: Cost) -> Row:
    intervals = report.intervals
    assert intervals is not None
    pq = {name: getattr(report.panoptic[name], "pq", None) for name in GROUPS}
    miou = {name: getattr(report.semantic[name], "miou", None) for name in GROUPS}
    return Row(
        label=entry.label,
        weights=str(entry.weights),
        overrides=entry.overrides,
        stage=report.protocol["stage"],
        mode=report.protocol["mode"],
        pq=_with_borders(pq, intervals.pq),
        miou=_with_borders(miou, intervals.miou),
        cost=cost,
    )


def _with_borders(
    values: dict[str, float | None], borders: dict[str, tuple[float, float] | None]
) -> Figures:
    found: Figures = {}
    for name, value in values.items():
        around = borders[name]
        found[name] = None if value is None or around is None else Interval(value, *around)
    return found


def _difference(
    label: str, minus: str, ours: Report, theirs: Report, split: ClassSplit, repeats: int
) -> Difference:
    a, b = ours.counts, theirs.counts
    assert a is not None and b is not None

    def of(one: SparseCounts | None, other: SparseCounts | None, mean: Mean) -> Figures:
        if one is None or other is None:
            return dict.fromkeys(GROUPS)
        counts = [one.dense(a.images)], [other.dense(b.images)]
        return paired_differences(*counts, mean, [split], repeats)

    return Difference(
        label,
        minus,
        of(a.panoptic, b.panoptic, mean_pq),
        of(a.semantic, b.semantic, mean_iou),
    )
