"""The schema of a run: frozen dataclasses with defaults, each number with its range.

A YAML file holds deltas from these defaults, and one file describes all stages. Ranges are checked
where a configuration is read (`config_file.py`); one that Python code makes itself, such as
`OptimConfig(lr=-1)`, is taken as it is, but for what a section's `__post_init__` checks. After each
key: where its default comes from, [paper] stated by a CONCAT source, [PADing], [Mask2Former],
[ZegFormer], or [ours]. A method's own section lies in its folder.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, Literal, TypeVar

from annotated_types import Ge, Gt, Le, Lt, MinLen

from concat_cli.core.method import own_sections

S = TypeVar("S")

Share = Annotated[float, Ge(0), Le(1)]
Below1 = Annotated[float, Ge(0), Lt(1)]
Weight = Annotated[float, Ge(0), Le(1e6)]  # of a loss or a group of parameters; 0: off
Positive = Annotated[float, Gt(0), Le(1e6)]
Several = Annotated[tuple[Positive, ...], MinLen(1)]
Offset = Annotated[float, Ge(-1e3), Le(1e3)]
Zoom = Annotated[float, Gt(0), Le(100)]
Scale = Annotated[float, Gt(0), Le(100)]  # of cosines; CLIP's own is at most 100
Whole = Annotated[int, Ge(0), Le(10**9)]  # a number of something; 0: none, or off
AtLeast1 = Annotated[int, Ge(1), Le(10**9)]
Width = Annotated[int, Ge(1), Le(1 << 16)]  # channels
Many = Annotated[int, Ge(1), Le(1 << 24)]  # things that are held at a time
Layers = Annotated[int, Ge(1), Le(1000)]
Pixels = Annotated[int, Ge(32), Le(1 << 14)]  # a side
Seed = Annotated[int, Ge(0), Lt(1 << 28)]

DROPPED: dict[str, Any] = {  # keys of former versions, and the one value that is left of each
    "bank.void_share": "0.5",
    "model.projector_hidden": "256",
    "cat.generator": "primitives",
    "cat.hidden": "512",
    "cat.noise_width": "32",
    "cat.refit_projector": "false",
    "clip_zss.synthesizer_ffn": "4",
    "clip_zss.dense_path": "value",
}
RENAMED: dict[str, str] = {  # a short name, or one of former versions -> a key's name now
    "segmentor": "model.segmentor",
}


def check(ok: object, message: str) -> None:
    """ValueError with `message` unless `ok`: for what a key's own range cannot say."""
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True)
class DataConfig:
    """Where the prepared data set is and how images are fed."""

    root: str = "data/shapes"  # folder with dataset.json, written by `concat prepare-data`
    workers: Annotated[int, Ge(0), Le(1024)] = 0  # loader processes per training process
    cache: bool = True  # keep decoded images in memory; for small data sets
    crop: Pixels = 128  # training crop side; smaller views are padded
    scale_min: Zoom = 1.0  # large-scale jitter [Mask2Former: 0.1-2.0]
    scale_max: Zoom = 1.0
    scale_side: Literal["long", "short"] = "long"  # that is scale times crop [Mask2Former: long]
    flip: Share = 0.5  # chance of a horizontal flip [Mask2Former]
    colour: Share = 0.0  # strength of brightness/contrast/saturation jitter, 0-1 [ours]

    def __post_init__(self) -> None:
        check(self.scale_min <= self.scale_max, "need scale_min <= scale_max")


@dataclass(frozen=True)
class ShapesConfig:
    """The built-in world, drawn when `data.root` is not there yet. All [ours]."""

    train: AtLeast1 = 4000  # scenes for training; no label of an unseen class is in them
    dev: AtLeast1 = 300  # such scenes for selection and calibration
    val: AtLeast1 = 500  # scenes with every class, scored once at the end
    size: Pixels = 128  # side of a scene
    seed: Seed = 0
    unseen: str = ""  # "striped star; green water": these names; empty: the default split
    unseen_seed: Annotated[int, Ge(-1), Lt(1 << 28)] = -1  # >= 0: another split like the default
    unseen_pixels: Literal["drop", "void"] = "drop"  # in train and dev: not drawn, or without label

    def __post_init__(self) -> None:
        check(not self.unseen or self.unseen_seed < 0, "give unseen or unseen_seed, not both")


@dataclass(frozen=True)
class ClipConfig:
    """The frozen teacher."""

    model: str = "tiny"  # "tiny" (built in), an open_clip name, "hf-hub:...", "local-dir:..."
    pretrained: str = ""  # open_clip tag or a weights file (OpenAI's: "...-quickgelu" models)
    templates: Literal["single", "scene", "imagenet_select", "vild"] = "single"  # `TEMPLATES`
    clean_names: bool = True  # "sky-other-merged" -> "sky" in prompts [ours; PADing: off]


@dataclass(frozen=True)
class ModelConfig:
    """The segmentor."""

    backbone: str = "small"  # "small" (built in) or any timm name with features_only
    backbone_weights: str = ""  # "timm" (published weights), or a file of them; empty: random
    frozen_bn: bool = False  # [Mask2Former R-50: true]
    pixel_decoder: Literal["fpn", "deformable"] = "fpn"  # [Mask2Former: deformable]
    width: Width = 128  # D [Mask2Former: 256]
    mask_width: Width = 128  # channels of the mask features [Mask2Former: 256]
    heads: Width = 8
    encoder_layers: Layers = 1  # [Mask2Former: 6]
    encoder_ffn: Width = 512  # [Mask2Former: 1024]
    decoder_layers: Layers = 3  # [Mask2Former: 9]
    decoder_ffn: Width = 512  # [Mask2Former: 2048]
    queries: Many = 16  # Q [Mask2Former: 100]
    projector_layers: Layers = 1  # linear layers of the semantic projector [ZegFormer: 1]
    logit_scale: Scale = 25.0  # 1/temperature of class logits [ZegFormer: 100]
    learn_scale: bool = True  # [ZegFormer: false]
    token_queries: bool = True  # queries selected from tokens instead of learned ones [ours]
    mask_pooling: bool = True  # class path also sees features pooled under its own mask [ours]
    detach_class_path: bool = False  # class gradients reach the pooled features alone [ours]
    init: str = ""  # a Mask2Former to start from: a file, a folder, or "hf-hub:ORG/NAME"
    segmentor: str = ""  # a published one, frozen, in the place of ours: as `init`, or a short name

    def __post_init__(self) -> None:
        part = 32 if self.pixel_decoder == "deformable" else 4  # groups of its norms; of positions
        fits = self.width % self.heads == 0 and self.width % part == 0
        check(fits, f"width must be a multiple of heads and, for this pixel_decoder, of {part}")


@dataclass(frozen=True)
class LossConfig:
    """Stage 1 segmentation losses. A weight of 0 switches a term off."""

    classes: Weight = 2.0  # cross-entropy [Mask2Former]
    mask: Weight = 5.0  # point-sampled BCE [Mask2Former]
    dice: Weight = 5.0  # [Mask2Former]
    no_object: Weight = 0.1  # class weight of no_object [Mask2Former]
    points: Many = 1024  # [Mask2Former: 12544]
    oversample: Annotated[float, Ge(1), Le(100)] = 3.0  # [Mask2Former]
    importance: Share = 0.75  # share of uncertain points [Mask2Former]
    dense: Weight = 0.0  # per-token cross-entropy on seen classes [ours]
    truth: Weight = 0.0  # the warm-up's losses on true masks, kept on in stage 1 [ours]
    denoising: Whole = 0  # queries made from truth-pooled features, per image [ours]
    void_share: Share = 0.5  # lying on void for more than this share: no target; 1: all have [ours]


@dataclass(frozen=True)
class AlignConfig:
    """CON: conditional token alignment. Weights of 0 give the projection-only model.

    The two losses are stated by the paper; their form (InfoNCE), temperature, bank size, layers and
    weights are not, and are [ours].
    """

    image: Weight = 0.0  # weight of conditional global alignment
    instance: Weight = 0.0  # weight of conditional instance alignment
    temperature: Positive = 0.07
    bank: Whole = 1024  # size of each token bank (FIFO of CLS tokens as negatives); 0: batch only
    pooling: Literal["attention", "objectness", "matched"] = "attention"  # of the semantic queries
    crops: Many = 8  # masked crops per image at most
    source: Literal["online", "cache"] = "online"  # "cache" keeps the tokens of views on disk
    detach: bool = False  # stop the alignment gradient before the vision query [ours]


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser and schedule of stage 1."""

    steps: Whole = 1000
    batch_size: AtLeast1 = 16  # global, over all processes; accumulation is derived from it
    per_device: AtLeast1 = 16  # images a process takes in one forward
    lr: Positive = 1e-3  # [Mask2Former: 1e-4]
    weight_decay: Weight = 0.05  # [Mask2Former]
    backbone_factor: Weight = 1.0  # learning rate of the backbone relative to lr [Mask2Former: 0.1]
    scale_factor: Weight = 3.0  # learning rate of the scale of the logits relative to lr [ours]
    clip_norm: Positive = 1.0  # full-model gradient norm [Mask2Former: 0.01]
    warmup: Whole = 100  # steps of linear warm-up
    schedule: Literal["constant", "cosine", "poly", "step"] = "cosine"
    decay_from: Share = 0.3  # share of the steps after which "cosine" begins to fall
    step_at: tuple[Share, ...] = (0.889, 0.963)  # x0.1 at these shares ("step") [Mask2Former]
    ema: Below1 = 0.0  # decay of an exponential moving average of the weights; 0: off [ours]
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    channels_last: bool = False
    threads: Annotated[int, Ge(0), Le(1024)] = 0  # of the CPU in training; 0: torch's choice [ours]
    save_every: AtLeast1 = 200  # steps between `last` checkpoints
    eval_every: Whole = 0  # steps between scores on dev (chooses `best`); 0: at the end only
    log_every: AtLeast1 = 20
    preview_every: Whole = 200
    seed: Seed = 0


@dataclass(frozen=True)
class BackboneWarmupConfig:
    """Warm-up of the backbone on true masks of seen classes before the segmentor [ours]."""

    steps: Whole = 0  # 0: off
    lr: Positive = 2e-3
    align: bool = True  # also align pooled features with CLIP when CON is on
    masks: Weight = 0.0  # weight of mask losses on queries made of true masks, before any layer


@dataclass(frozen=True)
class BankConfig:
    """The query bank: one pass (or several augmented ones) over the training part."""

    views: Annotated[int, Ge(1), Le(1000)] = 1
    images: Whole = 0  # at most so many images; 0: all


@dataclass(frozen=True)
class CatConfig:
    """CAT: the generator of pseudo vision queries."""

    layers: Layers = 3  # [PADing]
    primitives: Width = 400  # [PADing]
    heads: Width = 8  # [PADing]
    ffn: Width = 512  # [PADing: 1024]
    dropout: Below1 = 0.1  # [PADing]
    noise: Literal["gaussian", "analogy"] = "gaussian"  # [PADing: gaussian; analogy: ours]
    steps: Whole = 1500  # [PADing: 20000]
    batch: Annotated[int, Ge(2), Le(1 << 24)] = 256  # real queries per step [ours]
    lr: Positive = 5e-4  # [PADing]
    matching: Weight = 1.0  # generative moment matching [paper]
    contrast: Weight = 1.0  # query contrast [paper; weight ours]
    cycle: Weight = 0.1  # vision to semantic [paper; weight ours]
    temperature: Positive = 0.1  # of query contrast [ours]
    negatives: Many = 256  # unmatched queries per step [ours]
    bandwidths: Several = (0.25, 0.5, 1.0, 2.0, 4.0)  # x mean distance [ours]
    fold: Whole = 6  # seen classes set aside as pseudo-unseen for selection; 0: none [ours]
    eval_every: Whole = 250
    seed: Seed = 0


@dataclass(frozen=True)
class FinetuneConfig:
    """Union finetuning of the semantic projector."""

    steps: Whole = 100  # [PADing: 20000, alternating]
    lr: Positive = 1e-3  # [PADing, SGD]
    optimiser: Literal["adam", "sgd"] = "adam"  # [PADing: sgd]
    batch: Many = 512  # real queries per step [ours]
    pseudo: bool = True  # false: real queries only, the control of the ablation
    pseudo_per_class: Many = 16  # pseudo queries per unseen class and step [ours; PADing: 1]
    unseen_per_step: Whole = 0  # unseen classes per step; 0: all [PADing: 5]
    unseen_weight: Weight = 3.0  # [PADing: 5]
    no_object_weight: Weight = 0.1  # [PADing]
    layers: Literal["last", "all"] = "last"  # of the projector
    no_object: bool = False  # the no-object embedding learns too
    calibrate: bool = False  # choose an offset on seen logits from dev and the fold
    seed: Seed = 0


@dataclass(frozen=True)
class InferConfig:
    """From queries to panoptic segments."""

    size: Pixels = 128  # short side in pixels [Mask2Former: 800]
    max_size: Pixels = 512  # long side at most [Mask2Former: 1333]
    min_score: Share = 0.5  # of a query's best class [Mask2Former: 0.8]
    min_mask: Share = 0.5  # a pixel belongs to a query above this probability [Mask2Former]
    overlap: Share = 0.8  # a segment keeps at least this share of its own mask [Mask2Former]
    joint_stuff: bool = False  # ... where all queries of a stuff class count as one mask [ours]
    seen_offset: Offset = 0.0  # taken off the class logits of seen classes
    batch: Many = 16
    white: Annotated[int, Ge(1), Le(65535)] = 65535  # in grey pictures of 16 bits; 12 bits: 4095

    def __post_init__(self) -> None:
        check(self.size <= self.max_size, "need size <= max_size")


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
    methods: tuple[Any, ...] = field(
        default_factory=lambda: tuple(kind() for kind in own_sections().values())
    )  # the methods' own sections, in the order of `own_sections()`

    def sections(self) -> dict[str, Any]:
        """Every section by its name: those of all methods, then each method's own."""
        common = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "methods"}
        return common | dict(zip(own_sections(), self.methods, strict=True))

    def own(self, kind: type[S]) -> S:
        """A method's own section, by its type."""
        return next(section for section in self.methods if isinstance(section, kind))

    def with_own(self, section: object) -> Config:
        """The same with another section of a method in the place of its own."""
        kind = type(section)
        methods = tuple(section if isinstance(old, kind) else old for old in self.methods)
        return replace(self, methods=methods)

    def __post_init__(self) -> None:
        made_of_tokens = self.loss.denoising or self.loss.dense or self.warmup.masks
        check(
            self.model.token_queries or not made_of_tokens,
            "loss.denoising, loss.dense and warmup.masks need model.token_queries=true",
        )
        check(
            self.model.mask_pooling or not (self.warmup.steps or self.loss.truth),
            "warmup.steps and loss.truth need model.mask_pooling=true",
        )
        check(
            self.model.mask_pooling or not self.model.detach_class_path,
            "model.detach_class_path=true needs model.mask_pooling=true",
        )
        check(
            self.cat.fold > 0 or not self.finetune.calibrate,
            "finetune.calibrate=true needs cat.fold > 0",
        )
        check(  # what nobody chose is looked at where it is used
            self.model.width % self.cat.heads == 0 or self.cat.heads == CatConfig.heads,
            f"cat.heads must divide model.width, which is {self.model.width}",
        )
