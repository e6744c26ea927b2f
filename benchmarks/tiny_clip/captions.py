"""Captions of the built-in world: what the tiny CLIP reads, and which captions are true of what.

A concept is a class name ("striped star") or one word of it ("star"). An image holds concepts; a
caption asks for some; it is true of every image that holds all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from concat_cli.core.clip.prompts import TEMPLATES
from concat_cli.core.vocabulary import Vocabulary

SEGMENT_TEMPLATES: tuple[str, ...] = (
    *TEMPLATES["single"],
    *TEMPLATES["imagenet_select"],
    "{}",
    "a {}",
    "a photo of the {}.",
)
SCENE_TEMPLATES: tuple[str, ...] = ("a scene with {}", "a photo of {}.", "{}")
_PLAIN_SHARE = 0.4  # of the captions of segments: one of the templates that `single` runs use
_WORD_SHARE = 0.08  # of the captions of segments: one word ("a star") instead of the name
_LISTED = 4  # classes in a scene's caption at most


@dataclass(frozen=True)
class Concepts:
    """The concepts of a vocabulary: its names, then their words."""

    names: tuple[str, ...]
    index: dict[str, int]

    @staticmethod
    def of(vocabulary: Vocabulary) -> Concepts:
        """Names in class order, then words in order of appearance."""
        words = dict.fromkeys(word for name in vocabulary.names for word in name.split())
        names = (*vocabulary.names, *words)
        return Concepts(names, {name: i for i, name in enumerate(names)})

    def held(self, classes: Sequence[int] | np.ndarray) -> np.ndarray:
        """(C,) bool: the concepts of an image of these classes."""
        row = np.zeros(len(self.names), dtype=bool)
        for label in classes:
            row[[label, *(self.index[word] for word in self.names[label].split())]] = True
        return row

    def asked(self, concepts: Sequence[int]) -> np.ndarray:
        """(C,) bool: the concepts that a caption asks for."""
        row = np.zeros(len(self.names), dtype=bool)
        row[list(concepts)] = True
        return row


def known_words(vocabulary: Vocabulary) -> list[str]:
    """Words that name something in the pictures; the templates' own words name nothing."""
    return sorted({word for name in vocabulary.names for word in name.split()})


def all_captions(concepts: Concepts) -> list[str]:
    """Captions that together hold every token of every caption."""
    templates = (*SEGMENT_TEMPLATES, *SCENE_TEMPLATES)
    return [t.format(n) for n in concepts.names for t in templates] + ["a star, a star and a star"]


def segment_caption(
    concepts: Concepts, label: int, rng: np.random.Generator
) -> tuple[str, np.ndarray]:
    """A caption of one segment, and what it asks for."""
    concept = label
    if rng.random() < _WORD_SHARE:
        concept = concepts.index[rng.choice(concepts.names[label].split())]
    plain = rng.random() < _PLAIN_SHARE
    template = TEMPLATES["single"][0] if plain else rng.choice(SEGMENT_TEMPLATES)
    return template.format(concepts.names[concept]), concepts.asked([concept])


def scene_caption(
    concepts: Concepts, classes: Sequence[int] | np.ndarray, rng: np.random.Generator
) -> tuple[str, np.ndarray]:
    """A caption that lists some of a scene's classes, and what it asks for."""
    count = int(rng.integers(1, min(_LISTED, len(classes)) + 1))
    listed = rng.permutation(classes)[:count].tolist()
    names = [f"a {concepts.names[label]}" for label in listed]
    text = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    return str(rng.choice(SCENE_TEMPLATES)).format(text), concepts.asked(listed)
