"""Where COCO panoptic files are: the official layout, a simple one, or paths given."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from concat_cli.core.data.dataset import Part
from concat_cli.core.errors import UserError
from concat_cli.core.progress import SILENT, Progress

_PLACES = {  # where each thing is looked for below the root, in this order
    "images": ("{part}2017", "images/{part}2017"),
    "json": ("annotations/panoptic_{part}2017.json", "panoptic_{part}2017.json"),
    "pngs": ("annotations/panoptic_{part}2017", "panoptic_{part}2017"),
}
_SIMPLE = {"images": ("images",), "json": ("panoptic.json",), "pngs": ("panoptic",)}


@dataclass(frozen=True)
class CocoPaths:
    """Where a part is; what is None is looked for below the root."""

    images: Path | None = None
    json: Path | None = None
    pngs: Path | None = None


def find_sources(
    root: Path, train: CocoPaths, val: CocoPaths, progress: Progress = SILENT
) -> dict[str, Part]:
    """The train and val files: those given, the official layout, or ROOT/images, ROOT/panoptic.json
    and ROOT/panoptic. A part is there if its image folder is; one part alone serves as both."""
    if not root.is_dir():
        raise UserError(f"There is no folder {root}.", "Give the folder that holds train2017.")
    given = {"train": train, "val": val}
    found = {
        part: places
        for part in ("train", "val")
        if (places := _find_part(root, given[part], _places(_PLACES, part))) is not None
    }
    if not found:
        simple = _find_part(root, CocoPaths(), _SIMPLE)
        if simple is None:
            raise _wrong_layout(root)
        found = {"train": simple}
    if len(found) == 1:
        (name, part), other = next(iter(found.items())), {"train": "val", "val": "train"}
        found[other[name]] = part
        progress.say(
            f"Only one part is there ({part.json}); it serves as train and as val, so scores on "
            "val are not those of unknown images."
        )
    return found


def _places(places: dict[str, tuple[str, ...]], part: str) -> dict[str, tuple[str, ...]]:
    return {key: tuple(v.format(part=part) for v in values) for key, values in places.items()}


def _find_part(root: Path, given: CocoPaths, places: dict[str, tuple[str, ...]]) -> Part | None:
    """The part's three places; None if its images are nowhere, UserError if only the rest is."""
    paths: dict[str, Path] = {}
    for key, names in places.items():
        chosen = getattr(given, key)
        candidates = [chosen] if chosen is not None else [root / name for name in names]
        there = [p for p in candidates if (p.is_file() if key == "json" else p.is_dir())]
        if there:
            paths[key] = there[0].resolve()
            continue
        if key == "images" and given == CocoPaths():
            return None
        looked = " and ".join(str(path) for path in candidates)
        zips = [p.with_suffix(".zip") for p in candidates if p.with_suffix(".zip").is_file()]
        raise UserError(
            f"The {key} of {paths.get('images', 'the images')} are missing: looked for {looked}.",
            f"Unpack {zips[0]} there." if zips else "Download them, or give their path.",
        )
    return Part(**paths)


def _wrong_layout(root: Path) -> UserError:
    looked = [root / name for name in (*_PLACES["images"], *_SIMPLE["images"])]
    names = ", ".join(str(path).replace("{part}2017", "train2017 (or val2017)") for path in looked)
    has = ", ".join(sorted(p.name for p in root.iterdir())[:8]) or "nothing"
    return UserError(
        f"{root} does not look like COCO: looked for {names}. It holds: {has}.",
        "The official layout is ROOT/train2017, ROOT/val2017, "
        "ROOT/annotations/panoptic_{train,val}2017.json and folders of PNGs of the same name.",
    )
