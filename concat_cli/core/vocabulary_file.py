"""Vocabulary files, and lists of names: text, YAML or JSON -> a `Vocabulary`.

A vocabulary file has a class a line, or is a YAML or JSON list:

# comment
cat, kitten          a name, then its synonyms
sky : stuff          its kind, where it is not the default
"""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast

import yaml

from concat_cli.core.errors import UserError
from concat_cli.core.files import below_or_here
from concat_cli.core.vocabulary import KINDS, ClassEntry, Kind, Vocabulary, same_name

_KEYS = ("name", "synonyms", "kind")  # of a class in a YAML or JSON list
_FORM = "A vocabulary file has a class a line, like `cat, kitten` or `sky : stuff`, in UTF-8."
_OPTION, _INLINE = "--classes", 'Write --classes "dog; cat, kitten; grass : stuff".'
_ROW = (
    'Write "cat, kitten", or {"name": "cat", "synonyms": ["kitten"], "kind": "thing"}; '
    f"a kind is {' or '.join(KINDS)}."
)
_NUMBER = re.compile(r"[-+]?[0-9]+([.][0-9]+)?%?")
_NUMBERED = re.compile(r"[0-9]+[.)]?\s+\S")
_PLAIN = (
    "Write the names alone, one a line: no columns, no numbers. In a list for label maps the value "
    "goes behind the name: `car = 7`."
)
_SHORT = reprlib.Repr()  # a few lines of YAML can stand for lists of gigabytes
_SHORT.maxstring = _SHORT.maxother = 200


class _Item(NamedTuple):
    """One class as written; `kind` is empty where none was given."""

    names: tuple[str, ...]
    kind: str
    where: str


def without_comment(line: str) -> str:
    """A line of a text file less what stands behind a # at its start or behind a space."""
    return re.sub(r"(^|\s)#.*", "", line).strip()


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
    kind = path.suffix.lower()
    if kind in (".yaml", ".yml", ".json"):
        items = _list_items(str(path), _loaded(path, text, kind == ".json"))
    else:
        lines = map(without_comment, re.split(r"\r\n|\r|\n", text))
        items = [_line(line, f"{path}:{n}") for n, line in enumerate(lines, 1) if line]
        if len(items) > 1 and all(_NUMBERED.match(item.names[0]) for item in items):
            what = f"{path}: every line begins with a number, like {items[0].names[0]!r:.200}."
            raise UserError(
                what, f"{_PLAIN} Names that do begin so are read from a YAML or JSON list."
            )
    return _vocabulary(str(path), items, known, key)


def parse_names(names: Sequence[str], known: Vocabulary | None = None) -> Vocabulary:
    """The classes of a list, each as on a line of a file: ["cat, kitten", "sky : stuff"]; `known`
    and errors as in `parse_vocabulary`."""
    rows = [names] if isinstance(names, str) else list(names)
    return _vocabulary("The list", _list_items("The list", rows), known, same_name)


def parse_classes(text: str, known: Vocabulary | None = None, source: str = _OPTION) -> Vocabulary:
    """The classes of one line: "dog; cat, kitten; grass : stuff"; `known` and errors as in
    `parse_vocabulary`. source: what errors call it."""
    rows = [row for part in re.split(r"[;\r\n]", text) if (row := part.strip())]
    return _vocabulary(source, _list_items(source, rows), known, same_name)


def with_kinds(vocabulary: Vocabulary, kinds: str, root: Path = Path()) -> Vocabulary:
    """The classes with the kinds that a list like "dog; sky : stuff" gives, or a file, below a root
    or not; others keep theirs. UserError where it names no class."""
    things = Vocabulary(tuple(replace(entry, kind="thing") for entry in vocabulary.entries))
    path = below_or_here(root, kinds)
    listed = parse_vocabulary(path, things) if path else parse_classes(kinds, things)
    kind_of = {entry.id: entry.kind for entry in listed.entries}
    if unknown := [entry.name for entry in listed.entries if entry.id not in vocabulary.ids]:
        what = f"--kinds names {unknown[0]!r}, which is no class of this data set."
        raise UserError(what, f"Its classes: {', '.join(vocabulary.names)[:300]}.")
    entries = (replace(e, kind=kind_of.get(e.id, e.kind)) for e in vocabulary.entries)
    return Vocabulary(tuple(entries))


def doubt(vocabulary: Vocabulary) -> str:
    """What to say of a list that was perhaps meant otherwise, a single class with many synonyms;
    empty where there is nothing to say."""
    count = len(vocabulary.entries[0].synonyms) if len(vocabulary) == 1 else 0
    if count < 2:
        return ""
    return (
        f"read as 1 class with {count} synonyms; separate classes by ; on the command line, or "
        "write one a line (in a file) or an item (Python)"
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        inline = " The names themselves go to --classes, or, in Python, into a list."
        raise UserError(f"There is no vocabulary file {path}.", _FORM + inline) from None
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8 (byte {error.start} is {error.object[error.start]:#04x}).",
            "Save it as UTF-8 text.",
        ) from error
    except OSError as error:
        raise UserError(f"Cannot read {path}: {error.strerror}.", _FORM) from error


def _loaded(path: Path, text: str, as_json: bool) -> Any:
    """What a YAML or JSON file holds; YAML leaves `no` and `1` as they are written."""
    try:
        return json.loads(text) if as_json else yaml.load(text, yaml.BaseLoader)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        kind, reason = "JSON" if as_json else "YAML", " ".join(str(error).split())[:120]
        raise UserError(f"{path} is no valid {kind}: {reason}.", "Mend it.") from error


def _list_items(where: str, rows: Any) -> list[_Item]:
    if rows and not isinstance(rows, list):
        raise UserError(
            f"{where} holds no list.", 'Write `- cat` lines (YAML) or ["cat", ...] (JSON).'
        )
    listed = cast("list[Any]", rows or [])
    return [_row(row, f"{where}, item {n}") for n, row in enumerate(listed, 1)]


def _row(row: Any, where: str) -> _Item:
    """A list's item: a string as in a text file, or {name, synonyms, kind}."""
    if isinstance(row, str):
        return _line(row, where)
    keys = cast("dict[Any, Any]", row if isinstance(row, dict) else {})
    unknown = [key for key in keys if key not in _KEYS]
    if len(keys) == 1 and unknown and keys[unknown[0]] in KINDS:
        return _line(f"{unknown[0]} : {keys[unknown[0]]}", where)  # YAML's `- sky : stuff`
    if unknown or "name" not in keys:
        lacks = ": it has no name" if keys else ""
        lacks = f": unknown key {', '.join(map(repr, unknown))[:200]}" if unknown else lacks
        raise UserError(f"{where}: {_SHORT.repr(row):.300} is no class{lacks}.", _ROW)
    synonyms: Any = keys.get("synonyms") or []
    synonyms = synonyms.split(",") if isinstance(synonyms, str) else synonyms
    names: list[Any] = [keys["name"], *synonyms] if isinstance(synonyms, list) else [None]
    kind: Any = keys.get("kind") or ""
    if not all(isinstance(name, str) for name in (*names, kind)):
        raise UserError(f"{where}: name, synonyms and kind must be strings.", _FORM)
    return _item(names, kind, where)


def _line(line: str, where: str) -> _Item:
    if ";" in line:
        raise UserError(
            f"{where}: {line!r:.200} holds a semicolon.",
            "Write one class a line; a comma stands before a synonym: `cat, kitten`.",
        )
    if "\t" in line:
        raise UserError(f"{where}: {line!r:.200} is a row of a table: it holds a tab.", _PLAIN)
    names, colon, kind = line.rpartition(":")
    if colon and not kind.strip():
        raise UserError(f"{where}: nothing after the colon of {line!r:.200}.", _FORM)
    return _item((names if colon else line).split(","), kind.strip() if colon else "", where)


def _item(names: list[str], kind: str, where: str) -> _Item:
    """A class with sound names and a kind that there is."""
    item = _Item(tuple(" ".join(name.split()) for name in names), kind, where)
    if numbers := [name for name in item.names if _NUMBER.fullmatch(name)]:
        raise UserError(f"{where}: {numbers[0]!r:.200} is a number, not a name.", _PLAIN)
    if kind and kind not in KINDS:
        raise UserError(f"{where}: unknown kind {kind!r:.200}.", _ROW)
    if not all(item.names):
        raise UserError(f"{where}: a name is empty.", _FORM)
    if odd := [name for name in item.names if not name.isprintable()]:
        raise UserError(f"{where}: {odd[0]!r:.200} holds control characters.", _FORM)
    return item


def _vocabulary(
    source: str, items: list[_Item], known: Vocabulary | None, key: Callable[[str], str]
) -> Vocabulary:
    """Entries with what `known` says of them; ids that it does not give follow its highest."""
    if not items:
        raise UserError(f"{source} names no class.", _INLINE if source == _OPTION else _FORM)
    first: dict[str, str] = {}  # a name's form -> where it stands first
    for item in items:
        for name in item.names:
            if (form := same_name(name)) in first:
                place = f"{first[form]} and {item.where.removeprefix(source).strip(':, ')}"
                raise UserError(
                    f"'{name}' stands twice in the vocabulary: {place}.",
                    "Leave one of them out; a synonym belongs to one class.",
                )
            first[form] = item.where
    known = known or Vocabulary(())
    table = {key(n): e for e in reversed(known.entries) for n in (*e.synonyms, e.name)}
    used: set[int] = set()
    highest = max(known.ids, default=0)
    entries: list[ClassEntry] = []
    for item in items:
        old = next((table[k] for name in item.names if (k := key(name)) in table), None)
        base = old or ClassEntry("", 0, seen=False)
        if old is not None and old.id not in used:
            number = old.id
        else:
            number = highest = highest + 1
        used.add(number)
        kind = cast("Kind", item.kind or base.kind)
        entries.append(ClassEntry(item.names[0], number, item.names[1:], kind, base.seen))
    return Vocabulary(tuple(entries))
