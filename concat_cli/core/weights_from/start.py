"""Starting a segmentor, or its backbone alone, from weights made elsewhere, with a report."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from concat_cli.core.errors import UserError
from concat_cli.core.weights_from.files import read_tensors
from concat_cli.core.weights_from.hub import weights_file
from concat_cli.core.weights_from.names import CLASS_HEAD, Renamed, rename, rename_backbone

_WHY = {CLASS_HEAD: "classes are told by text here"}
_DEPTHS: dict[tuple[int, ...], str] = {
    (3, 4, 6, 3): "resnet50",
    (3, 4, 23, 3): "resnet101",
    (3, 8, 36, 3): "resnet152",
}
_SWINS = {(96, 6): "tiny", (96, 18): "small", (128, 18): "base", (192, 18): "large"}
_SIDES = {7: 224, 12: 384}  # of the images Swins were trained on, by the side of their windows
_THEIRS = ("backbone.", "pixel_decoder.", "query_decoder.")  # what every Mask2Former has
_OURS = ("query_decoder.token_embedding.", "query_decoder.objectness.")  # and what ours adds
_POINTS = 12  # read by a head of the deformable attention: 3 levels x 4


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
    path = weights_file(source)
    try:
        renamed = rename(read_tensors(path))
        if renamed is None or "query_decoder.level_embedding" not in renamed.tensors:
            raise UserError(
                f"{source} holds no Mask2Former, neither by the names of transformers nor of "
                "detectron2.",
                f"For the weights of a backbone alone: {prefix}backbone_weights.",
            )
        fitting = fitting_keys(renamed.tensors)
    except KeyError as error:
        raise _incomplete(source, str(error.args[0])) from error
    _check_fit(source, fitting, config, prefix)
    return _load(segmentor, source, renamed)


def fitting_keys(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The values of the model's keys that a Mask2Former under our names was made with."""
    encoder, decoder = "pixel_decoder.layers.", "query_decoder.layers."
    keys: dict[str, Any] = {"backbone": backbone_of(tensors), "pixel_decoder": "deformable"}
    keys["width"] = tensors["query_decoder.level_embedding"].shape[1]
    keys["mask_width"] = tensors["query_decoder.mask_embedding.4.weight"].shape[0]
    keys["heads"] = tensors[f"{encoder}0.attention.weights.bias"].shape[0] // _POINTS
    keys["encoder_layers"] = _count(tensors, encoder)
    keys["encoder_ffn"] = tensors[f"{encoder}0.feed_forward.first.bias"].shape[0]
    keys["decoder_layers"] = _count(tensors, decoder)
    keys["decoder_ffn"] = tensors[f"{decoder}0.feed_forward.first.bias"].shape[0]
    keys["queries"] = tensors["query_decoder.query_content"].shape[0]
    return keys


def backbone_of(tensors: Mapping[str, Tensor]) -> str:
    """The name of the backbone by the number and shape of its parts; empty for unknown ones."""
    table = tensors.get("backbone.body.layers.0.blocks.0.attn.relative_position_bias_table")
    if table is not None:
        width = tensors["backbone.body.patch_embed.norm.weight"].shape[0]
        window = (round(table.shape[0] ** 0.5) + 1) // 2
        size = _SWINS.get((width, _count(tensors, "backbone.body.layers.2.blocks.")))
        side = _SIDES.get(window)
        return f"swin_{size}_patch4_window{window}_{side}" if size and side else ""
    depths = tuple(_count(tensors, f"backbone.body.body.layer{i}.") for i in range(1, 5))
    return _DEPTHS.get(depths, "")


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


def _load(segmentor: nn.Module, source: str, renamed: Renamed) -> StartReport:
    state = segmentor.state_dict()
    fits = {name: t for name, t in renamed.tensors.items() if name in state}
    ignored = {group: list(names) for group, names in renamed.ignored.items()}
    for name in renamed.tensors.keys() - fits.keys():
        ignored.setdefault(_group(name), []).append(name)
    missing = [name for name in state if name not in fits and not _is_counter(name)]
    needed = [n for n in missing if n.startswith(_THEIRS) and not n.startswith(_OURS)]
    if needed:
        raise _incomplete(source, needed[0])
    _copy(segmentor, fits, source)
    used = _by_group(name for name in state if name in fits)
    return StartReport(source, renamed.naming, used, ignored, _by_group(missing))


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


def _incomplete(source: str, name: str) -> UserError:
    return UserError(
        f"{source} holds a part of a Mask2Former only: {name} is missing.",
        "Give a whole checkpoint with the multi-scale deformable pixel decoder.",
    )


def _copy(module: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Loads tensors by name; UserError for the first whose shape is another."""
    state = module.state_dict()
    for name, tensor in tensors.items():
        if tensor.shape != state[name].shape:
            raise UserError(
                f"{source} does not fit: {name} is {tuple(tensor.shape)} there and "
                f"{tuple(state[name].shape)} here.",
                "Choose the model.backbone, and model.* sizes, that the file was made with.",
            )
    if not any(parameter.is_meta for parameter in module.parameters()):  # a plan has no values
        module.load_state_dict(dict(tensors), strict=False)


def _count(tensors: Mapping[str, Tensor], prefix: str) -> int:
    """How many numbered parts there are under a prefix."""
    found = {n[len(prefix) :].split(".")[0] for n in tensors if n.startswith(prefix)}
    return len(found)


def _group(name: str) -> str:
    return name.split(".")[0]


def _by_group(names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(_group(name), []).append(name)
    return groups


def _groups(groups: Mapping[str, list[str]]) -> str:
    parts = []
    for group, names in groups.items():
        why = f": {_WHY[group]}" if group in _WHY else ""
        parts.append(f"{group} {len(names)} ({names[0]}{', ...' if names[1:] else ''}{why})")
    return "; ".join(parts)


def _is_counter(name: str) -> bool:
    """Counts of batches, which detectron2 does not keep and nothing here reads."""
    return name.endswith("num_batches_tracked")
