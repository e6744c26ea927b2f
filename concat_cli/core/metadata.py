"""What a weights file says of itself: one schema for the files of all methods and stages."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from concat_cli.core.errors import UserError
from concat_cli.core.method import stage_named
from concat_cli.core.vocabulary import ClassEntry

FORMAT = 1
_AGAIN = "Copy the file again, or make it again with the command that wrote it."


@dataclass(frozen=True)
class _Clip:
    model: str
    pretrained: str
    sha256: str


@dataclass(frozen=True)
class _Data:
    name: str
    class_split: str | None
    filtering: dict[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True)
class _Published:
    source: str
    sha256: str
    classes: tuple[str, ...]


@dataclass(frozen=True)
class _Meta:
    """Keys that are not listed are left to methods of other packages."""

    format: int
    stage: str
    config: dict[str, dict[str, Any]]  # checked where it is read (`config_file.from_dict`)
    vocabulary: tuple[ClassEntry, ...]
    trained: tuple[str, ...]
    clip: _Clip
    version: str = ""
    step: int = 0
    taught: tuple[str, ...] = ()
    data: _Data = _Data("", None)
    segmentor: str = ""
    published: _Published = _Published("", "", ())


NEEDED = ("format", "stage", "config", "vocabulary", "trained", "clip")


@cache
def _schema() -> TypeAdapter[_Meta]:
    return TypeAdapter(_Meta)


def checked_meta(path: Path, text: str, meta: dict[str, Any]) -> dict[str, Any]:
    """The metadata of a file of ours; UserError that names the field where one is missing or wrong.

    text: the JSON that `meta` was read from.
    """
    if not meta.keys() >= set(NEEDED):
        raise UserError(
            f"{path} holds tensors, but concat did not write it.",
            "Give weights made by `concat train-con`, `train-cat` or `finetune`.",
        )
    if meta["format"] != FORMAT:
        raise UserError(
            f"{path} has format {meta['format']!r:.80}, this version reads {FORMAT}.",
            f"Use concat {meta.get('version', 'of another version')!s:.80}.",
        )
    try:
        found = _schema().validate_json(text, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "it"
        raise _wrong(path, f"{place}: {first['msg']}") from error
    classes = found.vocabulary
    for what, values in (("id", [c.id for c in classes]), ("name", [c.name for c in classes])):
        value, count = next(iter(Counter(values).most_common(1)), ("", 0))
        if count > 1:
            raise _wrong(path, f"vocabulary: two classes have the {what} {value!r:.80}")
    for number, one in enumerate(classes):
        if not 0 <= one.id < 1 << 31 or not one.name.strip():
            what = f"the class {one.name!r:.80} with the id {one.id:.10g}"
            raise _wrong(path, f"vocabulary.{number}: {what} cannot be")
    try:
        stage_named(found.stage)
    except UserError as error:
        raise UserError(f"{path}: {error.what}", error.hint) from error
    return meta


def parsed(text: str) -> dict[str, Any]:
    """The JSON object of a text; ValueError where it holds none, or is nested too deeply."""
    try:
        found: Any = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    return dict(found)


def _wrong(path: Path, what: str) -> UserError:
    return UserError(f"The metadata of {path} is not as it should be: {what}.", _AGAIN)
