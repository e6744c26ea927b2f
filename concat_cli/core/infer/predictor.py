"""From a weights file to a predictor, and from a picture to what is in it: one path for all.

What differs between methods is behind two functions of their `METHOD`: `restore` makes the model of
a weights file, `predictor` the `Predictor` of a `Loading`.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from copy import copy
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from concat_cli.core.build import config_of, naming
from concat_cli.core.checkpoint import Weights, check_clip, open_weights
from concat_cli.core.clip.encoder import Clip, load_clip
from concat_cli.core.clip.prompts import (
    RecentTexts,
    cached_texts,
    check_names,
    class_texts,
    encode_classes,
)
from concat_cli.core.clip.source import check_here
from concat_cli.core.config import Config, InferConfig
from concat_cli.core.config_file import diff, from_dict, override, to_dict
from concat_cli.core.data.transforms import resize_short
from concat_cli.core.device import choose_device, choose_precision
from concat_cli.core.errors import UserError
from concat_cli.core.infer.instances import Instance, instances
from concat_cli.core.infer.pictures import Picture, to_array
from concat_cli.core.infer.postprocess import PanopticResult, Size, calibrated, panoptic, semantic
from concat_cli.core.infer.prediction import Prediction
from concat_cli.core.method import TASKS, loaded, stage_named
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.runs import BUILT_IN
from concat_cli.core.vocabulary import Vocabulary, same_name
from concat_cli.core.vocabulary_file import doubt, parse_names, parse_vocabulary
from concat_cli.core.weights_from.hub import without_waiting

DIVISOR = 32  # the coarsest stride of a model
Names = Vocabulary | Path | str | Sequence[str]
P = TypeVar("P", bound="Predictor")


@dataclass(frozen=True)
class Raw:
    """The model's output for some of the pictures given, which share one padded size.

    positions: which pictures; sizes: of the pictures; valid: their parts of the padded input;
    milliseconds per picture.
    """

    positions: list[int]
    sizes: list[Size]
    valid: list[Size]
    milliseconds: float


@dataclass(frozen=True)
class RawOutput(Raw):
    """Of a model with queries: its final layer.

    class_logits (B, Q, K+1); mask_logits (B, Q, h, w) at stride 4; image_logits (B, Q, K): what
    CLIP's image encoder says of the segments, where it was asked; else None.
    """

    class_logits: Tensor
    mask_logits: Tensor
    image_logits: Tensor | None = None


class Predictor:
    """A segmentor with the vocabulary it names segments by.

    Predictors of other kinds of models change what `_run` gives and what is made of it.

    Args:
        model: a segmentor in evaluation mode.
        text: (K, E) normalised text embeddings of the vocabulary.
        vocabulary: K classes; their `seen` says which logits `cfg.seen_offset` is taken off.
        dtype: of autocast in the model; None: fp32.
        meta: what the weights file says about itself.
    """

    tasks: tuple[str, ...] = TASKS  # that it can be scored for
    needs_clip_image = False  # whether CLIP's image encoder runs at test
    semantic_from = "queries"
    source = "The model"  # its weights file, where it is of one

    def __init__(
        self,
        model: nn.Module,
        text: Tensor,
        vocabulary: Vocabulary,
        cfg: InferConfig,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        meta: dict[str, Any] | None = None,
    ) -> None:
        assert len(text) == len(vocabulary), (len(text), len(vocabulary))
        self.device = torch.device(device)
        self.model = model.to(self.device)
        self.text = text.to(self.device)
        self.vocabulary, self.cfg, self.dtype = vocabulary, cfg, dtype
        self.meta = meta or {}
        self.is_thing = torch.tensor(vocabulary.is_thing, device=self.device)
        self.is_seen = torch.tensor(vocabulary.is_seen, device=self.device)

    @classmethod
    def load(
        cls,
        weights: Weights | Path | str | None = None,
        vocabulary: Names | None = None,
        device: torch.device | str = "auto",
        *,
        overrides: Sequence[str] | Config = (),
        precision: str = "auto",
        force: bool = False,
        cache_dir: Path | None = None,
        progress: Progress = SILENT,
    ) -> Predictor:
        """The predictor of weights of any method; UserError for what cannot be read or named.

        Args:
            weights: a file or folder, the short name of published weights (`concat weights` lists
                them), `hf-hub:ORG/NAME`; None: the built-in ones. Nothing is downloaded.
            vocabulary: a file, or names like `["cat, kitten", "sky : stuff"]`; None: the classes of
                the data set that the weights were trained on.
            overrides: keys that say how to predict (`["infer.size=640"]`); of a whole
                configuration, those keys alone count.
            precision: auto (fp32 on the CPU, the best the GPU has otherwise), fp32, bf16 or fp16.
            force: allow names with words that the built-in CLIP never saw.
            cache_dir: where text embeddings are kept between runs.
        """
        return Loading.of(
            weights,
            vocabulary,
            device,
            overrides=overrides,
            precision=precision,
            force=force,
            cache_dir=cache_dir,
            progress=progress,
        ).predictor()

    @overload
    def __call__(self, pictures: Picture, semantic: bool = True) -> Prediction: ...
    @overload
    def __call__(self, pictures: Sequence[Picture], semantic: bool = True) -> list[Prediction]: ...
    def __call__(
        self, pictures: Picture | Sequence[Picture], semantic: bool = True
    ) -> Prediction | list[Prediction]:
        """What is in a picture, or in each of a list of them.

        A picture is a path, a PIL image, or an array or tensor as `to_array` takes it; see
        `predict_batch` for the rest.
        """
        if isinstance(pictures, Sequence) and not isinstance(pictures, str):
            return self.predict_batch(pictures, semantic)
        return self.predict_batch([pictures], semantic)[0]

    def predict_batch(self, pictures: Sequence[Picture], semantic: bool = True) -> list[Prediction]:
        """Predictions in the order of the pictures; those of like size run together.

        semantic: also make the semantic maps, which panoptic segments alone do not need. UserError
        for a picture that cannot be read or is none.
        """
        start = time.perf_counter()
        images = [to_array(picture, self.cfg.white) for picture in pictures]
        load = (time.perf_counter() - start) * 1000 / max(1, len(images))
        found: dict[int, Prediction] = {}
        is_panoptic = "panoptic" in self.tasks
        for raw in self.raw(images):
            start = time.perf_counter()
            results = self.segments(raw)
            apart = is_panoptic and semantic  # else the segments are the semantic map
            maps = self.semantic(raw) if apart else [None] * len(results)
            post = (time.perf_counter() - start) * 1000 / len(results)
            times = {"load": load, "model": raw.milliseconds, "post": post}
            times = {name: round(value, 2) for name, value in times.items()}
            for position, result, classes in zip(raw.positions, results, maps, strict=True):
                found[position] = Prediction(
                    result.panoptic_map,
                    result.segments,
                    self.vocabulary,
                    times,
                    is_panoptic,
                    classes,
                    images[position],
                )
        return [found[position] for position in range(len(images))]

    @torch.inference_mode()
    def raw(self, images: Sequence[np.ndarray]) -> Iterator[Raw]:
        """Runs the model on (H, W, 3) uint8 images, in batches of one padded size."""
        resized = [resize_short(image, self.cfg.size, self.cfg.max_size) for image in images]
        groups: dict[Size, list[int]] = defaultdict(list)
        for position, image in enumerate(resized):
            height, width = image.shape[:2]
            groups[self._padded(height, width)].append(position)
        for padded, members in groups.items():
            for first in range(0, len(members), self.cfg.batch):
                positions = members[first : first + self.cfg.batch]
                start = time.perf_counter()
                sizes = [(images[p].shape[0], images[p].shape[1]) for p in positions]
                valid = [(resized[p].shape[0], resized[p].shape[1]) for p in positions]
                raw = self._run(*self._batch([resized[p] for p in positions], padded), valid)
                if self.device.type == "cuda":
                    torch.cuda.synchronize(self.device)  # or the next step would be booked for it
                self._check(raw)
                elapsed = (time.perf_counter() - start) * 1000 / len(positions)
                yield replace(
                    raw, positions=positions, sizes=sizes, valid=valid, milliseconds=elapsed
                )

    def _check(self, raw: Raw) -> None:
        """UserError where the model gave NaN: nothing would be found, without a word."""
        found = [value for value in vars(raw).values() if isinstance(value, Tensor)]
        if any(bool(value.isnan().any()) for value in found):
            raise UserError(
                f"{self.source} gives no numbers (NaN) for a picture (in {self.dtype or 'fp32'}).",
                "In half precision, try --precision fp32 (of Python: precision='fp32'). Otherwise "
                "the weights are damaged, or were saved by a training that went astray.",
            )

    def segments(self, raw: Raw) -> list[PanopticResult]:
        """What `Prediction` holds of raw outputs, in the order of `raw.positions`."""
        return self.panoptic(raw)

    @torch.inference_mode()
    def panoptic(self, raw: Raw, offset: float | None = None) -> list[PanopticResult]:
        """Panoptic maps; `offset` on the seen logits, by default that of the configuration."""
        raw, probabilities = self._named(raw, offset)
        return panoptic(
            probabilities, raw.mask_logits, raw.sizes, self.is_thing, self.cfg, raw.valid
        )

    @torch.inference_mode()
    def semantic(self, raw: Raw, offset: float | None = None) -> list[NDArray[np.int32]]:
        """(H, W) class indices of raw outputs, in the order of `raw.positions`."""
        raw, probabilities = self._named(raw, offset)
        return semantic(probabilities, raw.mask_logits, raw.sizes, raw.valid)

    @torch.inference_mode()
    def instances(self, raw: Raw, offset: float | None = None) -> list[list[Instance]]:
        """Instances of things, which may overlap, in the order of `raw.positions`."""
        raw, probabilities = self._named(raw, offset)
        return instances(probabilities, raw.mask_logits, raw.sizes, self.is_thing, raw.valid)

    @property
    def offset_scale(self) -> float:
        """What offsets are measured against: the scale of the class logits."""
        scale = self.model.get_submodule("classifier").scale
        assert isinstance(scale, Tensor)
        return scale.item()

    @property
    def parameters(self) -> int:
        """How many parameters run at test; text embeddings are made before, once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def probabilities(self, raw: RawOutput, offset: float) -> Tensor:
        """(B, Q, K+1) of the classes and no_object, with `offset` taken off the seen ones."""
        return calibrated(raw.class_logits, self.is_seen, offset).softmax(-1)

    def _named(self, raw: Raw, offset: float | None) -> tuple[RawOutput, Tensor]:
        assert isinstance(raw, RawOutput)
        return raw, self.probabilities(raw, self.cfg.seen_offset if offset is None else offset)

    def _padded(self, height: int, width: int) -> Size:
        """What a picture of this size is padded to."""
        return -(-height // DIVISOR) * DIVISOR, -(-width // DIVISOR) * DIVISOR

    def _batch(self, images: list[np.ndarray], padded: Size) -> tuple[Tensor, Tensor | None]:
        """Images (B, 3, H, W) uint8 on the device, and where they are padding, if anywhere."""
        batch = torch.zeros(len(images), 3, *padded, dtype=torch.uint8)
        padding = torch.ones(len(images), *padded, dtype=torch.bool)
        for row, image in enumerate(images):
            height, width = image.shape[:2]
            batch[row, :, :height, :width] = torch.tensor(image).permute(2, 0, 1)
            padding[row, :height, :width] = False
        pads = padding.to(self.device) if bool(padding.any()) else None
        return batch.to(self.device), pads

    def _run(self, images: Tensor, padding: Tensor | None, valid: list[Size]) -> Raw:
        """The model's output for a batch; whose images they are is filled in by `raw`."""
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
            output = self.model(images, padding, self.text, last_only=True)
        classes, masks = output.class_logits[-1].float(), output.mask_logits[-1].float()
        return RawOutput([], [], valid, 0.0, classes, masks)


load = Predictor.load


@dataclass
class _Kept:
    """What is loaded once, also where vocabularies change."""

    clip: Clip | None = None
    model: nn.Module | None = None


@dataclass
class Loading:
    """What a method's predictor is made of: weights, and what was asked for.

    cfg: the weights' configuration as it predicts. vocabulary: `seen` are those that the weights
    were trained on with labels. dtype: of autocast; None: fp32. cache_dir: of text embeddings;
    None: the user's. force: unknown words were allowed. recent: where other vocabularies follow,
    the embeddings of the names asked for last; the model and CLIP's text tower then stay. on_disk:
    whether text embeddings are kept there.
    """

    weights: Weights
    cfg: Config
    vocabulary: Vocabulary
    device: torch.device
    dtype: torch.dtype | None = None
    progress: Progress = SILENT
    cache_dir: Path | None = None
    force: bool = False
    recent: RecentTexts | None = None
    on_disk: bool = True
    _kept: _Kept = field(default_factory=_Kept, init=False, repr=False)

    @classmethod
    def of(
        cls,
        weights: Weights | Path | str | None = None,
        vocabulary: Names | None = None,
        device: torch.device | str = "auto",
        *,
        overrides: Sequence[str] | Config = (),
        precision: str = "auto",
        force: bool = False,
        cache_dir: Path | None = None,
        progress: Progress = SILENT,
    ) -> Loading:
        """What was asked for, checked; arguments and errors as of `Predictor.load`."""
        if not isinstance(weights, Weights):
            weights = open_weights(BUILT_IN if weights is None else weights)
        cfg = at_test(weights, overrides)
        place = _device(device, progress)
        dtype = None
        if precision != "auto" or place.type == "cuda":  # the CPU stays exact unless told otherwise
            dtype, reason = choose_precision(precision, place)
            progress.say(f"precision {dtype or torch.float32} ({reason})")
        classes = named_by(weights, vocabulary)
        if vocabulary is not None and (doubtful := doubt(classes)):
            progress.say(doubtful)
        progress.say(told(classes))
        with naming(weights) if vocabulary is None else nullcontext():
            unknown = check_names(classes, cfg.clip, force)
        if unknown:
            progress.say(f"the built-in CLIP has never seen: {', '.join(unknown)} (--force)")
        return cls(weights, cfg, classes, place, dtype, progress, cache_dir, force)

    def predictor(self) -> Predictor:
        """The predictor, of the kind of the weights' method."""
        method, _ = stage_named(self.weights.stage)
        return loaded(method.predictor)(self)

    def renamed(self, vocabulary: Vocabulary) -> Loading:
        """For other names, with the model and the CLIP that are in memory already; nothing of
        these names is written to disk or said."""
        assert self.recent is not None, "nothing was kept"
        other = copy(self)
        other.vocabulary, other.progress, other.on_disk = vocabulary, SILENT, False
        return other

    def text(self, templates: tuple[str, ...] = (), vocabulary: Vocabulary | None = None) -> Tensor:
        """(K, E) normalised embeddings of the vocabulary or another one, of the configured
        templates or others.

        They come from the cache; CLIP's text tower is loaded where they are not all there.
        """
        rows = class_texts(vocabulary or self.vocabulary, self.cfg.clip, templates)
        encode = self._encoded if self.recent is None else partial(self.recent, self._encoded)
        return encode(rows).to(self.device)

    def _encoded(self, rows: list[list[str]]) -> Tensor:
        if not self.on_disk:
            return encode_classes(self.clip(image_tower=False), rows)
        return cached_texts(
            self.weights.meta["clip"]["sha256"] or self.clip(image_tower=True).identity.sha256,
            rows,
            lambda: self.clip(image_tower=False),
            self.cache_dir,
            self.progress,
        )

    def clip(self, image_tower: bool) -> Clip:
        """The CLIP of the weights, loaded once; UserError where it is not here, or another one lies
        in its place."""
        clip = self._kept.clip
        if clip is None or (image_tower and not clip.has_image_tower):
            check_here(self.cfg.clip)
            with without_waiting(all_cached=True):  # to predict fetches nothing
                clip = load_clip(self.cfg.clip, self.device, image_tower=image_tower)
            check_clip(self.weights, clip.identity)
            self._kept.clip = clip
        return clip

    def model(self) -> nn.Module:
        """The model of the weights in evaluation mode, on the device; on a CPU made ready for it,
        so that it can no longer be trained. Where other vocabularies follow, it stays."""
        if self._kept.model is not None:
            return self._kept.model
        method, _ = stage_named(self.weights.stage)
        model = loaded(method.restore)(self.weights).to(self.device)
        # the maps of the small backbone are too small for its layout to count in fp32
        if self.device.type == "cpu" and (self.dtype or self.cfg.model.backbone != "small"):
            from concat_cli.core.model.prepared import prepare

            prepare(model, self.dtype)
        if self.recent is not None:
            self._kept.model = model
        return model

    def open(self, kind: Callable[..., P], text: Tensor | None = None, **own: Any) -> P:
        """A predictor whose first arguments are those of `Predictor`, and `own` its own. text: by
        default that of the vocabulary's classes."""
        found = kind(
            self.model(),
            self.text() if text is None else text,
            self.vocabulary,
            self.cfg.infer,
            self.device,
            self.dtype,
            self.weights.meta,
            **own,
        )
        found.source = str(self.weights.path)
        return found


def open_predictor(loading: Loading) -> Predictor:
    """The predictor of weights whose model is a segmentor and needs nothing else."""
    return loading.open(Predictor)


def at_test(weights: Weights, overrides: Sequence[str] | Config = ()) -> Config:
    """The configuration of weights with what was asked for at test.

    Only keys that say how to predict change: those of `infer` and `Method.at_test`. UserError where
    overrides name others; of a whole configuration the others are left aside.
    """
    own = config_of(weights)
    method, _ = stage_named(weights.stage)
    allowed = (*(f"infer.{one.name}" for one in fields(InferConfig)), *method.at_test)
    if isinstance(overrides, Config):
        values, asked = to_dict(own), to_dict(overrides)
        for section, _, key in (name.partition(".") for name in allowed):
            values[section][key] = asked[section][key]
        return from_dict(values)
    cfg = override(own, overrides)
    others = [key for line in diff(own, cfg) if (key := line.split(":")[0]) not in allowed]
    if others:
        raise UserError(
            f"{', '.join(others)} cannot be changed in these weights.",
            f"Keys that say how they predict: {', '.join(allowed)}.",
        )
    return cfg


def check_plan(weights: Weights, cfg: Config) -> None:
    """UserError, before anything is predicted, where the CLIP is not here that was to be chosen."""
    method, _ = stage_named(weights.stage)
    if "clip.model" in method.at_test and cfg.clip.model:
        check_here(cfg.clip)


def named_by(weights: Weights, vocabulary: Names | None = None) -> Vocabulary:
    """The classes that a predictor is to name, `seen` as of `seen_by`; see `Predictor.load`."""
    known = vocabulary_of(weights)
    if isinstance(vocabulary, (str, Path)):
        vocabulary = parse_vocabulary(Path(vocabulary), known)
    elif vocabulary is not None and not isinstance(vocabulary, Vocabulary):
        vocabulary = parse_names(vocabulary, known)
    return seen_by(known if vocabulary is None else vocabulary, weights)


def told(classes: Vocabulary) -> str:
    """How many classes there are, and of what kinds."""
    things, seen = sum(classes.is_thing), len(classes.seen_indices)
    return (
        f"names {len(classes)} {'class' if len(classes) == 1 else 'classes'} (things {things}, "
        f"stuff {len(classes) - things}; trained with labels: {seen})"
    )


def vocabulary_of(weights: Weights) -> Vocabulary:
    """The classes of the data set that the weights were trained on."""
    return Vocabulary.from_json(weights.meta["vocabulary"])


def seen_by(vocabulary: Vocabulary, weights: Weights) -> Vocabulary:
    """The vocabulary with `seen` set where labels of a class of that name (or one of its synonyms)
    were trained on; case does not count."""
    trained = {same_name(name) for name in weights.meta["trained"]}
    return Vocabulary(
        tuple(
            replace(e, seen=any(same_name(n) in trained for n in (e.name, *e.synonyms)))
            for e in vocabulary.entries
        )
    )


def _device(device: torch.device | str, progress: Progress) -> torch.device:
    if isinstance(device, torch.device):
        return device
    chosen, why = choose_device(device)
    progress.say(f"device {chosen} ({why})")
    return chosen
