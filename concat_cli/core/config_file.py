"""YAML deltas and `section.key=value` overrides -> a checked `Config`, and back."""

from __future__ import annotations

import contextlib
import difflib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, fields
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple, cast, get_type_hints

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError, create_model

from concat_cli.core.config import DROPPED, RENAMED, Config
from concat_cli.core.errors import UserError
from concat_cli.core.method import own_sections

Plain = dict[str, dict[str, Any]]  # plain values by section and key
SHIPPED = Path(__file__).parents[1] / "configs"
_ALL_KEYS = "`concat train-con --dry-run --verbose` prints every key with its value."
_LIMITS = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}


class _Given(NamedTuple):
    """One value and where it was written."""

    key: str
    value: Any  # text, a list, or plain; the key's type decides what it means
    where: str


class _Mistakes(list[tuple[str, str]]):
    """What is wrong, and what may have been meant; told all at once."""

    def note(self, what: str, hint: str = "") -> None:
        self.append((what, hint))

    def tell(self) -> None:
        if len(self) == 1:
            raise UserError(self[0][0], self[0][1] or _ALL_KEYS)
        if self:
            lines = "".join(f"\n- {what} {hint}".rstrip() for what, hint in self)
            raise UserError(f"{len(self)} mistakes in the configuration:{lines}", _ALL_KEYS)


def find_config(given: Path | str) -> Path:
    """The shipped configuration of that name, or the file of that path."""
    path = Path(given)
    shipped = SHIPPED / f"{path.name.removesuffix('.yaml')}.yaml"
    named = path.parent == Path() and shipped.is_file()
    return shipped if named and not (path.suffix and path.is_file()) else path


def load_config(path: Path | str | None, overrides: Sequence[str] = ()) -> Config:
    """Defaults, then a file or the shipped configuration of that name, then the overrides;
    UserError with every mistake at once."""
    mistakes = _Mistakes()
    given = [] if path is None else [*_of_file(find_config(path), mistakes)]
    return _build([*given, *_of_overrides(overrides, mistakes)], mistakes)


def override(cfg: Config, overrides: Sequence[str]) -> Config:
    """The configuration with overrides on top; UserError with every mistake at once."""
    mistakes = _Mistakes()
    return _build([*_saved(to_dict(cfg)), *_of_overrides(overrides, mistakes)], mistakes)


def from_dict(raw: Plain) -> Config:
    """The inverse of `to_dict`; keys may be missing. UserError for those that do not exist."""
    return _build(_saved(raw), _Mistakes())


def to_dict(cfg: Config) -> Plain:
    """Plain values by section and key; tuples become lists."""
    return {
        name: {k: [*v] if type(v) is tuple else v for k, v in asdict(section).items()}
        for name, section in cfg.sections().items()
    }


def dump_yaml(cfg: Config, full: bool = False) -> str:
    """YAML that `load_config` reads back to the same value: the deltas, or every key."""
    values = to_dict(cfg)
    if not full:
        usual = to_dict(Config())
        values = {
            section: {k: v for k, v in keys.items() if v != usual[section][k]}
            for section, keys in values.items()
            if keys != usual[section]
        }
    return yaml.safe_dump(values, sort_keys=False, default_flow_style=None, allow_unicode=True)


def diff(before: Config, after: Config) -> list[str]:
    """A line `section.key: old -> new` for each value that differs."""
    old, new = _flat(to_dict(before)), _flat(to_dict(after))
    shown = [(k, "(empty)" if v == "" else v) for k, v in old.items() if new[k] != v]
    return [f"{k}: {v} -> {'(empty)' if new[k] == '' else new[k]}" for k, v in shown]


def _flat(values: Plain) -> dict[str, Any]:
    return {f"{name}.{key}": value for name, keys in values.items() for key, value in keys.items()}


@cache
def _defaults() -> dict[str, Any]:
    """Every `section.key` with its default."""
    return _flat(to_dict(Config()))


@cache
def _sections() -> dict[str, type]:
    """The type of each section, by name."""
    types = get_type_hints(Config)
    return {f.name: types[f.name] for f in fields(Config) if f.name != "methods"} | own_sections()


@cache
def _reader() -> type[Any]:
    """What pydantic checks a whole configuration with."""
    sections: dict[str, Any] = {name: (kind, kind()) for name, kind in _sections().items()}
    settings = ConfigDict(extra="forbid", allow_inf_nan=False)
    return create_model("Configuration", __config__=settings, **sections)


def _saved(raw: Plain) -> list[_Given]:
    return [_Given(key, value, "saved configuration") for key, value in _flat(raw).items()]


def _of_overrides(overrides: Sequence[str], mistakes: _Mistakes) -> Iterator[_Given]:
    for text in overrides:
        key, equals, value = text.partition("=")
        if equals:
            yield _Given(key.strip(), value.strip(), "command line")
        else:
            known = key.strip() in _defaults()
            hint = f"Write {key}=VALUE." if known else "Overrides look like optim.steps=500."
            mistakes.note(f"'{text:.200}' is no key=value.", hint)


def _of_file(path: Path, mistakes: _Mistakes) -> Iterator[_Given]:
    """The file's values as written, each with its line; types are not YAML's business here."""
    try:
        root = yaml.SafeLoader(path.read_text(encoding="utf-8-sig")).get_single_node()
    except FileNotFoundError:
        raise UserError(f"There is no configuration {path}.", _others(path)) from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"Cannot read {path}: {error}.", "Give a YAML file in UTF-8.") from error
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{path}{line} is no valid YAML: {reason}.", "Mend that line.") from error
    for section, node, where in _items(root, path, "section", mistakes):
        if section not in _sections():
            mistakes.note(f"{where}: unknown section '{section:.200}'.", _meant(section[:200]))
            continue
        for key, leaf, place in _items(node, path, section, mistakes):
            listed = leaf.value if isinstance(leaf, yaml.SequenceNode) else [leaf]
            if not all(isinstance(one, yaml.ScalarNode) for one in listed):
                mistakes.note(f"{place}: '{section}.{key}' takes a value, or a list of them.")
                continue
            value: Any = None if _is_null(leaf) else leaf.value
            if listed is leaf.value:
                value = [one.value for one in listed]
            yield _Given(f"{section}.{key}", value, place)


def _items(node: Any, path: Path, what: str, mistakes: _Mistakes) -> Iterator[tuple[str, Any, str]]:
    """Key, value and place of each entry of a mapping; notes what is none, and double keys."""
    if node is None or _is_null(node):
        return
    if not isinstance(node, yaml.MappingNode):
        place = f"{path}:{node.start_mark.line + 1}"
        return mistakes.note(f"{place}: '{what}' must hold indented `key: value` lines.")
    seen: set[str] = set()
    for key, value in node.value:
        place = f"{path}:{key.start_mark.line + 1}"
        if str(key.value) in seen:
            mistakes.note(f"{place}: '{key.value!s:.200}' is given twice.")
            continue
        seen.add(str(key.value))
        yield str(key.value), value, place


def _is_null(node: yaml.Node) -> bool:
    return node.tag == "tag:yaml.org,2002:null"


def _build(given: Sequence[_Given], mistakes: _Mistakes) -> Config:
    values: Plain = {}
    written: dict[str, _Given] = {}
    for one in given:
        key = RENAMED.get(one.key, one.key)
        if key in DROPPED:
            if str(one.value).lower() != DROPPED[key]:
                what = f"{one.where}: {key} is no more, and {DROPPED[key]} is what is left of it."
                mistakes.note(what, "Leave it out, or take concat 0.1.")
        elif key not in _defaults():
            mistakes.note(f"{one.where}: unknown key '{key:.200}'.", _meant(key[:200]))
        else:
            section, name = key.split(".")
            values.setdefault(section, {})[name] = _prepared(one.value, _defaults()[key])
            written[key] = written[section] = one
    sections: dict[str, Any] = {}
    try:
        sections = dict(_reader().model_validate(values))
    except ValidationError as error:
        of_each = {wrong["loc"][:2]: wrong for wrong in reversed(error.errors())}
        for wrong in reversed(of_each.values()):  # of a list's many, the first
            mistakes.note(*_wrong(wrong, written))
    mistakes.tell()
    own = tuple(sections.pop(name) for name in own_sections())
    try:
        return Config(**sections, methods=own)
    except ValueError as error:  # sections that do not fit together
        what = f"The configuration does not fit together: {error}."
        raise UserError(what, _ALL_KEYS) from error


def _prepared(value: Any, default: Any) -> Any:
    """A value as written, in a form that pydantic takes for one of the default's type."""
    if isinstance(default, list):
        parts: Any = value.strip("[]() ").split(",") if isinstance(value, str) else value or []
        if not isinstance(parts, list):
            return parts
        return [part for part in cast("list[Any]", parts) if str(part).strip()]
    if isinstance(default, str):
        return "" if value is None else value
    if type(default) is int and isinstance(value, str):
        with contextlib.suppress(ValueError):
            return float(value)  # 1e3 and 2.0 are whole numbers
    return value


def _wrong(error: Any, written: dict[str, _Given]) -> tuple[str, str]:
    """One of pydantic's errors in words: what a key takes, and what was given instead."""
    key = ".".join(error["loc"][:2])
    given, limits = written[key], error.get("ctx", {})
    if key not in _defaults():  # keys of a section that do not fit together
        told = str(limits["error"])
        named = [k for k in written if k.startswith(f"{key}.") and k.split(".")[1] in told]
        return f"{given.where}: {key}: {told}.", " ".join(map(_about, named))
    if given.value in (None, "", []):
        return f"{given.where}: {key} has no value.", _about(key)
    many = isinstance(given.value, list)
    shown = f"the list {given.value!s:.200}" if many else f"'{given.value!s:.200}'"
    wanted = "finite" if error["type"] == "finite_number" else _kind(_schema(key))
    for name in _LIMITS.keys() & limits:
        wanted = f"{_LIMITS[name]} {limits[name]:.10g}"
    choices: list[str] = _schema(key).get("enum", [])
    close = difflib.get_close_matches(str(given.value), choices, n=1, cutoff=0.5)
    meant = f" Did you mean {close[0]}?" if close else ""
    return f"{given.where}: {key} must be {wanted}, is {shown}.{meant}", _about(key)


def _about(key: str) -> str:
    """A key's type and its default, as it is written in an override."""
    default = _defaults()[key]
    shown = str(default).lower() if type(default) in (bool, list) else str(default)
    return f"{key} is {_kind(_schema(key))}; its default is {shown or 'empty'}."


def _schema(key: str) -> dict[str, Any]:
    """The JSON schema of a key."""
    section, name = key.split(".")
    return TypeAdapter(_sections()[section]).json_schema()["properties"][name]


def _kind(schema: dict[str, Any]) -> str:
    """A key's type in words, and its range as far as one would come near to its ends."""
    if "enum" in schema:
        return f"one of {', '.join(schema['enum'])}"
    if schema["type"] == "array":
        return f"a list, each {_kind(schema['items'])}"
    names = {"boolean": "true or false", "integer": "a whole number", "number": "a number"}
    ends = ("minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum")
    known = {word: schema[e] for e, word in zip(ends, _LIMITS.values(), strict=True) if e in schema}
    bounds = " and ".join(f"{word} {v:g}" for word, v in known.items() if abs(v) < 1e6)
    return f"{names.get(schema['type'], 'text')} {bounds}".strip()


def _others(path: Path) -> str:
    """The configuration that may have been meant, of those beside it and the shipped ones."""
    beside = {p.stem: str(p) for p in sorted(path.parent.glob("*.yaml"))}
    names = {p.stem: p.stem for p in sorted(SHIPPED.glob("*.yaml"))} | beside
    close = difflib.get_close_matches(path.stem, names, n=1, cutoff=0.5)
    return f"Did you mean {names[close[0]]}?" if close else f"There are: {', '.join(names)}."


def _meant(key: str) -> str:
    """The nearest keys: of that name in other sections, else by spelling."""
    section, dot, name = key.rpartition(".")
    same = [k for k in _defaults() if k.split(".")[1] == name]
    if dot or same:
        close = difflib.get_close_matches(key, same, n=1 if dot else 3, cutoff=0.0)
        close = close or difflib.get_close_matches(key, _defaults(), n=1, cutoff=0.5)
    else:
        close = difflib.get_close_matches(key, [*_sections(), *_defaults()], n=2, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(close)}?"
    if section in _sections():
        return f"{section} has: {', '.join(f.name for f in fields(_sections()[section]))}."
    return f"Sections are: {', '.join(_sections())}."
