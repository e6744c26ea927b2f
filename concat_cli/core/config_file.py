"""YAML deltas and `section.key=value` overrides -> a checked `Config`, and back."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import yaml

from concat_cli.core.config import Config
from concat_cli.core.errors import UserError

Raw = str | list[str] | None  # a value as written; the field's type decides what it means
_SECTIONS: dict[str, type] = get_type_hints(Config)
_TYPES: dict[str, Any] = {
    f"{section}.{key}": kind
    for section, cls in _SECTIONS.items()
    for key, kind in get_type_hints(cls).items()
}
_ALL_KEYS = "`concat train-con --dry-run` prints every key with its value."
_TRUE, _FALSE = ("true", "yes", "on", "1"), ("false", "no", "off", "0")


@dataclass(frozen=True)
class _Given:
    """One value and where it was written."""

    key: str
    value: Raw
    where: str


@dataclass(frozen=True)
class _Problem:
    """One mistake, and what may have been meant."""

    what: str
    hint: str = ""

    def __str__(self) -> str:
        return f"{self.what} {self.hint}".strip()


def load_config(path: Path | None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then the file, then the overrides; UserError with every mistake at once."""
    problems: list[_Problem] = []
    given = _read_yaml(path, problems) if path is not None else []
    given += [one for text in overrides if (one := _read_override(text, problems)) is not None]
    return _build(given, problems)


def override(cfg: Config, overrides: Sequence[str]) -> Config:
    """The configuration with overrides on top; UserError with every mistake at once."""
    problems: list[_Problem] = []
    given = _given(to_dict(cfg), "saved configuration")
    given += [one for text in overrides if (one := _read_override(text, problems)) is not None]
    return _build(given, problems)


def from_dict(raw: dict[str, dict[str, Any]], where: str = "saved configuration") -> Config:
    """The inverse of `to_dict`; keys may be missing. UserError for those that do not exist."""
    return _build(_given(raw, where), [])


def to_dict(cfg: Config) -> dict[str, dict[str, Any]]:
    """Plain values by section and key; tuples become lists."""
    return {
        section: {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()}
        for section, values in asdict(cfg).items()
    }


def dump_yaml(cfg: Config, full: bool = False) -> str:
    """YAML that `load_config` reads back to the same value: the deltas, or every key."""
    values, default = to_dict(cfg), to_dict(Config())
    kept = {
        section: {k: v for k, v in keys.items() if full or v != default[section][k]}
        for section, keys in values.items()
    }
    kept = {section: keys for section, keys in kept.items() if keys}
    return yaml.safe_dump(kept, sort_keys=False, default_flow_style=None, allow_unicode=True)


def diff(before: Config, after: Config) -> list[str]:
    """A line `section.key: old -> new` for each value that differs."""
    old, new = to_dict(before), to_dict(after)
    return [
        f"{section}.{key}: {_shown(old[section][key])} -> {_shown(value)}"
        for section, keys in new.items()
        for key, value in keys.items()
        if value != old[section][key]
    ]


def _given(raw: dict[str, dict[str, Any]], where: str) -> list[_Given]:
    return [
        _Given(f"{section}.{key}", _plain(value), where)
        for section, values in raw.items()
        for key, value in values.items()
    ]


def _shown(value: Any) -> str:
    return "(empty)" if value == "" else str(value)


def _plain(value: Any) -> Raw:
    if value is None or isinstance(value, str):
        return value
    return [str(v) for v in value] if isinstance(value, (list, tuple)) else str(value)


def _read_override(text: str, problems: list[_Problem]) -> _Given | None:
    key, equals, value = text.partition("=")
    if not equals:
        known = key.strip() in _TYPES
        hint = f"Write {key}=VALUE." if known else "Overrides look like optim.steps=500."
        problems.append(_Problem(f"'{text}' is no key=value.", hint))
        return None
    return _Given(key.strip(), value.strip(), "command line")


def _read_yaml(path: Path, problems: list[_Problem]) -> list[_Given]:
    """The file's values as written, each with its line; types are not YAML's business here."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8-sig"), yaml.SafeLoader)
    except FileNotFoundError:
        raise UserError(f"There is no configuration {path}.", _others(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {path}: {error}.", "Give a YAML file in UTF-8.") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}{line} is no valid YAML: {reason}.", "Mend that line.") from error
    if root is None:
        return []
    given: list[_Given] = []
    for section, node, where in _items(root, path, "section", problems):
        if section in _SECTIONS and _is_null(node):
            continue
        if section in _SECTIONS:
            for key, leaf, place in _items(node, path, section, problems):
                given.append(_Given(f"{section}.{key}", _raw(leaf), place))
        else:
            problems.append(_Problem(f"{where}: unknown section '{section}'.", _meant(section)))
    return given


def _items(
    node: yaml.Node, path: Path, what: str, problems: list[_Problem]
) -> Iterable[tuple[str, yaml.Node, str]]:
    """Key, value and place of each entry of a mapping; notes what is none, and double keys."""
    if not isinstance(node, yaml.MappingNode):
        line = node.start_mark.line + 1
        problems.append(_Problem(f"{path}:{line}: '{what}' must hold indented `key: value` lines."))
        return
    seen: set[str] = set()
    for key, value in node.value:
        place = f"{path}:{key.start_mark.line + 1}"
        if str(key.value) in seen:
            problems.append(_Problem(f"{place}: '{key.value}' is given twice."))
            continue
        seen.add(str(key.value))
        yield str(key.value), value, place


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _raw(node: yaml.Node) -> Raw:
    if _is_null(node):
        return None
    if isinstance(node, yaml.SequenceNode):
        return [str(item.value) for item in node.value]
    return str(node.value)


def _others(path: Path) -> str:
    near = path.parent if path.parent.is_dir() else Path("configs")
    names = [p.name for p in sorted(near.glob("*.yaml"))]
    close = difflib.get_close_matches(path.name, names, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {near / close[0]}?"
    return f"There are: {', '.join(names)} in {near}." if names else "Check the path."


def _build(given: list[_Given], problems: list[_Problem]) -> Config:
    values: dict[str, dict[str, Any]] = {section: {} for section in _SECTIONS}
    where: dict[str, str] = {}
    for one in given:
        if one.key not in _TYPES:
            what = f"{one.where}: unknown key '{one.key}'."
            problems.append(_Problem(what, _meant(one.key)))
            continue
        section, key = one.key.split(".")
        try:
            values[section][key] = _coerce(one.value, _TYPES[one.key])
            where[section] = one.where
        except ValueError as error:
            problems.append(_Problem(f"{one.where}: {one.key} {error}", _about(one.key)))
    sections: dict[str, Any] = {}
    for section, cls in _SECTIONS.items():
        try:
            sections[section] = cls(**values[section])
        except ValueError as error:
            named = set(re.findall(r"\w+", str(error)))
            about = " ".join(_about(f"{section}.{k}") for k in values[section] if k in named)
            what = f"{where.get(section, 'defaults')}: {section}: {error}."
            problems.append(_Problem(what, about))
    if problems:
        raise _error(problems)
    try:
        return Config(**sections)
    except ValueError as error:  # sections that do not fit together
        raise _error([_Problem(f"The configuration does not fit together: {error}.")]) from None


def _error(problems: list[_Problem]) -> UserError:
    if len(problems) == 1:
        return UserError(problems[0].what, problems[0].hint or _ALL_KEYS)
    lines = "\n".join(f"- {problem}" for problem in problems)
    return UserError(
        f"{len(problems)} mistakes in the configuration:\n{lines}",
        _ALL_KEYS,
    )


def _about(key: str) -> str:
    """A key's type and its default."""
    section, name = key.split(".")
    default = getattr(getattr(Config(), section), name)
    shown = "empty" if default in ("", ()) else _written(default)
    return f"{key} is {_type_name(_TYPES[key])}; its default is {shown}."


def _written(value: Any) -> str:
    """A value as it is written in an override."""
    if isinstance(value, tuple):
        return ",".join(map(_written, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


def _type_name(kind: Any) -> str:
    if get_origin(kind) is tuple:
        return f"a list, each {_type_name(get_args(kind)[0])}"
    if get_origin(kind) is Literal:
        return f"one of {', '.join(get_args(kind))}"
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text"}[kind]


def _meant(key: str) -> str:
    """The nearest keys: of that name in other sections, else by spelling."""
    if "." not in key and key not in (k.split(".")[1] for k in _TYPES):
        close = difflib.get_close_matches(key, [*_SECTIONS, *_TYPES], n=2, cutoff=0.5)
    else:
        same = [k for k in _TYPES if k.split(".")[1] == key.split(".")[-1]]
        close = difflib.get_close_matches(key, same, n=1 if "." in key else 3, cutoff=0.0)
        close = close or difflib.get_close_matches(key, _TYPES, n=1, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    section = key.split(".")[0]
    if section in _SECTIONS:
        return f"{section} has: {', '.join(f.name for f in fields(_SECTIONS[section]))}."
    return f"Sections are: {', '.join(_SECTIONS)}."


def _coerce(value: Raw, kind: Any) -> Any:
    """The value as the field's type; ValueError with a predicate ("must be ..., is ...")."""
    if get_origin(kind) is tuple:
        parts = value.strip("[]() ").split(",") if isinstance(value, str) else value or []
        return tuple(_coerce(part.strip(), get_args(kind)[0]) for part in parts if part.strip())
    if isinstance(value, list):
        raise ValueError(f"must be one value, is the list [{', '.join(value)}].")
    if get_origin(kind) is Literal:
        return _choice(value or "", get_args(kind))
    if kind is str:
        return value or ""
    if value is None or value == "":
        raise ValueError("has no value.")
    return {bool: _bool, int: _int, float: _float}[kind](value)


def _choice(value: str, choices: tuple[str, ...]) -> str:
    if value in choices:
        return value
    close = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
    meant = f" Did you mean {close[0]}?" if close else ""
    raise ValueError(f"must be one of {', '.join(choices)}, is '{value}'.{meant}")


def _bool(value: str) -> bool:
    if value.lower() in (*_TRUE, *_FALSE):
        return value.lower() in _TRUE
    raise ValueError(f"must be true or false, is '{value}'.")


def _int(value: str) -> int:
    try:
        return int(value)
    except ValueError:
        number = _float(value, "a whole number")
    if number != int(number):
        raise ValueError(f"must be a whole number, is '{value}'.")
    return int(number)


def _float(value: str, what: str = "a number") -> float:
    try:
        number = float(value)
    except ValueError:
        raise ValueError(f"must be {what}, is '{value}'.") from None
    if not math.isfinite(number):
        raise ValueError(f"must be finite, is '{value}'.")
    return number
