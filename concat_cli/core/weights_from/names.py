"""Names of Mask2Former's and its backbones' tensors elsewhere -> names of a `Segmentor`'s tensors.

Known are: `transformers` (as its files have it, and as its modules do), detectron2, and backbones
in timm's and torchvision's naming.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

CLASS_HEAD = "class head"
_PARTS = ("query", "key", "value")

_WRAPPERS = ("module.", "model.")  # of data-parallel training; of Lightning modules and the like
_OWN = tuple(  # names that begin with "model." by themselves: those of transformers
    f"model.{part}." for part in ("pixel_level_module", "transformer_module", "task_encoder")
)
_LOSS = ("criterion.", "loss.")  # beside a wrapped model, with buffers of their own

# Tables: their prefix, ours, and rows of their name and ours behind these. Their names are regular
# expressions in which "." is a dot, "#" a number and "*" a word; of several in (?:a|b), published
# files have the first. In ours, {0} is the first of their numbers, {0+1} one more, "*" their word.
_Table = tuple[str, str, str]
_TRANSFORMERS: tuple[_Table, ...] = (
    ("model.pixel_level_module.decoder.", "pixel_decoder.", """
        level_embed                             level_embedding
        adapter_1.0.*                           lateral.conv.*
        adapter_1.1.*                           lateral.norm.*
        layer_1.0.*                             smooth.conv.*
        layer_1.1.*                             smooth.norm.*
        mask_projection.*                       mask_out.*
        input_projections.#.0.*                 inputs.{0}.conv.*
        input_projections.#.1.*                 inputs.{0}.norm.*
    """),
    ("model.pixel_level_module.decoder.encoder.layers.#.", "pixel_decoder.layers.{0}.", """
        self_attn.sampling_offsets.*            attention.offsets.*
        self_attn.attention_weights.*           attention.weights.*
        self_attn.value_proj.*                  attention.value.*
        self_attn.output_proj.*                 attention.out.*
        self_attn_layer_norm.*                  attention_norm.*
        fc1.*                                   feed_forward.first.*
        fc2.*                                   feed_forward.second.*
        final_layer_norm.*                      feed_forward_norm.*
    """),
    ("model.transformer_module.", "query_decoder.", """
        level_embed.weight                      level_embedding
        queries_features.weight                 query_content
        queries_embedder.weight                 query_position
        decoder.layernorm.*                     norm.*
        decoder.mask_predictor.mask_embedder.#.0.*  mask_embedding.{0*2}.*
    """),
    ("model.transformer_module.decoder.layers.#.", "query_decoder.layers.{0}.", """
        self_attn.q_proj.*                      self_attention.query.*
        self_attn.k_proj.*                      self_attention.key.*
        self_attn.v_proj.*                      self_attention.value.*
        self_attn.out_proj.*                    self_attention.out.*
        self_attn_layer_norm.*                  self_norm.*
        cross_attn.in_proj_*                    cross_attention.in_proj_*
        cross_attn.out_proj.*                   cross_attention.out.*
        cross_attn_layer_norm.*                 cross_norm.*
        fc1.*                                   feed_forward.first.*
        fc2.*                                   feed_forward.second.*
        final_layer_norm.*                      feed_forward_norm.*
    """),
    ("model.pixel_level_module.encoder.", "backbone.body.body.", """
        embedder.embedder.convolution.*         conv1.*
        embedder.embedder.normalization.*       bn1.*
    """),
    ("model.pixel_level_module.encoder.encoder.stages.#.layers.#.",
     "backbone.body.body.layer{0+1}.{1}.", """
        layer.#.convolution.*                   conv{2+1}.*
        layer.#.normalization.*                 bn{2+1}.*
        shortcut.convolution.*                  downsample.0.*
        shortcut.normalization.*                downsample.1.*
    """),
    ("model.pixel_level_module.encoder.(?:swin.)?", "backbone.body.", """
        embeddings.patch_embeddings.projection.*    patch_embed.proj.*
        embeddings.norm.*                       patch_embed.norm.*
        hidden_states_norms.stage#.*            norms.{0-1}.*
        encoder.layers.#.downsample.norm.*      layers.{0+1}.downsample.norm.*
        encoder.layers.#.downsample.reduction.* layers.{0+1}.downsample.reduction.*
    """),
    ("model.pixel_level_module.encoder.(?:swin.)?encoder.layers.#.blocks.#.",
     "backbone.body.layers.{0}.blocks.{1}.", """
        layernorm_before.*                      norm1.*
        layernorm_after.*                       norm2.*
        attention.(?:self|relative_position_bias).relative_position_bias_table
                                                attn.relative_position_bias_table
        attention.(?:self.query|q_proj).*       attn.query.*
        attention.(?:self.key|k_proj).*         attn.key.*
        attention.(?:self.value|v_proj).*       attn.value.*
        attention.(?:output.dense|o_proj).*     attn.proj.*
        (?:intermediate.dense|mlp.fc1).*        mlp.fc1.*
        (?:output.dense|mlp.fc2).*              mlp.fc2.*
    """),
)  # fmt: skip
_DETECTRON2: tuple[_Table, ...] = (
    ("sem_seg_head.(?:pixel_decoder.)?", "pixel_decoder.", """
        transformer.level_embed                 level_embedding
        adapter_1.*                             lateral.conv.*
        adapter_1.norm.*                        lateral.norm.*
        layer_1.*                               smooth.conv.*
        layer_1.norm.*                          smooth.norm.*
        mask_features.*                         mask_out.*
        input_proj.#.0.*                        inputs.{0}.conv.*
        input_proj.#.1.*                        inputs.{0}.norm.*
    """),
    ("sem_seg_head.(?:pixel_decoder.)?transformer.encoder.layers.#.",
     "pixel_decoder.layers.{0}.", """
        self_attn.sampling_offsets.*            attention.offsets.*
        self_attn.attention_weights.*           attention.weights.*
        self_attn.value_proj.*                  attention.value.*
        self_attn.output_proj.*                 attention.out.*
        norm1.*                                 attention_norm.*
        linear1.*                               feed_forward.first.*
        linear2.*                               feed_forward.second.*
        norm2.*                                 feed_forward_norm.*
    """),
    ("sem_seg_head.predictor.", "query_decoder.", """
        level_embed.weight                      level_embedding
        (?:query_feat|static_query).weight      query_content
        query_embed.weight                      query_position
        decoder_norm.*                          norm.*
        mask_embed.layers.#.*                   mask_embedding.{0*2}.*
    """),
    ("sem_seg_head.predictor.transformer_", "query_decoder.layers.{0}.", """
        self_attention_layers.#.self_attn.in_proj_*         self_attention.in_proj_*
        self_attention_layers.#.self_attn.out_proj.*        self_attention.out.*
        self_attention_layers.#.norm.*                      self_norm.*
        cross_attention_layers.#.multihead_attn.in_proj_*   cross_attention.in_proj_*
        cross_attention_layers.#.multihead_attn.out_proj.*  cross_attention.out.*
        cross_attention_layers.#.norm.*                     cross_norm.*
        ffn_layers.#.linear1.*                              feed_forward.first.*
        ffn_layers.#.linear2.*                              feed_forward.second.*
        ffn_layers.#.norm.*                                 feed_forward_norm.*
    """),
    ("(?:backbone.)?", "backbone.body.body.", """
        stem.conv1.weight                       conv1.weight
        stem.conv1.norm.*                       bn1.*
        res#.#.conv#.*                          layer{0-1}.{1}.conv{2}.*
        res#.#.conv#.norm.*                     layer{0-1}.{1}.bn{2}.*
        res#.#.shortcut.*                       layer{0-1}.{1}.downsample.0.*
        res#.#.shortcut.norm.*                  layer{0-1}.{1}.downsample.1.*
    """),
    ("(?:backbone.)?", "backbone.body.", """
        patch_embed.proj.*                      patch_embed.proj.*
        patch_embed.norm.*                      patch_embed.norm.*
        norm#.*                                 norms.{0}.*
        layers.#.downsample.norm.*              layers.{0+1}.downsample.norm.*
        layers.#.downsample.reduction.*         layers.{0+1}.downsample.reduction.*
    """),
    ("(?:backbone.)?layers.#.blocks.#.", "backbone.body.layers.{0}.blocks.{1}.", """
        norm1.*                                 norm1.*
        norm2.*                                 norm2.*
        attn.relative_position_bias_table       attn.relative_position_bias_table
        attn.qkv.*                              attn.qkv.*
        attn.proj.*                             attn.proj.*
        mlp.fc1.*                               mlp.fc1.*
        mlp.fc2.*                               mlp.fc2.*
    """),
)  # fmt: skip


@cache
def _rules(tables: tuple[_Table, ...]) -> list[tuple[re.Pattern[str], str]]:
    """A pattern of the whole name, and our template, for each row."""
    rules: list[tuple[re.Pattern[str], str]] = []
    for their_prefix, our_prefix, rows in tables:
        cells = iter(rows.split())
        for theirs, ours in zip(cells, cells, strict=True):
            pattern = f"{their_prefix}{theirs}".replace(".", r"\.").replace("#", r"(\d+)")
            rules.append((re.compile(pattern.replace("*", r"(\w+)")), our_prefix + ours))
    return rules


_NAMINGS = {"transformers": _TRANSFORMERS, "detectron2": _DETECTRON2}
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
    for pattern, ours in _rules(_NAMINGS[naming]):
        if match := pattern.fullmatch(name):
            return re.sub(r"\{(\d)(?:([-+*])(\d))?\}|\*", lambda slot: _filled(slot, match), ours)
    return None


def _filled(slot: re.Match[str], theirs: re.Match[str]) -> str:
    """What a slot of our template stands for."""
    if slot[0] == "*":
        return theirs.groups()[-1]
    number, sign, by = int(theirs.groups()[int(slot[1])]), slot[2], int(slot[3] or 0)
    return str(number * by if sign == "*" else number - by if sign == "-" else number + by)


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


@cache
def _inverse(tables: tuple[_Table, ...]) -> list[tuple[re.Pattern[str], list[str], str]]:
    """A pattern of our whole name, its slots, and their name with "#" and "*", for each row."""
    rules: list[tuple[re.Pattern[str], list[str], str]] = []
    for their_prefix, our_prefix, rows in tables:
        cells = iter(rows.split())
        for theirs, ours in zip(cells, cells, strict=True):
            name, slot = our_prefix + ours, r"\{[^}]*\}|\*"
            slots: list[str] = re.findall(slot, name)
            groups = [r"(\w+)" if found == "*" else r"(\d+)" for found in slots] + [""]
            fixed = map(re.escape, re.split(slot, name))
            pattern = "".join(part + group for part, group in zip(fixed, groups, strict=True))
            first = re.sub(r"\(\?:([^|)]*)[^)]*\)(\??)", _first, their_prefix + theirs)
            rules.append((re.compile(pattern), slots, first))
    return rules


def _first(choice: re.Match[str]) -> str:
    """The first of several names; nothing where there need be none."""
    return "" if choice[2] else choice[1]


def _their_name(name: str) -> str:
    for pattern, slots, theirs in _inverse(_TRANSFORMERS):
        if match := pattern.fullmatch(name):
            return _undone(slots, match.groups(), theirs)
    raise KeyError(name)


def _undone(slots: list[str], found: Sequence[str], theirs: str) -> str:
    """Their name, from what stands in the slots of ours: "{0}", "{0+1}", "{0-1}", "{0*2}", "*"."""
    numbers: dict[str, int] = {}
    word = ""
    for slot, text in zip(slots, found, strict=True):
        if slot == "*":
            word = text
        else:
            number, sign, by = int(text), slot[2], int(slot[3:-1] or 0)
            number = number // by if sign == "*" else number
            numbers[slot[1]] = number - by if sign == "+" else number + by * (sign == "-")
    for place in sorted(numbers):
        theirs = theirs.replace("#", str(numbers[place]), 1)
    return theirs.replace("*", word)


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
