"""FC-CLIP's published decoder on a frozen convolutional CLIP (Yu et al., NeurIPS 2023).

One pass of the CLIP's trunk serves both of its opinions: the decoder reads the maps of its stages,
and the last of them, averaged under a mask, goes through CLIP's own head. Its classes are told by
text, so its vocabulary is open.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.clip.encoder import Clip
from concat_cli.core.errors import UserError
from concat_cli.core.model.layers import drawn, map_size, resize_padding, zero_padding
from concat_cli.core.model.pixel_decoder import DeformablePixelDecoder
from concat_cli.core.model.query_decoder import QueryDecoder
from concat_cli.core.model.segmentor import MAX_SCALE
from concat_cli.core.segmentors import Proposals, PublishedSegmentor
from concat_cli.core.segmentors.files import Files
from concat_cli.core.weights_from.files import count_parts
from concat_cli.core.weights_from.fit import misfit, on_paper
from concat_cli.core.weights_from.names import rename

HEAD = "sem_seg_head.predictor."
# its own tensors beside a Mask2Former's -> ours
OWN = {
    f"{HEAD}_mask_pooling_proj.0": "pooled_norm",
    f"{HEAD}_mask_pooling_proj.1": "pooled_proj",
    **{f"{HEAD}class_embed.layers.{i}": f"class_embed.{i}" for i in range(3)},
}
SINGLE = {f"{HEAD}logit_scale": "log_scale", "void_embedding.weight": "void"}
COCO = 133  # classes that it was trained on
UNUSED = ("backbone.", "criterion.")  # the frozen CLIP, which comes from open_clip; the loss


class FcClip(PublishedSegmentor):
    """The decoders; `attach` gives them the CLIP they were trained on.

    Args:
        channels: of the maps of CLIP's trunk at strides 4, 8, 16, 32.
        embed_dim: E of CLIP's space.
        queries, layers, encoder_layers: of the decoders.
    """

    clip: Clip | None = None
    void: Tensor
    log_scale: Tensor

    def __init__(
        self,
        channels: tuple[int, ...] = (192, 384, 768, 1536),
        embed_dim: int = 768,
        queries: int = 250,
        layers: int = 9,
        encoder_layers: int = 6,
        width: int = 256,
    ) -> None:
        super().__init__()
        self.channels, self.embed_dim = channels, embed_dim
        self.width, self.count = width, queries
        self.pixel_decoder = DeformablePixelDecoder(
            channels, width, width, layers=encoder_layers, ffn=4 * width
        )
        self.query_decoder = QueryDecoder(width, 8, layers, 8 * width, queries, width)
        self.pooled_norm, self.pooled_proj = nn.LayerNorm(width), nn.Linear(width, width)
        sizes = (width, width, width, embed_dim)
        self.class_embed = nn.ModuleList(nn.Linear(i, o) for i, o in pairwise(sizes))
        self.log_scale = nn.Parameter(torch.tensor(math.log(1 / 0.07)))
        self.void = nn.Parameter(drawn(1, embed_dim))

    def attach(self, clip: Clip) -> None:
        """Takes the CLIP; UserError where it is none that the decoders fit on."""
        trunk = getattr(getattr(clip.model, "visual", None), "trunk", None)
        stages = getattr(trunk, "stages", None)
        found = tuple(info["num_chs"] for info in getattr(trunk, "feature_info", ()))
        if stages is None or found != self.channels or clip.embed_dim != self.embed_dim:
            shape = f"stages of {found}, space of {clip.embed_dim}" if stages else "no ConvNeXt"
            raise UserError(
                f"CLIP {clip.identity.model} ({shape}) does not fit {self.source}, whose decoder "
                f"reads stages of {self.channels} in a space of {self.embed_dim}.",
                "Take the CLIP it was trained on: clip.model=convnext_large_d_320 "
                "clip.pretrained=laion2b_s29b_b131k_ft_soup",
            )
        object.__setattr__(self, "clip", clip)  # no part of this module's weights

    def propose(self, images: Tensor, padding: Tensor | None) -> Proposals:
        """See `PublishedSegmentor`; a CLIP is attached."""
        assert self.clip is not None, "attach a CLIP first"
        visual: Any = self.clip.model.visual
        images = self.clip.normalise(images.float() / 255)
        images = images if padding is None else images.masked_fill(padding[:, None], 0.0)
        maps, dense = stages(visual.trunk, images)
        maps = [zero_padding(x, resize_padding(padding, map_size(x))) for x in maps]
        pixel = self.pixel_decoder(maps, padding)
        decoded = self.query_decoder(pixel, None, last_only=True)
        queries, masks = decoded.queries[-1], decoded.mask_logits[-1].float()
        hidden = self.pooled_proj(self.pooled_norm(pool(pixel.mask_features, masks > 0))) + queries
        for layer in self.class_embed[:-1]:
            hidden = F.relu(layer(hidden))
        coarse = F.interpolate(masks, map_size(dense), mode="bilinear", align_corners=False) > 0
        pooled = pool(dense, coarse).flatten(0, 1)[:, :, None, None]
        of_clip = visual.head(visual.trunk.head(pooled)).unflatten(0, masks.shape[:2])
        embeddings = torch.stack((self.class_embed[-1](hidden), of_clip), 2).float()
        return Proposals(masks, queries.new_zeros(*queries.shape[:2], 0), queries, embeddings)

    def classify(self, embeddings: Tensor, text: Tensor) -> Tensor:
        """(..., E), normalised texts (K, E) -> (..., K+1) logits, void last: cosines times the
        learned scale, which is at most 100."""
        classes = torch.cat((text.float(), F.normalize(self.void.float(), dim=-1)))
        cosines = F.normalize(embeddings.float(), dim=-1) @ classes.T
        return self.log_scale.exp().clamp(max=MAX_SCALE) * cosines


def stages(trunk: Any, images: Tensor) -> tuple[list[Tensor], Tensor]:
    """The maps after each stage of a ConvNeXt of timm, and the last one as its head takes it."""
    features = trunk.stem(images)
    maps: list[Tensor] = []
    for stage in trunk.stages:
        features = stage(features)
        maps.append(features)
    return maps, trunk.norm_pre(features)


def pool(features: Tensor, masks: Tensor) -> Tensor:
    """(B, C, h, w), bool (B, Q, h, w) -> (B, Q, C): means under masks, 0 for an empty one."""
    weights = masks.flatten(2).to(features.dtype)
    total = weights @ features.flatten(2).transpose(1, 2)
    return total / weights.sum(-1, keepdim=True).clamp(min=1)


def is_fcclip(tensors: Mapping[str, Tensor]) -> bool:
    """Whether the names are those of FC-CLIP's decoder."""
    return any(name.startswith(f"{HEAD}_mask_pooling_proj.") for name in tensors)


def open_fcclip(files: Files) -> FcClip:
    """The decoders of FC-CLIP's tensors; UserError names one that is missing, extra or misshapen.

    Their sizes are read off the tensors. The frozen CLIP's tensors, which some files hold as well,
    are left aside.
    """
    source = files.source
    ours = our_names(source, files.tensors)
    try:
        sizes = _sizes(ours)
    except KeyError as error:
        raise _unfit(source, f"{error.args[0]} is missing") from None
    except IndexError:
        raise _unfit(source, "a tensor that tells of its sizes has too few dimensions") from None
    with on_paper(ours):
        wrong = misfit(FcClip(**sizes).state_dict(), ours)
    if wrong:
        raise _unfit(source, wrong)
    model = FcClip(**sizes)
    model.load_state_dict(ours)
    files.describe(model, COCO, own_colours=True)
    return model.eval().requires_grad_(False)


def our_names(source: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The decoders' tensors under the names of `FcClip`; UserError for one that has none."""
    used = {name: t for name, t in tensors.items() if not name.startswith(UNUSED)}
    own: dict[str, Tensor] = {}
    for name, tensor in used.items():
        start, _, part = name.rpartition(".")
        if start in OWN:
            own[f"{OWN[start]}.{part}"] = tensor
        elif name in SINGLE:
            own[SINGLE[name]] = tensor
    shared = {n: t for n, t in used.items() if n not in SINGLE and n.rpartition(".")[0] not in OWN}
    renamed = rename(shared)
    if renamed is None:
        raise _unfit(source, "the decoders of a Mask2Former are missing")
    others = [name for names in renamed.ignored.values() for name in names]
    if others:
        raise _unfit(source, f"{others[0]} has no place in it ({len(others)} such tensors)")
    return own | renamed.tensors


def _sizes(ours: Mapping[str, Tensor]) -> dict[str, Any]:
    """The arguments of `FcClip` that tensors under our names were made with."""
    inputs = [ours[f"pixel_decoder.inputs.{i}.conv.weight"].shape[1] for i in (2, 1, 0)]
    lateral = ours["pixel_decoder.lateral.conv.weight"]

    return {
        "channels": (lateral.shape[1], *inputs),
        "embed_dim": ours["void"].shape[1],
        "queries": ours["query_decoder.query_content"].shape[0],
        "layers": count_parts(ours, "query_decoder.layers."),
        "encoder_layers": count_parts(ours, "pixel_decoder.layers."),
        "width": lateral.shape[0],
    }


def _unfit(source: str, why: str) -> UserError:
    return UserError(
        f"{source} looks like FC-CLIP's decoder, but {why}.",
        "Give the published file as it is (Voxel51/fc-clip, or bytedance's fcclip_cocopan.pth).",
    )
