"""COCO panoptic JSON files that anybody may have written, read and checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from concat_cli.core.errors import UserError

FORMAT_HINT = (
    "A COCO panoptic JSON holds `annotations`: [{image_id, file_name, segments_info: "
    "[{id, category_id}]}]; that of the truth also `images` and `categories`."
)


def _whole(value: Any) -> Any:
    """Numbers as JSON writers have them: 7.0 is 7; true and NaN are none."""
    if isinstance(value, bool) or (isinstance(value, float) and not value.is_integer()):
        raise ValueError("Input should be a whole number or text")
    return int(value) if isinstance(value, float) else value


Whole = Annotated[int, BeforeValidator(_whole)]


def _text(value: Any) -> Any:
    value = _whole(value)
    return str(value) if isinstance(value, int) else value


# 7 and "7" are one id: detection benchmarks and Cityscapes write text, others numbers
ImageId = Annotated[str, BeforeValidator(_text)]


class _Row(BaseModel):
    model_config = ConfigDict(coerce_numbers_to_str=True)


class Segment(_Row):
    """A segment; `area` as it stands there, since only one way of counting looks at it."""

    id: Annotated[Whole, Field(ge=1, lt=1 << 24)]  # 0 is void in a panoptic PNG
    category_id: Whole
    iscrowd: bool = False
    area: Any = None


class Annotation(_Row):
    """The segments of an image, and the PNG that they are drawn in."""

    image_id: ImageId
    file_name: str | None = None
    segments_info: list[Segment]


class Category(_Row):
    """A class; `isthing` is None where nothing is said."""

    id: Whole
    name: str
    isthing: bool | None = None


class Named(_Row):
    """An image and its file."""

    id: ImageId
    file_name: str | None = None


class Image(Named):
    """An image of the truth."""

    height: Whole
    width: Whole


class _Content(_Row):
    annotations: list[Annotation]
    categories: list[Category] = []

    def used(self) -> set[int]:
        """The category ids of all segments."""
        return {s.category_id for one in self.annotations for s in one.segments_info}


class Predictions(_Content):
    """What predictions must hold."""

    images: list[Named] = []


class Truth(_Content):
    """What a truth must hold."""

    images: list[Image]


J = TypeVar("J", Predictions, Truth)


def file_names(content: Predictions | Truth) -> dict[str, str]:
    """The image's file by image id, where `images` says it."""
    return {one.id: one.file_name for one in content.images if one.file_name}


@dataclass(frozen=True)
class PanopticFiles:
    """A panoptic JSON and the folder of its PNGs; None: the folder that is named like it."""

    json: Path
    folder: Path | None = None

    @property
    def pngs(self) -> Path:
        """The folder of the PNGs."""
        return self.folder or self.json.with_suffix("")

    def png(self, one: Annotation, image: str | None) -> Path:
        """The annotation's PNG; UserError where its name leads out of the folder.

        image: the image's own file name. Where the annotation names no PNG, it is looked for under
        COCO's number of 12 digits, the image's id, and the image's name.
        """
        if one.file_name:
            return self.pngs / _inside(self, one.file_name)
        names = [f"{one.image_id:0>12}.png", f"{one.image_id}.png"]
        if image:
            names.append(f"{PureWindowsPath(image).stem}.png")
        paths = [self.pngs / _inside(self, name) for name in dict.fromkeys(names)]
        found = next((path for path in paths if path.is_file()), None)
        if found is None:
            raise UserError(
                f"{self.json}: the annotation of image {one.image_id} has no file_name, and "
                f"{self.pngs} holds none of {', '.join(path.name for path in paths)}.",
                "Write the PNG's name into `file_name`.",
            )
        return found


def _inside(files: PanopticFiles, name: str) -> str:
    """The name; UserError where it is absolute or goes up: a JSON may come from anybody."""
    parts = (*PureWindowsPath(name).parts, *PurePosixPath(name).parts)
    if PureWindowsPath(name).anchor or name.startswith("/") or ".." in parts:
        raise UserError(
            f"{files.json}: the file_name {name!r:.200} leads out of {files.pngs}.",
            "Names of PNGs are relative to their folder, which --predictions-dir or --truth-dir "
            "names.",
        )
    return name


def read_panoptic(
    given: PanopticFiles | Path | str, kind: type[J]
) -> tuple[PanopticFiles, J, dict[str, Annotation]]:
    """A panoptic JSON and its annotations by image id, in file order.

    UserError where it is none, where it or its folder is missing, and for an image or a segment
    that is told twice.
    """
    files = given if isinstance(given, PanopticFiles) else PanopticFiles(Path(given))
    if not files.json.is_file():
        raise UserError(f"There is no file {files.json}.", "Check the path.")
    if not files.pngs.is_dir():
        raise UserError(
            f"There is no folder {files.pngs} with the PNGs of {files.json}.",
            "Name it with --predictions-dir or --truth-dir; in `compare`, as FILE.json:FOLDER.",
        )
    try:
        content = kind.model_validate_json(files.json.read_bytes())
    except OSError as error:
        raise UserError(
            f"Cannot read {files.json}: {error.strerror}.", "Check the file."
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(map(str, first["loc"])) or "as a whole"
        value = (
            "" if first["type"] in ("missing", "json_invalid") else f", not {first['input']!r:.60}"
        )
        what = f"{files.json} is no COCO panoptic JSON: {place}: {first['msg']}{value}"
        raise UserError(what, FORMAT_HINT) from error
    found = {one.image_id: one for one in content.annotations}
    if len(found) < len(content.annotations):
        raise UserError(f"{files.json}: two annotations have one image_id.", FORMAT_HINT)
    for one in content.annotations:
        if len({segment.id for segment in one.segments_info}) < len(one.segments_info):
            raise UserError(
                f"{files.json}: image {one.image_id} has segment ids that are repeated.",
                "Each id but 0 stands for one segment of a panoptic PNG.",
            )
    return files, content, found
