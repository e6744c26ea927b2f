"""What goes in: files, folders and globs as paths, and pictures of every kind as arrays."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from concat_cli.core.data.image_io import WHITE, foreign_kind, read_image, rgb_array
from concat_cli.core.data.store import SUFFIXES
from concat_cli.core.errors import UserError
from concat_cli.core.progress import SILENT, Progress

if TYPE_CHECKING:
    from torch import Tensor

OVERLAY = ".overlay.png"  # how `predict` ends the names of the pictures that it draws
VIDEOS = frozenset(".avi .m4v .mkv .mov .mp4 .mpeg .mpg .webm .wmv".split())  # endings
LITTER = frozenset({"__MACOSX", ".ipynb_checkpoints"})  # folders that hold no pictures of their own
CHANNELS = (1, 3, 4)  # grey, RGB, RGBA

Picture: TypeAlias = "NDArray[Any] | Path | str | Image.Image | Tensor"


def to_array(picture: Picture, white: int = WHITE) -> NDArray[np.uint8]:
    """(H, W, 3) uint8 RGB of a picture; what is transparent is laid over white.

    A path; a PIL image; an array or a tensor (H, W), (H, W, C) or (C, H, W), of uint8 or of floats
    in 0-1, of C = 1 (grey), 3 (RGB) or 4 (RGBA) channels. Where both ends may be C, an array has it
    last and a tensor first. white: as of `read_image`, of paths and PIL images. UserError for
    anything else, and for a file that cannot be read.
    """
    from torch import Tensor  # heavy, and not needed to find pictures

    if isinstance(picture, (str, Path)):
        return read_image(Path(picture), white=white)
    if isinstance(picture, Image.Image):
        return rgb_array(picture, white)
    if isinstance(picture, Tensor):
        values = picture.detach().cpu()
        values = values.float() if values.is_floating_point() else values
        return _from_values(
            values.numpy(), (0, -1), f"a tensor {tuple(picture.shape)} of {picture.dtype}"
        )
    if not isinstance(picture, np.ndarray):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise _no_picture(f"a {type(picture).__name__}")
    return _from_values(picture, (-1, 0), f"an array {picture.shape} of {picture.dtype}")


def _from_values(values: NDArray[Any], ends: tuple[int, int], given: str) -> NDArray[np.uint8]:
    """ends: where the channels may be, the likelier place first."""
    if values.ndim == 3 and values.size:
        place = next((end for end in ends if values.shape[end] in CHANNELS), None)
        if place is None:
            raise _no_picture(given)
        values = np.moveaxis(values, place, -1)
        values = values[..., 0] if values.shape[2] == 1 else values
    elif values.ndim != 2 or not values.size:
        raise _no_picture(given)
    if values.dtype.kind == "f":
        low, high = values.min(), values.max()
        if not (low >= 0 and high <= 1):  # nan is refused, too
            raise _no_picture(f"{given} with values from {low:g} to {high:g}")
        values = np.rint(values * 255).astype(np.uint8)
    if values.dtype != np.uint8:
        raise _no_picture(given)
    if values.ndim == 3 and values.shape[2] == 3:
        return values
    return rgb_array(Image.fromarray(np.ascontiguousarray(values)))


def _no_picture(given: str) -> UserError:
    return UserError(
        f"This is no picture: {given}.",
        "Give a path, a PIL image, or an array or tensor (H, W, 3), (H, W), (H, W, 4) or with the "
        "channels first, of uint8 or of floats in 0-1; several pictures as a list.",
    )


def expand_inputs(inputs: Sequence[str], progress: Progress = SILENT) -> list[Path]:
    """Every picture once, in the order given, those of a folder or glob by name.

    A folder gives the pictures directly in it, without hidden files and overlays; a glob may hold
    `**`. What is passed over is told, with the reason. UserError where one of the inputs gives
    nothing.
    """
    return list(dict.fromkeys(path for text in inputs for path in _expand(text, progress)))


def _expand(text: str, progress: Progress) -> list[Path]:
    path = Path(text)
    if path.is_file():
        return [path]
    if path.is_dir():
        return _pictures(
            sorted(path.iterdir()),
            f"The folder {path} holds no picture",
            f'For the folders below it, write "{path}/**/*.jpg".',
            progress,
        )
    if any(sign in text for sign in "*?["):
        root = Path(path.anchor)
        return _pictures(
            sorted(root.glob(str(path.relative_to(root)))),
            f"No picture matches {text}",
            "Check the pattern and the folder.",
            progress,
        )
    raise UserError(f"There is no picture {path}.", "Give files, folders or globs of pictures.")


def check_name(path: Path) -> None:
    """UserError where the path is no UTF-8, as the JSON that lists the pictures must be."""
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        shown = os.fsencode(path).decode("utf-8", "backslashreplace")
        what = f"The file name of {shown} is no UTF-8, so no JSON can hold it."
        raise UserError(what, "Rename the picture.") from error


def is_video(path: Path) -> bool:
    """A file with a video's ending."""
    return path.suffix.lower() in VIDEOS and path.is_file()


def is_picture(path: Path) -> bool:
    """A file with a picture's ending that is neither hidden nor an overlay made here."""
    return path.suffix.lower() in SUFFIXES and not _is_ours(path) and path.is_file()


def _pictures(paths: Sequence[Path], nothing: str, hint: str, progress: Progress) -> list[Path]:
    """The pictures among the paths; the others are told, or make the UserError."""
    found = [path for path in paths if is_picture(path)]
    left = set(paths).difference(found)
    told = _passed_over(path for path in left if path.is_file() and not _is_ours(path))
    if not found:
        raise UserError(f"{nothing}{told and f': only {told}'}.", hint)
    if told:
        progress.say(f"pictures {len(found)}; passed over: {told}")
    return found


def _passed_over(paths: Iterable[Path]) -> str:
    """How many files of each ending there are, and what those of known kinds are."""
    kinds = Counter((path.suffix.lower() or "without ending", foreign_kind(path)) for path in paths)
    return ", ".join(
        f"{count} {ending}" + (f" ({_advice(ending, kind)})" if kind or ending in VIDEOS else "")
        for (ending, kind), count in sorted(kinds.items())
    )


def _advice(ending: str, kind: str) -> str:
    if ending in VIDEOS:
        return "a video, which is predicted alone: give it by its name"
    return f"{kind}, which is not read: convert it first"


def _is_ours(path: Path) -> bool:
    """Hidden or left behind by another program, or an overlay that `predict` drew."""
    litter = path.name.startswith(".") or LITTER.intersection(path.parts)
    return bool(litter) or path.name.endswith(OVERLAY)
