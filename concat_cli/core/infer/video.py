"""Videos: their frames as pictures, upright and in order, and a video of overlays at their times.

PyAV decodes and encodes: FFmpeg's own libraries in one wheel, without a program to install. A video
is read to its end before anything is predicted, which takes a small part of the time and shows its
damage and its exact frames and times; a run that goes on decodes what is done once more, as seeking
is exact in some formats alone.
"""

from __future__ import annotations

from array import array
from collections.abc import Generator, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from fractions import Fraction
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from concat_cli.core import files
from concat_cli.core.data.image_io import read_id_png, write_png
from concat_cli.core.errors import UserError
from concat_cli.core.infer.colours import usual
from concat_cli.core.infer.pictures import OVERLAY, check_name
from concat_cli.core.infer.postprocess import Size
from concat_cli.core.infer.render import Drawing, Mark, overlay
from concat_cli.core.progress import SILENT, Progress
from concat_cli.core.vocabulary import Vocabulary

if TYPE_CHECKING:
    from concat_cli.core.infer.files import PicturePrediction

HDR = {16: "PQ", 18: "HLG"}  # transfer functions, by their numbers in ITU-T H.273
BT709, LIMITED = 1, 1  # matrix, primaries and transfer function; range
ENCODERS = {"libx264": {"crf": "20", "preset": "veryfast"}, "mpeg4": {"qscale": "3"}}


@dataclass
class Video:
    """The frames of a video, each `every`-th from the first on; a `files.Source` of pictures.

    size: upright height and width. pts: of the frames, from 0, in units of `time_base` seconds.
    """

    path: Path
    every: int
    size: Size
    pts: NDArray[np.int64]
    time_base: Fraction
    rate: Fraction
    _open: Iterator[tuple[int, Any]] | None = field(default=None, repr=False)
    _next: int = 0  # the number of the frame that `_open` gives next

    @classmethod
    def opened(cls, path: Path | str, every: int = 1, progress: Progress = SILENT) -> Video:
        """A video that was decoded to its end; UserError where it cannot be, or PyAV is missing."""
        path = Path(path)
        check_name(path)
        with _reading(path) as (container, stream):
            total, rate = stream.frames or None, Fraction(stream.average_rate or 25)
            base, transfer = stream.time_base, int(stream.codec_context.color_trc or 0)
            told = Fraction(container.duration or 0, 1_000_000)  # seconds
            pts, sizes = array("q"), list[Size]()
            frames = _frames(path, container, stream)
            for number, frame in progress.track(frames, "look through", total):
                pts.append(-1 if frame.pts is None else frame.pts)
                size = _upright_size(frame)
                if size not in sizes:
                    sizes.append(size)
                if len(sizes) > 1:
                    shown = " and ".join(f"{width}x{height}" for height, width in sizes)
                    raise UserError(
                        f"The frames of {path} differ in size: {shown}, from frame {number} on.",
                        "Cut the video there, or scale it to one size.",
                    )
        times = np.array(pts, np.int64)
        if not sizes:
            raise UserError(f"{path} holds no frame of video.", "Record or copy it again.")
        if transfer in HDR:
            progress.say(f"{path} is HDR ({HDR[transfer]}): its colours are taken as stored: pale")
        if not bool((np.diff(times) > 0).all()):
            progress.say(f"{path} tells no times of its frames: taken as {float(rate):g} a second")
            times, base = np.arange(len(pts), dtype=np.int64), 1 / rate
        if told - (int(times[-1]) + 1) * base > max(1, told / 10):
            progress.say(f"{path} tells of {float(told):.1f} s and ends before: is it whole?")
        return cls(path, every, sizes[0], (times - times[0])[::every], base, rate / every)

    def __len__(self) -> int:
        return len(self.pts)

    @property
    def seconds(self) -> float:
        """How long it is shown, if the last frame is shown as long as the others in the mean."""
        return float(int(self.pts[-1]) * self.time_base + 1 / self.rate)

    def number(self, one: int) -> int:
        """Of a frame in the whole video, from 0."""
        return one * self.every

    def name(self, one: int) -> str:
        """`clip_000120`: the same whatever `every` is."""
        return f"{self.path.stem}_{self.number(one):06}"

    def id(self, one: int) -> int:
        """Of its image in the JSON: as `name`."""
        return self.number(one) + 1

    def file(self, one: int) -> Path:
        """What the JSON calls the frame: the name it has where it is saved."""
        return Path(f"{self.name(one)}.png")

    def state(self, one: int) -> list[Any]:
        """Differs where the video has changed."""
        stat = self.path.stat()
        return [str(self.path.absolute()), stat.st_size, stat.st_mtime_ns]

    def pixels(self, one: int) -> int:
        """Of a frame."""
        return self.size[0] * self.size[1]

    def about(self, one: int) -> dict[str, Any]:
        """What its image in the JSON has besides: its number, and seconds since the first frame."""
        seconds = round(float(int(self.pts[one]) * self.time_base), 6)
        return {"frame": self.number(one), "seconds": seconds}

    def read(self, one: int, white: int = 0) -> NDArray[np.uint8]:
        """(H, W, 3) uint8 RGB of a frame, upright; quick in rising order alone."""
        wanted = self.number(one)
        if self._open is None or wanted < self._next:
            self._open, self._next = _all_frames(self.path), 0
        for number, frame in self._open:
            self._next = number + 1
            if number == wanted:
                return _upright(frame)
        raise UserError(f"{self.path} has changed since it was looked through.", "Start again.")

    def keep(self, one: int, image: NDArray[np.uint8], path: Path) -> None:
        """Writes a frame, for a data set."""
        write_png(path, image)

    def overlay(self, out: Path, one: int) -> Path:
        """Where the frame is drawn: a video for all."""
        return out / f"{self.path.stem}{OVERLAY.removesuffix('.png')}.mp4"

    def draw(
        self,
        out: Path,
        found: Iterable[PicturePrediction],
        vocabulary: Vocabulary,
        is_panoptic: bool,
        scale: int = 1,
        progress: Progress = SILENT,
    ) -> None:
        """Writes the video of all overlays from what is on disk, each at its frame's time.

        An odd size gets one more row or column, as players ask for even ones.
        """
        av = _av()
        name = next(one for one in ENCODERS if one in av.codecs_available)
        height, width = (side * scale + side * scale % 2 for side in self.size)
        drawings = (_drawing(one, vocabulary, is_panoptic) for one in found)
        path = self.overlay(out, 0)
        with files.atomic_path(path) as temp, av.open(str(temp), "w", format="mp4") as container:
            stream = container.add_stream(name, rate=self.rate, options=ENCODERS[name])
            stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
            codec = stream.codec_context
            codec.time_base, codec.color_range = self.time_base, LIMITED
            codec.colorspace = codec.color_primaries = codec.color_trc = BT709
            for one, drawing in enumerate(progress.track(drawings, "draw", len(self))):
                drawn = np.asarray(overlay(self.read(one), drawing, scale=scale))
                lacking = [(0, height - drawn.shape[0]), (0, width - drawn.shape[1]), (0, 0)]
                frame = av.VideoFrame.from_ndarray(np.pad(drawn, lacking, "edge"), format="rgb24")
                frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709")
                frame.pts, frame.time_base = int(self.pts[one]), self.time_base
                container.mux(stream.encode(frame))
            container.mux(stream.encode(None))


def _drawing(found: PicturePrediction, vocabulary: Vocabulary, is_panoptic: bool) -> Drawing:
    """What is to be drawn of a frame, from its files."""
    kinds = dict(zip(vocabulary.ids, vocabulary.is_thing, strict=True))
    if is_panoptic:
        key, ids, above = "id", read_id_png(found.png), 0
    else:
        grey: Any = Image.open(found.png)
        key, ids, above = "category_id", np.asarray(grey, np.int32), 1  # 0 may be a class
    marks = (
        Mark(each[key] + above, each["name"], kinds[each["category_id"]], each["score"])
        for each in sorted(found.segments, key=lambda each: each["id"])
    )
    return Drawing(ids + above, tuple(marks), usual(vocabulary))


def _av() -> Any:
    try:
        return import_module("av")
    except ImportError as error:
        what = "Videos are read with PyAV, which is not installed."
        raise UserError(what, 'pip install "concat-seg[video]"') from error


@contextmanager
def _reading(path: Path) -> Generator[tuple[Any, Any]]:
    """An open video and its stream of pictures; UserError where FFmpeg cannot read it."""
    av = _av()
    try:
        with av.open(str(path)) as container:
            stream = container.streams.best("video")
            if stream is None:
                raise UserError(f"{path} holds sound, but no video.", "Give another file.")
            stream.thread_type = "AUTO"
            stream.codec_context.options = {"err_detect": "explode"}  # else it guesses, and is mute
            yield container, stream
    except av.error.FFmpegError as error:
        raise UserError(
            f"Cannot read the video {path}: it is damaged, or no video ({error.strerror}).",
            f"Copy it again. What can be read of it: ffmpeg -i {path.name} whole.mp4",
        ) from error


def _frames(path: Path, container: Any, stream: Any) -> Iterator[tuple[int, Any]]:
    """Each frame behind its number, in the order of showing; UserError where the end is missing."""
    number = packets = 0
    for packet in container.demux(stream):
        packets += packet.size > 0
        try:
            decoded = packet.decode()
        except _av().error.FFmpegError as error:
            raise UserError(
                f"{path} is damaged behind its frame {number - 1} ({error.strerror}).",
                f"Copy it again. What can be read of it: ffmpeg -i {path.name} whole.mp4",
            ) from error
        for frame in decoded:
            yield number, frame
            number += 1
    if "mp4" in container.format.name and packets < stream.frames:  # others only estimate
        raise UserError(
            f"{path} is cut off: of {stream.frames} frames it holds {packets}.",
            f"Copy it again. What is there: ffmpeg -i {path.name} whole.mp4",
        )


def _all_frames(path: Path) -> Iterator[tuple[int, Any]]:
    with _reading(path) as (container, stream):
        yield from _frames(path, container, stream)


def _turns(frame: Any) -> int:
    """Quarter turns to the left that set a frame upright, as its display matrix says."""
    return round(frame.rotation / 90)


def _upright_size(frame: Any) -> Size:
    size = frame.height, frame.width
    return size[::-1] if _turns(frame) % 2 else size


def _upright(frame: Any) -> NDArray[np.uint8]:
    return np.ascontiguousarray(np.rot90(frame.to_ndarray(format="rgb24"), _turns(frame)))
