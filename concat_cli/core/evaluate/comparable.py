"""Runs as they are given to be compared: whether they can be, and in what else they differ."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from concat_cli.core.build import config_of
from concat_cli.core.checkpoint import Weights, read_meta
from concat_cli.core.config import Config
from concat_cli.core.config_file import override
from concat_cli.core.data.dataset import DatasetInfo, PanopticDataset, read_dataset_info
from concat_cli.core.errors import UserError
from concat_cli.core.evaluate.weights import PART, divided
from concat_cli.core.runs import RUNS, find_weights

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
class Checked:
    """A run of which nothing but its metadata was read.

    cfg: with the overrides; own: as it was trained; info: what it is scored on, divided as there.
    """

    entry: Entry
    cfg: Config
    own: Config
    info: DatasetInfo
    meta: dict[str, Any]


def parse_entry(text: str, root: Path = RUNS) -> Entry:
    """`[LABEL=]RUN[:KEY=VALUE,...]`; RUN is a name below `root`, or a path to weights or to the
    folder of a run or stage. UserError where there are no weights."""
    run, *overrides = _KEYS.split(text)
    label = text
    if "=" in run and not Path(run).exists():
        label, _, run = run.partition("=")
        label = label.strip()
    as_path = Path(run)
    is_path = as_path.is_file() or as_path.suffix == ".safetensors" or len(as_path.parts) > 1
    if not is_path and (":" in run or ":" in label.removesuffix(text)):
        raise UserError(
            f"'{text}' does not read as a run with overrides.",
            "Write RUN, or RUN:section.key=value, more of them after commas, LABEL= before it all.",
        )
    found = find_weights(None, as_path) if is_path else find_weights(run, root=root)
    return Entry(label, found.path, tuple(overrides))


def check_comparable(entries: Sequence[Entry]) -> list[Checked]:
    """UserError unless all would be scored on the same images, classes and division of these."""
    labels = [entry.label for entry in entries]
    for label in labels:
        if labels.count(label) > 1:
            raise UserError(f"Two runs are called {label}.", f"Name one of them: NAME={label}.")
    checked = [_check(entry) for entry in entries]
    for other in checked[1:]:
        _check_same(checked[0], other)
    return checked


def _check(entry: Entry) -> Checked:
    meta = read_meta(entry.weights)
    light = Weights({}, meta, entry.weights, "")  # the tensors play no part in it
    own = config_of(light)
    cfg = override(own, entry.overrides)
    info, _ = divided(read_dataset_info(Path(cfg.data.root)), light)
    return Checked(entry, cfg, own, info, meta)


def _check_same(first: Checked, other: Checked) -> None:
    one, two = first.info, other.info
    names, others = one.vocabulary.names, two.vocabulary.names
    what = ""
    if names != others:
        what = f"{len(names)} classes of {one.name}, and {len(others)} of {two.name}"
    elif one.vocabulary.is_seen != two.vocabulary.is_seen:
        pairs = zip(names, one.vocabulary.is_seen, two.vocabulary.is_seen, strict=True)
        moved = [name for name, here, there in pairs if here != there]
        more = ", ..." if len(moved) > _SHOWN else ""
        what = (
            f"the class split {one.class_split}, and {two.class_split}; seen in one of them: "
            f"{', '.join(moved[:_SHOWN])}{more}"
        )
    elif one.root != two.root and _digest(one, PART) != _digest(two, PART):
        what = f"the images of {one.root}, and those of {two.root}"
    if what:
        raise UserError(
            f"{first.entry.label} and {other.entry.label} would be scored on different things: "
            f"{what}.",
            f"Give both the same data set, like RUN:data.root={one.root}.",
        )


def _digest(info: DatasetInfo, part: str) -> str:
    return PanopticDataset(info.part(part), info.vocabulary).digest()


def differing_facts(checked: Sequence[Checked], modes: Sequence[str | None]) -> list[str]:
    """In what the runs differ apart from the method, a line for each; `modes`: of their reports."""
    known = {"transductive": "known in training", "inductive": "unknown before the test"}
    parts = [_trained_on(one) for one in checked]
    clips = [(one.meta["clip"]["model"], one.meta["clip"]["pretrained"]) for one in checked]
    sizes = [str(one.cfg.infer.size) for one in checked]
    offsets = [f"{one.cfg.infer.seen_offset:.3g}" for one in checked]
    facts = (
        ("trained on different scenes or labels", [p[0] for p in parts], [p[1] for p in parts]),
        ("names of unseen classes", modes, [known.get(mode or "", "not told") for mode in modes]),
        ("CLIP", [one.meta["clip"]["sha256"] for one in checked], [" ".join(c) for c in clips]),
        ("short side at test", sizes, sizes),
        ("offset on seen classes", offsets, offsets),
    )
    notes = []
    for what, keys, shown in facts:
        if len(set(keys)) > 1:
            pairs = zip(checked, shown, strict=True)
            told = "; ".join(f"{one.entry.label}: {text.strip()}" for one, text in pairs)
            notes.append(f"{what}: {told}")
    return notes


def _trained_on(one: Checked) -> tuple[str, str]:
    """The training part that the weights' configuration names, as it is there now: what tells it
    from others, and how it is shown."""
    root = Path(one.own.data.root)
    if not (root / "dataset.json").is_file():
        return str(root), f"{root} (not here any more)"
    info = read_dataset_info(root)
    pixels = info.protocol.get("unseen_pixels", "drop")
    return _digest(info, "train"), f"{root} (unseen pixels: {pixels})"
