"""The classes of the field's data sets: small YAML files in `core/classes`, a class a line.

- {id: 8, name: bed, kind: thing}
- {id: 9, name: "windowpane, window", kind: thing}    # what follows a comma is a synonym
"""

from __future__ import annotations

from collections import Counter
from functools import cache
from pathlib import Path

import yaml

from concat_cli.core.vocabulary import ClassEntry, Vocabulary

CLASSES = Path(__file__).resolve().parents[1] / "classes"


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
