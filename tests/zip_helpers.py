"""Zips, and zips in zips, written for tests."""

from __future__ import annotations

import zipfile
from pathlib import Path

STORED, PACKED = zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED


def zip_of(path: Path, content: dict[str, bytes], kind: int = PACKED) -> Path:
    with zipfile.ZipFile(path, "w", kind) as archive:
        for name, data in content.items():
            archive.writestr(name, data)
    return path


def nested(outer: Path, kinds: tuple[int, ...], content: dict[str, bytes], at: str = "a/") -> str:
    """A zip in a zip in ..., the outermost first; the location of the innermost."""
    location, inner = str(outer), outer.with_name("inner.zip")
    data = zip_of(inner, content, kinds[-1]).read_bytes()
    for kind in reversed(kinds[:-1]):
        data = zip_of(inner, {"b/other.txt": b"other", f"{at}in.zip": data}, kind).read_bytes()
        location += f"!{at}in.zip"
    outer.write_bytes(data)
    inner.unlink()
    return location
