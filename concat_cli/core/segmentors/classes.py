"""The classes that a published segmentor was trained on: their names and kinds."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from concat_cli.core.data.class_split import load_class_list
from concat_cli.core.vocabulary import ClassEntry, Kind, Vocabulary, same_name

SETS = {  # lists of core/classes -> what they are called
    "coco_panoptic_133": "COCO panoptic",
    "ade20k_150": "ADE20K",
    "cityscapes_19": "Cityscapes",
}
_KINDS: tuple[Kind, Kind] = ("stuff", "thing")
_PLACEHOLDER = re.compile(r"label_\d+", re.IGNORECASE)  # transformers' name of what has none


def own_classes(
    labels: Mapping[str, str], count: int, things: Collection[int] | None = None
) -> tuple[Vocabulary, list[str]]:
    """The classes of a class head, and what had to be assumed of them, a sentence each.

    Args:
        labels: names by index, as `id2label` of a config.json; what follows a comma is a synonym.
            Without real names those of the known set of so many classes are taken.
        count: how many there are.
        things: indices of the countable classes, where they are told.
    """
    names = [str(labels.get(str(i), "")).strip() for i in range(count)]
    unnamed = f"It names none of its {count} classes:"
    key = next((key for key in SETS if len(load_class_list(key)) == count), None)
    known = load_class_list(key).entries if key is not None else ()
    if all(names) and not all(_PLACEHOLDER.fullmatch(name) for name in names):
        entries, notes = _entries(names), list[str]()
    elif key is not None:
        notes = [f"{unnamed} by their number they are taken for {SETS[key]}'s."]
        entries = list(known)
    else:
        notes = [f'{unnamed} they are called "class 1" and so on, and count as things.']
        entries = [ClassEntry(f"class {i + 1}", i) for i in range(count)]
        things = range(count) if things is None else things
    if things is not None:
        told = [replace(e, kind=_KINDS[i in things]) for i, e in enumerate(entries)]
        return Vocabulary(tuple(told)), notes
    if _alike(entries, known):
        pairs = zip(entries, known, strict=True)
        return Vocabulary(tuple(replace(e, id=k.id, kind=k.kind) for e, k in pairs)), notes
    kinds = _kinds()
    found = [next((kinds[n] for n in _names(e) if n in kinds), None) for e in entries]
    unknown = [e.name for e, kind in zip(entries, found, strict=True) if kind is None]
    if unknown:
        some = f"{', '.join(unknown[:3])}{', ...' if unknown[3:] else ''}"
        notes.append(
            f"Of {len(unknown)} of its {count} classes ({some}) no known list tells the kind: they "
            "count as things."
        )
    pairs = zip(entries, found, strict=True)
    return Vocabulary(tuple(replace(e, kind=kind or "thing") for e, kind in pairs)), notes


def _entries(labels: Sequence[str]) -> list[ClassEntry]:
    """Each goes by its first name; by its whole label where others share that, with its index where
    they share even this."""
    firsts = [label.split(",")[0].strip() or label for label in labels]
    shared, wholes = Counter(firsts), Counter(labels)
    entries: list[ClassEntry] = []
    for index, (first, whole) in enumerate(zip(firsts, labels, strict=True)):
        name = first if shared[first] == 1 else whole
        name = name if wholes[whole] == 1 else f"{whole} ({index})"
        others = dict.fromkeys(" ".join(n.split()) for n in whole.split(","))
        entries.append(ClassEntry(name, index, tuple(n for n in others if n and n != name)))
    return entries


def _names(entry: ClassEntry) -> set[str]:
    return {same_name(name) for name in (entry.name, *entry.synonyms)}


def _alike(some: Sequence[ClassEntry], others: Sequence[ClassEntry]) -> bool:
    """Whether two lists are one: most names agree, place by place (spellings differ)."""
    if len(some) != len(others):
        return False
    agree = sum(bool(_names(a) & _names(b)) for a, b in zip(some, others, strict=True))
    return agree > len(some) / 2


def _kinds() -> dict[str, Kind]:
    """The kind of every name of the known sets; of several, the first set's counts."""
    sets = [load_class_list(key).entries for key in reversed(SETS)]
    return {name: entry.kind for entries in sets for entry in entries for name in _names(entry)}
