"""What an evaluation found, and its JSON form (`report.schema.json`)."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from typing import Any, Literal, TypeVar

from concat_cli.core.evaluate.bootstrap import Intervals
from concat_cli.core.evaluate.counts import ImageCounts
from concat_cli.core.evaluate.instance import InstanceQuality, InstanceResult, InstanceScore
from concat_cli.core.evaluate.offsets import Calibration
from concat_cli.core.evaluate.panoptic import PanopticScore, Quality
from concat_cli.core.evaluate.semantic import SemanticQuality, SemanticScore
from concat_cli.core.method import TASKS
from concat_cli.core.vocabulary import Vocabulary

Split = Literal["all", "seen", "unseen"]
_DIVIDED = ("seen", "unseen", "harmonic")  # groups that need to know which classes are seen
G = TypeVar("G")


def harmonic(a: float, b: float) -> float:
    """2ab / (a + b), the harmonic mean of two figures in 0-1; 0 if both are 0."""
    return 2 * a * b / (a + b) if a + b else 0.0


@dataclass(frozen=True)
class HarmonicQuality:
    """Harmonic means of the seen and unseen PQ, SQ, RQ, each on its own (hPQ is not hSQ * hRQ)."""

    pq: float
    sq: float
    rq: float

    @staticmethod
    def of(seen: Quality | None, unseen: Quality | None) -> HarmonicQuality | None:
        """None where one of the groups is missing."""
        if seen is None or unseen is None:
            return None
        return HarmonicQuality(
            harmonic(seen.pq, unseen.pq), harmonic(seen.sq, unseen.sq), harmonic(seen.rq, unseen.rq)
        )


@dataclass(frozen=True)
class HarmonicIou:
    """Harmonic mean of the seen and unseen mean IoU."""

    miou: float


@dataclass(frozen=True)
class HarmonicAp:
    """Harmonic means of the seen and unseen AP and AP50, each on its own."""

    ap: float
    ap50: float


@dataclass(frozen=True)
class ClassReport:
    """One class. PQ, SQ, RQ are 0 where TP + FP + FN = 0 (then it is in no mean); `iou` is the
    semantic IoU, None where the truth never holds the class; ap, ap50, ar are None for stuff, where
    the truth never holds the class, and where instances were not scored; `seen` is None where
    classes are not divided."""

    name: str
    id: int
    seen: bool | None
    thing: bool
    pq: float
    sq: float
    rq: float
    tp: int
    fp: int
    fn: int
    iou: float | None
    ap: float | None = None
    ap50: float | None = None
    ar: float | None = None

    @property
    def occurs(self) -> bool:
        """False where the class is left out of the panoptic means."""
        return self.tp + self.fp + self.fn > 0


@dataclass(frozen=True)
class Report:
    """All figures of one evaluation, in 0-1.

    panoptic: by group (all, seen, unseen, things, stuff, harmonic); semantic and instance: all,
    seen, unseen, harmonic; None = not reported, or no class of the group occurs. `absent`: for each
    task that was scored the names of reported classes that are in none of its means. `counts` is no
    part of the JSON.
    """

    protocol: dict[str, Any]
    panoptic: dict[str, Quality | HarmonicQuality | None]
    semantic: dict[str, SemanticQuality | HarmonicIou | None]
    per_class: tuple[ClassReport, ...]
    images: int
    seconds: dict[str, float]
    instance: dict[str, InstanceQuality | HarmonicAp | None]
    absent: dict[str, tuple[str, ...]]
    intervals: Intervals | None = None
    calibration: Calibration | None = None
    diagnostics: dict[str, float | None] = field(default_factory=dict)
    counts: ImageCounts | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values that follow `report.schema.json`."""
        plain = asdict(replace(self, counts=None))
        del plain["counts"]
        return _lists(plain | {"diagnostics": plain["diagnostics"] or None})


def _lists(value: Any) -> Any:
    """The same with lists for tuples, as JSON has them."""
    if isinstance(value, dict):
        return {name: _lists(inner) for name, inner in value.items()}
    return [_lists(inner) for inner in value] if isinstance(value, (list, tuple)) else value


def make_report(
    vocabulary: Vocabulary,
    panoptic: PanopticScore,
    semantic: SemanticScore,
    *,
    split: Split,
    protocol: dict[str, Any],
    images: int,
    seconds: dict[str, float],
    instance: InstanceScore | None = None,
    tasks: Collection[str] = ("panoptic", "semantic"),
    diagnostics: dict[str, float | None] | None = None,
    candidates: int | None = None,
    divided: bool = True,
    intervals: Intervals | None = None,
    calibration: Calibration | None = None,
    counts: ImageCounts | None = None,
) -> Report:
    """Turns counts into a report; `split` chooses which classes are reported, not which compete.

    `candidates`: how many classes competed, where it is not all of the vocabulary. `divided`:
    False where nobody knows which classes are seen; then no group of these is reported.
    """
    assert divided or split == "all", split
    found = (instance or InstanceScore()).result()
    rows = _per_class(vocabulary, panoptic, semantic, found, members(vocabulary)[split])
    rows = tuple(row if divided else replace(row, seen=None) for row in rows)
    facts = {"split": split, "candidates": candidates or len(vocabulary), "tasks": list(tasks)}
    return Report(
        protocol=protocol | facts,
        panoptic=_divided(_panoptic_groups(vocabulary, panoptic, split), divided),
        semantic=_divided(_semantic_groups(vocabulary, semantic, split), divided),
        instance=_divided(_instance_groups(vocabulary, found, split), divided),
        per_class=rows,
        absent=_absent(rows, tasks),
        images=images,
        seconds={name: round(value, 3) for name, value in seconds.items()},
        diagnostics=diagnostics or {},
        intervals=None if intervals is None else _reported(intervals, split, divided),
        calibration=calibration,
        counts=counts,
    )


def _reported(found: Intervals, split: Split, divided: bool) -> Intervals:
    """The intervals of the groups that are reported."""
    pq, miou = (
        _divided({name: v if split in ("all", name) else None for name, v in one.items()}, divided)
        for one in (found.pq, found.miou)
    )
    return replace(found, pq=pq, miou=miou)


def members(vocabulary: Vocabulary) -> dict[str, Sequence[int]]:
    """Class indices of the groups that every task has."""
    return {
        "all": range(len(vocabulary)),
        "seen": vocabulary.seen_indices,
        "unseen": vocabulary.unseen_indices,
    }


def _absent(rows: Iterable[ClassReport], tasks: Collection[str]) -> dict[str, tuple[str, ...]]:
    rows = list(rows)
    names = {
        "panoptic": tuple(row.name for row in rows if not row.occurs),
        "semantic": tuple(row.name for row in rows if row.iou is None),
        "instance": tuple(row.name for row in rows if row.thing and row.ap is None),
    }
    return {task: names[task] for task in TASKS if task in tasks}


def _divided(groups: dict[str, G | None], divided: bool) -> dict[str, G | None]:
    """The groups; without the seen and unseen ones where classes are not divided."""
    return {name: g if divided or name not in _DIVIDED else None for name, g in groups.items()}


def _panoptic_groups(
    vocabulary: Vocabulary, score: PanopticScore, split: Split
) -> dict[str, Quality | HarmonicQuality | None]:
    result = score.result()
    thing = vocabulary.is_thing
    kinds: dict[str, Sequence[int]] = {
        "things": [c for c in range(len(vocabulary)) if thing[c]],
        "stuff": [c for c in range(len(vocabulary)) if not thing[c]],
    }
    means = {
        name: result.mean(classes) if split in ("all", name) else None
        for name, classes in (members(vocabulary) | kinds).items()
    }
    return {**means, "harmonic": HarmonicQuality.of(means["seen"], means["unseen"])}


def _semantic_groups(
    vocabulary: Vocabulary, score: SemanticScore, split: Split
) -> dict[str, SemanticQuality | HarmonicIou | None]:
    means = {
        name: score.quality(classes) if split in ("all", name) else None
        for name, classes in members(vocabulary).items()
    }
    seen, unseen = means["seen"], means["unseen"]
    both = None if seen is None or unseen is None else harmonic(seen.miou, unseen.miou)
    return {**means, "harmonic": None if both is None else HarmonicIou(both)}


def _instance_groups(
    vocabulary: Vocabulary, result: InstanceResult, split: Split
) -> dict[str, InstanceQuality | HarmonicAp | None]:
    means = {
        name: result.quality(classes) if split in ("all", name) else None
        for name, classes in members(vocabulary).items()
    }
    seen, unseen = means["seen"], means["unseen"]
    if seen is None or unseen is None:
        return {**means, "harmonic": None}
    both = HarmonicAp(harmonic(seen.ap, unseen.ap), harmonic(seen.ap50, unseen.ap50))
    return {**means, "harmonic": both}


def _per_class(
    vocabulary: Vocabulary,
    panoptic: PanopticScore,
    semantic: SemanticScore,
    instance: InstanceResult,
    chosen: Iterable[int],
) -> tuple[ClassReport, ...]:
    result, iou = panoptic.result(), semantic.iou()
    rows = []
    for c in chosen:
        own = instance.quality([c])
        rows.append(
            ClassReport(
                name=vocabulary.names[c],
                id=vocabulary.ids[c],
                seen=vocabulary.is_seen[c],
                thing=vocabulary.is_thing[c],
                pq=float(result.pq[c]),
                sq=float(result.sq[c]),
                rq=float(result.rq[c]),
                tp=int(result.tp[c]),
                fp=int(result.fp[c]),
                fn=int(result.fn[c]),
                iou=None if math.isnan(iou[c]) else float(iou[c]),
                ap=None if own is None else own.ap,
                ap50=None if own is None else own.ap50,
                ar=None if own is None else own.ar,
            )
        )
    return tuple(rows)


def load_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of `Report.to_json()`."""
    path = resources.files("concat_cli.core.evaluate") / "report.schema.json"
    return json.loads(path.read_text(encoding="utf-8"))
