"""Which colour a segment is drawn in: that which its class usually has, or one of a palette."""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Collection, Mapping
from functools import cache, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from concat_cli.core.vocabulary import ClassEntry, Vocabulary, same_name

Colour = tuple[int, int, int]

PALETTE: tuple[Colour, ...] = (
    (230, 57, 70), (29, 132, 226), (255, 177, 27), (42, 157, 92), (142, 68, 205),
    (0, 181, 184), (240, 110, 30), (224, 64, 160), (120, 170, 20), (80, 90, 220),
    (160, 98, 52), (0, 128, 128), (255, 120, 140), (90, 190, 255), (190, 160, 0),
    (105, 60, 140), (20, 200, 110), (180, 30, 90), (120, 140, 170), (250, 140, 90),
)  # fmt: skip
TONES = 5  # of a class
STEP, DARKEST, LIGHTEST = 15, 12, 94  # of CIE L*, in which its tones differ, and their bounds
NEAR = 90  # sum of the differences of channels from which on two colours are told apart
GRID = 1 << 16  # pixels at which neighbours are looked for
_GAMMA = 2.2


@lru_cache(8)
def usual(vocabulary: Vocabulary) -> Mapping[str, Colour]:
    """Class name -> the colour that COCO or ADE20K give it, of those that have one: by name or
    synonym, in the table that knows more of the vocabulary first."""
    found: list[dict[str, Colour]] = []
    for table in tables().values():
        rows = ((e.name, table.get(_plain(n))) for e in vocabulary.entries for n in _names(e))
        known: dict[str, Colour] = {}
        for name, colour in rows:
            if colour:
                known.setdefault(name, colour)
        found.append(known)
    first, second = sorted(found, key=len, reverse=True)
    return second | first


@cache
def tables() -> Mapping[str, Mapping[str, Colour]]:
    """Data set -> plain class name -> its colour there."""
    found: dict[str, dict[str, Colour]] = {}
    text = Path(__file__).with_name("colours.txt").read_text("utf-8")
    for line in text.splitlines():
        if line.startswith("["):
            found[line.strip("[]")] = {}
        elif not line.startswith("#"):
            code, _, name = line.partition(" ")
            red, green, blue = bytes.fromhex(code)
            found[[*found][-1]][_plain(name)] = red, green, blue
    return found


def _names(entry: ClassEntry) -> tuple[str, ...]:
    return entry.name, *entry.synonyms


def _plain(name: str) -> str:
    """A name without what COCO's lists add to it: `sky-other-merged` -> `sky`."""
    name = same_name(name).removesuffix("-merged")
    return name.removesuffix("-other").removesuffix("-stuff")


def colours_of(
    names: Mapping[int, str], known: Mapping[str, Colour], segment_map: NDArray[np.integer]
) -> dict[int, Colour]:
    """A colour for each segment of a map (H, W).

    names: id -> class, the largest first. A class without a known colour gets one by its name that
    no other class of the picture has nearly. Segments of one class differ in lightness: the first
    TONES all do, further ones from those that they touch.
    """
    bases = {name: known[name] for name in names.values() if name in known}
    for name in names.values():
        if name not in bases:
            place = zlib.crc32(name.encode()) % len(PALETTE)
            turned = (*PALETTE[place:], *PALETTE[:place])
            free = (c for c in turned if all(_apart(c, other) for other in bases.values()))
            bases[name] = next(free, turned[0])
    many = {name for name, count in Counter(names.values()).items() if count > TONES}
    beside = _touching(segment_map) if many else set[tuple[int, int]]()
    chosen: dict[str, dict[int, int]] = {name: {} for name in bases}  # of each class: id -> tone
    for number, name in names.items():
        others = chosen[name]
        near = Counter(tone for other, tone in others.items() if (number, other) in beside)
        used = Counter(others.values())
        others[number] = min(range(TONES), key=lambda tone: (near[tone], used[tone], tone))
    return {number: tones(bases[name])[chosen[name][number]] for number, name in names.items()}


def _apart(one: Colour, other: Colour) -> bool:
    return sum(abs(a - b) for a, b in zip(one, other, strict=True)) > NEAR


def _touching(segment_map: NDArray[np.integer]) -> Collection[tuple[int, int]]:
    """Pairs of ids, in both orders, that lie beside one another somewhere."""
    step = max(1, int(np.ceil(np.sqrt(segment_map.size / GRID))))
    ids = segment_map[::step, ::step].astype(np.int64)
    wide = int(ids.max(initial=0)) + 1
    found: set[tuple[int, int]] = set()
    for one, other in ((ids[1:], ids[:-1]), (ids[:, 1:], ids[:, :-1])):
        differ = one != other
        pairs = np.unique(one[differ] * wide + other[differ])
        for a, b in zip((pairs // wide).tolist(), (pairs % wide).tolist(), strict=True):
            found |= {(a, b), (b, a)}
    return found


@lru_cache(512)
def tones(colour: Colour) -> tuple[Colour, ...]:
    """The colour and TONES - 1 others of its hue, each STEP of CIE L* from the next."""
    level = 116 * np.cbrt(luminance(colour)) - 16
    shifts = (0, *(sign * n * STEP for n in range(1, TONES) for sign in (1, -1)))
    found = [s for s in shifts if not s or DARKEST <= level + s <= LIGHTEST][:TONES]
    return tuple(_at(colour, ((level + s + 16) / 116) ** 3) if s else colour for s in found)


def luminance(colour: Colour) -> float:
    """Relative luminance, 0-1 (WCAG, with a plain gamma)."""
    red, green, blue = ((channel / 255) ** _GAMMA for channel in colour)
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def _at(colour: Colour, wanted: float) -> Colour:
    """Mixed with white or black, in linear light, to a relative luminance."""
    now = luminance(colour)
    goal, share = (1, (wanted - now) / (1 - now)) if wanted > now else (0, 1 - wanted / now)
    mixed = ((c / 255) ** _GAMMA * (1 - share) + goal * share for c in colour)
    red, green, blue = (round(255 * value ** (1 / _GAMMA)) for value in mixed)
    return red, green, blue
