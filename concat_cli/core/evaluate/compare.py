"""Several runs on the same images, side by side: how good with intervals, and at what cost.

What cannot be compared is refused before anything is scored; in what else they differ is told.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from concat_cli.core.data.dataset import DatasetInfo, PanopticDataset, read_dataset_info
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.cost import Cost, measure_cost
from concat_cli.core.evaluate.differences import Difference, Figures, difference, figures
from concat_cli.core.evaluate.report import Report
from concat_cli.core.evaluate.scores import Scoring
from concat_cli.core.evaluate.weights import PART, Subject, evaluate_weights, open_subject
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.runs import RUNS, find_weights, is_published

_KEYS = re.compile(r"[:,](?=\w+\.\w+=)")  # stands before each override
_SHOWN = 4  # class names that a message lists


@dataclass(frozen=True)
class Entry:
    """A run of a comparison: its name in the table, its weights, and the overrides on top of the
    configuration that they carry."""

    label: str
    weights: Path
    overrides: tuple[str, ...] = ()


@dataclass(frozen=True)
class Row:
    """What was found of a run.

    pq is None throughout where the weights tell no segments apart. mode: what was known of the
    names of unseen classes before the test.
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


def parse_entry(text: str, root: Path = RUNS) -> Entry:
    """`[LABEL=]RUN[:KEY=VALUE,...]`; RUN is a name below `root`, a path to weights or to the folder
    of a run or stage, or published weights. UserError where there are no weights."""
    run, *overrides = _KEYS.split(text)
    label = text
    if "=" in run and not Path(run).exists():
        label, _, run = run.partition("=")
        label = label.strip()
    as_path = Path(run)
    is_path = as_path.is_file() or as_path.suffix == ".safetensors" or len(as_path.parts) > 1
    is_path = is_path or (is_published(as_path) and not (root / run).exists())
    if not is_path and (":" in run or ":" in label.removesuffix(text)):
        raise UserError(
            f"'{text}' does not read as a run with overrides.",
            "Write RUN, or RUN:section.key=value, more of them after commas, LABEL= before it all.",
        )
    found = find_weights(None, as_path) if is_path else find_weights(run, root=root)
    return Entry(label, found.path, tuple(overrides))


def compare_runs(
    entries: Sequence[Entry],
    *,
    device: str = "auto",
    bootstraps: int = 1000,
    limit: int | None = None,
    force: bool = False,
    progress: Progress = SILENT,
) -> Comparison:
    """Scores every run on val, measures what it costs, and sets it against the first one.

    UserError, before anything is scored, where the runs would not be scored on the same images with
    the same seen and unseen classes. `limit`: only the first so many images. `force`: allow names
    with words that the built-in CLIP never saw.
    """
    subjects = _comparable(entries)
    scoring = Scoring(bootstraps=bootstraps, counts=True, limit=limit, force=force)
    reports: list[Report] = []
    rows: list[Row] = []
    for entry in entries:
        progress.say(f"{entry.label}: scoring {entry.weights}")
        of = entry.weights, entry.overrides
        reports.append(evaluate_weights(*of, scoring, device=device, progress=progress))
        progress.say(f"{entry.label}: measuring speed and memory")
        rows.append(_row(entry, reports[-1], measure_cost(*of, device)))
    info = subjects[0].info
    return Comparison(
        data=info.name,
        class_split=info.class_split,
        seen=len(info.vocabulary.seen_indices),
        unseen=len(info.vocabulary.unseen_indices),
        images=reports[0].images,
        repeats=bootstraps,
        rows=tuple(rows),
        differences=tuple(
            difference(row.label, report, rows[0].label, reports[0])
            for row, report in zip(rows[1:], reports[1:], strict=True)
        ),
        notes=tuple(_notes(rows, subjects)),
    )


def _row(entry: Entry, report: Report, cost: Cost) -> Row:
    pq, miou = figures(report)
    return Row(
        label=entry.label,
        weights=str(entry.weights),
        overrides=entry.overrides,
        stage=report.protocol["stage"],
        mode=report.protocol["mode"],
        pq=pq,
        miou=miou,
        cost=cost,
    )


def _comparable(entries: Sequence[Entry]) -> list[Subject]:
    """UserError unless all would be scored on the same images, classes and division of these."""
    labels = [entry.label for entry in entries]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"Two runs are called {label}.", f"Name one of them: NAME={label}.")
    found = [open_subject(entry.weights, entry.overrides, tensors=False) for entry in entries]
    for label, other in zip(labels[1:], found[1:], strict=True):
        what = _unlike(found[0].info, other.info)
        if what:
            raise UserError(
                f"{labels[0]} and {label} would be scored on different things: {what}.",
                f"Give both the same data set, like RUN:data.root={found[0].info.root}.",
            )
    return found


def _unlike(one: DatasetInfo, two: DatasetInfo) -> str:
    """What keeps two data sets from being scored alike; empty where nothing does."""
    names, others = one.vocabulary.names, two.vocabulary.names
    if names != others:
        return f"{len(names)} classes of {one.name}, and {len(others)} of {two.name}"
    if one.vocabulary.is_seen != two.vocabulary.is_seen:
        pairs = zip(names, one.vocabulary.is_seen, two.vocabulary.is_seen, strict=True)
        moved = [name for name, here, there in pairs if here != there]
        more = ", ..." if len(moved) > _SHOWN else ""
        return (
            f"the class split {one.class_split}, and {two.class_split}; seen in one of them: "
            f"{', '.join(moved[:_SHOWN])}{more}"
        )
    if one.root != two.root and _digest(one, PART) != _digest(two, PART):
        return f"the images of {one.root}, and those of {two.root}"
    return ""


def _digest(info: DatasetInfo, part: str) -> str:
    return PanopticDataset(info.part(part), info.vocabulary).digest()


def _notes(rows: Sequence[Row], subjects: Sequence[Subject]) -> list[str]:
    """In what the runs differ apart from the method, a line for each."""
    known = {"transductive": "known in training", "inductive": "unknown before the test"}
    clips = [_clip_of(one) for one in subjects]
    trained = [_trained_on(one) for one in subjects]
    facts = {  # what tells runs apart, and how it is shown
        "trained on different scenes or labels": trained,
        "names of unseen classes": [(r.mode, known.get(r.mode or "", "not told")) for r in rows],
        "CLIP": clips,
        "short side at test": [(one.cfg.infer.size, one.cfg.infer.size) for one in subjects],
        "offset on seen classes": [
            (f"{one.cfg.infer.seen_offset:.3g}", f"{one.cfg.infer.seen_offset:.3g}")
            for one in subjects
        ],
    }
    return [
        f"{what}: " + "; ".join(f"{r.label}: {s}" for r, (_, s) in zip(rows, pairs, strict=True))
        for what, pairs in facts.items()
        if len({key for key, _ in pairs}) > 1
    ]


def _clip_of(one: Subject) -> tuple[str, str]:
    """What tells the CLIP from others, and how it is shown; that of a pair is by name alone."""
    trained, asked = one.weights.meta["clip"], one.cfg.clip
    shown = f"{trained['model']} {trained['pretrained']}".strip()
    if not trained["sha256"]:
        shown = f"{asked.model} {asked.pretrained}".strip()
    return trained["sha256"] or shown, shown


def _trained_on(one: Subject) -> tuple[str, str]:
    """The training part that the weights' configuration names, as it is there now: what tells it
    from others, and how it is shown."""
    if not one.own.data.root:  # published weights
        return (told := one.weights.meta.get("data", {}).get("name", "not told")), told
    root = Path(one.own.data.root)
    if not (root / "dataset.json").is_file():
        return str(root), f"{root} (not here any more)"
    info = read_dataset_info(root)
    pixels = info.protocol.get("unseen_pixels", "drop")
    return _digest(info, "train"), f"{root} (unseen pixels: {pixels})"
