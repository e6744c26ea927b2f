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
from concat_cli.core.method import stage_named

if TYPE_CHECKING:
    from concat_cli.core.clip.encoder import ClipIdentity

FORMAT = 1
_KEY = "concat"
_NEEDED = ("format", "stage", "config", "vocabulary", "trained", "clip")


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
    missing = [key for key in _NEEDED if key not in meta]
    assert not missing, f"metadata without {missing}"
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    write_bytes(path, save(plain, {_KEY: json.dumps(meta, ensure_ascii=False)}))


def load_weights(path: Path) -> Weights:
    """Reads a weights file; UserError where it is missing, truncated, corrupt or not ours."""
    path = Path(path)
    data = _read(path)
    meta = _meta(path, data)
    try:
        tensors = load(data)
    except (SafetensorError, ValueError) as error:
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


def check_clip(weights: Weights, identity: ClipIdentity) -> None:
    """UserError unless the weights were trained with this CLIP, if with any (sha256 not empty)."""
    trained = weights.meta["clip"]
    if trained["sha256"] in ("", identity.sha256):
        return
    raise UserError(
        f"{weights.path} was trained with CLIP {_clip_name(**trained)}, this one is "
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
    except (zipfile.BadZipFile, RuntimeError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} is damaged, the run cannot go on from it ({reason:.120}).",
            "Run the same command with --fresh to start again.",
        ) from error


def _read(path: Path, header_only: bool = False) -> bytes:
    """A file's content, or 8 bytes that tell a length and the header of that length."""
    try:
        with path.open("rb") as file:
            if not header_only:
                return file.read()
            start = file.read(8)
            return start + file.read(min(int.from_bytes(start, "little"), 1 << 26))
    except FileNotFoundError:
        hint = "Make weights with `concat train-con`, or leave --weights out."
        raise UserError(f"There is no file {path}.", hint) from None
    except OSError as error:
        what = f"Cannot read {path}: {error.strerror}."
        raise UserError(what, "Check the path and its rights.") from error


def _meta(path: Path, data: bytes) -> dict[str, Any]:
    """The metadata in a safetensors header: 8 bytes of length, then JSON."""
    length = int.from_bytes(data[:8], "little")
    if len(data) < 8 + length:
        raise _damaged(path, "it ends too early, or is of another format")
    try:
        header: Any = json.loads(data[8 : 8 + length])
        meta: dict[str, Any] = dict(json.loads(header.get("__metadata__", {}).get(_KEY, "{}")))
    except (ValueError, AttributeError, TypeError) as error:
        raise _damaged(path, "its header is not readable") from error
    if not meta.keys() >= set(_NEEDED):
        raise UserError(
            f"{path} holds tensors, but concat did not write it.",
            "Give weights made by `concat train-con`, `train-cat` or `finetune`.",
        )
    if meta["format"] != FORMAT:
        raise UserError(
            f"{path} has format {meta['format']}, this version reads {FORMAT}.",
            f"Use concat {meta.get('version', 'of another version')}.",
        )
    return meta


def _damaged(path: Path, why: str) -> UserError:
    return UserError(
        f"{path} is no complete weights file: {why}.",
        "Copy it again, or make it again with the command that wrote it.",
    )


def _clip_name(model: str, pretrained: str, sha256: str) -> str:
    return f"{model} {pretrained}".strip() + f" ({sha256[:8]})"
