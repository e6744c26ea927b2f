"""What an evaluation found, and its JSON form (`report.schema.json`)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from importlib import resources
from typing import Any, TypeVar

from concat_cli.core.evaluate.instance import InstanceQuality, InstanceResult
from concat_cli.core.evaluate.intervals import ImageCounts, Intervals, bootstrap, harmonic
from concat_cli.core.evaluate.page.findings import Findings
from concat_cli.core.evaluate.quality import Quality, SemanticQuality, groups
from concat_cli.core.evaluate.scores import Calibration, Scoring, Tally
from concat_cli.core.vocabulary import Vocabulary

_DIVIDED = ("seen", "unseen", "harmonic")  # groups that need to know which classes are seen
Q = TypeVar("Q")
H = TypeVar("H", bound="HarmonicQuality | HarmonicIou | HarmonicAp")


@dataclass(frozen=True)
class HarmonicQuality:
    """Harmonic means of the seen and unseen PQ, SQ, RQ, each on its own (hPQ is not hSQ * hRQ)."""

    pq: float
    sq: float
    rq: float


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
    """One class. PQ, SQ, RQ are None where TP + FP + FN = 0 (then it is in no mean); `iou` is the
    semantic IoU, None where the truth never holds the class; ap, ap50, ar are None for stuff, where
    the truth never holds the class, and where instances were not scored; `seen` is None where
    classes are not divided."""

    name: str
    id: int
    seen: bool | None
    thing: bool
    pq: float | None
    sq: float | None
    rq: float | None
    tp: int
    fp: int
    fn: int
    iou: float | None
    ap: float | None = None
    ap50: float | None = None
    ar: float | None = None

    @property
    def absent(self) -> dict[str, bool]:
        """By task, whether the class is left out of the means."""
        return {
            "panoptic": not self.tp + self.fp + self.fn,
            "semantic": self.iou is None,
            "instance": self.thing and self.ap is None,
        }


@dataclass(frozen=True)
class Report:
    """All figures of one evaluation, in 0-1.

    panoptic: by group (all, seen, unseen, things, stuff, harmonic); semantic and instance: all,
    seen, unseen, harmonic; None = not reported, or no class of the group occurs. `absent`: for each
    task that was scored the names of reported classes that are in none of its means. `counts` and
    `findings` are no part of the JSON.
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
    diagnostics: dict[str, float | None] = field(default_factory=dict[str, float | None])
    counts: ImageCounts | None = None
    findings: Findings | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values that follow `report.schema.json`."""
        plain = asdict(replace(self, counts=None, findings=None))
        del plain["counts"], plain["findings"]
        return json.loads(json.dumps(plain | {"diagnostics": plain["diagnostics"] or None}))


def make_report(
    tally: Tally,
    vocabulary: Vocabulary,
    scoring: Scoring,
    tasks: Collection[str],
    *,
    protocol: dict[str, Any],
    seconds: Mapping[str, float],
    divided: bool = True,
    calibration: Calibration | None = None,
) -> Report:
    """Turns counts into a report.

    protocol: what it says of the predictions. divided: False where nobody knows which classes are
    seen; then no group of these is reported.
    """
    split = scoring.split
    assert divided or split == "all", split

    def shown(found: Mapping[str, Q]) -> dict[str, Q | None]:
        """Without the groups that are not reported."""
        return {
            name: one if split in ("all", name) and (divided or name not in _DIVIDED) else None
            for name, one in found.items()
        }

    members, thing = groups(vocabulary), vocabulary.is_thing
    kinds: dict[str, Sequence[int]] = {
        "things": [c for c in range(len(vocabulary)) if thing[c]],
        "stuff": [c for c in range(len(vocabulary)) if not thing[c]],
    }
    instance = tally.instance.result()
    rows = _per_class(vocabulary, tally, instance, members[split], divided)
    drawn = None
    if scoring.bootstraps:
        drawn = bootstrap(tally.each, vocabulary, scoring.bootstraps)
        drawn = replace(drawn, pq=shown(drawn.pq), miou=shown(drawn.miou))
    return Report(
        protocol={"split": split, "candidates": len(vocabulary), "tasks": list(tasks)} | protocol,
        panoptic=shown(_means(members | kinds, tally.panoptic.result().mean, HarmonicQuality)),
        semantic=shown(_means(members, tally.semantic.quality, HarmonicIou)),
        instance=shown(_means(members, instance.quality, HarmonicAp)),
        per_class=tuple(rows),
        absent={task: tuple(row.name for row in rows if row.absent[task]) for task in tasks},
        images=tally.each.images,
        seconds={name: round(value, 3) for name, value in seconds.items()},
        diagnostics=tally.masks.result(vocabulary) if scoring.diagnostics else {},
        intervals=drawn,
        calibration=calibration,
        counts=tally.each if scoring.counts else None,
        findings=tally.findings,
    )


def _means(
    members: Mapping[str, Sequence[int]], mean: Callable[[Sequence[int]], Q | None], both: type[H]
) -> dict[str, Q | H | None]:
    """The mean of each group, and the harmonic means of the seen and unseen ones."""
    means = {name: mean(classes) for name, classes in members.items()}
    pair = means["seen"], means["unseen"]
    names = [one.name for one in fields(both)]
    figures = (float(harmonic(*(getattr(one, name) for one in pair))) for name in names)
    return {**means, "harmonic": None if None in pair else both(*figures)}


def _per_class(
    vocabulary: Vocabulary,
    tally: Tally,
    instance: InstanceResult,
    chosen: Sequence[int],
    divided: bool,
) -> list[ClassReport]:
    result, iou = tally.panoptic.result(), tally.semantic.iou()
    rows: list[ClassReport] = []
    for c in chosen:
        own, panoptic = instance.quality([c]), result.mean([c])
        rows.append(
            ClassReport(
                name=vocabulary.names[c],
                id=vocabulary.ids[c],
                seen=vocabulary.is_seen[c] if divided else None,
                thing=vocabulary.is_thing[c],
                pq=panoptic and panoptic.pq,
                sq=panoptic and panoptic.sq,
                rq=panoptic and panoptic.rq,
                tp=int(result.tp[c]),
                fp=int(result.fp[c]),
                fn=int(result.fn[c]),
                iou=None if math.isnan(iou[c]) else float(iou[c]),
                ap=own and own.ap,
                ap50=own and own.ap50,
                ar=own and own.ar,
            )
        )
    return rows


def load_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of `Report.to_json()`."""
    path = resources.files("concat_cli.core.evaluate") / "report.schema.json"
    return json.loads(path.read_text(encoding="utf-8"))
