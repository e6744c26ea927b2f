"""The protocol of an evaluation in words, for those who read its figures."""

from __future__ import annotations

from typing import Any

from concat_cli.core.evaluate.report import Report

_MODES = {
    "transductive": "Transductive: the names of unseen classes were known in training, their "
    "labels and masks were not.",
    "inductive": "Inductive: nothing of unseen classes was known in training, not even the names.",
}


def sentences(report: Report) -> list[str]:
    """What was scored, and how, a sentence each."""
    facts: dict[str, Any] = report.protocol
    lines: list[str] = []
    if facts.get("predictions"):
        lines.append(f"The files {facts['predictions']}, against {facts['truth']}.")
    if facts.get("weights"):
        of = f", a model of stage {facts['stage']}" if facts.get("stage") else ""
        lines.append(f"The weights {facts['weights']}{of}, on the part val of {facts.get('data')}.")
    if facts["setting"] == "restricted":
        lines.append(
            f"Restricted: only the {facts['candidates']} classes of the split {facts['split']} "
            "compete, and all other truth is void. That is easier than the generalised protocol, "
            "with whose figures these are not to be compared."
        )
    else:
        lines.append(
            f"Generalised: all {facts['candidates']} classes compete for every segment, seen and "
            "unseen alike."
        )
    if facts["split"] != "all":
        lines.append(f"Only {facts['split']} classes are reported.")
    if facts.get("mode") in _MODES:
        lines.append(_MODES[facts["mode"]])
    divided = any(row.seen is not None for row in report.per_class)
    if divided and facts.get("class_split"):
        lines.append(f"Which classes are unseen says the class split {facts['class_split']}.")
    elif not divided:
        lines.append("Nobody says which classes are unseen, so they are not divided.")
    if facts.get("unseen_with_labels"):
        lines.append(
            f"Not zero-shot: labels of {facts['unseen_with_labels']} of the unseen classes were "
            "trained on."
        )
    if overlap := facts.get("overlap"):
        lines.append(
            "This is another list of classes than the weights'; labels of "
            f"{overlap['count']} of its {overlap['of']} classes were trained on, by name."
        )
    if facts.get("seen_offset"):
        lines.append(f"{facts['seen_offset']:.3g} is taken off the logits of seen classes.")
    if facts.get("area_from") == "json":
        lines.append("As panopticapi counts, the truth's areas are those of its JSON.")
    if report.intervals is not None:
        lines.append(
            f"Intervals are of {100 * report.intervals.level:.0f}%: the {report.images} images "
            f"were drawn again {report.intervals.repeats} times. They say how much a figure hangs "
            "on which images these were, and nothing of other training runs."
        )
    return lines
