"""Vocabulary files: a class a line, or a YAML or JSON list.

# comment
cat, kitten          a name, then its synonyms
sky : stuff          its kind, where it is not the default
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import yaml

from concat_cli.core.errors import UserError
from concat_cli.core.vocabulary import ClassEntry, Kind, Vocabulary

_FORM = "A vocabulary file has a class a line, like `cat, kitten` or `sky : stuff`, in UTF-8."
_KINDS: tuple[str, ...] = get_args(Kind)
_KEYS = ("name", "synonyms", "kind")  # of a class in a YAML or JSON list
_SHORT = reprlib.Repr()  # a few lines of YAML can stand for lists of gigabytes
_SHORT.maxstring = _SHORT.maxother = 200
_ROW_HINT = (
    'Write "cat, kitten", or {"name": "cat", "synonyms": ["kitten"], "kind": "thing"}; '
    f"a kind is {' or '.join(_KINDS)}."
)


@dataclass(frozen=True)
class _Item:
    """One class as written; `kind` is empty where none was given."""

    names: tuple[str, ...]
    kind: str
    where: str


def same_name(name: str) -> str:
    """The form in which two names count as one: case and spaces do not matter."""
    return " ".join(name.casefold().split())


def parse_vocabulary(
    path: Path | str,
    known: Vocabulary | None = None,
    key: Callable[[str], str] = same_name,
    text: str | None = None,
) -> Vocabulary:
    """The classes of a file, in order; UserError where it is missing, malformed or ambiguous.

    Args:
        known: the vocabulary of the weights. A name that it holds takes its kind (unless the file
            gives one), its id and whether it is seen; other names are unseen things.
        key: the form in which a name is looked up in `known`.
        text: the content, where the caller has taken something out of it.
    """
    path = Path(path)
    text = _read(path) if text is None else text
    reader = {".yaml": _yaml_items, ".yml": _yaml_items, ".json": _json_items}
    items = reader.get(path.suffix.lower(), _text_items)(path, text)
    if not items:
        raise UserError(f"{path} names no class.", _FORM)
    for item in items:
        _check(item)
    _check_duplicates(path, items)
    return _vocabulary(items, known or Vocabulary(()), key)


def written(vocabulary: Vocabulary) -> str:
    """The names, synonyms and kinds in one line, as a vocabulary file would have them."""
    return "; ".join(
        f"{', '.join((entry.name, *entry.synonyms))} : {entry.kind}" for entry in vocabulary.entries
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise UserError(f"There is no vocabulary file {path}.", _FORM) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}).",
            "Save it as UTF-8 text.",
        ) from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.", _FORM) from error


def _text_items(path: Path, text: str) -> list[_Item]:
    lines = (re.sub(r"(^|\s)#.*", "", line).strip() for line in re.split(r"\r\n|\r|\n", text))
    return [_line(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line]


def _yaml_items(path: Path, text: str) -> list[_Item]:
    try:
        rows = yaml.load(text, yaml.BaseLoader)  # which leaves `no` and `1` as they are written
    except (yaml.YAMLError, RecursionError) as error:
        reason = " ".join(str(error).split())[:120]
        raise UserError(f"{path} is no valid YAML: {reason}.", "Mend it.") from error
    return _list_items(path, rows)


def _json_items(path: Path, text: str) -> list[_Item]:
    try:
        return _list_items(path, json.loads(text))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no valid JSON: {error}.", "Mend it.") from error


def _list_items(path: Path, rows: Any) -> list[_Item]:
    if not rows:
        return []
    if not isinstance(rows, list):
        raise UserError(
            f"{path} holds no list.", 'Write `- cat` lines (YAML) or ["cat", ...] (JSON).'
        )
    return [_row(row, f"{path}, item {n}") for n, row in enumerate(rows, 1)]


def _row(row: Any, where: str) -> _Item:
    """A list's item: a string as in a text file, or {name, synonyms, kind}."""
    if isinstance(row, str):
        return _line(row, where)
    if isinstance(row, dict) and len(row) == 1 and not set(row) & set(_KEYS):
        name, kind = next(iter(row.items()))  # YAML reads `- sky : stuff` as a mapping
        if kind in _KINDS:
            return _line(f"{name} : {kind}", where)
    if not isinstance(row, dict) or not {"name"} <= set(row) <= set(_KEYS):
        raise UserError(f"{where}: {_SHORT.repr(row):.300} is no class{_unlike(row)}.", _ROW_HINT)
    synonyms = row.get("synonyms") or []
    synonyms = synonyms.split(",") if isinstance(synonyms, str) else synonyms
    names: list[Any] = [row["name"], *synonyms] if isinstance(synonyms, list) else [None]
    kind = row.get("kind") or ""
    if not all(isinstance(name, str) for name in (*names, kind)):
        raise UserError(f"{where}: name, synonyms and kind must be strings.", _FORM)
    return _Item(_clean(names), kind, where)


def _unlike(row: Any) -> str:
    """What a mapping has or lacks that makes it no class."""
    if not isinstance(row, dict):
        return ""
    unknown = [repr(key) for key in row if key not in _KEYS]
    return f": unknown key {', '.join(unknown)[:200]}" if unknown else ": it has no name"


def _line(line: str, where: str) -> _Item:
    if ";" in line:
        raise UserError(
            f"{where}: {line!r:.200} holds a semicolon.",
            "Write one class a line; a comma stands before a synonym: `cat, kitten`.",
        )
    names, colon, kind = line.rpartition(":")
    if colon and not kind.strip():
        raise UserError(f"{where}: nothing after the colon of {line!r:.200}.", _FORM)
    return _Item(
        _clean((names if colon else line).split(",")), kind.strip() if colon else "", where
    )


def _clean(names: list[str]) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in names)


def _check(item: _Item) -> None:
    if item.kind and item.kind not in _KINDS:
        raise UserError(
            f"{item.where}: unknown kind {item.kind!r:.200}.", f"A kind is {' or '.join(_KINDS)}."
        )
    if not all(item.names):
        raise UserError(f"{item.where}: a name is empty.", _FORM)
    odd = [name for name in item.names if not name.isprintable()]
    if odd:
        raise UserError(f"{item.where}: {odd[0]!r:.200} holds control characters.", _FORM)


def _check_duplicates(path: Path, items: list[_Item]) -> None:
    first: dict[str, str] = {}
    for item in items:
        for name in item.names:
            if (form := same_name(name)) in first:
                here = item.where.removeprefix(str(path)).strip(":, ")
                place = f"{first[form]} and {here}"
                raise UserError(
                    f"'{name}' stands twice in the vocabulary: {place}.",
                    "Leave one of them out; a synonym belongs to one class.",
                )
            first[form] = item.where


def _vocabulary(items: list[_Item], known: Vocabulary, key: Callable[[str], str]) -> Vocabulary:
    """Entries with what `known` says of them; ids that it does not give follow its highest."""
    table = {
        key(name): entry
        for entry in reversed(known.entries)
        for name in (*entry.synonyms, entry.name)
    }
    found = [next((table[k] for n in item.names if (k := key(n)) in table), None) for item in items]
    used: set[int] = set()
    highest = max(known.ids, default=0)
    entries: list[ClassEntry] = []
    for item, old in zip(items, found, strict=True):
        if old is not None and old.id not in used:
            number = old.id
        else:
            number = highest = highest + 1
        used.add(number)
        kind: Any = item.kind or (old.kind if old is not None else "thing")
        seen = old is not None and old.seen
        entries.append(ClassEntry(item.names[0], number, item.names[1:], kind, seen))
    return Vocabulary(tuple(entries))
