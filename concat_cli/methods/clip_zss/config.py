"""CLIP-ZSS's own section of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Gt, Le, MinLen

from concat_cli.core.config import Below1, Pixels, Positive, Scale, Weight, Width, check

Part = Annotated[float, Gt(0), Le(1)]


@dataclass(frozen=True)
class ClipZssConfig:
    """CLIP-ZSS: CLIP as the teacher of a dense encoder; `optim` holds the schedule.

    The paper states the losses and their equal weights, and how the parts fit together. All other
    numbers are [ours] unless they say where they are from. The ablation: seen pixels alone (the
    defaults), then glm=1, then pseudo=true, then synthesizer=1.
    """

    encoder: str = "small"  # "small" (built in) or any timm name with features_only
    encoder_weights: str = ""  # "timm" (published weights), or a file of them; empty: random
    head_width: Width = 256  # [SegFormer-B0, B1; from B2 on 768]
    dropout: Below1 = 0.1  # of the head's channels [SegFormer]
    logit_scale: Scale = 14.3  # alpha: 1/temperature of the pixels' logits, 1/0.07
    pseudo_scale: Annotated[float, Ge(0), Le(100)] = 0.0  # beta: of pseudo classes; 0: as alpha
    learn_scale: bool = True
    focal: Weight = 20.0  # NEL [ZegCLIP's code; its configurations: 100]
    dice: Weight = 1.0  # NEL [ZegCLIP]
    classes: Weight = 1.0  # cross-entropy of pixels [paper]
    full_size: bool = False  # logits enlarged to the pixels [ZegCLIP], or labels taken at stride 4
    glm: Weight = 0.0  # weight of L_global [paper: 1]
    glm_temperature: Weight = 0.0  # of its attention over cosines; 0: features as they are [paper]
    temperature: Positive = 0.07  # of its InfoNCE
    bank: Annotated[int, Ge(0), Le(1 << 24)] = 256  # CLS tokens: negatives, and to synthesize from
    source: Literal["online", "cache"] = "online"  # "cache" keeps the CLS tokens of views on disk
    pseudo: bool = False  # pseudo labels for pixels without a label [paper: true]
    dense_size: Pixels = 256  # side of CLIP's input for its dense tokens
    windows: Annotated[tuple[Width, ...], MinLen(1)] = (2, 4, 8)  # a side, at each K-Means scale
    stride: Part = 1.0  # from window to window, in widths of a window; below 1 they overlap
    covered: Part = 0.5  # a token is unannotated from this share of unannotated pixels on
    iterations: Annotated[int, Ge(0), Le(10**4)] = 10  # of K-Means
    merge: Annotated[float, Ge(-1), Le(1)] = 0.8  # clusters of a greater cosine join; the lambda
    centre: bool = False  # take the mean token of the image off first
    min_share: Below1 = 0.01  # of the image, for a pseudo class
    most: Annotated[int, Ge(1), Le(10**4)] = 16  # pseudo classes of an image
    synthesizer: Annotated[int, Ge(0), Le(1000)] = 0  # layers that make prototypes; 0: centroids
    heads: Width = 8  # of the synthesizer
    prototypes: Weight = 1.0  # weight of L_bce, with the synthesizer [paper]
    prototype_scale: Positive = 10.0  # of the cosines in L_bce

    def __post_init__(self) -> None:
        grows = all(a < b for a, b in zip(self.windows, self.windows[1:], strict=False))
        check(grows, "windows must grow")
        check(self.pseudo or not self.synthesizer, "synthesizer needs pseudo=true")
