"""Ways in which files go wrong: values in JSON, bytes anywhere, names that lead elsewhere."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from typing import Any

STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 1 << 70, -(1 << 40), 1.5, float("nan"), float("inf"), "", " ", "x" * 5000,
    "../x.png", "/etc/hostname", "..\\x", "a/../../b.jpg", "C:/x", "\x00", "\ud800", "NaN",
    [], {}, [[]],
    [0, 0, float("nan"), -5], [1e308] * 4, {"counts": "abc", "size": [3, 3]},
    {"counts": [1, 2], "size": [1 << 30, 1 << 30]}, [[0, 0, 1]], [[float("nan")] * 8],
)  # fmt: skip


def mutated_json(value: Any, rng: random.Random) -> str:
    """JSON text of `value` with one to three things wrong in it."""
    value = copy.deepcopy(value)
    for _ in range(rng.randint(1, 3)):
        places = list(_places(value))
        if places:
            _spoil(*rng.choice(places), rng)
    return json.dumps(value)


def mutated_bytes(whole: bytes, rng: random.Random) -> bytes:
    """The bytes cut short, flipped, doubled, filled, or with a few of them replaced."""
    data = bytearray(whole)
    at = rng.randrange(len(data) + 1)
    kind = rng.choice(("cut", "flip", "insert", "zero", "double", "head"))
    if kind == "cut":
        del data[at:]
    elif kind == "flip":
        for _ in range(rng.randint(1, 8)):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    elif kind == "insert":
        data[at:at] = rng.randbytes(rng.randint(1, 40))
    elif kind == "zero":
        data[at : at + 30] = bytes(len(data[at : at + 30]))
    elif kind == "double":
        data += data[at:]
    else:  # the header, where sizes and types stand
        for _ in range(3):
            data[rng.randrange(min(64, len(data)))] = rng.randrange(256)
    return bytes(data)


def _places(value: Any, parent: Any = None, key: Any = None) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    if parent is not None:
        yield parent, key
    if isinstance(value, (dict, list)):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in inner:
            yield from _places(item, value, name)


def _spoil(parent: Any, key: Any, rng: random.Random) -> None:
    kind = rng.choice(("replace", "replace", "delete", "double", "extra"))
    if kind == "delete":
        del parent[key]
    elif kind == "double" and isinstance(parent, list):
        parent.append(copy.deepcopy(parent[key]))
    elif kind == "extra" and isinstance(parent, dict):
        parent[f"{key} "] = rng.choice(STRANGE)
    else:
        parent[key] = copy.deepcopy(rng.choice(STRANGE))
