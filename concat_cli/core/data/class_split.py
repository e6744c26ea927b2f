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
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, ClassVar, Literal

from concat_cli.core.errors import UserError
from concat_cli.core.vocabulary import ClassEntry, Vocabulary

CLASSES = Path(__file__).resolve().parents[1] / "classes"
SPLITS = Path(__file__).resolve().parents[1] / "splits"


@dataclass
class _Split:
    """What a file says; see above."""

    __pydantic_config__: ClassVar[Any] = {"extra": "forbid", "coerce_numbers_to_str": True}
    unseen: list[str]
    counts: dict[Literal["seen", "unseen"], int] | None = None
    allow_missing: bool = False


@cache
def load_class_list(name: str) -> Vocabulary:
    """The classes of a list, in its order, all seen.

    A class goes by its first name. Where two classes share that one (ADE20K-Full has nine such
    pairs), each goes by its whole line, and all names of the line are synonyms.
    """
    import yaml

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
    split, called = _read(path), path.stem if path.parent == SPLITS else path
    missing = [name for name in split.unseen if name not in category_names]
    if missing and not split.allow_missing:
        close = difflib.get_close_matches(missing[0], category_names, n=1)
        raise UserError(
            f"Class split {called} names classes that the data set does not have: "
            f"{', '.join(missing)}.",
            (f"Did you mean {close[0]!r}? " if close else "")
            + "Choose another --class-split, or say `allow_missing: true` in your own split file.",
        )
    have = {"seen": len(category_names) - len(split.unseen), "unseen": len(split.unseen)}
    if split.counts not in (None, have):
        wanted, found = (
            " and ".join(f"{count} {kind}" for kind, count in counts.items())
            for counts in (split.counts, have)
        )
        raise UserError(
            f"Class split {called} is made for {wanted} classes, but this data set has {found}.",
            "Use the benchmark's data, or copy the split to your own file without `counts`.",
        )
    found = tuple(name for name in category_names if name in split.unseen)
    if len(found) == len(category_names):
        raise UserError(f"Class split {called} leaves no seen class.", "Name fewer classes.")
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
        f"The package has {', '.join(names)}; or give the path of a YAML file with `unseen:`, as "
        f"seen from {Path.cwd()}.",
    )


def _read(path: Path) -> _Split:
    import yaml  # both are slow to import, and every help would wait for them
    from pydantic import TypeAdapter, ValidationError

    try:
        split = TypeAdapter(_Split).validate_python(yaml.safe_load(path.read_bytes()))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UserError(
            f"Class split {path} is not as it should be: {place or 'it'}: {first['msg']}.",
            "Write `unseen:` and below it one `- class name` per line; a split may also have "
            "`counts` (of seen and unseen) and `allow_missing`.",
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError, OSError) as error:
        reason = str(error).split("\n")[0]
        raise UserError(f"Cannot read class split {path}: {reason}.", "Mend the file.") from error
    if len(set(split.unseen)) < len(split.unseen):
        raise UserError(f"Class split {path} names a class twice.", "Name it once.")
    return split
