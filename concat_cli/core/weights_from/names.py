"""Names of Mask2Former's and its backbones' tensors elsewhere -> names of a `Segmentor`'s tensors.

Known are: `transformers` (as its files have it, and as its modules do), detectron2, and backbones
in timm's and torchvision's naming. The rules are tables: a regular expression of their whole name,
and ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

Rule = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]
CLASS_HEAD = "class head"
_PARTS = ("query", "key", "value")

# What is the same in both namings once their prefixes are gone: layers of the pixel decoder's
# encoder and of the query decoder. Ours, transformers, detectron2.
_ENCODER_LAYER = (
    ("attention.offsets", "self_attn.sampling_offsets", "self_attn.sampling_offsets"),
    ("attention.weights", "self_attn.attention_weights", "self_attn.attention_weights"),
    ("attention.value", "self_attn.value_proj", "self_attn.value_proj"),
    ("attention.out", "self_attn.output_proj", "self_attn.output_proj"),
    ("attention_norm", "self_attn_layer_norm", "norm1"),
    ("feed_forward.first", "fc1", "linear1"),
    ("feed_forward.second", "fc2", "linear2"),
    ("feed_forward_norm", "final_layer_norm", "norm2"),
)
_DECODER_LAYER = (
    ("self_attention.query", "self_attn.q_proj", None),
    ("self_attention.key", "self_attn.k_proj", None),
    ("self_attention.value", "self_attn.v_proj", None),
    ("self_attention.out", "self_attn.out_proj", "self_attention:self_attn.out_proj"),
    ("self_norm", "self_attn_layer_norm", "self_attention:norm"),
    ("cross_attention.out", "cross_attn.out_proj", "cross_attention:multihead_attn.out_proj"),
    ("cross_norm", "cross_attn_layer_norm", "cross_attention:norm"),
    ("feed_forward.first", "fc1", "ffn:linear1"),
    ("feed_forward.second", "fc2", "ffn:linear2"),
    ("feed_forward_norm", "final_layer_norm", "ffn:norm"),
)
_PIXEL = (
    ("lateral.conv", "adapter_1.0", "adapter_1"),
    ("lateral.norm", "adapter_1.1", "adapter_1.norm"),
    ("smooth.conv", "layer_1.0", "layer_1"),
    ("smooth.norm", "layer_1.1", "layer_1.norm"),
    ("mask_out", "mask_projection", "mask_features"),
)
_SWIN_BLOCK = (
    ("norm1", "layernorm_before", "norm1"),
    ("norm2", "layernorm_after", "norm2"),
    ("attn.proj", r"attention\.(?:o_proj|output\.dense)", "attn.proj"),
    ("mlp.fc1", r"(?:mlp\.fc1|intermediate\.dense)", "mlp.fc1"),
    ("mlp.fc2", r"(?:mlp\.fc2|output\.dense)", "mlp.fc2"),
)
_W = r"\.(weight|bias)"
_WRAPPERS = ("module.", "model.")  # of data-parallel training; of Lightning modules and the like
_OWN = tuple(  # names that begin with "model." by themselves: those of transformers
    f"model.{part}." for part in ("pixel_level_module", "transformer_module", "task_encoder")
)
_LOSS = ("criterion.", "loss.")  # beside a wrapped model, with buffers of their own


def _rule(theirs: str, ours: str | Callable[[re.Match[str]], str]) -> Rule:
    return re.compile(theirs), ours


def _layers(prefix: str, ours: str, rows: Iterable[tuple[str, str]]) -> list[Rule]:
    """Rules of numbered layers: our part, their part (a regular expression)."""
    return [_rule(rf"{prefix}(\d+)\.{b}{_W}", rf"{ours}\1.{a}.\2") for a, b in rows]


def _downsample(match: re.Match[str]) -> str:
    """Elsewhere a stage of a Swin ends with its merging, here the next one begins with it."""
    return f"backbone.body.layers.{int(match[1]) + 1}.downsample.{match[2]}"


def _transformers() -> list[Rule]:
    pixel, query = r"model\.pixel_level_module\.decoder\.", r"model\.transformer_module\."
    rules = [_rule(re.escape("model.pixel_level_module.decoder.level_embed"),
                   "pixel_decoder.level_embedding")]  # fmt: skip
    rules += [_rule(rf"{pixel}{re.escape(b)}{_W}", rf"pixel_decoder.{a}.\1") for a, b, _ in _PIXEL]
    for index, part in enumerate(("conv", "norm")):
        ours = rf"pixel_decoder.inputs.\1.{part}.\2"
        rules.append(_rule(rf"{pixel}input_projections\.(\d)\.{index}{_W}", ours))
    rows = [(a, re.escape(b)) for a, b, _ in _ENCODER_LAYER]
    rules += _layers(rf"{pixel}encoder\.layers\.", "pixel_decoder.layers.", rows)
    rows = [(a, re.escape(b)) for a, b, _ in _DECODER_LAYER]
    rules += _layers(rf"{query}decoder\.layers\.", "query_decoder.layers.", rows)
    cross = rf"{query}decoder\.layers\.(\d+)\.cross_attn\.(in_proj_(?:weight|bias))"
    rules.append(_rule(cross, r"query_decoder.layers.\1.cross_attention.\2"))
    rules.append(_rule(rf"{query}decoder\.layernorm{_W}", r"query_decoder.norm.\1"))
    rules.append(_rule(rf"{query}level_embed\.weight", "query_decoder.level_embedding"))
    rules.append(_rule(rf"{query}queries_features\.weight", "query_decoder.query_content"))
    rules.append(_rule(rf"{query}queries_embedder\.weight", "query_decoder.query_position"))
    head = rf"{query}decoder\.mask_predictor\.mask_embedder\.(\d)\.0{_W}"
    rules.append(_rule(head, _mask_embedding))
    return rules + _transformers_resnet() + _transformers_swin()


def _mask_embedding(match: re.Match[str]) -> str:
    return f"query_decoder.mask_embedding.{2 * int(match[1])}.{match[2]}"


def _transformers_resnet() -> list[Rule]:
    encoder, body = r"model\.pixel_level_module\.encoder\.", "backbone.body.body."
    rules = [
        _rule(rf"{encoder}embedder\.embedder\.convolution\.(\w+)", rf"{body}conv1.\1"),
        _rule(rf"{encoder}embedder\.embedder\.normalization\.(\w+)", rf"{body}bn1.\1"),
    ]
    block = rf"{encoder}encoder\.stages\.(\d)\.layers\.(\d+)\."

    def named(kind: str) -> Callable[[re.Match[str]], str]:
        def ours(match: re.Match[str]) -> str:
            stage, index, number, part = match.groups()
            return f"{body}layer{int(stage) + 1}.{index}.{kind}{int(number) + 1}.{part}"

        return ours

    def shortcut(match: re.Match[str]) -> str:
        stage, index, kind, part = match.groups()
        place = int(kind == "normalization")
        return f"{body}layer{int(stage) + 1}.{index}.downsample.{place}.{part}"

    rules.append(_rule(rf"{block}layer\.(\d)\.convolution\.(\w+)", named("conv")))
    rules.append(_rule(rf"{block}layer\.(\d)\.normalization\.(\w+)", named("bn")))
    rules.append(_rule(rf"{block}shortcut\.(convolution|normalization)\.(\w+)", shortcut))
    return rules


def _transformers_swin() -> list[Rule]:
    encoder, body = r"model\.pixel_level_module\.encoder\.", "backbone.body."
    swin = rf"{encoder}(?:swin\.)?"
    layers = rf"{swin}encoder\.layers\.(\d)\."
    block, ours = rf"{layers}blocks\.(\d+)\.", rf"{body}layers.\1.blocks.\2."
    rules = [
        _rule(rf"{swin}embeddings\.patch_embeddings\.projection{_W}",
              rf"{body}patch_embed.proj.\1"),
        _rule(rf"{swin}embeddings\.norm{_W}", rf"{body}patch_embed.norm.\1"),
        _rule(rf"{encoder}hidden_states_norms\.stage(\d){_W}",
              lambda m: f"{body}norms.{int(m[1]) - 1}.{m[2]}"),
        _rule(rf"{layers}downsample\.(reduction\.weight|norm\.\w+)", _downsample),
        _rule(rf"{block}attention\.(?:self|relative_position_bias)\.relative_position_bias_table",
              f"{ours}attn.relative_position_bias_table"),
    ]  # fmt: skip
    for part in _PARTS:
        theirs = rf"{block}attention\.(?:{part[0]}_proj|self\.{part}){_W}"
        rules.append(_rule(theirs, rf"{ours}attn.{part}.\3"))
    rules += [_rule(rf"{block}{b}{_W}", rf"{ours}{a}.\3") for a, b, _ in _SWIN_BLOCK]
    return rules


def _detectron2() -> list[Rule]:
    pixel, query = r"sem_seg_head\.(?:pixel_decoder\.)?", r"sem_seg_head\.predictor\."
    rules = [_rule(rf"{pixel}{re.escape(b)}{_W}", rf"pixel_decoder.{a}.\1") for a, _, b in _PIXEL]
    rules.append(_rule(rf"{pixel}transformer\.level_embed", "pixel_decoder.level_embedding"))
    for index, part in enumerate(("conv", "norm")):
        ours = rf"pixel_decoder.inputs.\1.{part}.\2"
        rules.append(_rule(rf"{pixel}input_proj\.(\d)\.{index}{_W}", ours))
    rows = [(a, re.escape(b)) for a, _, b in _ENCODER_LAYER]
    rules += _layers(rf"{pixel}transformer\.encoder\.layers\.", "pixel_decoder.layers.", rows)
    for ours, _, theirs in _DECODER_LAYER:
        if theirs is not None:
            kind, _, part = theirs.partition(":")
            prefix = rf"{query}transformer_{kind}_layers\."
            rules += _layers(prefix, "query_decoder.layers.", [(ours, re.escape(part))])
    for kind, part in (("self", "self_attn"), ("cross", "multihead_attn")):
        theirs = rf"{query}transformer_{kind}_attention_layers\.(\d+)\.{part}\.(in_proj_\w+)"
        rules.append(_rule(theirs, rf"query_decoder.layers.\1.{kind}_attention.\2"))
    rules.append(_rule(rf"{query}decoder_norm{_W}", r"query_decoder.norm.\1"))
    rules.append(_rule(rf"{query}level_embed\.weight", "query_decoder.level_embedding"))
    content = rf"{query}(?:query_feat|static_query)\.weight"  # the second in old files
    rules.append(_rule(content, "query_decoder.query_content"))
    rules.append(_rule(rf"{query}query_embed\.weight", "query_decoder.query_position"))
    rules.append(_rule(rf"{query}mask_embed\.layers\.(\d){_W}", _mask_embedding))
    return rules + _detectron2_backbones()


def _detectron2_backbones() -> list[Rule]:
    body = "backbone.body."

    def block(match: re.Match[str]) -> str:
        stage, index, layer, norm, part = match.groups()
        name = f"downsample.{int(bool(norm))}"
        if layer != "shortcut":
            name = f"{'bn' if norm else 'conv'}{layer[-1]}"
        return f"{body}body.layer{int(stage) - 1}.{index}.{name}.{part}"

    start = r"(?:backbone\.)?"
    layers, ours = rf"{start}layers\.(\d)\.", rf"{body}layers.\1.blocks.\2."
    rules = [
        _rule(rf"{start}stem\.conv1\.norm\.(\w+)", rf"{body}body.bn1.\1"),
        _rule(rf"{start}stem\.conv1\.weight", f"{body}body.conv1.weight"),
        _rule(rf"{start}res(\d)\.(\d+)\.(conv\d|shortcut)\.(norm\.)?(\w+)", block),
        _rule(rf"{start}patch_embed\.(proj|norm){_W}", rf"{body}patch_embed.\1.\2"),
        _rule(rf"{start}norm(\d){_W}", rf"{body}norms.\1.\2"),
        _rule(rf"{layers}downsample\.(reduction\.weight|norm\.\w+)", _downsample),
        _rule(rf"{layers}blocks\.(\d+)\.attn\.(relative_position_bias_table|qkv{_W})",
              rf"{ours}attn.\3"),
    ]  # fmt: skip
    rules += [_rule(rf"{layers}blocks\.(\d+)\.{re.escape(b)}{_W}", rf"{ours}{a}.\3")
              for a, _, b in _SWIN_BLOCK]  # fmt: skip
    return rules


_NAMINGS = {"transformers": _transformers(), "detectron2": _detectron2()}
_CLASS_HEADS = re.compile(r"class_predictor\..*|criterion\..*|sem_seg_head\.predictor\.class_.*")


def unwrapped(theirs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors by the names that they have in the model itself, out of any nest of wrappers.

    Known are torch.compile ("_orig_mod.", on the model or on parts of it), data-parallel training
    ("module.") and modules that keep a "model". A wrapper's prefix is on all names but a loss's.
    """
    tensors = {name.replace("_orig_mod.", ""): tensor for name, tensor in theirs.items()}
    while True:
        wrapped = [name for name in tensors if not name.startswith(_LOSS)]
        prefix = next((w for w in _WRAPPERS if all(n.startswith(w) for n in wrapped)), None)
        if prefix is None or not wrapped or any(name.startswith(_OWN) for name in wrapped):
            return tensors
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


@dataclass(frozen=True)
class Renamed:
    """A file's tensors under our names; `ignored`: their names by why they are of no use here."""

    naming: str
    tensors: dict[str, Tensor]
    ignored: dict[str, list[str]]

    def only(self, names: Collection[str]) -> Renamed:
        """The tensors of these names; others are ignored by the first part of theirs."""
        ignored = {group: list(theirs) for group, theirs in self.ignored.items()}
        for name in self.tensors:
            if name not in names:
                ignored.setdefault(name.split(".")[0], []).append(name)
        tensors = {name: tensor for name, tensor in self.tensors.items() if name in names}
        return Renamed(self.naming, tensors, ignored)


def rename(theirs: Mapping[str, Tensor]) -> Renamed | None:
    """Tensors of a Mask2Former, or of a backbone of detectron2, under our names.

    None where the names are of neither naming. The class head is left out: a cosine to text takes
    its place.
    """
    naming = max(_NAMINGS, key=lambda kind: sum(_our_name(kind, n) is not None for n in theirs))
    ours: dict[str, Tensor] = {}
    ignored: dict[str, list[str]] = {}
    for name, tensor in theirs.items():
        target = _our_name(naming, name)
        if target is not None:
            ours[target] = tensor
        elif not name.endswith(("relative_position_index", "attn_mask")):  # which are computed
            kind = CLASS_HEAD if _CLASS_HEADS.fullmatch(name) else "other"
            ignored.setdefault(kind, []).append(name)
    return Renamed(naming, _repack(ours), ignored) if ours else None


def _our_name(naming: str, name: str) -> str | None:
    for pattern, ours in _NAMINGS[naming]:
        match = pattern.fullmatch(name)
        if match is not None:
            return match.expand(ours) if isinstance(ours, str) else ours(match)
    return None


def _repack(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Splits what is packed there and single here, and joins the reverse (Swin's attention)."""
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        start, packed, part = name.rpartition(".in_proj_")
        before, attention, piece = name.rpartition(".attn.")
        if packed:
            for kind, third in zip(_PARTS, tensor.chunk(3), strict=True):
                ours[f"{start}.{kind}.{part}"] = third.clone()
        elif attention and piece.startswith("query."):
            pieces = [tensors[f"{before}.attn.{kind}.{piece[6:]}"] for kind in _PARTS]
            ours[f"{before}.attn.qkv.{piece[6:]}"] = torch.cat(pieces)
        elif not (attention and piece.startswith(("key.", "value."))):
            ours[name] = tensor
    return ours


def published_names(ours: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a Mask2Former under our names by the names of `transformers`' published files: the
    inverse of `rename`, with a Swin or a ResNet as the backbone. KeyError for what it has none
    for."""
    theirs: dict[str, Tensor] = {}
    packed: dict[str, dict[str, Tensor]] = {}
    for name, tensor in ours.items():
        start, cross, rest = name.partition(".cross_attention.")
        kind, _, part = rest.partition(".")
        if cross and kind in _PARTS:  # one tensor there
            packed.setdefault(f"{start}{cross}in_proj_{part}", {})[kind] = tensor
        elif ".attn.qkv." in name:  # three tensors there
            start, _, part = name.partition(".attn.qkv.")
            for kind, third in zip(_PARTS, tensor.chunk(3), strict=True):
                theirs[_their_name(f"{start}.attn.{kind}.{part}")] = third.clone()
        else:
            theirs[_their_name(name)] = tensor
    for name, parts in packed.items():
        theirs[_their_name(name)] = torch.cat([parts[kind] for kind in _PARTS])
    return theirs


def _their_name(name: str) -> str:
    for pattern, theirs in _INVERSE:
        match = pattern.fullmatch(name)
        if match is not None:
            return match.expand(theirs) if isinstance(theirs, str) else theirs(match)
    raise KeyError(name)


def _inverse() -> list[Rule]:
    """Our names -> those of published files; of a layer's parts by the tables above."""
    module = "model.pixel_level_module."
    pixel, query = f"{module}decoder.", "model.transformer_module."
    rules = [
        _rule(r"pixel_decoder\.level_embedding", f"{pixel}level_embed"),
        _rule(r"query_decoder\.level_embedding", f"{query}level_embed.weight"),
        _rule(r"query_decoder\.query_content", f"{query}queries_features.weight"),
        _rule(r"query_decoder\.query_position", f"{query}queries_embedder.weight"),
        _rule(rf"query_decoder\.norm{_W}", rf"{query}decoder.layernorm.\1"),
        _rule(rf"query_decoder\.mask_embedding\.(\d){_W}",
              lambda m: f"{query}decoder.mask_predictor.mask_embedder.{int(m[1]) // 2}.0.{m[2]}"),
        _rule(r"query_decoder\.layers\.(\d+)\.cross_attention\.(in_proj_\w+)",
              rf"{query}decoder.layers.\1.cross_attn.\2"),
    ]  # fmt: skip
    for index, part in enumerate(("conv", "norm")):
        theirs = rf"{pixel}input_projections.\1.{index}.\2"
        rules.append(_rule(rf"pixel_decoder\.inputs\.(\d)\.{part}{_W}", theirs))
    rules += [_rule(rf"pixel_decoder\.{re.escape(a)}{_W}", rf"{pixel}{b}.\1") for a, b, _ in _PIXEL]
    rows = [(b, re.escape(a)) for a, b, _ in _ENCODER_LAYER]
    rules += _layers(r"pixel_decoder\.layers\.", f"{pixel}encoder.layers.", rows)
    rows = [(b, re.escape(a)) for a, b, _ in _DECODER_LAYER]
    rules += _layers(r"query_decoder\.layers\.", f"{query}decoder.layers.", rows)
    return rules + _inverse_resnet(f"{module}encoder.") + _inverse_swin(f"{module}encoder.")


def _inverse_resnet(encoder: str) -> list[Rule]:
    kinds = {"conv": "convolution", "bn": "normalization", "0": "convolution", "1": "normalization"}
    body = r"backbone\.body\.body\."

    def stem(match: re.Match[str]) -> str:
        return f"{encoder}embedder.embedder.{kinds[match[1]]}.{match[2]}"

    def layer(match: re.Match[str]) -> str:
        stage, index, kind, number, part = match.groups()
        start = f"{encoder}encoder.stages.{int(stage) - 1}.layers.{index}"
        return f"{start}.layer.{int(number) - 1}.{kinds[kind]}.{part}"

    def shortcut(match: re.Match[str]) -> str:
        stage, index, place, part = match.groups()
        start = f"{encoder}encoder.stages.{int(stage) - 1}.layers.{index}"
        return f"{start}.shortcut.{kinds[place]}.{part}"

    block = rf"{body}layer(\d)\.(\d+)\."
    return [
        _rule(rf"{body}(conv|bn)1\.(\w+)", stem),
        _rule(rf"{block}(conv|bn)(\d)\.(\w+)", layer),
        _rule(rf"{block}downsample\.(\d)\.(\w+)", shortcut),
    ]


def _inverse_swin(encoder: str) -> list[Rule]:
    body, layers = r"backbone\.body\.", rf"{encoder}encoder.layers."
    block, theirs = rf"{body}layers\.(\d)\.blocks\.(\d+)\.", rf"{layers}\1.blocks.\2."
    parts = (
        ("norm1", "layernorm_before"), ("norm2", "layernorm_after"),
        ("attn.proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"),
        ("mlp.fc2", "output.dense"),
    )  # fmt: skip
    return [
        _rule(rf"{body}patch_embed\.proj{_W}",
              rf"{encoder}embeddings.patch_embeddings.projection.\1"),
        _rule(rf"{body}patch_embed\.norm{_W}", rf"{encoder}embeddings.norm.\1"),
        _rule(rf"{body}norms\.(\d){_W}",
              lambda m: f"{encoder}hidden_states_norms.stage{int(m[1]) + 1}.{m[2]}"),
        _rule(rf"{body}layers\.(\d)\.downsample\.(.*)",
              lambda m: f"{layers}{int(m[1]) - 1}.downsample.{m[2]}"),
        _rule(rf"{block}attn\.(relative_position_bias_table|(?:query|key|value){_W})",
              rf"{theirs}attention.self.\3"),
        *(_rule(rf"{block}{re.escape(a)}{_W}", rf"{theirs}{b}.\3") for a, b in parts),
    ]  # fmt: skip


_INVERSE = _inverse()


def rename_backbone(theirs: Mapping[str, Tensor], body: Iterable[str]) -> Renamed:
    """The tensors of a file that holds a backbone, or a whole Mask2Former, by the body's names.

    body: the names in `Backbone.body`. Files of timm, of torchvision's ResNets, of Swin's authors,
    of detectron2 and of `transformers`' Mask2Former are known.
    """
    body = list(body)
    of_timm = any(name.startswith("layers.1.") for name in theirs)
    if not of_timm or "layers.0.downsample.reduction.weight" in theirs:
        renamed = rename(theirs)
        if renamed is not None:
            start = "backbone.body."
            kept = renamed.only({f"{start}{name}" for name in body})
            own = {name.removeprefix(start): tensor for name, tensor in kept.tensors.items()}
            return replace(kept, tensors=own)
    # timm flattens the names in a feature extractor: "stages.0.x" becomes "stages_0.x"
    flat = {name.replace(".", "_"): name for name in theirs}
    found = {name: flat.get(name.removeprefix("body.").replace(".", "_")) for name in body}
    tensors = {ours: theirs[name] for ours, name in found.items() if name is not None}
    others = [name for name in theirs if name not in found.values()]
    return Renamed("timm", tensors, {"other": others} if others else {})
