"""Classes of the built-in world and which of them are unseen.

The rule of every split: each word of an unseen name (shape, pattern, texture, colouring) also
occurs in the name of a seen class.
"""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Collection

from concat_cli.core.errors import UserError
from concat_cli.core.prepare.shapes_paint import PATTERNS, SHAPES, TEXTURES, Random
from concat_cli.core.vocabulary import ClassEntry, Vocabulary

STUFF: tuple[str, ...] = tuple(TEXTURES)
THINGS: tuple[str, ...] = tuple(f"{pattern} {shape[0]}" for shape in SHAPES for pattern in PATTERNS)

# All 48 classes, 40 things and then 8 stuff, with data-set ids 1..48; all of them seen.
CLASSES = Vocabulary(
    tuple(ClassEntry(name, i + 1, kind="thing") for i, name in enumerate(THINGS))
    + tuple(ClassEntry(name, len(THINGS) + i + 1, kind="stuff") for i, name in enumerate(STUFF))
)

DEFAULT_UNSEEN: tuple[str, ...] = (
    "checkered circle", "dotted square", "striped triangle", "striped star", "outlined heart",
    "solid cross", "checkered ring", "dotted crescent", "green water", "grey wood",
)  # fmt: skip


def unseen_split(unseen: str = "", unseen_seed: int = -1) -> tuple[str, tuple[str, ...]]:
    """The split's name and its unseen class names, in class order.

    unseen: names between semicolons; "none": every class is seen (the upper bound of zero-shot
    results); empty: the default split, or the one of `unseen_seed` >= 0.
    UserError for an unknown name and for a set that breaks the rule.
    """
    if unseen.strip() == "none":
        return "all_seen", ()
    if unseen.strip():
        return "custom", _parse(unseen)
    if unseen_seed < 0:
        return "default", DEFAULT_UNSEEN
    if unseen_seed >= 1 << 64:
        raise UserError(f"unseen_seed {unseen_seed} is too large.", "Take one below 2^64.")
    return f"seed-{unseen_seed}", _drawn(unseen_seed)


def seen_indices(unseen: Collection[str]) -> tuple[int, ...]:
    """Class indices of the classes that are not named in `unseen`."""
    return CLASSES.with_unseen(unseen).seen_indices


def _drawn(seed: int) -> tuple[str, ...]:
    """Two stuff classes of two colourings and textures, and one thing of each shape with each
    pattern at most twice; never the default split."""
    rng = Random(seed)
    words = Counter(word for name in STUFF for word in name.split())
    able = [name for name in STUFF if all(words[word] > 1 for word in name.split())]
    while True:
        stuff = rng.sample(able, 2)
        extra = rng.sample(PATTERNS, len(SHAPES) - len(PATTERNS))
        patterns = rng.sample([*PATTERNS, *extra], len(SHAPES))
        names = {f"{p} {shape[0]}" for p, shape in zip(patterns, SHAPES, strict=True)}
        chosen = _ordered(names | set(stuff))
        if chosen != DEFAULT_UNSEEN and not _lost_words(chosen):
            return chosen


def _ordered(names: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in CLASSES.names if name in names)


def _lost_words(unseen: Collection[str]) -> list[str]:
    """Words of unseen names that no seen name holds."""
    seen = {word for name in CLASSES.names if name not in unseen for word in name.split()}
    return sorted({word for name in unseen for word in name.split()} - seen)


def _parse(text: str) -> tuple[str, ...]:
    """Names between semicolons (or commas), checked."""
    parts = (" ".join(part.lower().split()) for part in text.replace(",", ";").split(";"))
    names = {part for part in parts if part}
    for name in sorted(names):
        if name not in CLASSES.index_of_name:
            near = difflib.get_close_matches(name, CLASSES.names, n=3, cutoff=0.6)
            meant = " or ".join(f'"{n}"' for n in near)
            raise UserError(
                f'The built-in world has no class "{name}".',
                f"Did you mean {meant}?" if near else f"It has {THINGS[0]}, ..., {STUFF[-1]}.",
            )
    if not names:
        raise UserError(f"No class name in {text!r}.", 'Write "striped star; green water".')
    lost = _lost_words(names)
    if lost:
        holders = {word: [n for n in names if word in n.split()] for word in lost}
        raise UserError(
            "; ".join(f'no seen class would hold "{w}"' for w in lost).capitalize() + ".",
            f"Leave out one of: {', '.join(_ordered(holders[lost[0]]))}. "
            "Each shape, pattern, texture and colouring must be seen elsewhere.",
        )
    return _ordered(names)
