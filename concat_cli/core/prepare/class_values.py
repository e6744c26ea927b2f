"""Lists of what the values of label maps mean: class names, with values or colours behind them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from concat_cli.core.errors import UserError
from concat_cli.core.vocabulary import Vocabulary
from concat_cli.core.vocabulary_file import parse_vocabulary, without_comment

VOID = (255, 65535)  # void by custom, in 8 and 16 bit, unless they are classes
_VALUE = re.compile(r"^(.*?)\s*=\s*(\d+)\s*$")
_RGB = r"(?P<r>\d{1,3})\s*,\s*(?P<g>\d{1,3})\s*,\s*(?P<b>\d{1,3})"
_COLOURS = (  # a name and its colour, as tools write them
    re.compile(rf"^(?P<name>.+?)\s*=\s*{_RGB}$"),  # ours
    re.compile(rf"^(?P<name>.+?):{_RGB}(:.*)?$"),  # CVAT's labelmap.txt
    re.compile(rf"^(?P<name>[^,]+),\s*{_RGB}$"),  # CamVid's class_dict.csv
    re.compile(
        r"^(?P<r>\d{1,3})\s+(?P<g>\d{1,3})\s+(?P<b>\d{1,3})\s+(?P<name>.+)$"
    ),  # CamVid's label_colors.txt
)
_HEADING = re.compile(r"^name\s*,\s*r\s*,\s*g\s*,\s*b$", re.IGNORECASE)
_HINT = "Give each line its value, like `car, automobile = 7`, or none: then they count from 0."


@dataclass(frozen=True)
class ClassValues:
    """What the values of label maps mean.

    table: raw value -> category id. void: raw values without truth. coloured: the raw values are
    colours, R + 256 G + 65536 B.
    """

    vocabulary: Vocabulary
    table: Mapping[int, int]
    void: tuple[int, ...]
    coloured: bool = False


def read_classes(path: Path) -> ClassValues:
    """The classes of label maps, with their raw values as ids, and the void values.

    A vocabulary file, whose lines stand for the raw values 0, 1, 2, ...; `car = 7` gives its own;
    the value of a line `void` has no truth. Or a table of colours, `car = 250, 50, 83` or as CVAT
    or CamVid write it: ids then count from 0. UserError where two lines have one value or only some
    lines have one.
    """
    if path.suffix.lower() in (".yaml", ".yml", ".json"):
        vocabulary = parse_vocabulary(path)
        values, void = list(range(len(vocabulary))), list[int]()
    else:
        lines = _lines(path)
        if any(_colour(line) for line in lines):
            return _coloured(path, lines)
        vocabulary, values, void = _read_lines(path, lines)
    _refuse_twice(path, [*values, *void], values)
    if max(values) > 65534 or max(void, default=0) > 65535:
        largest = max([*values, *void])
        raise UserError(f"{path}: {largest} is no value of 16 bit that could be one.", _HINT)
    entries = (replace(e, id=v) for e, v in zip(vocabulary.entries, values, strict=True))
    unused = [value for value in VOID if value not in values and value not in void]
    return ClassValues(Vocabulary(tuple(entries)), {v: v for v in values}, (*void, *unused))


def _refuse_twice(path: Path, listed: list[int], of: list[int]) -> None:
    twice = {value for value in of if listed.count(value) > 1}
    if twice:
        raise UserError(f"{path}: two lines have the value {min(twice)}.", _HINT)


def _lines(path: Path) -> list[str]:
    """The lines of a text file; none where it cannot be read, which `parse_vocabulary` says."""
    try:
        return path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        return []


def _colour(line: str) -> tuple[str, tuple[int, int, int]] | None:
    """A name and its colour; None where the line holds none."""
    found = next((m for form in _COLOURS if (m := form.match(without_comment(line)))), None)
    if found is None:
        return None
    return found["name"].strip(), (int(found["r"]), int(found["g"]), int(found["b"]))


def _coloured(path: Path, lines: list[str]) -> ClassValues:
    """A table of colours; UserError naming a line that holds none, or a colour that cannot be."""
    names: list[str] = []
    packed: list[int] = []
    void: list[int] = []
    for number, line in enumerate(lines, 1):
        plain = without_comment(line)
        if not plain or _HEADING.match(plain):
            names.append("")
            continue
        found = _colour(line)
        if found is None or max(found[1]) > 255:
            raise UserError(
                f"{path}:{number}: {plain[:80]!r} is no name with a colour, as other lines are.",
                "Give each line its colour, like `car = 250, 50, 83`, each of 0 to 255.",
            )
        name, (red, green, blue) = found
        is_void = name.split(":")[0].strip().casefold() == "void"
        names.append("" if is_void else name)
        (void if is_void else packed).append(red | green << 8 | blue << 16)
    vocabulary = parse_vocabulary(path, text="\n".join(names))
    if len({*packed, *void}) < len(packed) + len(void):
        raise UserError(f"{path}: two lines have one colour.", "Give each class its own.")
    entries = (replace(entry, id=place) for place, entry in enumerate(vocabulary.entries))
    table = {colour: place for place, colour in enumerate(packed)}
    return ClassValues(Vocabulary(tuple(entries)), table, tuple(void), coloured=True)


def _read_lines(path: Path, lines: list[str]) -> tuple[Vocabulary, list[int], list[int]]:
    """A text file's classes, their values, and the values of its `void` lines."""
    names: list[str] = []
    given: list[tuple[str, bool]] = []  # the value as written, and whether it is void
    for line in lines:
        plain = without_comment(line)
        match = _VALUE.match(plain)
        name, value = match.groups() if match else (plain, "")
        void = name.split(":")[0].strip().casefold() == "void"
        if match and not name:
            raise UserError(f"{path}: {plain[:80]!r} has a value and no name.", _HINT)
        if plain:
            given.append((value[:9], void))  # longer ones are refused, too
        names.append("" if void else name)
    vocabulary = parse_vocabulary(path, text="\n".join(names) if names else None)
    some = sum(bool(value) for value, _ in given)
    if 0 < some < len(given):
        raise UserError(f"{path}: {some} of {len(given)} lines have a value.", _HINT)
    values = [int(value) if value else place for place, (value, _) in enumerate(given)]
    rows = list(zip(values, (void for _, void in given), strict=True))
    return vocabulary, [v for v, void in rows if not void], [v for v, void in rows if void]
