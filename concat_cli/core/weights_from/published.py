"""The list of published segmentors, each with a CLIP to name its masks by: `published.yaml`."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from concat_cli.core.errors import UserError

PREFIX = "hf-hub:"
WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")  # of transformers, best first
CLIP_FILES = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")  # as open_clip asks
NOT_STATED = "not stated"
DEFAULT = "photos"  # whose CLIP names the masks of a segmentor that is not listed
TRAINED_ON, CLASSES = "COCO panoptic", 133  # every one of the list; labels of all classes
_LIST = Path(__file__).with_name("published.yaml")


@dataclass(frozen=True)
class Part:
    """What is needed of a repository of the hub.

    weights: names of files of which the first that is there will do. others: files that are needed
    beside it. bytes: of the download, approximately; 0 where unknown.
    """

    repository: str
    weights: tuple[str, ...] = WEIGHT_FILES
    others: tuple[str, ...] = ()
    bytes: int = 0
    licence: str = NOT_STATED


@dataclass(frozen=True)
class PublishedClip:
    """A CLIP by open_clip's name and tag. extra: needs transformers."""

    model: str
    pretrained: str
    part: Part
    extra: bool = False


@dataclass(frozen=True)
class Pair:
    """A segmentor and a CLIP. purpose: what for. source: whose work. extra: needs transformers
    (pip install concat-seg[hub])."""

    name: str
    purpose: str
    segmentor: Part
    clip: PublishedClip
    source: str
    extra: bool = False

    @property
    def parts(self) -> tuple[Part, Part]:
        """All that is downloaded."""
        return self.segmentor, self.clip.part

    @property
    def bytes(self) -> int:
        """Of both downloads."""
        return sum(part.bytes for part in self.parts)


@cache
def pairs() -> dict[str, Pair]:
    """Every pair by its short name, in the order of the list."""
    listed: dict[str, dict[str, Any]] = yaml.safe_load(_LIST.read_text("utf-8"))
    clips = {name: _clip(row) for name, row in listed["clips"].items()}
    return {name: _pair(name, row, clips[row["clip"]]) for name, row in listed["pairs"].items()}


def _clip(row: Mapping[str, Any]) -> PublishedClip:
    part = _part(row, CLIP_FILES, ())
    return PublishedClip(row["model"], row["pretrained"], part, row.get("extra", False))


def _pair(name: str, row: Mapping[str, Any], clip: PublishedClip) -> Pair:
    names = tuple(dict.fromkeys((row["file"], *WEIGHT_FILES)))
    part, extra = _part(row, names, ("config.json",)), row.get("extra", False) or clip.extra
    return Pair(name, row["purpose"], part, clip, row["source"], extra)


def _part(row: Mapping[str, Any], weights: tuple[str, ...], others: tuple[str, ...]) -> Part:
    others = tuple(row.get("others", others))
    return Part(row["repository"], weights, others, row["bytes"], row["licence"])


def located(source: str) -> str:
    """`hf-hub:ORG/NAME` of the segmentor that a short name stands for; others as they are."""
    pair = pairs().get(source)
    return source if pair is None else PREFIX + pair.segmentor.repository


def pair_of(source: str) -> Pair | None:
    """The pair of a short name, or the first one with that segmentor (`hf-hub:ORG/NAME`)."""
    there = pairs().get(source)
    return there or next((p for n, p in pairs().items() if located(n) == source), None)


def parts_of(name: str) -> tuple[Part, ...]:
    """What `concat weights get NAME` fetches; UserError for a name that stands for nothing.

    Of a repository that is not listed: its weights, and the CLIP of `photos`.
    """
    pair = pair_of(name)
    if pair is not None:
        return pair.parts
    if name.startswith(PREFIX) and name.count("/") == 1:
        return Part(name.removeprefix(PREFIX)), pairs()[DEFAULT].clip.part
    raise UserError(
        f"No published weights are called {name!r}.",
        f"{did_you_mean(name)}`concat weights` lists them; others go by hf-hub:ORG/NAME.",
    )


def did_you_mean(name: str) -> str:
    """A question with the short names that are alike, and a space; empty where none is."""
    near = difflib.get_close_matches(name, pairs(), 3)
    return f"Did you mean {', '.join(near)}? " if near else ""


def segmentor_part(repository: str) -> Part:
    """What is needed of a segmentor's repository, listed or not."""
    pair = pair_of(PREFIX + repository)
    return Part(repository) if pair is None else pair.segmentor


def how_to_get(source: str) -> str:
    """What to type for weights that are not here, with a network and without."""
    get = f"concat weights get {source}"
    return (
        f"Fetch it: `{get}`. Where there is no network: `{get} --to DIR` on a machine with one, "
        f"then `{get} --from DIR` here."
    )


def in_words(count: int) -> str:
    """Bytes: `of about 190 MB`, `of about 1.4 GB`, `of unknown size`."""
    if not count:
        return "of unknown size"
    rounded = float(f"{count:.2g}")
    return (
        f"of about {rounded / 1e9:.1f} GB" if rounded >= 1e9 else f"of about {rounded / 1e6:.0f} MB"
    )
