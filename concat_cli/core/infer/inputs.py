"""Files, folders and globs -> picture paths."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from concat_cli.core.errors import UserError

SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".tif", ".tiff", ".webp", ".bmp"})
OVERLAY = ".overlay.png"  # how `predict` ends the names of the pictures that it draws


def expand_inputs(inputs: Sequence[str]) -> list[Path]:
    """Every picture once, in the order given, those of a folder or glob by name.

    A folder gives the pictures directly in it, without hidden files and overlays; a glob may hold
    `**`. UserError where one of the inputs gives nothing.
    """
    paths: dict[Path, None] = {}  # an ordered set
    for text in inputs:
        paths.update(dict.fromkeys(_expand(text)))
    return list(paths)


def _expand(text: str) -> list[Path]:
    path = Path(text)
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [p for p in sorted(path.iterdir()) if is_picture(p)]
        if not found:
            raise UserError(
                f"The folder {path} holds no picture ({', '.join(sorted(SUFFIXES))}).",
                f'For the folders below it, write "{path}/**/*.jpg".',
            )
        return found
    if any(sign in text for sign in "*?["):
        root = Path(path.anchor)
        found = [p for p in sorted(root.glob(str(path.relative_to(root)))) if is_picture(p)]
        if not found:
            raise UserError(f"No picture matches {text}.", "Check the pattern and the folder.")
        return found
    raise UserError(f"There is no picture {path}.", "Give files, folders or globs of pictures.")


def is_picture(path: Path) -> bool:
    """A file with a picture's ending that is neither hidden nor an overlay made here."""
    return (
        path.suffix.lower() in SUFFIXES
        and not path.name.startswith(".")
        and not path.name.endswith(OVERLAY)
        and path.is_file()
    )
