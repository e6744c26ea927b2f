"""Prompts: class names -> text embeddings, cached on disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from concat_cli.core.clip.encoder import Clip
from concat_cli.core.config import ClipConfig
from concat_cli.core.errors import UserError
from concat_cli.core.files import write_bytes
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.vocabulary import Vocabulary

# "single": CLIP paper, 3.1.4. "scene": ZegFormer's single one. "imagenet_select": PADing's eight
# (of open_clip's templates), which ZegFormer takes on COCO. "masked": the 32 that name what CLIP's
# image encoder is shown of a segment [ZegFormer].
TEMPLATES: dict[str, tuple[str, ...]] = {
    "single": ("a photo of a {}.",),
    "scene": ("A photo of a {} in the scene",),
    "imagenet_select": (
        "itap of a {}.",
        "a bad photo of the {}.",
        "a origami {}.",
        "a photo of the large {}.",
        "a {} in a video game.",
        "art of the {}.",
        "a photo of the small {}.",
        "A photo of a {} in the scene",
    ),
    "masked": (
        "a bad photo of the {}.",
        "a photo of the large {}.",
        "a photo of the small {}.",
        "a cropped photo of a {}.",
        "This is a photo of a {}",
        "This is a photo of a small {}",
        "This is a photo of a medium {}",
        "This is a photo of a large {}",
        "This is a masked photo of a {}",
        "This is a masked photo of a small {}",
        "This is a masked photo of a medium {}",
        "This is a masked photo of a large {}",
        "This is a cropped photo of a {}",
        "This is a cropped photo of a small {}",
        "This is a cropped photo of a medium {}",
        "This is a cropped photo of a large {}",
        "A photo of a {} in the scene",
        "a bad photo of the {} in the scene",
        "a photo of the large {} in the scene",
        "a photo of the small {} in the scene",
        "a cropped photo of a {} in the scene",
        "a photo of a masked {} in the scene",
        "There is a {} in the scene",
        "There is the {} in the scene",
        "This is a {} in the scene",
        "This is the {} in the scene",
        "This is one {} in the scene",
        "There is a masked {} in the scene",
        "There is the masked {} in the scene",
        "This is a masked {} in the scene",
        "This is the masked {} in the scene",
        "This is one masked {} in the scene",
    ),
}
_SUFFIXES = frozenset({"merged", "other", "stuff"})
_HEADS = frozenset({"wall", "floor", "ceiling"})
_SPLIT_WORDS = {"playingfield": "playing field", "waterdrops": "water drops"}
_ARTICLES = frozenset({"a", "an", "the", "of", "in", "on", "and", "with"})


def clean_name(name: str) -> str:
    """A data set's class name as people write it; the rules, in order:

    1. hyphens and underscores are spaces;
    2. trailing "merged", "other", "stuff" go: "sky-other-merged" -> "sky";
    3. COCO's "wall-", "floor-", "ceiling-" name the material second: "wall-brick" -> "brick wall";
    4. "playingfield" -> "playing field", "waterdrops" -> "water drops".
    """
    parts = re.split(r"[-_\s]+", name.strip())
    hyphenated = "-" in name
    while len(parts) > 1 and parts[-1].lower() in _SUFFIXES:
        parts.pop()
    if hyphenated and len(parts) == 2 and parts[0].lower() in _HEADS:
        parts.reverse()
    return " ".join(_SPLIT_WORDS.get(part.lower(), part) for part in parts)


def check_words(vocabulary: Vocabulary, clip: Clip, force: bool = False) -> tuple[str, ...]:
    """Words of the vocabulary that the built-in CLIP has never seen; none for a real CLIP.

    UserError if there are any, unless `force`.
    """
    if clip.known_words is None:
        return ()
    unknown: dict[str, None] = {}  # an ordered set
    for entry in vocabulary.entries:
        for name in (entry.name, *entry.synonyms):
            words = re.findall(r"[^\W_]+", clean_name(name).lower())
            unknown.update(dict.fromkeys(w for w in words if w not in clip.known_words | _ARTICLES))
    if unknown and not force:
        raise UserError(
            f"The built-in CLIP has never seen: {_list(list(unknown))}. It knows drawn shapes and "
            f"{len(clip.known_words)} words: {', '.join(sorted(clip.known_words))}.",
            "Use weights trained with a real CLIP (concat train-con -c "
            "configs/concat_coco_119_14.yaml), or --force to go on all the same.",
        )
    return tuple(unknown)


def text_embeddings(
    clip: Clip,
    vocabulary: Vocabulary,
    cfg: ClipConfig,
    cache_dir: Path | None = None,
    progress: Progress = SILENT,
    templates: str | None = None,
) -> Tensor:
    """(K, E) fp32, L2-normalised, on the CLIP's device: the mean over synonyms and templates of
    normalised embeddings, normalised again. `cache_dir` None: `default_cache_dir()`; `templates`:
    a key of `TEMPLATES`, None: `cfg.templates`."""
    rows = class_texts(vocabulary, cfg, templates)
    path = (cache_dir or default_cache_dir()) / "text" / f"{_key(clip, rows)}.safetensors"
    embeddings = _read(path, (len(rows), clip.embed_dim), progress)
    if embeddings is None:
        embeddings = encode_classes(clip, rows)
        _write(path, embeddings, progress)
    return embeddings.to(clip.device)


def default_cache_dir() -> Path:
    """$CONCAT_CACHE, else ~/.cache/concat."""
    return Path(os.environ.get("CONCAT_CACHE") or Path.home() / ".cache" / "concat")


def class_texts(
    vocabulary: Vocabulary, cfg: ClipConfig, templates: str | None = None
) -> list[list[str]]:
    """The prompts of each class: every name and synonym in every template."""
    chosen = TEMPLATES[templates or cfg.templates]
    return [
        [
            template.format(clean_name(name) if cfg.clean_names else name)
            for name in (entry.name, *entry.synonyms)
            for template in chosen
        ]
        for entry in vocabulary.entries
    ]


def encode_classes(clip: Clip, rows: list[list[str]]) -> Tensor:
    """The texts of each class -> (K, E) on the CPU: mean of normalised embeddings, normalised."""
    flat = [text for texts in rows for text in texts]
    owner = torch.tensor([k for k, texts in enumerate(rows) for _ in texts])
    encoded = clip.encode_text(flat).cpu()  # (T, E)
    total = torch.zeros(len(rows), encoded.shape[1]).index_add_(0, owner, encoded)
    return F.normalize(total, dim=-1)


def _key(clip: Clip, rows: list[list[str]]) -> str:
    text = json.dumps([clip.identity.sha256, rows], ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _read(path: Path, shape: tuple[int, int], progress: Progress) -> Tensor | None:
    """The cached embeddings; None where there are none or the file is broken."""
    if not path.is_file():
        return None
    try:
        embeddings = load_file(path)["embeddings"]
    except (SafetensorError, OSError, KeyError) as error:
        progress.say(f"Cached text embeddings are computed again: {path} is broken ({error}).")
        return None
    if embeddings.shape != shape or not torch.isfinite(embeddings).all():
        progress.say(f"Cached text embeddings are computed again: {path} does not fit.")
        return None
    return embeddings


def _write(path: Path, embeddings: Tensor, progress: Progress) -> None:
    try:
        write_bytes(path, save({"embeddings": embeddings}))
    except UserError as error:  # a cache that cannot be written costs time, nothing else
        progress.say(f"Text embeddings are not cached: {error.what}")


def _list(words: list[str], most: int = 8) -> str:
    shown = ", ".join(repr(word) for word in words[:most])
    return shown + (f" and {len(words) - most} more" if len(words) > most else "")
