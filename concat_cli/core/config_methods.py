"""Configuration of the two other methods, ZegFormer and CLIP-ZSS; see `config.py` for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from concat_cli.core.config_check import check


@dataclass(frozen=True)
class ZegFormerConfig:
    """ZegFormer; its loss weights are those of `loss` (classes, mask, dice, no_object).

    A maskformer takes of `model` the backbone, width, mask_width, heads, decoder_*, queries,
    projector_* and the scale of the logits; `loss.mask` is then the weight of focal losses.
    """

    segmentor: Literal["maskformer", "mask2former"] = "maskformer"  # the latter: as CON's [ours]
    targets: Literal["category", "segment"] = "category"  # a mask per class present [code], or each
    raw_no_object: bool = True  # no_object logit: raw dot product [code], or cosine [paper]
    branch: Literal["segment", "image", "fusion"] = "fusion"  # what names the segments at test
    exponent: float = 2 / 3  # lambda of the fusion [paper]
    crop: Literal["crop", "mask", "cropmask"] = "cropmask"  # what CLIP's image encoder is shown
    image_prompts: Literal["same", "masked"] = "masked"  # clip.templates, or the 32 [code]
    skip_below: float = 1e-3  # not sent: queries by which CLIP changes no pixel more [ours]

    def __post_init__(self) -> None:
        check(0 <= self.exponent <= 1, "exponent lies in 0-1")
        check(0 <= self.skip_below < 1, "skip_below lies in 0-1")


@dataclass(frozen=True)
class ClipZssConfig:
    """CLIP-ZSS: CLIP as the teacher of a dense encoder; `optim` holds the schedule.

    The paper states the losses and their equal weights, and how the parts fit together. All other
    numbers are [ours] unless they say where they are from. The ablation: seen pixels alone (the
    defaults), then glm=1, then pseudo=true, then synthesizer=1.
    """

    encoder: str = "small"  # "small" (built in) or any timm name with features_only
    encoder_weights: str = ""  # "timm" (published weights), or a file of them; empty: random
    head_width: int = 256  # [SegFormer-B0, B1; from B2 on 768]
    dropout: float = 0.1  # of the head's channels [SegFormer]
    logit_scale: float = 14.3  # alpha: 1/temperature of the pixels' logits, 1/0.07
    pseudo_scale: float = 0.0  # beta: the same of pseudo classes; 0: as alpha, learned with it
    learn_scale: bool = True
    focal: float = 20.0  # NEL [ZegCLIP's code; its configurations: 100]
    dice: float = 1.0  # NEL [ZegCLIP]
    classes: float = 1.0  # cross-entropy of pixels [paper]
    full_size: bool = False  # logits enlarged to the pixels [ZegCLIP], or labels taken at stride 4
    glm: float = 0.0  # weight of L_global [paper: 1]
    glm_temperature: float = 0.0  # of its attention over cosines; 0: features as they are [paper]
    temperature: float = 0.07  # of its InfoNCE
    bank: int = 256  # CLS tokens kept as negatives and for the synthesizer
    source: Literal["online", "cache"] = "online"  # "cache" keeps the CLS tokens of views on disk
    pseudo: bool = False  # pseudo labels for pixels without a label [paper: true]
    dense_size: int = 256  # side of CLIP's input for its dense tokens, in pixels
    dense_path: Literal["value", "last"] = "value"  # the last attention's values [MaskCLIP], or not
    windows: tuple[int, ...] = (2, 4, 8)  # windows along a side, at each scale of K-Means
    stride: float = 1.0  # from window to window, in widths of a window; below 1 they overlap
    covered: float = 0.5  # a token is unannotated from this share of unannotated pixels on
    iterations: int = 10  # of K-Means
    merge: float = 0.8  # clusters of a greater cosine are joined; the paper's lambda
    centre: bool = False  # take the mean token of the image off first
    min_share: float = 0.01  # of the image, for a pseudo class
    most: int = 16  # pseudo classes of an image
    synthesizer: int = 0  # layers of the decoder that makes prototypes; 0: centroids [paper: on]
    heads: int = 8  # of the synthesizer
    synthesizer_ffn: int = 4  # width of its feed-forward blocks, in widths of CLIP
    prototypes: float = 1.0  # weight of L_bce, with the synthesizer [paper]
    prototype_scale: float = 10.0  # of the cosines in L_bce

    def __post_init__(self) -> None:
        check(0 < self.logit_scale <= 100, "logit_scale lies in 0-100")
        check(0 <= self.pseudo_scale <= 100, "pseudo_scale lies in 0-100")
        check(0 < self.stride <= 1 and 0 < self.covered <= 1, "need 0 < stride, covered <= 1")
        check(self.synthesizer_ffn >= 1, "synthesizer_ffn is at least 1")
        check(0 <= self.dropout < 1, "dropout lies in 0-1")
        check(self.temperature > 0 and self.glm_temperature >= 0, "temperatures are positive")
        check(self.glm >= 0 and self.bank >= 0, "glm and bank are at least 0")
        check(self.synthesizer >= 0 and self.heads >= 1, "need synthesizer >= 0 and heads >= 1")
        grows = all(a < b for a, b in zip((0, *self.windows), self.windows, strict=False))
        check(bool(self.windows) and grows, "windows are positive and grow")
        check(self.iterations >= 0 and self.most >= 1, "need iterations >= 0 and most >= 1")
        check(-1 <= self.merge <= 1 and 0 <= self.min_share < 1, "merge or min_share out of range")
        check(self.pseudo or not self.synthesizer, "synthesizer needs pseudo=true")
