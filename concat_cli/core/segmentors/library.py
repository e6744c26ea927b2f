"""Segmentors through the `transformers` library, an optional extra: EoMT, OneFormer, MaskFormer.

Their raw outputs alone are taken; pictures are prepared, and masks are made segments, by us.
"""

from __future__ import annotations

import importlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from concat_cli.core.errors import UserError
from concat_cli.core.segmentors import STRIDE, Proposals, PublishedSegmentor
from concat_cli.core.segmentors.files import Files
from concat_cli.core.weights_from.fit import not_finite, on_paper
from concat_cli.core.weights_from.hub import short, without_waiting

INSTALL = "pip install concat-seg[hub]"
_ROOM = 1 << 24  # parameters that a model may ask for beyond those that there are
_LOSS = "criterion."  # what a loss keeps beside the model; nothing here reads it


class LibrarySegmentor(PublishedSegmentor):
    """A model of the library's, and the colours that it was trained with.

    They are told of no padding, as the library's own models of these kinds ignore it.
    """

    model_class: ClassVar[str]
    mean: Tensor  # (3, 1, 1) of pixels in 0-1
    std: Tensor

    def __init__(self, model: nn.Module, files: Files) -> None:
        super().__init__()
        self.model = model
        for name, values in zip(("mean", "std"), files.colours, strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)
        head = self.class_head
        self.width, self.count = int(head.in_features), self.queries_of(model)
        files.describe(self, int(head.out_features) - 1)

    @property
    def class_head(self) -> nn.Linear:
        """Queries to class logits."""
        head = self.model.get_submodule("class_predictor")
        assert isinstance(head, nn.Linear)
        return head

    @staticmethod
    def adapt(config: Any) -> None:
        """Sets what a configuration has to say before the model is built."""

    @staticmethod
    def queries_of(model: Any) -> int:
        """How many queries there are."""
        return int(model.config.num_queries)

    def run(self, pixels: Tensor) -> Proposals:
        """Normalised pictures (B, 3, H, W) -> the library's own raw outputs."""
        raise NotImplementedError

    def propose(self, images: Tensor, padding: Tensor | None) -> Proposals:
        """See `PublishedSegmentor`."""
        pixels = (images.float() / 255 - self.mean) / self.std
        if padding is not None:
            pixels = pixels.masked_fill(padding[:, None], 0.0)
        found = self.run(pixels)
        masks = found.mask_logits.float()
        size = (images.shape[-2] // STRIDE, images.shape[-1] // STRIDE)
        if masks.shape[-2:] != size:
            masks = F.interpolate(masks, size, mode="bilinear")
        return Proposals(masks, found.class_logits.float(), found.queries)


class EoMT(LibrarySegmentor):
    """Kerssies et al., CVPR 2025: a plain ViT, of one fixed input; its processor pads it black."""

    model_class = "EomtForUniversalSegmentation"

    def __init__(self, model: nn.Module, files: Files) -> None:
        super().__init__(model, files)
        self.padded = (self.size, self.size)
        shares = model.get_buffer("attn_mask_probs")
        if bool(((shares > 0) & (shares < 1)).any()):
            shares.round_()
            annealed = (
                "It was saved while its attention masks were annealed, and would draw them at "
                "random: those that are likelier taken than not are taken."
            )
            self.notes = (*self.notes, annealed)

    def run(self, pixels: Tensor) -> Proposals:
        """See `LibrarySegmentor`."""
        out = self.model(pixel_values=pixels)
        queries = out.last_hidden_state[:, : self.count]
        return Proposals(out.masks_queries_logits, out.class_queries_logits, queries)


class OneFormer(LibrarySegmentor):
    """Jain et al., CVPR 2023, told that its task is panoptic."""

    model_class = "OneFormerForUniversalSegmentation"
    task: Tensor  # (1, 77) tokens

    def __init__(self, model: nn.Module, files: Files) -> None:
        super().__init__(model, files)
        self.register_buffer("task", task_tokens(int(self.model.config.task_seq_len)), False)  # pyright: ignore

    @property
    def class_head(self) -> nn.Linear:
        """Queries to class logits."""
        head = self.model.get_submodule("model.transformer_module.decoder.class_embed")
        assert isinstance(head, nn.Linear)
        return head

    @staticmethod
    def adapt(config: Any) -> None:
        """Without the text encoder, which training alone needs."""
        config.is_training = False

    def run(self, pixels: Tensor) -> Proposals:
        """See `LibrarySegmentor`."""
        out = self.model(pixel_values=pixels, task_inputs=self.task.expand(len(pixels), -1))
        norm = self.model.get_submodule("model.transformer_module.decoder.decoder_norm")
        queries = norm(out.transformer_decoder_object_queries)
        return Proposals(out.masks_queries_logits, out.class_queries_logits, queries)


class MaskFormer(LibrarySegmentor):
    """Cheng et al., NeurIPS 2021."""

    model_class = "MaskFormerForInstanceSegmentation"

    @staticmethod
    def queries_of(model: Any) -> int:
        """How many queries there are."""
        return int(model.config.decoder_config.num_queries)

    def run(self, pixels: Tensor) -> Proposals:
        """See `LibrarySegmentor`."""
        out = self.model(pixel_values=pixels)
        queries = out.transformer_decoder_last_hidden_state
        return Proposals(out.masks_queries_logits, out.class_queries_logits, queries)


def task_tokens(length: int) -> Tensor:
    """What OneFormer's processor makes of "panoptic": CLIP's tokens, zeros behind; (1, length)."""
    from open_clip import SimpleTokenizer

    return SimpleTokenizer(context_length=length)("the task is panoptic")


def open_library(kind: type[LibrarySegmentor], files: Files) -> LibrarySegmentor:
    """A model of a kind with the tensors of the files.

    UserError where the library is not installed or too old, or where tensors are missing, left over
    or of a shape that does not fit.
    """
    library = library_with(kind.model_class, kind.__name__)
    model_class = getattr(library, kind.model_class)
    dropped = () if kind is not OneFormer else ("model.text_mapper.",)
    tensors = {n: t for n, t in files.tensors.items() if not n.startswith((_LOSS, *dropped))}
    try:
        with quiet(library), without_waiting(all_cached=True):
            config = model_class.config_class.from_dict(files.config)
            kind.adapt(config)
            with on_paper(tensors):
                _check_size(model_class(config), tensors)
            model, report = model_class.from_pretrained(
                None, config=config, state_dict=tensors, output_loading_info=True,
                ignore_mismatched_sizes=True,
            )  # fmt: skip
    except UserError as error:
        raise UserError(f"{files.source}: {error.what}", error.hint) from error
    except Exception as error:  # whatever the library raises of a configuration that is not sound
        raise UserError(
            f"transformers {library.__version__} cannot build the {kind.__name__} of "
            f"{files.source}: {type(error).__name__}: {short(error)}",
            "Check that its config.json is whole; or install a newer transformers: "
            "pip install -U transformers",
        ) from error
    _check(files.source, report)
    if wrong := not_finite(dict(model.named_parameters())):
        raise UserError(f"{files.source}: {wrong}.", "Copy the weights again.")
    return kind(model.eval().requires_grad_(False), files).eval()


def library_with(model_class: str, what: str) -> Any:
    """The transformers library; UserError where it is not installed, or too old to have a class."""
    try:
        library = importlib.import_module("transformers")
    except ImportError as error:
        raise UserError(
            f"{what} runs through the transformers library, which is not installed.",
            f"Install it: {INSTALL}",
        ) from error
    if not hasattr(library, model_class):
        raise UserError(
            f"transformers {library.__version__} has no {what}.",
            f"Install a newer one: {INSTALL} -U",
        )
    return library


@contextmanager
def quiet(library: Any) -> Generator[None]:
    """Without the library's own bars and tables: what is amiss is told by an error."""
    logging = library.utils.logging
    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()


def _check_size(planned: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """UserError where a configuration asks for far more numbers than there are."""
    asked, held = (
        sum(t.numel() for t in some) for some in (planned.parameters(), tensors.values())
    )
    if asked > _ROOM + 2 * held:
        raise UserError(
            f"config.json asks for {asked / 1e6:,.0f} million parameters, the weights hold "
            f"{held / 1e6:,.0f} million.",
            "Copy both files again, from one place.",
        )


def _check(source: str, report: dict[str, Any]) -> None:
    """UserError for tensors that are missing, left over or misshapen."""
    missing = sorted(n for n in report["missing_keys"] if not n.startswith(_LOSS))
    wrong = sorted(report["mismatched_keys"])
    extra = sorted(report["unexpected_keys"])
    if wrong:
        name, there, here = wrong[0]
        what = f"{name} is {tuple(there)} there and {tuple(here)} by its config.json"
        what += f", and {len(wrong) - 1} more" if wrong[1:] else ""
    elif missing:
        what = f"{len(missing)} tensors are missing, like {missing[0]}"
    elif extra:
        what = f"{len(extra)} tensors have no place in it, like {extra[0]}"
    else:
        return
    raise UserError(
        f"{source} does not fit its config.json: {what}.",
        "Copy both files again, from one place.",
    )
