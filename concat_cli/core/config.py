"""The schema of a run: frozen dataclasses with defaults and checked ranges.

A YAML file holds deltas from these defaults (`config_file.py` reads it); one file describes all
three stages. After each key: where its default comes from, [paper] stated by a CONCAT source,
[PADing], [Mask2Former], [ZegFormer], or [ours].
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeVar

from concat_cli.core.config_check import check as _check
from concat_cli.core.config_methods import ClipZssConfig, ZegFormerConfig
from concat_cli.core.config_shapes import ShapesConfig

S = TypeVar("S")


@dataclass(frozen=True)
class DataConfig:
    """Where the prepared data set is and how images are fed."""

    root: str = "data/shapes"  # folder with dataset.json, written by `concat prepare-data`
    workers: int = 0  # loader processes per training process
    cache: bool = True  # keep decoded images in memory; for small data sets
    crop: int = 128  # training crop side; smaller views are padded
    scale_min: float = 1.0  # large-scale jitter [Mask2Former: 0.1-2.0]
    scale_max: float = 1.0
    scale_side: Literal["long", "short"] = "long"  # that is scale times crop [Mask2Former: long]
    flip: float = 0.5  # chance of a horizontal flip [Mask2Former]
    colour: float = 0.0  # strength of brightness/contrast/saturation jitter, 0-1 [ours]

    def __post_init__(self) -> None:
        _check(self.crop >= 32, "crop must be at least 32")
        _check(0 < self.scale_min <= self.scale_max, "need 0 < scale_min <= scale_max")
        _check(0 <= self.flip <= 1 and 0 <= self.colour <= 1, "flip and colour lie in 0-1")
        _check(self.workers >= 0, "workers must be >= 0")


@dataclass(frozen=True)
class ClipConfig:
    """The frozen teacher."""

    model: str = "tiny"  # "tiny" (built in), an open_clip name, "hf-hub:...", "local-dir:..."
    pretrained: str = ""  # open_clip tag or a weights file (OpenAI's: "...-quickgelu" models)
    templates: Literal["single", "scene", "imagenet_select"] = "single"  # [PADing: the last]
    clean_names: bool = True  # "sky-other-merged" -> "sky" in prompts [ours; PADing: off]


@dataclass(frozen=True)
class ModelConfig:
    """The segmentor."""

    backbone: str = "small"  # "small" (built in) or any timm name with features_only
    backbone_weights: str = ""  # "timm" (published weights), or a file of them; empty: random
    frozen_bn: bool = False  # [Mask2Former R-50: true]
    pixel_decoder: Literal["fpn", "deformable"] = "fpn"  # [Mask2Former: deformable]
    width: int = 128  # D [Mask2Former: 256]
    mask_width: int = 128  # channels of the mask features [Mask2Former: 256]
    heads: int = 8
    encoder_layers: int = 1  # [Mask2Former: 6]
    encoder_ffn: int = 512  # [Mask2Former: 1024]
    decoder_layers: int = 3  # [Mask2Former: 9]
    decoder_ffn: int = 512  # [Mask2Former: 2048]
    queries: int = 16  # Q [Mask2Former: 100]
    projector_layers: int = 1  # linear layers of the semantic projector [ZegFormer: 1]
    projector_hidden: int = 256
    logit_scale: float = 25.0  # 1/temperature of class logits [ZegFormer: 100]
    learn_scale: bool = True  # [ZegFormer: false]
    token_queries: bool = True  # queries selected from tokens instead of learned ones [ours]
    mask_pooling: bool = True  # class path also sees features pooled under its own mask [ours]
    detach_class_path: bool = False  # class gradients reach the pooled features alone [ours]
    init: str = ""  # a Mask2Former to start from: a file, a folder, or "hf-hub:ORG/NAME"

    def __post_init__(self) -> None:
        _check(self.width % self.heads == 0, "width must be a multiple of heads")
        _check(self.queries >= 1 and self.decoder_layers >= 1, "need queries and decoder layers")
        _check(self.projector_layers >= 1, "projector_layers must be at least 1")
        _check(self.logit_scale > 0, "logit_scale must be positive")


@dataclass(frozen=True)
class LossConfig:
    """Stage 1 segmentation losses. A weight of 0 switches a term off."""

    classes: float = 2.0  # cross-entropy [Mask2Former]
    mask: float = 5.0  # point-sampled BCE [Mask2Former]
    dice: float = 5.0  # [Mask2Former]
    no_object: float = 0.1  # class weight of no_object [Mask2Former]
    points: int = 1024  # [Mask2Former: 12544]
    oversample: float = 3.0  # [Mask2Former]
    importance: float = 0.75  # share of uncertain points [Mask2Former]
    dense: float = 0.0  # per-token cross-entropy on seen classes [ours]
    truth: float = 0.0  # the warm-up's losses on true masks, kept on in stage 1 [ours]
    denoising: int = 0  # queries made from truth-pooled features, per image [ours]
    void_share: float = 0.5  # lying on void for more than this share: no target; 1: all have [ours]

    def __post_init__(self) -> None:
        _check(self.points >= 1 and self.oversample >= 1, "points and oversample are at least 1")
        _check(0 <= self.importance <= 1, "importance lies in 0-1")
        _check(0 <= self.void_share <= 1, "void_share lies in 0-1")


@dataclass(frozen=True)
class AlignConfig:
    """CON: conditional token alignment. Weights of 0 give the projection-only model.

    The two losses are stated by the paper; their form (InfoNCE), temperature, bank size, layers and
    weights are not, and are [ours].
    """

    image: float = 0.0  # weight of conditional global alignment
    instance: float = 0.0  # weight of conditional instance alignment
    temperature: float = 0.07
    bank: int = 1024  # size of each token bank (FIFO of CLS tokens as negatives); 0: batch only
    pooling: Literal["attention", "objectness", "matched"] = "attention"  # of the semantic queries
    crops: int = 8  # masked crops per image at most
    source: Literal["online", "cache"] = "online"  # "cache" keeps the tokens of views on disk
    detach: bool = False  # stop the alignment gradient before the vision query [ours]

    def __post_init__(self) -> None:
        _check(self.temperature > 0, "temperature must be positive")
        _check(self.bank >= 0 and self.crops >= 1, "need bank >= 0 and crops >= 1")


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and schedule of stage 1."""

    steps: int = 1000
    batch_size: int = 16  # global, over all processes; accumulation is derived from it
    per_device: int = 16  # images a process takes in one forward
    lr: float = 1e-3  # [Mask2Former: 1e-4]
    weight_decay: float = 0.05  # [Mask2Former]
    backbone_factor: float = 1.0  # learning rate of the backbone relative to lr [Mask2Former: 0.1]
    scale_factor: float = 3.0  # learning rate of the scale of the logits relative to lr [ours]
    clip_norm: float = 1.0  # full-model gradient norm [Mask2Former: 0.01]
    warmup: int = 100  # steps of linear warm-up
    schedule: Literal["constant", "cosine", "poly", "step"] = "cosine"
    decay_from: float = 0.3  # share of the steps after which "cosine" begins to fall
    step_at: tuple[float, ...] = (0.889, 0.963)  # x0.1 at these shares ("step") [Mask2Former]
    ema: float = 0.0  # decay of an exponential moving average of the weights; 0: off [ours]
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    channels_last: bool = False
    save_every: int = 200  # steps between `last` checkpoints
    eval_every: int = 0  # steps between scores on dev (chooses `best`); 0: at the end only
    log_every: int = 20
    preview_every: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.steps >= 0, "steps must be >= 0")
        _check(self.batch_size >= 1 and self.per_device >= 1, "batch sizes must be at least 1")
        _check(self.lr > 0, "lr must be positive")
        _check(0 <= self.ema < 1, "ema lies in 0-1")
        _check(self.save_every >= 1 and self.log_every >= 1, "save_every and log_every are >= 1")


@dataclass(frozen=True)
class BackboneWarmupConfig:
    """Warm-up of the backbone on true masks of seen classes before the segmentor [ours]."""

    steps: int = 0  # 0: off
    lr: float = 2e-3
    align: bool = True  # also align pooled features with CLIP when CON is on
    masks: float = 0.0  # weight of mask losses on queries made of true masks, before any layer


@dataclass(frozen=True)
class BankConfig:
    """The query bank: one pass (or several augmented ones) over the training part."""

    views: int = 1
    images: int = 0  # at most so many images; 0: all
    void_share: float = 0.5  # queries lying on void for more than this share are left out


@dataclass(frozen=True)
class CatConfig:
    """CAT: the generator of pseudo vision queries."""

    generator: Literal["primitives", "mlp"] = "primitives"  # [PADing: primitives]
    layers: int = 3  # [PADing]
    primitives: int = 400  # [PADing]
    heads: int = 8  # [PADing]
    ffn: int = 512  # [PADing: 1024]
    hidden: int = 512  # of the MLP generator [ours]
    dropout: float = 0.1  # [PADing]
    noise: Literal["gaussian", "analogy"] = "gaussian"  # [PADing: gaussian; analogy: ours]
    noise_width: int = 32  # of the MLP generator; primitives add noise of the query width
    steps: int = 1500  # [PADing: 20000]
    batch: int = 256  # real queries per step [ours]
    lr: float = 5e-4  # [PADing]
    matching: float = 1.0  # generative moment matching [paper]
    contrast: float = 1.0  # query contrast [paper; weight ours]
    cycle: float = 0.1  # vision to semantic [paper; weight ours]
    temperature: float = 0.1  # of query contrast [ours]
    negatives: int = 256  # unmatched queries per step [ours]
    bandwidths: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)  # x mean distance [ours]
    fold: int = 6  # seen classes set aside as pseudo-unseen for selection; 0: none [ours]
    refit_projector: bool = False  # refit the projector without the fold for selection [ours]
    eval_every: int = 250
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.steps >= 0 and self.batch >= 2, "need steps >= 0 and batch >= 2")
        _check(self.temperature > 0, "temperature must be positive")
        _check(self.fold >= 0, "fold must be >= 0")


@dataclass(frozen=True)
class FinetuneConfig:
    """Union finetuning of the semantic projector."""

    steps: int = 100  # [PADing: 20000, alternating]
    lr: float = 1e-3  # [PADing, SGD]
    optimiser: Literal["adam", "sgd"] = "adam"  # [PADing: sgd]
    batch: int = 512  # real queries per step [ours]
    pseudo: bool = True  # false: real queries only, the control of the ablation
    pseudo_per_class: int = 16  # pseudo queries per unseen class and step [ours; PADing: 1]
    unseen_per_step: int = 0  # unseen classes per step; 0: all [PADing: 5]
    unseen_weight: float = 3.0  # [PADing: 5]
    no_object_weight: float = 0.1  # [PADing]
    layers: Literal["last", "all"] = "last"  # of the projector
    no_object: bool = False  # the no-object embedding learns too
    calibrate: bool = False  # choose an offset on seen logits from dev and the fold
    seed: int = 0

    def __post_init__(self) -> None:
        _check(self.steps >= 0 and self.batch >= 1, "need steps >= 0 and batch >= 1")


@dataclass(frozen=True)
class InferConfig:
    """From queries to panoptic segments."""

    size: int = 128  # short side in pixels [Mask2Former: 800]
    max_size: int = 512  # long side at most [Mask2Former: 1333]
    min_score: float = 0.5  # of a query's best class [Mask2Former: 0.8]
    min_mask: float = 0.5  # a pixel belongs to a query above this probability [Mask2Former]
    overlap: float = 0.8  # a segment keeps at least this share of its own mask [Mask2Former]
    seen_offset: float = 0.0  # taken off the class logits of seen classes
    batch: int = 16

    def __post_init__(self) -> None:
        _check(32 <= self.size <= self.max_size, "need 32 <= size <= max_size")
        _check(0 <= self.min_score <= 1 and 0 <= self.overlap <= 1, "thresholds lie in 0-1")


@dataclass(frozen=True)
class ProtocolConfig:
    """What a run may know of the unseen classes."""

    mode: Literal["transductive", "inductive"] = "transductive"
    # transductive: unseen *names* enter CAT and finetuning; inductive: no unseen name before test


@dataclass(frozen=True)
class Config:
    """Everything a run needs to know; the same for all stages."""

    data: DataConfig = field(default_factory=DataConfig)
    shapes: ShapesConfig = field(default_factory=ShapesConfig)
    clip: ClipConfig = field(default_factory=ClipConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    warmup: BackboneWarmupConfig = field(default_factory=BackboneWarmupConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    align: AlignConfig = field(default_factory=AlignConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    bank: BankConfig = field(default_factory=BankConfig)
    cat: CatConfig = field(default_factory=CatConfig)
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    infer: InferConfig = field(default_factory=InferConfig)
    protocol: ProtocolConfig = field(default_factory=ProtocolConfig)
    zegformer: ZegFormerConfig = field(default_factory=ZegFormerConfig)
    clip_zss: ClipZssConfig = field(default_factory=ClipZssConfig)

    def own(self, kind: type[S]) -> S:
        """A method's own section, by its type."""
        return next(value for value in vars(self).values() if isinstance(value, kind))

    def __post_init__(self) -> None:
        made_of_tokens = self.loss.denoising or self.loss.dense or self.warmup.masks
        _check(
            self.model.token_queries or not made_of_tokens,
            "loss.denoising, loss.dense and warmup.masks need model.token_queries=true",
        )
        _check(
            self.model.mask_pooling or not (self.warmup.steps or self.loss.truth),
            "warmup.steps and loss.truth need model.mask_pooling=true",
        )
        _check(
            self.model.mask_pooling or not self.model.detach_class_path,
            "model.detach_class_path=true needs model.mask_pooling=true",
        )
        _check(
            self.cat.fold > 0 or not self.finetune.calibrate,
            "finetune.calibrate=true needs cat.fold > 0",
        )
