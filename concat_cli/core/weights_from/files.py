"""Files of weights made elsewhere: read without running anything, and what starts from them.

Pickled files are programs. So a torch file is read with `weights_only`, and a plain pickle (the
model zoo of detectron2) by an unpickler that knows how to put NumPy arrays together, and no more.
"""

from __future__ import annotations

import io
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import load_file  # pyright: ignore[reportUnknownVariableType]
from torch import Tensor, nn

from concat_cli.core.errors import UserError
from concat_cli.core.weights_from.fit import misfit
from concat_cli.core.weights_from.hub import short, weights_file
from concat_cli.core.weights_from.names import (
    CLASS_HEAD,
    Renamed,
    rename,
    rename_backbone,
    unwrapped,
)

_ZIP = b"PK\x03\x04"  # torch.save since 1.6
_LEGACY = b"\x80\x02\x8a\x0al\xfc\x9cF\xf9 j\xa8P\x19."  # torch.save before: its magic number
_INSIDE = ("model", "state_dict", "model_state_dict", "module")  # where checkpoints keep the model
_DAMAGED = (
    pickle.UnpicklingError, EOFError, ValueError, IndexError, KeyError, TypeError, AttributeError,
    RuntimeError, OSError, MemoryError, SafetensorError,
)  # fmt: skip
_WHY = {CLASS_HEAD: "classes are told by text here"}
RESNETS: dict[str, tuple[bool, tuple[int, ...]]] = {  # timm's: bottlenecks or not, and depths
    "resnet18": (False, (2, 2, 2, 2)),
    "resnet34": (False, (3, 4, 6, 3)),
    "resnet26": (True, (2, 2, 2, 2)),
    "resnet50": (True, (3, 4, 6, 3)),
    "resnet101": (True, (3, 4, 23, 3)),
    "resnet152": (True, (3, 8, 36, 3)),
}
_SWINS = {(96, 6): "tiny", (96, 18): "small", (128, 18): "base", (192, 18): "large"}
_SIDES = {7: 224, 12: 384}  # of the images Swins were trained on, by the side of their windows
_THEIRS = ("backbone.", "pixel_decoder.", "query_decoder.")  # what every Mask2Former has
_OURS = ("query_decoder.token_embedding.", "query_decoder.objectness.")  # and what ours adds
_POINTS = 12  # read by a head of the deformable attention: 3 levels x 4


class RefusedError(pickle.UnpicklingError):
    """A pickle asks for something else than arrays."""


def _latin1(text: object, encoding: str) -> bytes:
    """What NumPy's pickles of protocol 2 use `_codecs.encode` for."""
    if encoding != "latin1" or not isinstance(text, str):
        raise RefusedError(f"_codecs.encode to {encoding}")
    return text.encode("latin1")


# What NumPy's own pickles call, as NumPy itself names it; modules moved from NumPy 1 to 2.
_NUMPY: dict[str, Any] = {
    "_reconstruct": np.zeros(1).__reduce__()[0],
    "scalar": np.float64(1).__reduce__()[0],
    "_frombuffer": np.zeros(1).__reduce_ex__(5)[0],
}
_MODULES = [
    f"numpy.{core}.{part}" for core in ("core", "_core") for part in ("multiarray", "numeric")
]
_ADMITTED: dict[tuple[str, str], Any] = {
    **{(module, name): call for module in _MODULES for name, call in _NUMPY.items()},
    ("numpy", "ndarray"): np.ndarray,
    ("numpy", "dtype"): np.dtype,
    ("_codecs", "encode"): _latin1,
    ("collections", "OrderedDict"): OrderedDict,
}


class ArrayUnpickler(pickle.Unpickler):
    """Reads pickles of plain values and NumPy arrays; anything else raises RefusedError."""

    def find_class(self, module: str, name: str) -> Any:
        """An admitted function or class."""
        try:
            return _ADMITTED[module, name]
        except KeyError:
            raise RefusedError(f"{module}.{name}") from None

    def persistent_load(self, pid: Any) -> Any:
        """Nothing lies outside of such a file."""
        raise RefusedError("a reference to something outside of the file")


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors, torch or detectron2 file by name, on the CPU.

    The model is taken out of a training checkpoint ("model", "state_dict"); what was wrapped around
    it ("module.", "_orig_mod.", "model.") goes off the names.
    UserError where the file is missing, damaged, holds no tensors, or would run code.
    """
    path = Path(path)
    if not path.is_file():
        kind = "a folder" if path.is_dir() else "not there"
        raise UserError(f"{path} should be a file of weights, but it is {kind}.", "Check the path.")
    read = _reader(path)
    try:
        found = read(path)
    except RefusedError as error:
        raise _refused(path, str(error)) from error
    except _DAMAGED as error:
        if "weights_only" in str(error) or "Weights only" in str(error):
            raise _refused(path, _forbidden_name(str(error))) from error
        raise UserError(
            f"{path} cannot be read: {short(error)}",
            "It must be a safetensors file, a torch file or a detectron2 pickle; copy it again if "
            "it may be incomplete.",
        ) from error
    tensors = dict(_tensors(_model_in(found)))
    if not tensors:
        raise UserError(f"{path} holds no tensors by name.", "Give a file of model weights.")
    return unwrapped(tensors)


def _reader(path: Path) -> Callable[[Path], Any]:
    """How to read a file, by its first bytes: names of such files are not to be relied on."""
    with path.open("rb") as file:
        start = file.read(len(_LEGACY))
    header = int.from_bytes(start[:8], "little")  # of safetensors, whose JSON follows
    if start[8:9] == b"{" and header < path.stat().st_size:
        return _read_safetensors
    if start.startswith(_ZIP) or start == _LEGACY:
        return _read_torch
    return _read_pickle if start[:1] == b"\x80" else _read_safetensors


def _read_safetensors(path: Path) -> Any:
    return load_file(path)


def _read_torch(path: Path) -> Any:
    numpy: list[Any] = [*_NUMPY.values(), np.ndarray, np.dtype, np.dtypes.Float32DType]
    numpy += [np.dtypes.Float64DType, np.dtypes.Int64DType]  # counters beside the weights
    with torch.serialization.safe_globals(numpy):
        return torch.load(path, map_location="cpu", weights_only=True)


def _read_pickle(path: Path) -> Any:
    # detectron2 reads its own files as latin1 too: some were written by Python 2
    return ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()


def _model_in(found: Any) -> Mapping[Any, Any]:
    """The innermost mapping that may be the model; empty where there is none."""
    if not isinstance(found, Mapping):
        return {}
    mapping = cast("Mapping[Any, Any]", found)
    inner = next((mapping[k] for k in _INSIDE if isinstance(mapping.get(k), Mapping)), None)
    return mapping if inner is None else _model_in(inner)


def _tensors(found: Mapping[Any, Any]) -> Iterator[tuple[str, Tensor]]:
    for name, value in found.items():
        if isinstance(value, Tensor):
            yield str(name), value.detach()
        elif isinstance(value, np.ndarray):
            array = cast("NDArray[Any]", value)
            if array.dtype.kind in "fiub":
                own = torch.from_numpy(np.array(array, order="C"))  # pyright: ignore[reportUnknownMemberType]
                yield str(name), own


def _refused(path: Path, what: str) -> UserError:
    return UserError(
        f"{path} is refused: reading it would run code of its own ({what}). Nothing was run.",
        "Get the weights as safetensors, or save their tensors alone where you trust the source.",
    )


def _forbidden_name(message: str) -> str:
    """The name that torch did not admit, out of its long message."""
    if "TorchScript" in message:
        return "it is a TorchScript program"
    after = message.partition("GLOBAL ")[2].split()
    return after[0] if after else short(ValueError(message))


@dataclass(frozen=True)
class StartReport:
    """What became of a file's tensors: names by group. `missing` ones keep their random start."""

    source: str
    naming: str
    used: dict[str, list[str]]
    ignored: dict[str, list[str]]
    missing: dict[str, list[str]]

    def lines(self) -> list[str]:
        """A line for each of used, ignored and missing: counts, and an example of each group."""
        count = sum(len(names) for names in self.used.values())
        groups = ", ".join(f"{group} {len(names)}" for group, names in self.used.items())
        lines = [f"{self.source} ({self.naming} names): {count} tensors used: {groups}"]
        if self.ignored:
            lines.append(f"  ignored: {_groups(self.ignored)}")
        if self.missing:
            lines.append(f"  not in the file, so they start at random: {_groups(self.missing)}")
        return lines


def start_segmentor(
    segmentor: nn.Module, source: str, config: Mapping[str, Any], prefix: str = "model."
) -> StartReport:
    """Copies a Mask2Former's weights into a `Segmentor`; all but the class head.

    Args:
        source: a file, a folder with model.safetensors, or `hf-hub:ORG/NAME`.
        config: values of the model's keys; UserError names those that would fit the file.
        prefix: of the keys in that message.
    """
    whole = mask2former_in(source, read_tensors(weights_file(source, download=True)))
    if whole is None:
        raise UserError(
            f"{source} holds no Mask2Former, neither by the names of transformers nor of "
            "detectron2.",
            f"For the weights of a backbone alone: {prefix}backbone_weights.",
        )
    renamed, fitting = whole
    _check_fit(source, fitting, config, prefix)
    return fill_segmentor(segmentor, source, renamed)


def mask2former_in(
    source: str, tensors: Mapping[str, Tensor]
) -> tuple[Renamed, dict[str, Any]] | None:
    """A Mask2Former under our names, and the values of the model's keys that it was made with.

    None where the tensors are no Mask2Former's; UserError where a part of it is missing.
    """
    try:
        renamed = rename(tensors)
        if renamed is None or "query_decoder.level_embedding" not in renamed.tensors:
            return None
        return renamed, _fitting_keys(renamed.tensors)
    except KeyError as error:
        raise _incomplete(source, f"{error.args[0]} is missing") from error
    except IndexError as error:
        raise _incomplete(source, "a tensor that tells of its sizes is too small") from error


def _fitting_keys(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The values of the model's keys that a Mask2Former under our names was made with."""
    encoder, decoder = "pixel_decoder.layers.", "query_decoder.layers."
    keys: dict[str, Any] = {"backbone": backbone_of(tensors), "pixel_decoder": "deformable"}
    keys["width"] = tensors["query_decoder.level_embedding"].shape[1]
    keys["mask_width"] = tensors["query_decoder.mask_embedding.4.weight"].shape[0]
    keys["heads"] = tensors[f"{encoder}0.attention.weights.bias"].shape[0] // _POINTS
    keys["encoder_layers"] = count_parts(tensors, encoder)
    keys["encoder_ffn"] = tensors[f"{encoder}0.feed_forward.first.bias"].shape[0]
    keys["decoder_layers"] = count_parts(tensors, decoder)
    keys["decoder_ffn"] = tensors[f"{decoder}0.feed_forward.first.bias"].shape[0]
    keys["queries"] = tensors["query_decoder.query_content"].shape[0]
    return keys


def backbone_of(tensors: Mapping[str, Tensor]) -> str:
    """The name of the backbone by the number and shape of its parts; empty for unknown ones."""
    table = tensors.get("backbone.body.layers.0.blocks.0.attn.relative_position_bias_table")
    if table is not None:
        width = tensors["backbone.body.patch_embed.norm.weight"].shape[0]
        window = (round(table.shape[0] ** 0.5) + 1) // 2
        size = _SWINS.get((width, count_parts(tensors, "backbone.body.layers.2.blocks.")))
        side = _SIDES.get(window)
        return f"swin_{size}_patch4_window{window}_{side}" if size and side else ""
    body = "backbone.body.body.layer"
    depths = tuple(count_parts(tensors, f"{body}{i}.") for i in range(1, 5))
    shape = f"{body}1.0.conv3.weight" in tensors, depths
    return next((name for name, known in RESNETS.items() if known == shape), "")


def _check_fit(
    source: str, fitting: Mapping[str, Any], config: Mapping[str, Any], prefix: str
) -> None:
    """UserError with every key that would have to be another for the file to fit."""
    fitting = dict(fitting)
    if config["token_queries"]:
        del fitting["queries"]  # which are not learned then
    if not fitting["backbone"]:
        del fitting["backbone"]  # unknown: the shapes will tell
    found = {key: config[key] for key in fitting}
    found["backbone"] = str(config["backbone"]).partition(".")[0]  # without timm's tag
    wrong = {key: value for key, value in fitting.items() if found[key] != value}
    if wrong:
        told = ", ".join(f"{prefix}{key} is {config[key]}, there {wrong[key]}" for key in wrong)
        keys = " ".join(f"{prefix}{key}={value}" for key, value in wrong.items())
        raise UserError(f"{source} is a Mask2Former of another shape: {told}.", f"Set {keys}")


def fill_segmentor(segmentor: nn.Module, source: str, renamed: Renamed) -> StartReport:
    """Copies a Mask2Former's tensors into a `Segmentor` of its sizes; UserError for one missing."""
    state = segmentor.state_dict()
    fits = renamed.only(state)
    missing = [name for name in state if name not in fits.tensors and not _is_counter(name)]
    needed = [n for n in missing if n.startswith(_THEIRS) and not n.startswith(_OURS)]
    if needed:
        raise _incomplete(source, f"{needed[0]} is missing")
    _copy(segmentor, fits.tensors, source)
    used = _by_group(name for name in state if name in fits.tensors)
    return StartReport(source, fits.naming, used, fits.ignored, _by_group(missing))


def start_backbone(body: nn.Module, path: Path, name: str) -> StartReport:
    """Copies a backbone's weights from a file into `Backbone.body`; UserError where one is missing.

    name: the backbone's, for the message.
    """
    state = body.state_dict()
    renamed = rename_backbone(read_tensors(path), state)
    missing = [n for n in state if n not in renamed.tensors and not _is_counter(n)]
    # published Swins have no norms on the outputs of their stages: Mask2Former learns these
    needed = [n for n in missing if not n.startswith("norms.")]
    if needed:
        raise UserError(
            f"{path} does not hold the weights of '{name}': {len(needed)} of {len(state)} tensors "
            f"are missing, like {needed[0]}.",
            "Give a file in the naming of timm, torchvision, detectron2 (torchvision/R-50.pkl) or "
            "Swin's authors for this very backbone (model.backbone_weights).",
        )
    _copy(body, renamed.tensors, str(path))
    used = {"backbone": list(renamed.tensors)}
    return StartReport(
        str(path), renamed.naming, used, renamed.ignored, {"norms": missing} if missing else {}
    )


def _incomplete(source: str, why: str) -> UserError:
    return UserError(
        f"{source} holds a part of a Mask2Former only: {why}.",
        "Give a whole checkpoint with the multi-scale deformable pixel decoder.",
    )


def _copy(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Loads tensors by name; UserError for the first that does not fit in its place."""
    state = module.state_dict()
    wrong = misfit({name: state[name] for name in tensors}, tensors)
    if wrong:
        raise UserError(
            f"{source} does not fit: {wrong}.",
            "Choose the model.backbone, and model.* sizes, that the file was made with.",
        )
    if not any(parameter.is_meta for parameter in module.parameters()):  # a plan has no values
        module.load_state_dict(dict(tensors), strict=False)


def count_parts(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered parts there are under a prefix."""
    return len({n[len(prefix) :].split(".")[0] for n in tensors if n.startswith(prefix)})


def _by_group(names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(name.split(".")[0], []).append(name)
    return groups


def _groups(groups: Mapping[str, list[str]]) -> str:
    parts: list[str] = []
    for group, names in groups.items():
        why = f": {_WHY[group]}" if group in _WHY else ""
        parts.append(f"{group} {len(names)} ({names[0]}{', ...' if names[1:] else ''}{why})")
    return "; ".join(parts)


def _is_counter(name: str) -> bool:
    """Counts of batches, which detectron2 does not keep and nothing here reads."""
    return name.endswith("num_batches_tracked")
