"""Prompts: class names -> text embeddings, cached on disk."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from concat_cli.core.clip import tiny
from concat_cli.core.clip.encoder import TEXT_BATCH, Clip
from concat_cli.core.config import ClipConfig
from concat_cli.core.errors import UserError
from concat_cli.core.files import write_bytes
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.vocabulary import Vocabulary

# "single": CLIP paper, 3.1.4. "scene": Ding et al., CVPR 2022. "imagenet_select": PADing's eight
# (of open_clip's templates), which Ding et al. take on COCO. "vild": the 14 of ViLD's (Gu et al.,
# ICLR 2022) that FC-CLIP takes.
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
    "vild": (
        "a photo of a {}.",
        "This is a photo of a {}",
        "There is a {} in the scene",
        "There is the {} in the scene",
        "a photo of a {} in the scene",
        "a photo of a small {}.",
        "a photo of a medium {}.",
        "a photo of a large {}.",
        "This is a photo of a small {}.",
        "This is a photo of a medium {}.",
        "This is a photo of a large {}.",
        "There is a small {} in the scene.",
        "There is a medium {} in the scene.",
        "There is a large {} in the scene.",
    ),
}
MANY_TEXTS = 500  # that it is told of before they are encoded
_SUFFIXES = frozenset({"merged", "other", "stuff"})
_MATERIALS = {  # that COCO names second; nobody else's "ceiling-fan" is turned round
    "wall": "brick concrete panel stone tile wood",
    "floor": "marble stone tile wood",
    "ceiling": "tile",
}
_SPLIT_WORDS = {"playingfield": "playing field", "waterdrops": "water drops"}
_ARTICLES = frozenset({"a", "an", "the", "of", "in", "on", "and", "with"})


def clean_name(name: str) -> str:
    """A data set's class name as people write it; the rules, in order:

    1. hyphens and underscores are spaces;
    2. trailing "merged", "other", "stuff" go: "sky-other-merged" -> "sky";
    3. COCO's "wall-", "floor-", "ceiling-" of a material: "wall-brick" -> "brick wall";
    4. "playingfield" -> "playing field", "waterdrops" -> "water drops".
    """
    parts = re.split(r"[-_\s]+", name.strip())
    hyphenated = "-" in name
    while len(parts) > 1 and parts[-1].lower() in _SUFFIXES:
        parts.pop()
    if hyphenated and len(parts) == 2:
        head, material = (part.lower() for part in parts)
        if material in _MATERIALS.get(head, "").split():
            parts.reverse()
    return " ".join(_SPLIT_WORDS.get(part.lower(), part) for part in parts)


def known_words(model: str) -> frozenset[str] | None:
    """The words that a built-in model has learned, of its file's header; None for other models."""
    if model not in tiny.FILES:
        return None
    try:
        with cast("Any", safe_open(tiny.FILES[model], framework="pt")) as file:
            return frozenset(json.loads(file.metadata()["words"]))
    except (SafetensorError, OSError, KeyError):
        return tiny.load_tiny(tiny.FILES[model]).words  # which says what is wrong with the file


def only_drawn(model: str) -> str:
    """What to know of weights that were trained with the built-in CLIP; "" of others."""
    words = known_words(model)
    if words is None:
        return ""
    return (
        f"these weights know drawn shapes and {len(words)} words; for photos: "
        "`concat weights get photos`, then --weights photos"
    )


def check_names(vocabulary: Vocabulary, cfg: ClipConfig, force: bool = False) -> tuple[str, ...]:
    """`check_words` for the CLIP of a configuration, after a UserError where it would be asked for
    two classes by one prompt: nothing could tell them apart."""
    first: dict[object, str] = {}
    for entry in vocabulary.entries:
        name, *others = (
            (clean_name(text) if cfg.clean_names else text).casefold()
            for text in (entry.name, *entry.synonyms)
        )
        forms = name, frozenset({name, *others})
        twin = next((first[form] for form in forms if form in first), None)
        if twin is not None:
            raise UserError(
                f"The classes {twin!r} and {entry.name!r} are one prompt for CLIP: {name!r}.",
                "Leave one of them out, or make it a synonym of the other; with "
                "clip.clean_names=false a run takes names as they are written.",
            )
        first |= dict.fromkeys(forms, entry.name)
    return check_words(vocabulary, known_words(cfg.model), force)


def check_words(
    vocabulary: Vocabulary, known: Collection[str] | None, force: bool = False
) -> tuple[str, ...]:
    """Words of the vocabulary that the built-in CLIP has never seen; none for a real CLIP.

    known: as of `known_words`. UserError if there are any, unless `force`.
    """
    if known is None:
        return ()
    names = (name for entry in vocabulary.entries for name in (entry.name, *entry.synonyms))
    words = (word for name in names for word in re.findall(r"[^\W_]+", clean_name(name).lower()))
    unknown = tuple(dict.fromkeys(w for w in words if w not in {*known, *_ARTICLES}))
    if unknown and not force:
        raise UserError(
            f"The built-in CLIP has never seen: {_list(unknown)}. It knows drawn shapes and "
            f"{len(known)} words: {', '.join(sorted(known))}.",
            "For photos: `concat weights get photos`, then --weights photos. "
            "--force goes on all the same.",
        )
    return unknown


def text_embeddings(
    clip: Clip,
    vocabulary: Vocabulary,
    cfg: ClipConfig,
    cache_dir: Path | None = None,
    progress: Progress = SILENT,
) -> Tensor:
    """(K, E) fp32, L2-normalised, on the CLIP's device: the mean over synonyms and templates of
    normalised embeddings, normalised again. `cache_dir` None: `default_cache_dir()`."""
    rows = class_texts(vocabulary, cfg)
    found = cached_texts(clip.identity.sha256, rows, lambda: clip, cache_dir, progress)
    return found.to(clip.device)


def cached_texts(
    sha256: str,
    rows: list[list[str]],
    clip: Callable[[], Clip],
    cache_dir: Path | None = None,
    progress: Progress = SILENT,
) -> Tensor:
    """`text_embeddings` of the texts of each class, on the CPU or the CLIP's device.

    sha256: the CLIP's, by which the cache knows them; `clip` is called where they are not there.
    """
    key = hashlib.sha256(json.dumps([sha256, rows], ensure_ascii=False).encode()).hexdigest()
    path = (cache_dir or default_cache_dir()) / "text" / f"{key[:40]}.safetensors"
    embeddings = _read(path, len(rows), progress)
    if embeddings is None:
        embeddings = encode_classes(clip(), rows, progress)
        _write(path, embeddings, progress)
    return embeddings


class RecentTexts:
    """The embeddings of the classes asked for last, in memory, each by its texts.

    most: how many of them; 4,096 of 1,024 numbers take 16 MB.
    """

    def __init__(self, most: int = 4096) -> None:
        self._most = most
        self._rows: dict[tuple[str, ...], Tensor] = {}  # those asked for last stand last

    def __call__(
        self, encode: Callable[[list[list[str]]], Tensor], rows: list[list[str]]
    ) -> Tensor:
        """(K, E) of the texts of K classes; `encode` is asked for those that are not here."""
        keys = [tuple(row) for row in rows]
        missing = [key for key in dict.fromkeys(keys) if key not in self._rows]
        if missing:
            new = encode([list(key) for key in missing])
            self._rows |= zip(missing, (row.clone() for row in new), strict=True)
        self._rows |= {key: self._rows.pop(key) for key in dict.fromkeys(keys)}
        found = torch.stack([self._rows[key] for key in keys])
        for key in list(self._rows)[: -self._most]:
            del self._rows[key]
        return found


def default_cache_dir() -> Path:
    """$CONCAT_CACHE, else ~/.cache/concat."""
    return Path(os.environ.get("CONCAT_CACHE") or Path.home() / ".cache" / "concat")


def class_texts(
    vocabulary: Vocabulary, cfg: ClipConfig, templates: tuple[str, ...] = ()
) -> list[list[str]]:
    """The prompts of each class: each name and synonym in each template (none given: `cfg`'s)."""
    chosen = templates or TEMPLATES[cfg.templates]
    return [
        [
            template.format(clean_name(name) if cfg.clean_names else name)
            for name in (entry.name, *entry.synonyms)
            for template in chosen
        ]
        for entry in vocabulary.entries
    ]


def encode_classes(clip: Clip, rows: list[list[str]], progress: Progress = SILENT) -> Tensor:
    """The texts of each class -> (K, E) on the CPU: mean of normalised embeddings, normalised."""
    flat = [text for texts in rows for text in texts]
    owner = torch.tensor([k for k, texts in enumerate(rows) for _ in texts])
    starts: Iterable[int] = range(0, len(flat), TEXT_BATCH)
    if len(flat) >= MANY_TEXTS and clip.identity.model not in tiny.FILES:
        slow = ": on a CPU, minutes" if clip.device.type == "cpu" else ""
        progress.say(f"CLIP reads {len(flat)} texts of {len(rows)} names, once{slow}")
        starts = progress.track(starts, f"batches of {TEXT_BATCH} texts")
    encoded = torch.cat(
        [clip.encode_text(flat[n : n + TEXT_BATCH]).cpu() for n in starts]
    )  # (T, E)
    total = torch.zeros(len(rows), encoded.shape[1]).index_add_(0, owner, encoded)
    return F.normalize(total, dim=-1)


def _read(path: Path, classes: int, progress: Progress) -> Tensor | None:
    """The cached embeddings; None where there are none or the file is broken."""
    if not path.is_file():
        return None
    with suppress(SafetensorError, OSError, KeyError, ValueError, TypeError):
        with cast("Any", safe_open(path, framework="pt")) as file:
            embeddings: Tensor = file.get_tensor("embeddings")
            digest: str = file.metadata()["sha256"]  # TypeError: an earlier version's has none
        if embeddings.shape[:-1] == (classes,) and digest == _digest(embeddings):
            return embeddings
    progress.say(
        f"Text embeddings are computed again: {path} is damaged, or of an earlier version."
    )
    return None


def _write(path: Path, embeddings: Tensor, progress: Progress) -> None:
    try:
        write_bytes(path, save({"embeddings": embeddings}, {"sha256": _digest(embeddings)}))
    except UserError as error:  # a cache that cannot be written costs time, nothing else
        progress.say(f"Text embeddings are not cached: {error.what}")


def _digest(embeddings: Tensor) -> str:
    return hashlib.sha256(embeddings.contiguous().numpy().tobytes()).hexdigest()


def _list(words: Sequence[str], most: int = 8) -> str:
    shown = ", ".join(repr(word) for word in words[:most])
    return shown + (f" and {len(words) - most} more" if len(words) > most else "")
