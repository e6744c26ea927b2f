"""Classes of label maps: a vocabulary file whose lines stand for the raw values 0, 1, 2, ...

road : stuff             the first line is value 0
car, automobile          value 1
void                     value 2 has no truth
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from concat_cli.core.errors import UserError
from concat_cli.core.vocabulary import Vocabulary, parse_vocabulary

VOID = (255, 65535)  # void by custom, in 8 and 16 bit, unless they are classes
_VALUE = re.compile(r"^(.*?)\s*=\s*(\d+)\s*$")
_HINT = "Give each line its value, like `car, automobile = 7`, or none: then they count from 0."


def read_classes(path: Path) -> tuple[Vocabulary, tuple[int, ...]]:
    """The classes, with their raw values as ids, and the void values; UserError where two lines
    have one value or only some lines have one."""
    if path.suffix.lower() in (".yaml", ".yml", ".json"):
        vocabulary = parse_vocabulary(path)
        values, void = list(range(len(vocabulary))), []
    else:
        vocabulary, values, void = _read_lines(path)
    twice = {value for value in values if [*values, *void].count(value) > 1}
    if twice:
        raise UserError(f"{path}: two lines have the value {min(twice)}.", _HINT)
    if max(values) > 65534 or max(void, default=0) > 65535:
        what = (
            f"{path}: {max([*values, *void])} is no value of 16 bit that could be a class or void."
        )
        raise UserError(what, _HINT)
    entries = (replace(e, id=v) for e, v in zip(vocabulary.entries, values, strict=True))
    unused = [value for value in VOID if value not in values and value not in void]
    return Vocabulary(tuple(entries)), (*void, *unused)


def _read_lines(path: Path) -> tuple[Vocabulary, list[int], list[int]]:
    """A text file's classes, their values, and the values of its `void` lines."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError):
        text = ""  # parse_vocabulary says what is wrong
    lines: list[str] = []
    given: list[int | None] = []
    is_void: list[bool] = []
    for line in text.splitlines():
        plain = re.sub(r"(^|\s)#.*", "", line).strip()
        match = _VALUE.match(plain)
        name = match[1] if match else plain
        void = name.split(":")[0].strip().casefold() == "void"
        if match and not name:
            raise UserError(f"{path}: {plain[:80]!r} has a value and no name.", _HINT)
        if plain:
            given.append(int(match[2][:9]) if match else None)  # longer ones are refused, too
            is_void.append(void)
        lines.append("" if void else name)
    vocabulary = parse_vocabulary(path, text="\n".join(lines) if lines else None)
    some = [value for value in given if value is not None]
    if some and len(some) < len(given):
        raise UserError(f"{path}: {len(some)} of {len(given)} lines have a value.", _HINT)
    values = some or list(range(len(given)))
    rows = list(zip(values, is_void, strict=True))
    return vocabulary, [v for v, void in rows if not void], [v for v, void in rows if void]
