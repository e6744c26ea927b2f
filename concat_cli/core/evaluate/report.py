"""What an evaluation found, and its JSON form (`report.schema.json`)."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field, replace
from importlib import resources
from typing import Any, Literal, TypeVar

from concat_cli.core.evaluate.panoptic import PanopticScore, Quality
from concat_cli.core.evaluate.semantic import SemanticScore
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
class MeanIou:
    """Mean IoU in 0-1 over classes that occur in the truth."""

    miou: float


@dataclass(frozen=True)
class ClassReport:
    """One class. PQ, SQ, RQ are 0 where TP + FP + FN = 0 (then it is in no mean); `iou` is the
    semantic IoU, None where the truth never holds the class; `seen` is None where classes are not
    divided."""

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

    @property
    def occurs(self) -> bool:
        """False where the class is left out of the panoptic means."""
        return self.tp + self.fp + self.fn > 0


@dataclass(frozen=True)
class Report:
    """All figures of one evaluation, in 0-1.

    panoptic: by group (all, seen, unseen, things, stuff, harmonic); semantic: all, seen, unseen,
    harmonic; None = not reported, or no class of the group occurs. `diagnostics` is no part of the
    JSON.
    """

    protocol: dict[str, Any]
    panoptic: dict[str, Quality | HarmonicQuality | None]
    semantic: dict[str, MeanIou | None]
    per_class: tuple[ClassReport, ...]
    images: int
    seconds: dict[str, float]
    diagnostics: dict[str, float | None] = field(default_factory=dict)

    @property
    def absent(self) -> tuple[str, ...]:
        """Names of the reported classes that neither truth nor prediction holds."""
        return tuple(row.name for row in self.per_class if not row.occurs)

    def to_json(self) -> dict[str, Any]:
        """Plain values that follow `report.schema.json`."""
        plain = asdict(self)
        plain.pop("diagnostics")
        return plain | {"per_class": list(plain["per_class"])}


def make_report(
    vocabulary: Vocabulary,
    panoptic: PanopticScore,
    semantic: SemanticScore,
    *,
    split: Split,
    protocol: dict[str, Any],
    images: int,
    seconds: dict[str, float],
    diagnostics: dict[str, float | None] | None = None,
    candidates: int | None = None,
    divided: bool = True,
) -> Report:
    """Turns counts into a report; `split` chooses which classes are reported, not which compete.

    `candidates`: how many classes competed, where it is not all of the vocabulary. `divided`:
    False where nobody knows which classes are seen; then no group of these is reported.
    """
    assert divided or split == "all", split
    chosen = {
        "all": range(len(vocabulary)),
        "seen": vocabulary.seen_indices,
        "unseen": vocabulary.unseen_indices,
    }[split]
    return Report(
        protocol=protocol | {"split": split, "candidates": candidates or len(vocabulary)},
        panoptic=_divided(_panoptic_groups(vocabulary, panoptic, split), divided),
        semantic=_divided(_semantic_groups(vocabulary, semantic, split), divided),
        per_class=tuple(
            row if divided else replace(row, seen=None)
            for row in _per_class(vocabulary, panoptic, semantic, chosen)
        ),
        images=images,
        seconds={name: round(value, 3) for name, value in seconds.items()},
        diagnostics=diagnostics or {},
    )


def _divided(groups: dict[str, G | None], divided: bool) -> dict[str, G | None]:
    """The groups; without the seen and unseen ones where classes are not divided."""
    return {name: g if divided or name not in _DIVIDED else None for name, g in groups.items()}


def _panoptic_groups(
    vocabulary: Vocabulary, score: PanopticScore, split: Split
) -> dict[str, Quality | HarmonicQuality | None]:
    result = score.result()
    thing = vocabulary.is_thing
    members: dict[str, Sequence[int]] = {
        "all": range(len(vocabulary)),
        "seen": vocabulary.seen_indices,
        "unseen": vocabulary.unseen_indices,
        "things": [c for c in range(len(vocabulary)) if thing[c]],
        "stuff": [c for c in range(len(vocabulary)) if not thing[c]],
    }
    means = {
        name: result.mean(classes) if split in ("all", name) else None
        for name, classes in members.items()
    }
    return {**means, "harmonic": HarmonicQuality.of(means["seen"], means["unseen"])}


def _semantic_groups(
    vocabulary: Vocabulary, score: SemanticScore, split: Split
) -> dict[str, MeanIou | None]:
    members: dict[str, Sequence[int]] = {
        "all": range(len(vocabulary)),
        "seen": vocabulary.seen_indices,
        "unseen": vocabulary.unseen_indices,
    }
    means = {
        name: score.mean(classes) if split in ("all", name) else None
        for name, classes in members.items()
    }
    seen, unseen = means["seen"], means["unseen"]
    means["harmonic"] = None if seen is None or unseen is None else harmonic(seen, unseen)
    return {name: None if value is None else MeanIou(value) for name, value in means.items()}


def _per_class(
    vocabulary: Vocabulary, panoptic: PanopticScore, semantic: SemanticScore, chosen: Iterable[int]
) -> tuple[ClassReport, ...]:
    result, iou = panoptic.result(), semantic.iou()
    return tuple(
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
        )
        for c in chosen
    )


def load_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of `Report.to_json()`."""
    path = resources.files("concat_cli.core.evaluate") / "report.schema.json"
    return json.loads(path.read_text(encoding="utf-8"))
