"""open_clip models: by name and tag or file, by a hub's id, or from a folder.

open_clip takes the activation from a model's name and only warns where the weights were trained
with the other one (OpenAI's with QuickGELU); here it follows the tag.
"""

from __future__ import annotations

import difflib
import logging
import pickle
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from torch import Tensor, nn

from concat_cli.core.clip import tiny
from concat_cli.core.config import ClipConfig
from concat_cli.core.errors import UserError
from concat_cli.core.weights_from import hub
from concat_cli.core.weights_from.files import read_tensors
from concat_cli.core.weights_from.published import how_to_get, pairs

T = TypeVar("T")
RANDOM = "random"  # ClipConfig.pretrained: random weights on purpose, for tests and dry runs
WEIGHT_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # best first
_FILES = (".safetensors", ".pt", ".pth", ".bin")
_ELSEWHERE = (hub.PREFIX, "local-dir:")
_FAULTS = (
    RuntimeError, OSError, ValueError, KeyError, TypeError, ImportError, SafetensorError,
    pickle.UnpicklingError,
)  # fmt: skip


def library() -> Any:
    """open_clip, whose import takes as long as torch's: cached texts need none of it."""
    import open_clip

    return open_clip


def create(cfg: ClipConfig) -> nn.Module:
    """An open_clip model with its weights, or with random ones where the config asks for that.

    What is cached is used without asking the hub; UserError, at once, for what cannot be had.
    """
    options: dict[str, Any] = {}
    if not cfg.model.startswith(_ELSEWHERE):
        _check_names(cfg)
        options = _options(cfg)
    if cfg.pretrained == RANDOM:
        options = {"load_weights": False}
    else:
        options["require_pretrained"] = True
    return _attempt(cfg, lambda: library().create_model(cfg.model, **options))


def tokenizer(cfg: ClipConfig) -> Callable[..., Tensor]:
    """The tokenizer that belongs to a model."""
    return _attempt(cfg, lambda: library().get_tokenizer(cfg.model))


def repository_of(cfg: ClipConfig) -> str:
    """The hub's repository that holds the weights; empty where they come from elsewhere."""
    if cfg.model.startswith(hub.PREFIX):
        return cfg.model.removeprefix(hub.PREFIX)
    tagged = library().get_pretrained_cfg(_name(cfg), cfg.pretrained or "")
    return tagged.get("hf_hub", "").rpartition("/")[0]


def is_cached(cfg: ClipConfig) -> bool:
    """Whether the weights are in the hub's local cache."""
    repository = repository_of(cfg)
    return bool(repository) and hub.cached(repository, WEIGHT_FILES) is not None


def check_here(cfg: ClipConfig) -> None:
    """UserError for a CLIP that would have to be downloaded, with the command that does so."""
    if cfg.model in tiny.FILES or cfg.pretrained == RANDOM or cfg.model.startswith("local-dir:"):
        return
    asked = cfg.model, cfg.pretrained
    pair = next((p for p in pairs().values() if (p.clip.model, p.clip.pretrained) == asked), None)
    repository = repository_of(cfg)
    if repository and not (is_cached(cfg) if pair is None else hub.is_here(pair.clip.part)):
        raise UserError(
            f"CLIP {cfg.model} {cfg.pretrained} is not in the cache ({hub.constants.HF_HUB_CACHE})."
            f" It is a download {hub.size_of(_name(cfg))} ({repository}).",
            _fetch_hint(cfg) if pair is None else how_to_get(pair.name),
        )


def _name(cfg: ClipConfig) -> str:
    return cfg.model.replace("/", "-")


def _options(cfg: ClipConfig) -> dict[str, Any]:
    """What open_clip is told about the weights of a model that it knows by name."""
    name = _name(cfg)
    options: dict[str, Any] = {"pretrained": cfg.pretrained}
    tagged = library().get_pretrained_cfg(name, cfg.pretrained)
    if tagged:
        options["quick_gelu"] = bool(tagged.get("quick_gelu", False))
    elif cfg.pretrained != RANDOM:
        # a file does not say how its images were normalised: as all weights of this model, if one
        tags = [library().get_pretrained_cfg(name, tag) for tag in _tags(cfg)]
        ways = {(tag.get("mean"), tag.get("std")) for tag in tags}
        if len(ways) == 1 and None not in (way := ways.pop()):
            options["force_preprocess_cfg"] = {"mean": way[0], "std": way[1]}
    return options


def _tags(cfg: ClipConfig) -> list[str]:
    return library().list_pretrained_tags_by_model(_name(cfg))


def _check_names(cfg: ClipConfig) -> None:
    """UserError for an unknown model, a missing file, and a model without a choice of weights."""
    known = [*tiny.FILES, *library().list_models()]
    if _name(cfg) not in known:
        near = difflib.get_close_matches(cfg.model, known, 3) or list(tiny.FILES)
        raise UserError(
            f"No CLIP model is called {cfg.model!r} (clip.model).",
            f"Did you mean {', '.join(near)}? A folder of your own: clip.model=local-dir:PATH",
        )
    tags = _tags(cfg)
    if not cfg.pretrained:
        raise UserError(
            f"CLIP {cfg.model} needs weights, and clip.pretrained is empty.",
            f"Set clip.pretrained to a tag ({_some(tags)}) or to a weights file; "
            f"{RANDOM!r} gives random weights.",
        )
    path = Path(cfg.pretrained)
    if (path.suffix in _FILES or len(path.parts) > 1) and not path.is_file():
        raise UserError(
            f"There is no file {path} (clip.pretrained).",
            f"Give an open_clip weights file, or a tag: {_some(tags)}.",
        )


def _attempt(cfg: ClipConfig, call: Callable[[], T]) -> T:
    """Runs open_clip's loader; what goes wrong there is the user's to mend."""
    there = True
    try:
        with hub.without_waiting(not _downloads(cfg)) as there, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "QuickGELU mismatch")  # which `_options` mends
            return call()
    except _FAULTS as error:
        if Path(cfg.pretrained).is_file():
            read_tensors(Path(cfg.pretrained))  # which tells a damaged or a refused file
        raise _not_loaded(cfg, error, there) from error


def _downloads(cfg: ClipConfig) -> bool:
    """Whether anything may have to be downloaded."""
    if cfg.model.startswith(_ELSEWHERE):
        return cfg.model.startswith(hub.PREFIX)
    config: dict[str, dict[str, Any]] = library().get_model_config(_name(cfg)) or {}
    parts = config.get("text_cfg", {})
    if any(key.startswith("hf_") for key in parts):  # a tokenizer or a text tower from the hub
        return True
    return bool(repository_of(cfg)) and not is_cached(cfg)


def _not_loaded(cfg: ClipConfig, error: Exception, there: bool) -> UserError:
    what = f"CLIP {cfg.model} (weights: {cfg.pretrained or 'its own'}) cannot be loaded: "
    what += hub.short(error)
    repository = repository_of(cfg)
    if repository and not there and not is_cached(cfg):
        what = (
            f"CLIP {cfg.model} {cfg.pretrained} is not in the cache, and the hub cannot be "
            f"reached. It is a download {hub.size_of(_name(cfg))} ({repository})."
        )
    return UserError(what, _fetch_hint(cfg))


def _fetch_hint(cfg: ClipConfig) -> str:
    if cfg.model.startswith("local-dir:"):
        return "The folder must hold open_clip_config.json (with model_cfg) and the weights."
    if Path(cfg.pretrained).is_file():
        return f"The file must hold open_clip weights of this very model (clip.model={cfg.model})."
    weights = "" if cfg.model.startswith(hub.PREFIX) else f", pretrained={cfg.pretrained!r}"
    call = f"open_clip.create_model({cfg.model!r}{weights})"
    tags = _tags(cfg)
    return (
        f'Fetch it where there is a network: python -c "import open_clip; {call}", then copy '
        "~/.cache/huggingface, or give the file: clip.pretrained=PATH or clip.model=local-dir:PATH."
        + (f" Known tags: {_some(tags)}." if tags and cfg.pretrained not in tags else "")
    )


def _some(tags: list[str], most: int = 4) -> str:
    return ", ".join(tags[:most]) + (", ..." if len(tags) > most else "")


@contextmanager
def quiet() -> Generator[None]:
    """Keeps open_clip's log lines off the terminal: what matters is said through `Progress`."""
    root, handler, level = logging.getLogger(), logging.NullHandler(), logging.root.manager.disable
    root.addHandler(handler)
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(level)
        root.removeHandler(handler)
