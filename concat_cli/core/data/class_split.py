"""Classes of the field's data sets, and which of them are unseen: small YAML files.

In `core/classes`, a class a line:
- {id: 8, name: bed, kind: thing}
- {id: 9, name: "windowpane, window", kind: thing}    # what follows a comma is a synonym

In `core/splits` or the user's own, by class name:
unseen: [cow, giraffe]             # all others are seen
counts: {seen: 119, unseen: 14}    # optional: checked against the data
allow_missing: true                # optional: names that the data lacks are left out
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, cast

import yaml

from concat_cli.core.errors import UserError
from concat_cli.core.vocabulary import ClassEntry, Vocabulary

CLASSES = Path(__file__).resolve().parents[1] / "classes"
SPLITS = Path(__file__).resolve().parents[1] / "splits"
_KEYS = {"unseen", "counts", "allow_missing"}


@cache
def load_class_list(name: str) -> Vocabulary:
    """The classes of a list, in its order, all seen.

    A class goes by its first name. Where two classes share that one (ADE20K-Full has nine such
    pairs), each goes by its whole line, and all names of the line are synonyms.
    """
    rows = yaml.safe_load((CLASSES / f"{name}.yaml").read_text(encoding="utf-8"))
    shared = Counter(str(row["name"]).split(", ")[0] for row in rows)
    entries: list[ClassEntry] = []
    for row in rows:
        whole = str(row["name"])
        first, *rest = names = whole.split(", ")
        if shared[first] > 1 and rest:
            first, rest = whole, names
        entries.append(ClassEntry(first, int(row["id"]), tuple(rest), row["kind"]))
    return Vocabulary(tuple(entries))


def class_split_names() -> list[str]:
    """The splits that come with the package."""
    return sorted(path.stem for path in SPLITS.glob("*.yaml"))


def load_class_split(name_or_path: str | Path, category_names: Sequence[str]) -> tuple[str, ...]:
    """The unseen class names of a split, in the order of `category_names`.

    UserError if there is no such split, the file is malformed, it names a class that the data
    lacks, or its counts do not fit the data.
    """
    path = _find(name_or_path)
    raw = _read(path)
    unseen = [str(name) for name in raw["unseen"]]
    missing = [name for name in unseen if name not in category_names]
    if missing and not raw.get("allow_missing", False):
        close = difflib.get_close_matches(missing[0], category_names, n=1)
        raise UserError(
            f"Class split {path.stem} names classes that the data set does not have: "
            f"{', '.join(missing)}.",
            (f"Did you mean {close[0]!r}? " if close else "")
            + "Choose another --class-split, or say `allow_missing: true` in your own split file.",
        )
    _check_counts(path, raw, unseen, category_names)
    found = tuple(name for name in category_names if name in unseen)
    if len(found) == len(category_names):
        raise UserError(f"Class split {path.stem} leaves no seen class.", "Name fewer classes.")
    return found


def _find(name_or_path: str | Path) -> Path:
    text = str(name_or_path)
    if text in class_split_names():
        return SPLITS / f"{text}.yaml"
    path = Path(text)
    if path.is_file():
        return path
    names = class_split_names()
    close = difflib.get_close_matches(text, names, n=1, cutoff=0.4)
    raise UserError(
        f"There is no class split {text!r}." + (f" Did you mean {close[0]!r}?" if close else ""),
        f"The package has {', '.join(names)}; or give the path of a YAML file with `unseen:`, as seen from "
        f"{Path.cwd()}.",
    )


def _read(path: Path) -> dict[str, Any]:
    try:
        raw: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"Cannot read class split {path}: {reason}.", "Mend the file.") from error
    example = "Write `unseen:` and below it one `- class name` per line."
    found = cast("dict[str, Any]", raw) if isinstance(raw, dict) else {}
    if not isinstance(found.get("unseen"), list):
        raise UserError(f"Class split {path} has no list `unseen`.", example)
    unseen: list[Any] = found["unseen"]
    unknown = sorted(str(key) for key in found.keys() - _KEYS)
    if unknown:
        known = ", ".join(sorted(_KEYS))
        raise UserError(f"Class split {path} has unknown keys {unknown}.", f"Keys are: {known}.")
    if any(isinstance(name, list | dict) for name in unseen):
        raise UserError(f"Class split {path} lists something that is no name.", example)
    if not isinstance(found.get("counts", {}), dict | None):
        raise UserError(f"`counts` of class split {path} has no seen and unseen.", example)
    if len(set(map(str, unseen))) < len(unseen):
        raise UserError(f"Class split {path} names a class twice.", example)
    return found


def _check_counts(
    path: Path, raw: dict[str, Any], unseen: list[str], category_names: Sequence[str]
) -> None:
    counts = raw.get("counts")
    have = {"seen": len(category_names) - len(unseen), "unseen": len(unseen)}
    if counts is not None and counts != have:
        raise UserError(
            f"Class split {path.stem} is made for {counts.get('seen')} seen and "
            f"{counts.get('unseen')} "
            f"unseen classes, but this data set gives {have['seen']} and {have['unseen']}.",
            "Use the benchmark's data, or copy the split to your own file without `counts`.",
        )
