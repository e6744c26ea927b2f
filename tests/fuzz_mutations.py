"""Ways in which files go wrong: values in JSON, bytes anywhere, names that lead elsewhere."""

from __future__ import annotations

import copy
import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

STRANGE: tuple[Any, ...] = (
    None, True, -1, 0, 1 << 70, -(1 << 40), 1.5, float("nan"), float("inf"), "", " ", "x" * 5000,
    "../x.png", "/etc/hostname", "..\\x", "a/../../b.jpg", "C:/x", "\x00", "\ud800", "NaN",
    "\x1b[2J\x1b]0;x\x07", "\u202egnp", [], {}, [[]],
    [0, 0, float("nan"), -5], [1e308] * 4, {"counts": "abc", "size": [3, 3]},
    {"counts": [1, 2], "size": [1 << 30, 1 << 30]}, [[0, 0, 1]], [[float("nan")] * 8],
)  # fmt: skip
NUMBERS = (0, -1, 1, 1 << 31, (1 << 63) - 1, 1 << 64, 10**30, 10**6, 1e308, -0.0, float("nan"),
           float("inf"), 1e-320, 0.5)  # fmt: skip
_NUMBER = re.compile(rb"-?\d+(\.\d+)?")
DEEP = 20_000  # brackets inside each other, far deeper than Python recurses


def spoilt_json(value: Any, rng: random.Random) -> tuple[str, str]:
    """JSON text of `value` with one to three things wrong in it, and their kinds."""
    value, kinds, deep = copy.deepcopy(value), set[str](), False
    for _ in range(rng.randint(1, 3)):
        places = list(_places(value))
        if places:
            kind = _spoil(*rng.choice(places), rng)
            deep = deep or kind == "nesting"
            kinds.add(kind)
    text = json.dumps(value)
    if deep:
        text = text.replace('"__deep__"', "[" * DEEP + "]" * DEEP)
    return text, "+".join(sorted(kinds)) or "none"


def spoilt_bytes(
    whole: bytes, rng: random.Random, other: bytes = b"", text: bool = False
) -> tuple[bytes, str]:
    """Bytes cut short, flipped, doubled, filled, or partly replaced, and how.

    other: what a splice takes from. text: also numbers, brackets and control characters.
    """
    data = bytearray(whole)
    at = rng.randrange(len(data) + 1)
    kinds = ["cut", "flip", "insert", "zero", "double", "head", "splice", "encoding"]
    kind = rng.choice([*kinds, "numbers", "brackets", "controls"] if text else kinds)
    if not data:
        return rng.randbytes(20), "insert"
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
    elif kind == "splice":
        start = rng.randrange(len(other) + 1)
        data[at:] = other[start:]
    elif kind == "encoding":
        words = bytes(data).decode("utf-8", "replace")
        form = rng.choice(("utf-16", "utf-32", "utf-8-sig", "cp037"))
        data = bytearray(words.encode(form, "replace"))
    elif kind == "numbers":
        places = list(_NUMBER.finditer(data))
        if places:
            place = rng.choice(places)
            data[place.start() : place.end()] = str(rng.choice(NUMBERS)).encode()
    elif kind == "brackets":
        data[at:at] = rng.choice((b"[", b"{", b"- ", b"(", b"*a ", b"&a ")) * DEEP
    elif kind == "controls":
        data[at:at] = rng.choice((b"\x1b[2J", b"\x00", b"\xc2\x9b", b"\xe2\x80\xae", b"\r"))
    else:  # the header, where sizes and types stand
        for _ in range(3):
            data[rng.randrange(min(64, len(data)))] = rng.randrange(256)
    return bytes(data), kind


def spoilt_safetensors(whole: bytes, rng: random.Random, other: bytes) -> tuple[bytes, str]:
    """A safetensors file with something wrong in its metadata, its header, or its bytes."""
    length = int.from_bytes(whole[:8], "little")
    header: dict[str, Any] = json.loads(whole[8 : 8 + length])
    where = rng.choice(("metadata", "metadata", "metadata", "header", "values", "bytes"))
    if where == "bytes":
        data, kind = spoilt_bytes(whole, rng, other)
        return data, f"bytes {kind}"
    if where == "values":
        size = rng.choice((2, 4))
        value = rng.choice((b"\x00\x7e", b"\x00\x00\xc0\x7f", b"\x00\x00\x80\x7f", b"\xff" * 4))
        at = 8 + length + rng.randrange(max(1, len(whole) - 8 - length - 8)) // size * size
        return whole[:at] + value + whole[at + len(value) :], "values"
    if where == "metadata" and header.get("__metadata__"):
        key = rng.choice(sorted(header["__metadata__"]))
        text = header["__metadata__"][key]
        try:
            inner, kind = spoilt_json(json.loads(text), rng)
        except ValueError:
            inner, kind = spoilt_json([text], rng)
        header["__metadata__"][key] = inner
        head = json.dumps(header).encode()
    else:
        some = {name: header[name] for name in rng.sample(sorted(header), min(4, len(header)))}
        text, kind = spoilt_json(some, rng)
        inside = json.dumps({k: v for k, v in header.items() if k not in some})[1:-1]
        head = (text[:-1] + (", " if inside else "") + inside + "}").encode()
    return len(head).to_bytes(8, "little") + head + whole[8 + length :], f"{where} {kind}"


def _places(value: Any, parent: Any = None, key: Any = None) -> Iterator[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    if parent is not None:
        yield parent, key
    if isinstance(value, (dict, list)):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for name, item in inner:
            yield from _places(item, value, name)


def _spoil(parent: Any, key: Any, rng: random.Random) -> str:
    """Changes a place in a JSON value; returns the kind."""
    kind = rng.choice(("replace", "replace", "delete", "double", "extra", "number", "type", "nest"))
    value = parent[key]
    if kind == "delete":
        del parent[key]
        return "removal"
    if kind == "double" and isinstance(parent, list):
        parent.append(copy.deepcopy(value))
        return "duplication"
    if kind == "extra" and isinstance(parent, dict):
        parent[f"{key} "] = rng.choice(STRANGE)
        return "extra key"
    if kind == "number" and type(value) in (int, float):
        parent[key] = rng.choice(NUMBERS)
        return "number"
    if kind == "type":
        parent[key] = rng.choice(_SWAPS)(value)
        return "type"
    if kind == "nest":
        parent[key] = "__deep__"
        return "nesting"
    parent[key] = copy.deepcopy(rng.choice(STRANGE))
    return "value"


_SWAPS: tuple[Callable[[Any], Any], ...] = (
    str, lambda value: [value], lambda value: {"a": value}, lambda value: None,
    lambda value: json.dumps(value), bool,
)  # fmt: skip
