"""The files of several methods on the same truth, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.differences import Difference, Figures, difference, figures
from concat_cli.core.evaluate.files import PLAIN_RULES, PanopticFiles, Rules, evaluate_files
from concat_cli.core.evaluate.report import Report
from concat_cli.core.evaluate.scores import Scoring
from concat_cli.core.evaluate.semantic_files import evaluate_maps
from concat_cli.core.progress import SILENT, Progress


@dataclass(frozen=True)
class Against:
    """What predictions are scored against, and how. classes: what the values of semantic maps mean,
    whose folders then stand in the place of the JSON files."""

    truth: PanopticFiles
    classes: Path | None = None
    class_split: str | None = None
    rules: Rules = PLAIN_RULES


@dataclass(frozen=True)
class FileRow:
    """The predictions of a method, and how good they are."""

    label: str
    predictions: str
    pq: Figures
    miou: Figures


@dataclass(frozen=True)
class FileComparison:
    """The table, and what has to be known to read it; class_split: None where nobody says which
    classes are unseen; `repeats`: how often the images were drawn again for the intervals."""

    truth: str
    class_split: str | None
    classes: int
    images: int
    repeats: int
    rows: tuple[FileRow, ...]
    differences: tuple[Difference, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def score_files(
    found: PanopticFiles, against: Against, scoring: Scoring, progress: Progress = SILENT
) -> Report:
    """Scores a panoptic JSON, or a folder of semantic maps where `classes` says what they hold."""
    truth, split = against.truth, against.class_split
    if against.classes is not None:
        return evaluate_maps(
            found.json, truth.json, against.classes, scoring, class_split=split, progress=progress
        )
    if found.json.is_dir():
        raise UserError(
            f"{found.json} is a folder, not a COCO panoptic JSON.",
            "Semantic PNGs are scored with --classes FILE, which says what their values mean.",
        )
    rules = against.rules
    return evaluate_files(found, truth, scoring, class_split=split, rules=rules, progress=progress)


def look_again(
    entries: Sequence[tuple[str, PanopticFiles]],
    against: Against,
    pictures: Path | None,
    label: str,
    names: frozenset[str],
) -> Report:
    """The report of one of the entries on the images of these names, with all of their pictures."""
    scoring = Scoring(look=True, images=names, pictures=pictures)
    return score_files(dict(entries)[label], against, scoring)


def parse_file(text: str) -> tuple[str, PanopticFiles]:
    """`[LABEL=]FILE.json[:PNGS]`, or in place of the file a folder that `--save` wrote, or one of
    semantic maps."""
    label, rest = text, text
    if "=" in text and not Path(text).exists():
        label, _, rest = text.partition("=")
    path, colon, folder = rest.partition(".json:")
    if colon:
        return label.strip(), PanopticFiles(Path(f"{path}.json"), Path(folder))
    saved = Path(rest) / "panoptic.json"
    return label.strip(), PanopticFiles(saved if saved.is_file() else Path(rest))


def is_file(text: str) -> bool:
    """Whether an argument means files, not a run."""
    return parse_file(text)[1].json.suffix == ".json"


def compare_files(
    entries: Sequence[tuple[str, PanopticFiles]],
    against: Against,
    bootstraps: int = 1000,
    progress: Progress = SILENT,
) -> FileComparison:
    """Scores every method's files on the same truth, and sets it against the first one."""
    labels = [label for label, _ in entries]
    if twice := [label for label in labels if labels.count(label) > 1]:
        raise UserError(f"Two files are called {twice[0]}.", f"Name one of them: NAME={twice[0]}.")
    scoring = Scoring(bootstraps=bootstraps, counts=True)
    reports: list[Report] = []
    for label, files in entries:
        progress.say(f"{label}: scoring {files.json}")
        reports.append(score_files(files, against, scoring, progress))
    first = reports[0]
    return FileComparison(
        truth=first.protocol["truth"],
        class_split=first.protocol["class_split"],
        classes=len(first.per_class),
        images=first.images,
        repeats=bootstraps,
        rows=tuple(
            FileRow(label, str(files.json), *figures(report))
            for (label, files), report in zip(entries, reports, strict=True)
        ),
        differences=tuple(
            difference(label, report, labels[0], first)
            for label, report in zip(labels[1:], reports[1:], strict=True)
        ),
    )
