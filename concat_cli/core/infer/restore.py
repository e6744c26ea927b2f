"""From a weights file and a vocabulary to all that a predictor needs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from concat_cli.core.build import config_of
from concat_cli.core.checkpoint import Weights, check_clip
from concat_cli.core.clip.encoder import Clip, load_clip
from concat_cli.core.clip.prompts import check_words, text_embeddings
from concat_cli.core.config import InferConfig
from concat_cli.core.device import choose_device, choose_precision
from concat_cli.core.method import loaded, stage_named
from concat_cli.core.progress import Progress
from concat_cli.core.vocabulary import Vocabulary, parse_vocabulary, same_name


@dataclass(frozen=True)
class Restored:
    """A model ready to run: text (K, E), seen/unseen by what the weights were trained on."""

    weights: Weights
    model: nn.Module
    text: Tensor
    vocabulary: Vocabulary
    infer: InferConfig
    device: torch.device
    dtype: torch.dtype | None
    clip: Clip


def restore(
    weights: Weights,
    vocabulary: Vocabulary | Path | str | None,
    device: torch.device | str,
    *,
    infer: InferConfig | None,
    image_tower: bool,
    precision: str,
    force: bool,
    cache_dir: Path | None,
    progress: Progress,
) -> Restored:
    """Builds, checks and embeds; arguments as in `Predictor.load`. `image_tower`: of CLIP, too."""
    cfg = config_of(weights)
    chosen = _device(device, progress)
    dtype = None
    if precision != "auto" or chosen.type == "cuda":  # the CPU stays exact unless told otherwise
        dtype, reason = choose_precision(precision, chosen)
        progress.say(f"precision {dtype or torch.float32} ({reason})")
    known = vocabulary_of(weights)
    if isinstance(vocabulary, (str, Path)):
        vocabulary = parse_vocabulary(Path(vocabulary), known)
    vocabulary = seen_by(vocabulary or known, weights)
    clip = load_clip(cfg.clip, chosen, image_tower=image_tower)
    check_clip(weights, clip.identity)
    unknown = check_words(vocabulary, clip, force)
    if unknown:
        progress.say(f"the built-in CLIP has never seen: {', '.join(unknown)} (--force)")
    text = text_embeddings(clip, vocabulary, cfg.clip, cache_dir, progress)
    method, _ = stage_named(weights.stage)
    model = loaded(method.restore)(weights).to(chosen)
    return Restored(weights, model, text, vocabulary, infer or cfg.infer, chosen, dtype, clip)


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
