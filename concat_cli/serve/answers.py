"""A picture with names -> what the server sends back."""

from __future__ import annotations

import base64
import json
import re
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from concat_cli.core.data.image_io import (
    id_picture,
    png_bytes,
    read_image,
    runs,
    stored_size,
    write_png,
)
from concat_cli.core.data.store import Held
from concat_cli.core.errors import UserError
from concat_cli.core.infer.files import SEMANTIC, Saver, segment_entries
from concat_cli.core.infer.pictures import OVERLAY
from concat_cli.core.infer.predictor import Prediction
from concat_cli.core.infer.renaming import AnyNames
from concat_cli.core.infer.render import drawn_colours
from concat_cli.core.vocabulary import Vocabulary
from concat_cli.core.vocabulary_file import doubt

SHOWN = 1600  # pixels of the longer side of what the page draws


@dataclass(frozen=True)
class Limits:
    """What a request may hold, and how many may wait.

    upload: bytes of a request; pixels of a picture; names and synonyms together, and characters of
    each; waiting: requests at a time; seconds: until a request must have arrived.
    """

    upload: int = 32 << 20
    pixels: int = 40_000_000
    names: int = 300
    letters: int = 100
    waiting: int = 32
    seconds: float = 60.0


class TooMuchError(UserError):
    """More than the limits allow."""


@dataclass(frozen=True)
class Question:
    """A picture as it was sent, names as of `--classes` ("": the weights' own), the least score of
    a segment (None: that of the weights)."""

    picture: Held
    classes: str = ""
    min_score: float | None = None


@dataclass(frozen=True)
class Answer:
    """The body of a response and its media type; file_name: what it is saved as."""

    body: bytes
    media_type: str
    file_name: str = ""


@dataclass(frozen=True)
class Found:
    """A question with what was found."""

    question: Question
    prediction: Prediction

    @property
    def stem(self) -> str:
        """The picture's name without ending, of letters that any file system takes."""
        return re.sub(r"[^\w-]+", "_", Path(self.question.picture.name).stem)[:80] or "picture"

    @property
    def segments(self) -> list[dict[str, Any]]:
        """COCO's entries with name, kind, score and colour, the largest first."""
        vocabulary, colours = self.prediction.vocabulary, drawn_colours(self.prediction)
        kinds = {entry.id: entry.kind for entry in vocabulary.entries}
        entries = segment_entries(self.prediction.segments, vocabulary)
        for one in entries:
            one["kind"] = kinds[one["category_id"]]
            one["colour"] = "#{:02x}{:02x}{:02x}".format(*colours[one["id"]])
        return sorted(entries, key=lambda one: -one["area"])


class Answers:
    """Answers questions, one at a time. The last one's prediction is kept, as who has seen it asks
    for its files next."""

    def __init__(self, names: AnyNames, limits: Limits) -> None:
        self._names, self._limits = names, limits
        self._last: Found | None = None

    def __call__(self, question: Question, form: str) -> Answer:
        """In one of `FORMS`; UserError for what cannot be read or named, `TooMuchError` for what
        exceeds the limits."""
        if self._last is None or self._last.question != question:
            self._last = None  # two are never in memory
            self._last = self._found(question)
        return FORMS[form](self._last)

    def _found(self, question: Question) -> Found:
        vocabulary = self._names.parsed(question.classes)
        check_length(vocabulary, self._limits, self._names.own)
        height, width = stored_size(question.picture)
        if height * width > self._limits.pixels:
            raise TooMuchError(
                f"{question.picture} has {width} x {height} pixels, more than "
                f"{self._limits.pixels / 1e6:g} million.",
                "Scale it down first, or use `concat predict`.",
            )
        predictor = self._names.predictor(vocabulary, question.min_score)
        image = read_image(question.picture, white=predictor.cfg.white)
        (prediction,) = predictor.predict_batch([image], semantic=False)
        return Found(question, prediction)


def check_length(vocabulary: Vocabulary, limits: Limits, own: Vocabulary) -> None:
    """`TooMuchError` for too many names or too long ones, but for the weights' own."""
    names = [name for entry in vocabulary.entries for name in (entry.name, *entry.synonyms)]
    if not names:
        raise UserError("These weights have no classes of their own.", "Name some.")
    if vocabulary != own and len(names) > limits.names:
        raise TooMuchError(f"{len(names)} names are more than {limits.names}.", "Leave some out.")
    if long := [name for name in names if len(name) > limits.letters]:
        raise TooMuchError(f"A name of {len(long[0])} letters: {long[0][:40]}...", "Shorten it.")


def _described(found: Found) -> dict[str, Any]:
    """What both JSON forms say."""
    prediction = found.prediction
    height, width = prediction.panoptic_map.shape
    return {
        "file_name": found.question.picture.name,
        "height": height,
        "width": width,
        "panoptic": prediction.is_panoptic,
        "segments": found.segments,
        "milliseconds": prediction.milliseconds,
        "note": doubt(prediction.vocabulary) if found.question.classes else "",
    }


def _json(found: Found) -> Answer:
    """The segments, and the map of their ids as a COCO panoptic PNG in base64."""
    png = base64.b64encode(_png(found).body).decode("ascii")
    return _as_json(_described(found) | {"panoptic_png": png})


def _runs(found: Found) -> Answer:
    """The segments, and the map in runs of equal ids, row by row, made smaller for a screen. Of a
    PNG some browsers hand out changed pixels, against being recognised by them."""
    ids = found.prediction.panoptic_map
    step = -(-max(ids.shape) // SHOWN)
    small = ids[step // 2 :: step, step // 2 :: step] if step > 1 else ids
    values, lengths = runs(small)
    shown = {"height": small.shape[0], "width": small.shape[1]}
    shown |= {"values": values.tolist(), "lengths": lengths.tolist()}
    return _as_json(_described(found) | {"map": shown})


def _as_json(value: dict[str, Any]) -> Answer:
    return Answer(json.dumps(value, ensure_ascii=False).encode(), "application/json")


def _png(found: Found) -> Answer:
    """The map of ids as a COCO panoptic PNG."""
    body = png_bytes(id_picture(found.prediction.panoptic_map))
    return Answer(body, "image/png", f"{found.stem}.png")


def _overlay(found: Found) -> Answer:
    body = png_bytes(found.prediction.plot())
    return Answer(body, "image/png", f"{found.stem}{OVERLAY}")


def _zip(found: Found) -> Answer:
    """The files that `concat predict` writes."""
    prediction, name = found.prediction, found.question.picture.name
    entries = segment_entries(prediction.segments, prediction.vocabulary)
    body = BytesIO()
    with TemporaryDirectory() as folder:
        out = Path(folder)
        saver = Saver(out, prediction.vocabulary)
        if prediction.is_panoptic:
            saver.panoptic(1, name, prediction.panoptic_map, entries, found.stem)
        else:
            png = saver.semantic(prediction.semantic_map, found.stem)
            saver.enter(SEMANTIC, png, 1, name, prediction.panoptic_map.shape, entries)
        saver.finish([saver.state()])
        write_png(out / f"{found.stem}{OVERLAY}", prediction.plot())
        with zipfile.ZipFile(body, "w", zipfile.ZIP_DEFLATED) as packed:
            for path in sorted(path for path in out.rglob("*") if path.is_file()):
                packed.write(path, path.relative_to(out))
    return Answer(body.getvalue(), "application/zip", f"{found.stem}.zip")


FORMS: dict[str, Callable[[Found], Answer]] = {
    "json": _json,
    "runs": _runs,
    "png": _png,
    "overlay": _overlay,
    "zip": _zip,
}
