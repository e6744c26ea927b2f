"""File names as a JSON lists them -> the files that are meant, where exactly one can be.

Tools write backslashes, the folder of the images once more, or the place on another machine.
"""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Sequence

from concat_cli.core.data.store import is_safe, open_store
from concat_cli.core.errors import UserError


def fitted(names: Sequence[str], location: str, listed_in: str) -> tuple[dict[str, str], str]:
    """Name as listed -> the file of that location, and what to say of those named otherwise.

    A name means the file whose path it ends with, or that ends with it; upper and lower case do not
    matter. UserError where several fit, or one fits several names. What nothing fits keeps its
    name, less what leads out of the location, and is missing.
    """
    store = open_store(location)
    there = set(store.names())
    found = {n: n for n in names if n in there or (is_safe(n) and store.stamp(n) is not None)}
    astray = [name for name in dict.fromkeys(names) if name not in found]
    if not astray:
        return found, ""
    files: dict[str, list[tuple[list[str], str]]] = {}
    for file in there:
        parts = _parts(file)
        files.setdefault(parts[-1], []).append((parts, file))
    missing: dict[str, str] = {}
    owners = {file: name for name, file in found.items()}
    for name in astray:
        parts = _parts(name)
        near = files.get(parts[-1], []) if parts else []
        fits = sorted(file for other, file in near if _is_end(other, parts))
        if not fits:
            missing[name] = "/".join(_steps(name)) or name
        elif len(fits) > 1:
            raise UserError(
                f"{listed_in} names {name!r}, which may be {fits[0]} or {fits[1]} in {location}.",
                "Name the folder that the listed names begin in, or one with these images alone.",
            )
        elif (first := owners.setdefault(fits[0], name)) != name:
            raise UserError(
                f"{listed_in} names {first!r} and {name!r}, but {location} has {fits[0]} alone.",
                "Name the folder that the listed names begin in.",
            )
        else:
            found[name] = fits[0]
    told = [name for name in astray if name in found]
    if not told:
        return found | missing, ""
    note = (
        f"{len(told)} of {len(set(names))} names in {listed_in} are otherwise than in {location}: "
        f"{told[0]!r} is read as {found[told[0]]}"
    )
    return found | missing, note


def together(places: Sequence[str]) -> tuple[str, list[str]]:
    """The location that files lie in, and their names in it; places may be "x.zip!folder/file"."""
    apart = [apart_path(place) for place in places]
    folder = os.path.commonpath([os.path.dirname(place) for place in apart])  # noqa: PTH120
    return joined(folder), [place[len(folder) :].lstrip("/") for place in apart]


def apart_path(location: str) -> str:
    """The whole path of a location, with a zip as a folder: "x.zip!a" -> "/here/x.zip!/a"."""
    return os.path.abspath(location.replace(".zip!", ".zip!/"))  # noqa: PTH100


def joined(path: str) -> str:
    """A location from a path on which a zip is a folder: "x.zip!/a" -> "x.zip!a"."""
    return path.removesuffix("!").replace(".zip!/", ".zip!")


def _steps(name: str) -> list[str]:
    """The folders and the file that a name goes through, less drives and ways up."""
    steps = re.split(r"[\\/]+", name)
    return [step for step in steps if step not in ("", ".", "..") and not step.endswith(":")]


def _parts(name: str) -> list[str]:
    """The steps in a form in which case and the system's way of writing accents do not count."""
    return [unicodedata.normalize("NFC", step).casefold() for step in _steps(name)]


def _is_end(one: list[str], other: list[str]) -> bool:
    """Whether the shorter path is the end of the longer."""
    length = min(len(one), len(other))
    return one[-length:] == other[-length:]
