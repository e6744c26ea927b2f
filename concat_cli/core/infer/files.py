"""What comes out, on disk: predictions, or the truth of a data set, one picture after the other.

OUT/panoptic.json        COCO panoptic, one for all; `concat evaluate --predictions` reads it
OUT/panoptic/NAME.png    ids in R + 256 G + 65536 B, in the folder named like the JSON
OUT/semantic/NAME.png    grey PNG of the data set's category ids, of 8 bits where all ids fit, else
                         of 16; `predict` lists them in OUT/semantic.json
OUT/instances.json       COCO results: [{image_id, category_id, score, bbox, segmentation
                         (compressed run lengths)}]
OUT/NAME.overlay.png     the picture with its segments drawn in, made by `predict`

As COCO lays out data sets, which other tools open as they are: OUT/annotations/panoptic_predictions
(.json, and the folder), and OUT/images/NAME.EXT, copies of the pictures.
"""

from __future__ import annotations

import io
import json
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from concat_cli.core import files
from concat_cli.core.data.image_io import LARGE, looked_up, read_header, write_id_png, write_png
from concat_cli.core.device import ALONE, Share
from concat_cli.core.errors import UserError
from concat_cli.core.infer.instances import Instance, bounding_box
from concat_cli.core.infer.pictures import OVERLAY, check_name, to_array
from concat_cli.core.infer.postprocess import Segment, Size
from concat_cli.core.infer.predictor import Prediction, Predictor
from concat_cli.core.infer.render import overlay
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.vocabulary import Vocabulary

PANOPTIC, SEMANTIC, INSTANCES = "panoptic", "semantic", "instances"
CHUNK = 8  # pictures in memory at a time
Layout = Literal["plain", "coco"]
Images = dict[int, NDArray[np.uint8]]  # by their number


class Saver:
    """Writes what is handed over; `finish` makes the JSON files of what all processes wrote.

    What the JSON files list waits in hidden files, each value in a line behind its image's id, so
    that nothing of it stays in memory.
    """

    def __init__(
        self, out: Path, vocabulary: Vocabulary, rank: int = 0, layout: Layout = "plain"
    ) -> None:
        self.out, self.vocabulary, self.rank, self.layout = out, vocabulary, rank, layout
        self._waiting: dict[str, BinaryIO] = {}
        for folder in (out, out / PANOPTIC, out / SEMANTIC):
            files.remove_leftovers(folder, deep=False)

    def folder(self, kind: str) -> Path:
        """Where the PNGs of a kind go; the JSON that lists them stands beside it."""
        if self.layout == "coco":
            return self.out / "annotations" / f"{kind}_predictions"
        return self.out / kind

    def index(self, kind: str) -> Path:
        """The JSON that lists the PNGs of a kind."""
        return self.folder(kind).with_name(f"{self.folder(kind).name}.json")

    def panoptic(
        self,
        image_id: int,
        file_name: str,
        panoptic_map: NDArray[np.integer],
        segments_info: list[dict[str, Any]],
        name: str,
    ) -> Path:
        """A panoptic map (H, W) of segment ids, 0 = void, and what COCO says of its segments.

        name: of the PNG without its ending. Returns the PNG.
        """
        png = self.folder(PANOPTIC) / f"{name}.png"
        write_id_png(png, panoptic_map)
        self.enter(PANOPTIC, png, image_id, file_name, panoptic_map.shape, segments_info)
        return png

    def semantic(self, semantic_map: NDArray[np.integer], name: str) -> Path:
        """A semantic map (H, W) of class indices; UserError where ids need more than 16 bits."""
        png = self.folder(SEMANTIC) / f"{name}.png"
        ids = np.array(self.vocabulary.ids)
        if ids.min() < 0 or ids.max() >= 1 << 16:
            raise UserError(
                f"The category ids {ids.min()} to {ids.max()} do not fit into a PNG of 16 bits.",
                "Prepare the data set with ids of 0..65535, or leave --save out.",
            )
        kind = np.uint8 if ids.max() < 1 << 8 else np.uint16
        buffer = io.BytesIO()
        Image.fromarray(looked_up(ids.astype(kind), semantic_map)).save(buffer, "PNG")
        files.write_bytes(png, buffer.getvalue(), sync=False)
        return png

    def enter(
        self,
        kind: str,
        png: Path,
        image_id: int,
        file_name: str,
        size: Sequence[int],
        segments_info: list[dict[str, Any]],
    ) -> None:
        """Lists a PNG in the JSON of its kind; size: height, width."""
        image = {"id": image_id, "file_name": file_name, "height": size[0], "width": size[1]}
        self._wait(f"{kind}.images", image_id, image)
        annotation = {
            "id": image_id,  # COCO's own have none; kwcoco needs one
            "image_id": image_id,
            "file_name": png.name,
            "segments_info": segments_info,
        }
        self._wait(f"{kind}.annotations", image_id, annotation)

    def instances(self, image_id: int, found: Sequence[Instance]) -> None:
        """The instances of an image."""
        self.begin(INSTANCES)  # so that the file is there, even where nothing is found
        for one in found:
            rle = one.rle | {"counts": one.rle["counts"].decode("ascii")}
            value = {
                "image_id": image_id,
                "category_id": self.vocabulary.ids[one.class_index],
                "score": round(one.score, 6),
                "bbox": bounding_box(one.rle),
                "segmentation": rle,
            }
            self._wait(INSTANCES, image_id, value)

    def begin(self, name: str) -> BinaryIO:
        """The hidden file of a list; `finish` writes the list even if nothing is added."""
        if name not in self._waiting:
            path = files.temporary_name(self.out / name)
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                self._waiting[name] = path.open("xb")
            except OSError as error:
                raise files.write_error(path, error) from error
        return self._waiting[name]

    def state(self) -> dict[str, Path]:
        """What this process wrote, for `finish`; nothing is added after."""
        paths = {name: Path(file.name) for name, file in self._waiting.items()}
        for name, file in self._waiting.items():
            try:
                file.close()
            except OSError as error:
                raise files.write_error(paths[name], error) from error
        return paths

    def finish(self, states: Iterable[dict[str, Path]]) -> None:
        """Writes the JSON files from what all processes wrote, and deletes the hidden ones."""
        found: dict[str, list[Path]] = {}
        for name, path in (item for state in states for item in state.items()):
            found.setdefault(name, []).append(path)
        try:
            for kind in (PANOPTIC, SEMANTIC):
                if f"{kind}.images" in found:
                    _write(self.index(kind), self._listing(kind, found))
            if INSTANCES in found:
                _write(self.out / f"{INSTANCES}.json", _in_order(found[INSTANCES]))
        finally:
            for path in (path for paths in found.values() for path in paths):
                path.unlink(missing_ok=True)

    def abandon(self) -> None:
        """Deletes this process's hidden files, whatever they still wait to write."""
        for file in self._waiting.values():
            with suppress(OSError):  # such as the full disk that is being told
                file.close()
            Path(file.name).unlink(missing_ok=True)

    def _wait(self, name: str, image_id: int, value: dict[str, Any]) -> None:
        file = self.begin(name)
        try:
            file.write(f"{image_id} {json.dumps(value, ensure_ascii=False)}\n".encode())
        except OSError as error:
            raise files.write_error(Path(file.name), error) from error

    def _listing(self, kind: str, found: dict[str, list[Path]]) -> Iterator[str]:
        categories = [
            {"id": entry.id, "name": entry.name, "isthing": int(entry.kind == "thing")}
            for entry in self.vocabulary.entries
        ]
        yield '{"images": '
        yield from _in_order(found[f"{kind}.images"])
        yield ', "annotations": '
        yield from _in_order(found[f"{kind}.annotations"])
        yield f', "categories": {json.dumps(categories, ensure_ascii=False)}}}'


def _in_order(paths: Sequence[Path]) -> Iterator[str]:
    """The pieces of one JSON list of the values in some hidden files, by image id."""
    with ExitStack() as stack:
        opened: list[BinaryIO] = [stack.enter_context(path.open("rb")) for path in paths]
        places = np.fromiter(_places(opened), np.dtype((np.int64, 3)))
        yield "["
        for number, row in enumerate(np.argsort(places[:, 0], kind="stable")):
            file: BinaryIO = opened[int(places[row, 1])]
            file.seek(int(places[row, 2]))
            value = file.readline().partition(b" ")[2].strip().decode("utf-8")
            yield f", {value}" if number else value
        yield "]"


def _places(opened: Sequence[BinaryIO]) -> Iterator[tuple[int, int, int]]:
    """Image id, file and offset of each value."""
    for which, file in enumerate(opened):
        start = 0
        for line in file:
            yield int(line.partition(b" ")[0]), which, start
            start += len(line)


def _write(path: Path, pieces: Iterator[str]) -> None:
    with files.atomic_path(path) as temp, temp.open("w", encoding="utf-8") as file:
        file.writelines(pieces)
        file.write("\n")


def flat_names(file_names: Iterable[str]) -> list[str]:
    """File names without folders and ending, `town/0001.jpg` -> `town_0001`; where two would be
    one, with the ending, then with a number."""
    paths = [PurePosixPath(name) for name in file_names]
    flat = [path.with_suffix("").as_posix().replace("/", "_") for path in paths]
    return _distinct([(f, f"{f}_{p.suffix[1:]}") for f, p in zip(flat, paths, strict=True)])


def segment_entries(segments: Iterable[Segment], vocabulary: Vocabulary) -> list[dict[str, Any]]:
    """The segments as COCO panoptic entries, with the class's name and score besides."""
    return [
        {
            "id": segment.id,
            "category_id": vocabulary.ids[segment.class_index],
            "name": vocabulary.names[segment.class_index],
            "score": round(segment.score, 4),
            "area": segment.area,
            "bbox": list(segment.bbox),
            "iscrowd": 0,
        }
        for segment in segments
    ]


def output_names(inputs: Sequence[Path]) -> list[str]:
    """A file name without ending for each input, all different even where case does not count.

    The stem where no other input has it; else with the ending (`cat_jpg`), then with the folder
    (`holiday_cat_jpg`), then with a number.
    """
    endings = [f"{path.stem}_{path.suffix[1:]}" for path in inputs]
    return _distinct(
        [
            (path.stem, ending, f"{path.parent.name}_{ending}")
            for path, ending in zip(inputs, endings, strict=True)
        ]
    )


def _distinct(candidates: Sequence[tuple[str, ...]]) -> list[str]:
    """For each its first name that no other could have, else its last one, with a number if need
    be; case does not count, as on some file systems."""
    count = Counter(form.casefold() for forms in candidates for form in set(forms))
    names: list[str] = []
    taken: set[str] = set()
    for forms in candidates:
        name = next((form for form in forms if count[form.casefold()] == 1), forms[-1])
        base, number = name, 2
        while name.casefold() in taken:
            name, number = f"{base}_{number}", number + 1
        taken.add(name.casefold())
        names.append(name)
    return names


def image_ids(names: Sequence[str]) -> list[int]:
    """The numbers in COCO names (`000000142238` -> 142238) where all have one; else 1, 2, ..."""
    if all(name.isascii() and name.isdigit() for name in names):
        ids = [int(name) for name in names]
        if len(set(ids)) == len(ids):
            return ids
    return list(range(1, len(names) + 1))


@dataclass(frozen=True)
class PicturePrediction:
    """What was found in one picture and where it was written.

    size: height, width. segments: COCO panoptic entries with `name` and `score`, the largest first.
    milliseconds: load, model, post.
    """

    path: Path
    id: int
    size: Size
    png: Path
    overlay: Path
    segments: list[dict[str, Any]]
    milliseconds: dict[str, float]


@dataclass(frozen=True)
class Predicted:
    """What came of many pictures: predictions in their order, an error for each unreadable one, and
    the JSON that lists the predictions."""

    pictures: list[PicturePrediction]
    unreadable: list[UserError]
    index: Path


def predict_paths(
    predictor: Predictor,
    paths: Sequence[Path],
    out: Path,
    *,
    layout: Layout = "plain",
    share: Share = ALONE,
    progress: Progress = SILENT,
) -> Predicted:
    """Writes an overlay and a PNG for each picture, then one JSON for all.

    Pictures that cannot be read are left out and named in the result.
    Each of several processes takes its share, all return everything, in the order of `paths`.
    """
    kind = PANOPTIC if PANOPTIC in predictor.tasks else SEMANTIC
    names = output_names(paths)
    named = list(zip(paths, names, image_ids(names), strict=True))
    chunks = _chunks(paths, share.of(len(paths)))
    done: dict[int, PicturePrediction | UserError] = {}
    saver = Saver(out, predictor.vocabulary, share.rank, layout)

    def write(images: Images, found: Sequence[Prediction], load: float) -> None:
        for (index, image), prediction in zip(images.items(), found, strict=True):
            done[index] = _save(saver, *named[index], image, prediction, load)

    try:
        for name in (f"{kind}.images", f"{kind}.annotations"):
            saver.begin(name)
        track = progress.track(chunks, f"predict, {CHUNK} pictures at a time", len(chunks))
        _predict_chunks(predictor, paths, track, write, done)
        parts = share.gather((done, saver.state()))
        if share.rank == 0:
            saver.finish(state for _, state in parts)
    except BaseException:
        saver.abandon()
        raise
    everything = dict(item for part, _ in parts for item in part.items())
    ordered = [everything[index] for index in sorted(everything)]
    pictures = [one for one in ordered if isinstance(one, PicturePrediction)]
    if share.rank == 0:
        _tell_older(out, kind, pictures, progress)
    return Predicted(
        pictures,
        [one for one in ordered if isinstance(one, UserError)],
        saver.index(kind),
    )


def _predict_chunks(
    predictor: Predictor,
    paths: Sequence[Path],
    chunks: Iterable[list[int]],
    write: Callable[[Images, Sequence[Prediction], float], None],
    done: dict[int, PicturePrediction | UserError],
) -> None:
    """Each chunk is written while the next one is read and predicted, but for large pictures, of
    which one at a time is in memory."""
    with ThreadPoolExecutor(1) as writer:
        written: Future[None] | None = None
        for chunk in chunks:
            images, load = _read(paths, chunk, predictor.cfg.white, done)
            alone = any(image.shape[0] * image.shape[1] > LARGE for image in images.values())
            if written is not None and alone:
                written.result()
            found = predictor.predict_batch(list(images.values()), semantic=False)
            if written is not None:
                written.result()
            written = writer.submit(write, images, found, load)
            if alone:
                written.result()
        if written is not None:
            written.result()


def _tell_older(
    out: Path, kind: str, pictures: Sequence[PicturePrediction], progress: Progress
) -> None:
    """Says which files of an earlier run are still beside the new ones."""
    new = {path for one in pictures for path in (one.png, one.overlay)}
    older = sorted({*out.glob(f"*{OVERLAY}"), *(out / kind).glob("*.png")} - new)
    if older:
        progress.say(
            f"{out} still holds {len(older)} files of an earlier run, such as {older[0].name}; "
            f"{kind}.json does not list them"
        )


def _chunks(paths: Sequence[Path], mine: Sequence[int]) -> list[list[int]]:
    """The pictures of this process, so many at a time; a large one is alone."""
    chunks: list[list[int]] = []
    room = 0
    for number in mine:
        large = _pixels(paths[number]) > LARGE
        if large or not room:
            chunks.append([])
            room = CHUNK
        chunks[-1].append(number)
        room = 0 if large else room - 1
    return chunks


def _pixels(path: Path) -> int:
    """Of a picture, by its header; 0 where it cannot be read, which is told when it is."""
    try:
        height, width = read_header(path).size
    except UserError:
        return 0
    return height * width


def _read(
    paths: Sequence[Path],
    chunk: Sequence[int],
    white: int,
    done: dict[int, PicturePrediction | UserError],
) -> tuple[Images, float]:
    """Images by their number, and the milliseconds of one; errors go to `done`."""
    start = time.perf_counter()
    images: Images = {}
    for index in chunk:
        try:
            check_name(paths[index])
            images[index] = to_array(paths[index], white)
        except UserError as error:
            done[index] = error
    return images, round((time.perf_counter() - start) * 1000 / len(chunk), 2)


def _save(
    saver: Saver,
    path: Path,
    name: str,
    image_id: int,
    image: NDArray[np.uint8],
    prediction: Prediction,
    load: float,
) -> PicturePrediction:
    entries = segment_entries(prediction.segments, prediction.vocabulary)
    file_name, size = path.as_posix(), (image.shape[0], image.shape[1])
    if saver.layout == "coco":
        file_name = f"{name}{path.suffix}"
        files.copy(path, saver.out / "images" / file_name)
    if prediction.is_panoptic:
        png = saver.panoptic(image_id, file_name, prediction.panoptic_map, entries, name)
    else:
        png = saver.semantic(prediction.semantic_map, name)
        saver.enter(SEMANTIC, png, image_id, file_name, size, entries)
    drawn = saver.out / f"{name}{OVERLAY}"
    write_png(drawn, overlay(image, prediction))
    largest_first = sorted(entries, key=lambda segment: -segment["area"])
    times = prediction.milliseconds | {"load": load}
    return PicturePrediction(path, image_id, size, png, drawn, largest_first, times)
