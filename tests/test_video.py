"""Videos: the same as their frames saved as pictures, at the right time and the right way up."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image
from test_folders import SETTINGS, Heard, predictor  # noqa: F401

from concat_cli.app import main
from concat_cli.core.data.image_io import read_id_png, write_png
from concat_cli.core.errors import UserError
from concat_cli.core.infer import files
from concat_cli.core.infer import video as video_module
from concat_cli.core.infer.files import predict_paths
from concat_cli.core.infer.journal import NAME
from concat_cli.core.infer.video import Video
from concat_cli.core.vocabulary import ClassEntry, Vocabulary

av: Any = pytest.importorskip("av", reason='pip install "concat-seg[video]"')
UPRIGHT = struct.pack(">9i", 0, 65536, 0, -65536, 0, 0, 0, 0, 1 << 30)  # a phone held upright


def scene(number: int, height: int, width: int) -> NDArray[np.uint8]:
    """Red left, green right, a blue bar on top, and a bright square that moves."""
    image = np.zeros((height, width, 3), np.uint8)
    image[:, : width // 2] = 200, 0, 0
    image[:, width // 2 :] = 0, 160, 0
    image[: height // 4] = 0, 0, 255
    image[height // 2 : height // 2 + 8, 3 * number : 3 * number + 8] = 255
    return image


def clip(
    path: Path, times: Sequence[int], size: tuple[int, int] = (48, 64), codec: str = "libx264"
) -> Path:
    """A video with a frame at each of some milliseconds."""
    height, width = size
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options={"crf": "4"})
        stream.width, stream.height = width, height
        stream.pix_fmt = "yuv444p" if height % 2 or width % 2 else "yuv420p"
        stream.codec_context.time_base = Fraction(1, 1000)
        for number, time in enumerate(times):
            frame = av.VideoFrame.from_ndarray(scene(number, height, width), format="rgb24")
            frame.pts, frame.time_base = time, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def ok(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command prints that must succeed."""
    code, (out, err) = main([*words]), capsys.readouterr()
    assert code == 0, err
    return out


def frames(path: Path) -> list[tuple[float, NDArray[np.uint8]]]:
    """Seconds and pixels of each frame."""
    with av.open(str(path)) as container:
        return [(f.time, f.to_ndarray(format="rgb24")) for f in container.decode(video=0)]


def test_a_frame_is_predicted_as_the_same_frame_saved(tmp_path: Path, predictor: Any) -> None:  # noqa: F811
    video = Video.opened(clip(tmp_path / "clip.mp4", range(0, 440, 40)), every=2)
    assert len(video) == 6 and video.seconds == pytest.approx(0.44, abs=0.045)
    shown = [image for _, image in frames(video.path)][::2]
    paths = [tmp_path / f"clip_{number:06}.png" for number in range(0, 12, 2)]
    for path, image in zip(paths, shown, strict=True):
        write_png(path, image)
    found = predict_paths(predictor, video, tmp_path / "video")
    saved = predict_paths(predictor, paths, tmp_path / "saved")
    for one, two in zip(found.pictures, saved.pictures, strict=True):
        assert one.png.read_bytes() == two.png.read_bytes()
        assert one.segments == two.segments and one.png.name == two.png.name
    images = json.loads(found.index.read_text())["images"]
    assert [i["frame"] for i in images] == [0, 2, 4, 6, 8, 10]
    assert [i["id"] for i in images] == [1, 3, 5, 7, 9, 11]
    assert [i["seconds"] for i in images] == pytest.approx([0, 0.08, 0.16, 0.24, 0.32, 0.4])
    assert [i["file_name"] for i in images] == [path.name for path in paths]
    drawn = frames(tmp_path / "video" / "clip.overlay.mp4")
    assert [time for time, _ in drawn] == pytest.approx([i["seconds"] for i in images])
    for one, (_, image) in zip(saved.pictures, drawn, strict=True):
        overlay = np.asarray(Image.open(one.overlay).convert("RGB"), np.float64)
        blocks = (overlay - image).reshape(6, 8, 8, 8, 3).mean((1, 3))
        assert np.abs(blocks).mean() < 3  # a video keeps colours at half the width and height


def test_semantic_maps_are_drawn_by_class(tmp_path: Path) -> None:
    """Whose PNGs hold category ids, of which 0 is one."""
    vocabulary = Vocabulary((ClassEntry("sky", 0, kind="stuff"), ClassEntry("star", 7)))
    png = tmp_path / "one.png"
    Image.fromarray(np.array([[0, 7], [0, 0]], np.uint8)).save(png)
    segments = [
        {"id": 1, "category_id": 7, "name": "star", "score": 0.5},
        {"id": 2, "category_id": 0, "name": "sky", "score": 0.7},
    ]
    found = files.PicturePrediction(png, 1, (2, 2), png, png, segments, {})
    drawing = video_module._drawing(found, vocabulary, is_panoptic=False)
    assert drawing.segment_map.tolist() == [[1, 8], [1, 1]]
    assert [(m.id, m.name, m.thing) for m in drawing.marks] == [
        (8, "star", True),
        (1, "sky", False),
    ]


def test_uneven_times_odd_sizes_and_a_data_set(tmp_path: Path, predictor: Any) -> None:  # noqa: F811
    times = [0, 33, 70, 400, 410, 900]
    video = Video.opened(clip(tmp_path / "odd.mkv", times, (47, 63)))
    assert video.size == (47, 63)
    found = predict_paths(predictor, video, tmp_path / "out", layout="coco", scale=1)
    images = json.loads(found.index.read_text())["images"]
    assert [i["seconds"] for i in images] == [time / 1000 for time in times]
    drawn = frames(tmp_path / "out" / "odd.overlay.mp4")
    assert [time for time, _ in drawn] == pytest.approx([time / 1000 for time in times], abs=1e-4)
    assert drawn[0][1].shape == (48, 64, 3)
    for one, image in enumerate(images):
        kept = np.asarray(Image.open(tmp_path / "out" / "images" / image["file_name"]))
        assert np.array_equal(kept, video.read(one)) and kept.shape == (47, 63, 3)


def test_phones_turn_their_videos(tmp_path: Path, predictor: Any) -> None:  # noqa: F811
    """By a matrix in the header, which says: a quarter to the right."""
    path = clip(tmp_path / "lying.mp4", [0, 40, 80])
    content = bytearray(path.read_bytes())
    start = content.index(b"tkhd") + 4 + 40  # of the matrix, in version 0 of the box
    content[start : start + 36] = UPRIGHT
    turned = tmp_path / "turned.mp4"
    turned.write_bytes(content)
    lying, upright = Video.opened(path), Video.opened(turned)
    assert (lying.size, upright.size) == ((48, 64), (64, 48))
    assert np.array_equal(upright.read(1), np.rot90(lying.read(1), -1))
    assert upright.read(0)[2, 2].argmax() == 0 and upright.read(0)[32, 44].argmax() == 2
    found = predict_paths(predictor, upright, tmp_path / "out")
    assert {one.size for one in found.pictures} == {(64, 48)}
    assert frames(tmp_path / "out" / "turned.overlay.mp4")[0][1].shape == (64, 48, 3)


def test_a_stopped_run_goes_on(
    tmp_path: Path, predictor: Any, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    video = Video.opened(clip(tmp_path / "clip.mp4", range(0, 800, 40)))
    out, whole = tmp_path / "out", tmp_path / "whole"
    predict_paths(predictor, video, whole)
    predict = type(predictor).predict_batch

    def stopped(self: Any, pictures: Any, semantic: bool = True) -> Any:
        if self.count >= 16:
            raise KeyboardInterrupt
        return predict(self, pictures, semantic)

    monkeypatch.setattr(type(predictor), "predict_batch", stopped)
    predictor.count = 0
    with pytest.raises(KeyboardInterrupt):
        predict_paths(predictor, video, out, settings=SETTINGS)
    assert (out / NAME).is_dir() and not (out / "panoptic.json").exists()
    monkeypatch.setattr(type(predictor), "predict_batch", predict)
    predictor.count, said = 0, Heard()
    predict_paths(predictor, Video.opened(video.path), out, settings=SETTINGS, progress=said)
    assert 4 <= predictor.count < 20 and any("of 20 pictures are done" in s for s in said.lines)
    for name in ("panoptic.json", "panoptic/clip_000019.png"):
        assert (out / name).read_bytes() == (whole / name).read_bytes()
    assert len(frames(out / "clip.overlay.mp4")) == 20
    assert not (out / NAME).exists()


def test_frames_in_memory_do_not_grow_with_their_number(
    tmp_path: Path, predictor: Any, monkeypatch: pytest.MonkeyPatch  # noqa: F811
) -> None:  # fmt: skip
    """Of pictures that were read, none but those of the two chunks at work is still alive."""
    import weakref

    alive: list[Any] = []
    most = 0
    read = Video.read

    def counted(self: Video, one: int, white: int = 0) -> Any:
        nonlocal most
        image = read(self, one, white)
        alive.append(weakref.ref(image))
        most = max(most, sum(ref() is not None for ref in alive))
        return image

    monkeypatch.setattr(Video, "read", counted)
    predict_paths(predictor, Video.opened(clip(tmp_path / "clip.mp4", range(80))), tmp_path / "out")
    assert len(alive) == 160 and most <= 4 * files.CHUNK


@pytest.mark.parametrize("kind", ["none", "cut", "spoilt", "sound", "empty"])
def test_what_cannot_be_read_is_refused(tmp_path: Path, kind: str) -> None:
    path = clip(tmp_path / "clip.mp4", range(0, 1200, 40))
    content = bytearray(path.read_bytes())
    if kind == "spoilt":
        with av.open(str(path)) as container:
            places = [packet.pos for packet in container.demux(video=0) if packet.size]
        content[places[15] : places[15] + 12] = b"\xff" * 12
    elif kind == "cut":
        with (
            av.open(str(path)) as whole,
            av.open(str(path.with_name("fast.mp4")), "w", options={"movflags": "faststart"}) as to,
        ):
            stream = to.add_stream_from_template(whole.streams.video[0])
            for packet in whole.demux(video=0):
                if packet.dts is not None:
                    packet.stream = stream
                    to.mux(packet)
        content = bytearray(path.with_name("fast.mp4").read_bytes())
        del content[len(content) * 2 // 3 :]
    elif kind == "sound":
        path = path.with_suffix(".mkv")
        with av.open(str(path), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000)
            stream.layout = "mono"
            sound = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
            sound.rate, sound.pts = 8000, 0
            container.mux(stream.encode(sound))
        content = bytearray(path.read_bytes())
    else:
        content = bytearray(b"no video" * (kind == "none"))
    path.write_bytes(content)
    says = {
        "cut": "cut off: of 30|behind its frame",
        "spoilt": "behind its frame",
        "sound": "no video",
    }
    with pytest.raises(UserError, match=says.get(kind, "Cannot read")) as error:
        Video.opened(path)
    assert path.name in error.value.what and error.value.hint


def test_times_that_are_not_told_are_even_and_an_early_end_is_said(tmp_path: Path) -> None:
    said = Heard()
    video = Video.opened(clip(tmp_path / "clip.avi", range(0, 400, 40)), progress=said)
    assert len(video) == 10 and len(said.lines) == 1 and "no times" in said.lines[0]
    assert np.diff(video.pts).tolist() == [1] * 9
    path = clip(tmp_path / "clip.mkv", range(0, 4000, 100))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert len(Video.opened(path, progress=said)) < 40 and "is it whole" in said.lines[-1]


def test_from_the_command_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    clip(tmp_path / "clip.mp4", range(0, 200, 40))
    named = ("--classes", "solid circle; solid square", "--out", "out")
    out = ok(capsys, "predict", "clip.mp4", "--every", "2", *named)
    assert "3 frames of 64x48" in out and " a second" in out and "out/clip.overlay.mp4" in out
    value = json.loads(ok(capsys, "predict", "clip.mp4", "--json", *named))
    assert [image["frame"] for image in value["images"]] == [0, 1, 2, 3, 4]
    assert {image["overlay"] for image in value["images"]} == {"out/clip.overlay.mp4"}
    listed = json.loads(Path(value["panoptic_json"]).read_text())
    for annotation, image in zip(listed["annotations"], value["images"], strict=True):
        ids = set(np.unique(read_id_png(image["png"])).tolist()) - {0}
        assert ids == {segment["id"] for segment in annotation["segments_info"]}
    write_png(tmp_path / "one.png", scene(0, 48, 64))
    for words, says in (
        (["clip.mp4", "one.png"], "alone"),
        (["one.png", "--every", "2"], "means nothing where no video is given"),
    ):
        assert main(["predict", *words]) == 2
        assert says in capsys.readouterr().err
    assert "1 .mp4 (a video" in ok(capsys, "predict", ".", "--dry-run")
    monkeypatch.setitem(__import__("sys").modules, "av", None)
    assert main(["predict", "clip.mp4"]) == 2
    assert "concat-seg[video]" in capsys.readouterr().err
