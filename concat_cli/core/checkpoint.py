"""Weights that describe themselves (safetensors with JSON metadata), and the state of a loop.

Tensor names begin with a part's name, such as `segmentor.`. Metadata: format, version, stage (one
of `method.stages()`), step, config, vocabulary, trained and taught (class names), clip (model,
pretrained, sha256), data (name, class_split).
"""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from concat_cli.core.errors import UserError
from concat_cli.core.files import write_bytes
from concat_cli.core.metadata import NEEDED, checked_meta, parsed
from concat_cli.core.method import loaded, methods, stage_named
from concat_cli.core.weights_from.hub import at_hand, weights_file
from concat_cli.core.weights_from.published import PREFIX, WEIGHT_FILES, did_you_mean, located

if TYPE_CHECKING:
    from concat_cli.core.clip.encoder import ClipIdentity

_KEY = "concat"
_TORCH, _PICKLE = b"PK", b"\x80"  # what their files begin with
_UNREADABLE = (  # what a damaged state raises
    zipfile.BadZipFile, pickle.UnpicklingError, zlib.error, RuntimeError, ValueError, TypeError,
    LookupError, AttributeError, EOFError, OSError, OverflowError, MemoryError,
)  # fmt: skip


@dataclass(frozen=True)
class Weights:
    """A weights file in memory. `sha256` is that of the file."""

    tensors: dict[str, Tensor]
    meta: dict[str, Any]
    path: Path
    sha256: str

    @property
    def stage(self) -> str:
        """The stage that made them, by its name."""
        return self.meta["stage"]


def save_weights(path: Path, tensors: Mapping[str, Tensor], meta: dict[str, Any]) -> None:
    """Writes tensors and their metadata atomically; UserError where the system refuses."""
    missing = [key for key in NEEDED if key not in meta]
    assert not missing, f"metadata without {missing}"
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(plain, {_KEY: json.dumps(meta, ensure_ascii=False)}))


def open_weights(given: Path | str, *, tensors: bool = True) -> Weights:
    """What `--weights` takes: a file of ours, or what a method opens of somebody else's making.

    given: a file, a folder, the short name of published weights, or `hf-hub:ORG/NAME`. tensors:
    False where nothing is to be predicted: those of a file of ours are not read then. Nothing is
    downloaded. UserError for what is not here, damaged or unknown.
    """
    source = given.as_posix() if isinstance(given, Path) else given
    path = _own_file(source)
    if path is None:
        for method in reversed(methods()):  # installed ones first: what is built in has a last word
            found = loaded(method.opens)(source) if method.opens else None
            if found is not None:
                return found
    path = path or Path(source)
    return load_weights(path) if tensors else Weights({}, read_meta(path), path, "")


def _own_file(source: str) -> Path | None:
    """The file, unless it is of somebody else's making."""
    path = Path(source)
    if not path.is_file():
        if located(source).startswith(PREFIX):
            path = weights_file(source) if at_hand(source) else None
        elif path.is_dir():
            path = path / WEIGHT_FILES[0] if (path / WEIGHT_FILES[0]).is_file() else None
        else:
            return path
        if path is None:
            return None
    data = _read(path, header_only=True)
    other = data.startswith((_TORCH, _PICKLE)) and data[8:9] != b"{"  # where JSON would begin
    return None if other or _about(path, data) is None else path


def load_weights(path: Path) -> Weights:
    """Reads a weights file; UserError where it is missing, truncated, corrupt or not ours."""
    path = Path(path)
    meta = read_meta(path)  # first: what is not ours is not read whole
    data = _read(path)
    try:
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError) as error:  # KeyError: numbers of an odd kind
        raise _damaged(path, str(error)) from error
    return Weights(tensors, meta, path, hashlib.sha256(data).hexdigest())


def read_meta(path: Path) -> dict[str, Any]:
    """The metadata alone; the tensors are not read."""
    return _meta(path, _read(path, header_only=True))


def check_stage(weights: Weights, *expected: str) -> None:
    """UserError unless the weights come from one of the expected stages."""
    if weights.stage not in expected:
        makers = " or ".join(f"`concat {stage_named(stage)[1].command}`" for stage in expected)
        raise UserError(
            f"{weights.path} is of stage '{weights.stage}', needed: {' or '.join(expected)}.",
            f"Give weights that {makers} made.",
        )


def check_finished(weights: Weights, force: bool) -> str:
    """UserError, or with `force` a line to be told, where the stage that made the weights was
    stopped before its last step, as the newest ones beside them say."""
    newest = weights.path.with_name("last.safetensors")
    meta = read_meta(newest) if newest.is_file() else weights.meta
    done, steps = meta.get("step", 0), meta.get("steps", 0)
    if done >= steps:
        return ""
    told = f"{weights.path} is of a training that was stopped at step {done} of {steps}"
    if not force:
        command = f"concat {stage_named(weights.stage)[1].command}"
        raise UserError(
            f"{told}.", f"Let `{command}` go on first, or take them as they are with --force."
        )
    return told


def check_clip(weights: Weights, identity: ClipIdentity) -> None:
    """UserError unless the weights were trained with this CLIP, if with any (sha256 not empty)."""
    trained = weights.meta["clip"]
    if trained["sha256"] in ("", identity.sha256):
        return
    raise UserError(
        f"{weights.path} was trained with CLIP "
        f"{_clip_name(*(trained[key] for key in ('model', 'pretrained', 'sha256')))}, this one is "
        f"{_clip_name(identity.model, identity.pretrained, identity.sha256)}.",
        f"Set clip.model={trained['model']} and clip.pretrained={trained['pretrained']!r}, "
        "or train with the new CLIP.",
    )


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes what a loop needs to go on (optimiser, counters): tensors and plain values only."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_bytes(path, buffer.getvalue())


def load_state(path: Path) -> dict[str, Any]:
    """The inverse of `save_state`, on the CPU; UserError where the file is damaged."""
    data = _read(path)
    try:
        with zipfile.ZipFile(io.BytesIO(data)) as archive:  # which torch.save writes
            broken = archive.testzip()
        if broken is not None:
            raise zipfile.BadZipFile(f"{broken} was changed")
        return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise damaged_state(path, reason) from error


def damaged_state(path: Path, reason: str) -> UserError:
    """Of a file that a loop cannot go on from."""
    return UserError(
        f"{path} is damaged, the run cannot go on from it ({reason:.120}).",
        "Run the same command with --fresh to start again (the old folder is kept).",
    )


def _read(path: Path, header_only: bool = False) -> bytes:
    """A file's content, or 8 bytes that tell a length and the header of that length."""
    try:
        with path.open("rb") as file:
            if not header_only:
                return file.read()
            start = file.read(8)
            return start + file.read(min(int.from_bytes(start, "little"), 1 << 26))
    except FileNotFoundError:
        hint = (
            f"{did_you_mean(str(path))}Make weights with `concat train-con`, or leave --weights "
            "out. `concat weights` lists published ones."
        )
        raise UserError(f"There is no file {path}.", hint) from None
    except OSError as error:
        what = f"Cannot read {path}: {error.strerror}."
        raise UserError(what, "Check the path and its rights.") from error


def _meta(path: Path, data: bytes) -> dict[str, Any]:
    """The checked metadata of a file of ours."""
    text = _about(path, data)
    try:
        meta = {} if text is None else parsed(text)
    except (ValueError, TypeError) as error:
        raise _damaged(path, "its header is not readable") from error
    return checked_meta(path, text or "", meta)


def _about(path: Path, data: bytes) -> str | None:
    """Our metadata in a safetensors header (8 bytes of length, then JSON); None where it has none.
    UserError where there is no such header."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 + length:
        raise _damaged(path, "it ends too early, or is of another format")
    try:
        ours: Any = parsed(data[8 : 8 + length].decode()).get("__metadata__", {}).get(_KEY)
    except (ValueError, AttributeError, TypeError) as error:
        raise _damaged(path, "its header is not readable") from error
    if ours is not None and not isinstance(ours, str):
        raise _damaged(path, "its header is not readable")
    return ours


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} is no complete weights file: {why}.",
        "Copy it again, or make it again with the command that wrote it.",
    )


def _clip_name(model: str, pretrained: str, sha256: str) -> str:
    return f"{model} {pretrained}".strip() + f" ({sha256[:8]})"
