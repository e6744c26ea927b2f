"""What comes out, on disk: predictions, or the truth of a data set, one picture after the other.

OUT/panoptic.json        COCO panoptic, one for all; `concat evaluate --predictions` reads it
OUT/panoptic/NAME.png    ids in R + 256 G + 65536 B, in the folder named like the JSON
OUT/semantic/NAME.png    grey PNG of the data set's category ids, of 8 bits where all ids fit, else
                         of 16; `predict` lists them in OUT/semantic.json
OUT/instances.json       COCO results: [{image_id, category_id, score, bbox, segmentation
                         (compressed run lengths)}]
OUT/NAME.overlay.png     the picture with its segments drawn in, made by `predict`
OUT/NAME.overlay.mp4     the same of a video

As COCO lays out data sets, which other tools open as they are: OUT/annotations/panoptic_predictions
(.json, and the folder), and OUT/images/NAME.EXT, copies of the pictures.
"""

from __future__ import annotations

import hashlib
import io
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from tempfile import TemporaryFile
from typing import Any, BinaryIO, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from concat_cli.core import files
from concat_cli.core.data.image_io import LARGE, looked_up, read_header, write_id_png, write_png
from concat_cli.core.device import ALONE, Share
from concat_cli.core.errors import UserError
from concat_cli.core.infer.instances import Instance, bounding_box
from concat_cli.core.infer.journal import Journal, opened, read
from concat_cli.core.infer.pictures import OVERLAY, check_name, to_array
from concat_cli.core.infer.postprocess import Size
from concat_cli.core.infer.prediction import Prediction, categories, segment_entries
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.infer.video import Video
from concat_cli.core.progress import SILENT, Progress, in_parts
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
        about: dict[str, Any] | None = None,
    ) -> None:
        """Lists a PNG in the JSON of its kind; size: height, width. about: the image, besides."""
        image = {"id": image_id, "file_name": file_name, "height": size[0], "width": size[1]}
        self._wait(f"{kind}.images", image_id, image | (about or {}))
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
        yield '{"images": '
        yield from _in_order(found[f"{kind}.images"])
        yield ', "annotations": '
        yield from _in_order(found[f"{kind}.annotations"])
        yield f', "categories": {json.dumps(categories(self.vocabulary), ensure_ascii=False)}}}'


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


class Paths:
    """Pictures that are files, by their place among them."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths, self._names = paths, output_names(paths)
        self._ids = image_ids(self._names)

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, one: int) -> str:
        """Of what is written of a picture, without ending; all differ."""
        return self._names[one]

    def id(self, one: int) -> int:
        """Of the picture in the JSON."""
        return self._ids[one]

    def file(self, one: int) -> Path:
        """Where the picture is."""
        return self._paths[one]

    def state(self, one: int) -> list[Any]:
        """Differs where the picture is another one, or has changed since."""
        rows: list[Any] = []
        with suppress(OSError):
            stat = self._paths[one].stat()
            rows.append([stat.st_size, stat.st_mtime_ns])
        return [*rows, [str(self._paths[one]), self._names[one], self._ids[one]]]

    def pixels(self, one: int) -> int:
        """By the header; 0 where it cannot be read, which is told when the picture is."""
        try:
            height, width = read_header(self._paths[one]).size
        except UserError:
            return 0
        return height * width

    def about(self, one: int) -> dict[str, Any]:
        """What the JSON says of a picture besides: nothing."""
        return {}

    def read(self, one: int, white: int) -> NDArray[np.uint8]:
        """(H, W, 3); UserError where it cannot be read."""
        check_name(self._paths[one])
        return to_array(self._paths[one], white)

    def keep(self, one: int, image: NDArray[np.uint8] | None, path: Path) -> None:
        """Copies the picture."""
        files.copy(self._paths[one], path)

    def overlay(self, out: Path, one: int) -> Path:
        """The file that its overlay is in."""
        return out / f"{self._names[one]}{OVERLAY}"


Source = Paths | Video


@dataclass(frozen=True)
class PicturePrediction:
    """What was found in one picture and where it was written.

    size: height, width. segments: COCO panoptic entries with `name` and `score`, the largest first.
    milliseconds: load, model, post. about: what the JSON says of the picture besides.
    """

    path: Path
    id: int
    size: Size
    png: Path
    overlay: Path
    segments: list[dict[str, Any]]
    milliseconds: dict[str, float]
    about: dict[str, Any] = field(default_factory=dict[str, Any])

    def to_json(self) -> dict[str, Any]:
        """As a line of a journal holds it."""
        own = {name: str(getattr(self, name)) for name in ("path", "png", "overlay")}
        return vars(self) | own

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> PicturePrediction:
        """From such a line."""
        own: dict[str, Any] = {name: Path(value[name]) for name in ("path", "png", "overlay")}
        own["size"] = tuple(value["size"])
        return cls(**value | own)


class Pictures:
    """The predictions of many pictures, in their order: on disk, whatever their number."""

    def __init__(self, folder: Path) -> None:
        self._file = TemporaryFile("w+", dir=folder, encoding="utf-8")  # noqa: SIM115
        self._count = 0

    def add(self, one: PicturePrediction) -> None:
        """Appends one."""
        self._file.write(json.dumps(one.to_json()) + "\n")
        self._count += 1

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[PicturePrediction]:
        self._file.seek(0)
        return (PicturePrediction.from_json(json.loads(line)) for line in self._file)


@dataclass(frozen=True)
class Predicted:
    """What came of many pictures: predictions in their order, which only the first of several
    processes has, an error for each unreadable one, and the JSON that lists the predictions."""

    pictures: Pictures
    unreadable: list[UserError]
    index: Path


def predict_paths(
    predictor: Predictor,
    paths: Sequence[Path] | Video,
    out: Path,
    *,
    layout: Layout = "plain",
    settings: dict[str, Any] | None = None,
    share: Share = ALONE,
    scale: int = 1,
    progress: Progress = SILENT,
) -> Predicted:
    """Writes an overlay and a PNG for each picture or frame, then one JSON for all.

    Pictures that cannot be read are left out and named in the result. Each of several processes
    takes its share. Nothing of a picture stays in memory.

    settings: what the results depend on beside the pictures; with them, the same call goes on where
    a killed one stopped. What was done with others is forgotten, which is said.
    """
    kind = PANOPTIC if PANOPTIC in predictor.tasks else SEMANTIC
    saver = Saver(out, predictor.vocabulary, share.rank, layout)
    source = paths if isinstance(paths, Video) else Paths(paths)
    work = _Work(predictor, source, saver, scale)
    with ExitStack() as stack:
        begun: tuple[Path, Path, set[int]] | None = None
        if share.rank == 0:
            lasting = settings is not None and len(paths) > CHUNK
            journal = stack.enter_context(opened(out, lasting, progress.say))
            begun = (journal.folder, *_begin(journal, settings or {}, work, progress))
        folder, kept, done = share.gather(begun)[0]
        todo = sorted(set(range(0, len(paths), CHUNK)).difference(done))
        own = Journal(folder)
        mine = [todo[place] for place in share.of(len(todo))]
        track = in_parts(progress, [work.of(first) for first in mine], "predict")
        start = time.perf_counter()
        _predict_chunks(work, mine, track, own)
        if isinstance(source, Video):
            progress.say(_speed(sum(len(work.of(first)) for first in mine), start))
        added = share.gather(own.close())
        pictures, broken = Pictures(out), list[tuple[str, str]]()
        if share.rank == 0:
            broken = _assemble(work, kind, [kept, *(path for path in added if path)], pictures)
            _tell_older(out, saver.folder(kind), pictures, progress)
        unreadable = [UserError(*error) for error in share.gather(broken)[0]]
        if share.rank == 0 and isinstance(source, Video) and not unreadable:
            source.draw(out, pictures, predictor.vocabulary, kind == PANOPTIC, scale, progress)
    return Predicted(pictures, unreadable, saver.index(kind))


@dataclass(frozen=True)
class _Work:
    """The pictures of a run, who predicts them, what writes the results, and how many times as
    large as a picture its overlay is."""

    predictor: Predictor
    source: Source
    saver: Saver
    scale: int

    def of(self, first: int) -> range:
        """The pictures of the chunk that begins with one."""
        return range(first, min(first + CHUNK, len(self.source)))

    def key(self, first: int) -> str:
        """Differs where a chunk holds other pictures, or where they have changed since."""
        rows = [row for one in self.of(first) for row in self.source.state(one)]
        return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def _begin(
    journal: Journal, settings: dict[str, Any], work: _Work, progress: Progress
) -> tuple[Path, set[int]]:
    """A file with the chunks that a stopped run has done, and their numbers."""
    if others := journal.begin(settings):
        progress.say(
            f"a run that was stopped in {work.saver.out} had other {', '.join(others)}: its "
            "pictures are predicted again"
        )

    def is_valid(first: int, key: str, value: dict[str, Any]) -> bool:
        parts = ("png",) if isinstance(work.source, Video) else ("png", "overlay")
        made = (Path(one[part]) for one in value["pictures"] for part in parts)
        return key == work.key(first) and all(path.is_file() for path in made)

    kept, done, dropped = journal.keep(is_valid)
    if done or dropped:
        count, changed = sum(len(work.of(first)) for first in done), dropped and "; the others"
        progress.say(
            f"{count} of {len(work.source)} pictures are done, by a run that was stopped"
            + (f"{changed} of it have changed or are gone" if changed else "")
        )
    return kept, done


def _assemble(
    work: _Work, kind: str, lists: Sequence[Path], pictures: Pictures
) -> list[tuple[str, str]]:
    """Writes the JSON of everything that the processes listed; the errors of unreadable pictures.

    UserError where the lists are not all there.
    """
    saver, there, broken = work.saver, 0, list[tuple[str, str]]()
    try:
        for name in (f"{kind}.images", f"{kind}.annotations"):
            saver.begin(name)
        for _, value in read(lists):
            for one in map(PicturePrediction.from_json, value["pictures"]):
                entries = sorted(one.segments, key=lambda segment: segment["id"])
                name = _file_name(saver, one.path, one.png.stem)
                saver.enter(kind, one.png, one.id, name, one.size, entries, one.about)
                pictures.add(one)
            broken += [(what, hint) for what, hint in value["errors"]]
            there += len(value["pictures"]) + len(value["errors"])
        if there != len(work.source):
            raise UserError(
                f"Of {len(work.source)} pictures only {there} are listed in {saver.out}.",
                "All processes must write into one folder: give one that all machines share.",
            )
        saver.finish([saver.state()])
    except BaseException:
        saver.abandon()
        raise
    return broken


@dataclass(frozen=True)
class _Read:
    """Pictures by their number, those that cannot be read, and the milliseconds of one."""

    images: Images
    errors: list[UserError]
    load: float


def _predict_chunks(
    work: _Work, chunks: Sequence[int], track: Iterable[range], journal: Journal
) -> None:
    """Reading, the model and writing overlap, but for chunks that hold a large picture: those are
    dealt with picture by picture, and nothing else is in memory meanwhile."""
    predict = work.predictor.predict_batch

    def write(first: int, key: str, parts: Iterable[tuple[_Read, Sequence[Prediction]]]) -> None:
        pictures: list[dict[str, Any]] = []
        errors: list[tuple[str, str]] = []
        for part, found in parts:
            for one, prediction in zip(part.images, found, strict=True):
                pictures.append(_save(work, one, prediction, part.load).to_json())
            errors += [(error.what, error.hint) for error in part.errors]
        journal.add(first, key, {"pictures": pictures, "errors": errors})

    with ThreadPoolExecutor(1) as reader, ThreadPoolExecutor(1) as writer:
        following = iter([*chunks[1:], None])
        ahead = reader.submit(_read_chunk, work, chunks[0]) if chunks else None
        written: Future[None] | None = None
        for chunk in track:
            assert ahead is not None
            first, (key, part) = chunk[0], ahead.result()
            coming = next(following)
            if part is None:  # one is large
                if written is not None:
                    written.result()
                each = (_read(work, [one]) for one in work.of(first))
                write(first, key, ((one, predict([*one.images.values()], False)) for one in each))
                ahead = None if coming is None else reader.submit(_read_chunk, work, coming)
                continue
            ahead = None if coming is None else reader.submit(_read_chunk, work, coming)
            found = predict(list(part.images.values()), semantic=False)
            if written is not None:
                written.result()
            written = writer.submit(write, first, key, [(part, found)])
        if written is not None:
            written.result()


def _read_chunk(work: _Work, first: int) -> tuple[str, _Read | None]:
    """The key of a chunk and its pictures; None where one is large."""
    chunk, key = work.of(first), work.key(first)
    large = any(work.source.pixels(one) > LARGE for one in chunk)
    return key, None if large else _read(work, chunk)


def _read(work: _Work, chunk: Sequence[int]) -> _Read:
    start = time.perf_counter()
    images: Images = {}
    errors: list[UserError] = []
    for one in chunk:
        try:
            images[one] = work.source.read(one, work.predictor.cfg.white)
        except UserError as error:
            errors.append(error)
    return _Read(images, errors, round((time.perf_counter() - start) * 1000 / len(chunk), 2))


def _save(work: _Work, number: int, prediction: Prediction, load: float) -> PicturePrediction:
    saver, source, name = work.saver, work.source, work.source.name(number)
    path, drawn = source.file(number), source.overlay(saver.out, number)
    entries = segment_entries(prediction.segments, prediction.vocabulary)
    if saver.layout == "coco":
        assert prediction.image is not None
        source.keep(number, prediction.image, saver.out / "images" / _file_name(saver, path, name))
    if prediction.is_panoptic:
        png = saver.folder(PANOPTIC) / f"{name}.png"
        write_id_png(png, prediction.panoptic_map)
    else:
        png = saver.semantic(prediction.semantic_map, name)
    if not isinstance(source, Video):  # whose overlays are drawn together
        write_png(drawn, prediction.plot(scale=work.scale))
    largest_first = sorted(entries, key=lambda segment: -segment["area"])
    times = prediction.milliseconds | {"load": load}
    height, width = prediction.panoptic_map.shape
    return PicturePrediction(
        path,
        source.id(number),
        (height, width),
        png,
        drawn,
        largest_first,
        times,
        source.about(number),
    )


def _speed(frames: int, start: float) -> str:
    seconds = time.perf_counter() - start
    return f"{frames} frames in {seconds:.1f} s: {frames / max(seconds, 1e-9):.3g} a second"


def _file_name(saver: Saver, path: Path, name: str) -> str:
    """What the JSON calls a picture."""
    return f"{name}{path.suffix}" if saver.layout == "coco" else path.as_posix()


def _tell_older(out: Path, pngs: Path, pictures: Pictures, progress: Progress) -> None:
    """Says which files of an earlier run are still beside the new ones."""
    new = {name for one in pictures for name in (one.png.name, one.overlay.name)}
    there = (path.name for path in (*out.glob(f"*{OVERLAY}"), *pngs.glob("*.png")))
    older = sorted(name for name in there if name not in new)
    if older:
        progress.say(
            f"{out} still holds {len(older)} files of an earlier run, such as {older[0]}; "
            f"{pngs.name}.json does not list them"
        )
