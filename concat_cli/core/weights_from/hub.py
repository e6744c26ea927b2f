"""Published weights: what is in the local cache is used; what is not is told at once.

Without a network, the libraries that download (open_clip, timm) retry for half a minute for each
file. So the hub is tried once, shortly, and they are told that there is no network.
"""

from __future__ import annotations

import os
import socket
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from huggingface_hub import constants

from concat_cli.core.errors import UserError
from concat_cli.core.files import read_json
from concat_cli.core.weights_from.published import (
    PREFIX,
    WEIGHT_FILES,
    Part,
    how_to_get,
    in_words,
    located,
    segmentor_part,
)

_WAIT = 4.0  # seconds
# Approximate sizes of common downloads in GB: parameters x 4 bytes. Segmentors are in the list of
# published ones.
SIZES: dict[str, float] = {
    "RN50": 0.41, "RN101": 0.48, "RN50x4": 0.71, "RN50x16": 1.16, "RN50x64": 2.49,
    "ViT-B-32": 0.61, "ViT-B-16": 0.60, "ViT-B-16-SigLIP": 0.81, "ViT-L-14": 1.71,
    "ViT-L-14-336": 1.71, "ViT-H-14": 3.94,
    "pvt_v2_b2": 0.10, "convnext_base": 0.61, "convnext_base_w": 0.72, "convnext_base_w_320": 0.72,
    "convnext_large_d": 1.41, "convnext_large_d_320": 1.41,
    "resnet50": 0.10, "resnet101": 0.18, "swin_tiny_patch4_window7_224": 0.11,
    "swin_small_patch4_window7_224": 0.20, "swin_base_patch4_window7_224": 0.35,
    "swin_base_patch4_window12_384": 0.36, "swin_large_patch4_window7_224": 0.79,
    "swin_large_patch4_window12_384": 0.79,
}  # fmt: skip


def short(error: BaseException, most: int = 160) -> str:
    """An error's message as one line of limited length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= most else text[:most] + "..."


def size_of(name: str) -> str:
    """`of about 600 MB`, or `of unknown size`."""
    size = SIZES.get(name.removesuffix("-quickgelu"))
    return in_words(segmentor_part(name).bytes if size is None else round(size * 1e9))


def reachable() -> bool:
    """Whether the hub answers within a few seconds; behind a proxy it is taken to."""
    if constants.HF_HUB_OFFLINE:
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
        return True
    place = urlsplit(constants.ENDPOINT)
    address = (place.hostname or "", place.port or (443 if place.scheme == "https" else 80))
    answers: list[bool] = []

    def knock() -> None:
        try:
            socket.create_connection(address, timeout=_WAIT).close()
            answers.append(True)
        except OSError:
            answers.append(False)

    thread = threading.Thread(target=knock, daemon=True)  # a lookup of names has no limit of time
    thread.start()
    thread.join(_WAIT)
    return answers == [True]


@contextmanager
def without_waiting(all_cached: bool = False) -> Generator[bool]:
    """Inside, downloads fail at once where the hub cannot be reached; yields whether it can.

    all_cached: nothing will be downloaded; the hub is not asked at all.
    """
    there, before = not all_cached and reachable(), constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = not there
    try:
        yield there
    finally:
        constants.HF_HUB_OFFLINE = before


def cached(repository: str, names: Sequence[str], revision: str | None = None) -> Path | None:
    """The first of the files of a repository that is in the local cache."""
    from huggingface_hub import try_to_load_from_cache  # its HTTP client is slow to import

    for name in names:
        found = try_to_load_from_cache(repository, name, revision=revision)
        if isinstance(found, str):
            return Path(found)
    return None


def is_here(part: Part) -> bool:
    """Whether all that is needed of a repository is in the local cache."""
    there = cached(part.repository, part.weights) is not None
    return there and all(cached(part.repository, [name]) for name in part.others)


def at_hand(source: str) -> bool:
    """Whether `weights_file` finds it without a download."""
    source = located(source)
    if not source.startswith(PREFIX):
        return True
    repository, _, revision = source.removeprefix(PREFIX).partition("@")
    return cached(repository, segmentor_part(repository).weights, revision or None) is not None


def weights_file(source: str, download: bool = False) -> Path:
    """The file that a short name, `hf-hub:ORG/NAME[@REVISION]`, a folder or a file stands for.

    From the hub, a cached file comes first, then a download if that is allowed. UserError where
    there is none.
    """
    if located(source).startswith(PREFIX):
        return _from_hub(source, download)
    path = Path(source).expanduser()
    if path.is_dir():
        inside = next((path / name for name in WEIGHT_FILES if (path / name).is_file()), None)
        if inside is None:
            raise UserError(
                f"The folder {path} holds no {' and no '.join(WEIGHT_FILES)}.",
                "Give the file itself.",
            )
        return inside
    if not path.is_file():
        raise UserError(
            f"There is no file {path}.",
            "Give a file, a folder with model.safetensors, or hf-hub:ORG/NAME.",
        )
    return path


def beside(path: Path, name: str) -> dict[str, Any]:
    """A JSON file in the folder of a weights file (of a cached one: in its snapshot); empty where
    there is none. UserError where it holds no JSON object."""
    found = path.parent / name
    if path.suffix not in (".safetensors", ".bin") or not found.is_file():
        return {}  # pickles of a training lie among files that are not theirs
    held = read_json(found, "Copy it again.")
    if not isinstance(held, dict):
        raise UserError(f"{found} holds no JSON object.", "Copy it again.")
    return cast("dict[str, Any]", held)


def _from_hub(source: str, download: bool) -> Path:
    repository, _, revision = located(source).removeprefix(PREFIX).partition("@")
    names = segmentor_part(repository).weights
    found = cached(repository, names, revision or None)
    if found is not None:
        return found
    reason = ""
    if download:
        reason = ", and the hub cannot be reached"
        with without_waiting() as there:
            from huggingface_hub import (
                hf_hub_download,  # pyright: ignore[reportUnknownVariableType]
            )

            for name in names if there else ():
                try:
                    return Path(hf_hub_download(repository, name, revision=revision or None))
                except (OSError, ValueError, RuntimeError) as error:  # HTTP errors are OSErrors
                    reason = f", and {short(error)}"
    raise UserError(
        f"{source} is not in the cache ({constants.HF_HUB_CACHE}){reason}. It is a download "
        f"{size_of(repository)}.",
        how_to_get(source),
    )
