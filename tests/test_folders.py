"""Folders of pictures: what a killed run has done is taken up, by any number of processes."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
import torch

from concat_cli.core.build import build_segmentor
from concat_cli.core.config import InferConfig, ModelConfig
from concat_cli.core.data.image_io import write_png
from concat_cli.core.device import Share
from concat_cli.core.errors import UserError
from concat_cli.core.infer.files import predict_paths
from concat_cli.core.infer.journal import NAME, Journal
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.progress import Silent
from concat_cli.core.vocabulary import ClassEntry, Vocabulary

SETTINGS: dict[str, Any] = {"classes": ["star", "brick"], "keys": {"size": 32}}
MODEL = ModelConfig(width=32, mask_width=32, heads=4, encoder_ffn=32, decoder_layers=1,
                    decoder_ffn=32, queries=6)  # fmt: skip
CFG = InferConfig(size=32, max_size=64, min_score=0.05, overlap=0.1)
PICTURES = 20  # three times eight, less four


class Heard(Silent):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def say(self, message: str) -> None:
        self.lines.append(message)


class Counting(Predictor):
    """How many pictures it was given."""

    count = 0

    def predict_batch(self, pictures: Any, semantic: bool = True) -> Any:
        self.count += len(pictures)
        return super().predict_batch(pictures, semantic)


@pytest.fixture
def predictor() -> Counting:
    torch.manual_seed(0)
    text = torch.nn.functional.normalize(torch.randn(2, 16), dim=-1)
    vocabulary = Vocabulary((ClassEntry("star", 1), ClassEntry("brick", 9, kind="stuff")))
    return Counting(build_segmentor(MODEL, 16).eval(), text, vocabulary, CFG)


@pytest.fixture
def paths(tmp_path: Path) -> list[Path]:
    rng = np.random.default_rng(0)
    paths = [tmp_path / f"{number}.png" for number in range(PICTURES)]
    for path in paths:
        write_png(path, rng.integers(0, 256, (24, 32, 3), dtype=np.uint8))
    return paths


def killed(run: Callable[[], Any], lines: int) -> None:
    """The run in a process that is killed when it would note its next chunk after so many."""

    def dying() -> None:
        add, left = Journal.add, [lines]

        def adding(self: Journal, *args: Any) -> None:
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
            left[0] -= 1
            add(self, *args)

        pytest.MonkeyPatch().setattr(Journal, "add", adding)
        run()

    process = get_context("fork").Process(target=dying)
    process.start()
    process.join(100)
    assert process.exitcode == -signal.SIGKILL


def together(run: Callable[[Share], Any], world: int) -> None:
    """The run in so many processes, here threads."""
    parts: list[Any] = [None] * world
    barrier = Barrier(world)

    def of(rank: int) -> None:
        def gather(value: Any) -> list[Any]:
            parts[rank] = value
            barrier.wait(60)
            found = list(parts)
            barrier.wait(60)
            return found

        run(Share(rank, world, gather))

    with ThreadPoolExecutor(world) as pool:
        list(pool.map(of, range(world)))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file, hidden ones too."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.mark.parametrize("world", [1, 2])
def test_a_killed_run_goes_on(
    predictor: Counting, paths: list[Path], tmp_path: Path, world: int
) -> None:
    whole, out, said = tmp_path / "whole", tmp_path / "out", Heard()
    predict_paths(predictor, paths, whole, settings=SETTINGS)
    killed(lambda: predict_paths(predictor, paths, out, settings=SETTINGS), 1)
    assert (out / "8.overlay.png").exists() and not (out / "panoptic.json").exists()
    journal = max((out / NAME).glob("*.jsonl"), key=lambda path: path.stat().st_size)
    journal.write_bytes(journal.read_bytes() + b'8 0123456789abcdef {"pict')  # cut off by the kill
    predictor.count = 0
    together(
        lambda share: predict_paths(
            predictor, paths, out, settings=SETTINGS, share=share, progress=said
        ),
        world,
    )
    assert predictor.count == PICTURES - 8
    assert said.lines == ["8 of 20 pictures are done, by a run that was stopped"]
    assert contents(out) == contents(whole)  # and nothing hidden is left
    predict_paths(predictor, paths, out, settings=SETTINGS, progress=said)  # ended: made anew
    assert predictor.count == 2 * PICTURES - 8 and len(said.lines) == 1


def test_other_settings_begin_anew_and_say_so(
    predictor: Counting, paths: list[Path], tmp_path: Path
) -> None:
    said, out = Heard(), tmp_path / "out"
    killed(lambda: predict_paths(predictor, paths, out, settings=SETTINGS), 2)
    others = SETTINGS | {"classes": ["ring", "brick"]}
    killed(lambda: predict_paths(predictor, paths, out, settings=others), 0)
    predictor.count = 0
    predict_paths(predictor, paths, out, settings=SETTINGS, progress=said)
    assert predictor.count == PICTURES
    assert len(said.lines) == 1 and "had other classes: its pictures are" in said.lines[0]


def test_what_has_changed_is_predicted_again(
    predictor: Counting, paths: list[Path], tmp_path: Path
) -> None:
    said, out = Heard(), tmp_path / "out"
    killed(lambda: predict_paths(predictor, paths, out, settings=SETTINGS), 2)
    write_png(paths[0], np.zeros((24, 40, 3), np.uint8))
    (out / "15.overlay.png").unlink()
    predictor.count = 0
    predicted = predict_paths(predictor, paths, out, settings=SETTINGS, progress=said)
    assert predictor.count == PICTURES and next(iter(predicted.pictures)).size == (24, 40)
    assert len(said.lines) == 1 and "0 of 20 pictures are done" in said.lines[0]
    assert (out / "15.overlay.png").exists()


def test_unreadable_pictures_are_kept_in_mind(
    predictor: Counting, paths: list[Path], tmp_path: Path
) -> None:
    out = tmp_path / "out"
    paths[3].write_bytes(b"no picture")
    killed(lambda: predict_paths(predictor, paths, out, settings=SETTINGS), 1)
    predicted = predict_paths(predictor, paths, out, settings=SETTINGS)
    assert [str(paths[3]) in error.what for error in predicted.unreadable] == [True]
    assert len(predicted.pictures) == PICTURES - 1


def test_a_folder_that_is_not_shared_is_no_result(
    predictor: Counting, paths: list[Path], tmp_path: Path
) -> None:
    lost = Share(0, 2, lambda value: [value, None])  # the other one writes elsewhere
    with pytest.raises(UserError, match="only 12 are listed") as caught:
        predict_paths(predictor, paths, tmp_path / "out", settings=SETTINGS, share=lost)
    assert "that all machines share" in caught.value.hint
    assert not (tmp_path / "out" / "panoptic.json").exists()


def test_a_second_process_in_the_folder_works_by_itself(
    predictor: Counting, paths: list[Path], tmp_path: Path
) -> None:
    """Locks tell processes apart, not threads."""
    said, out = Heard(), tmp_path / "out"

    def second() -> None:
        predict_paths(predictor, paths[8:], out, settings=SETTINGS, progress=said)
        assert "begin anew" in said.lines[0] and len(list(out.glob(".predict*"))) == 1
        os._exit(7)

    def gather(value: Any) -> list[Any]:  # the first time, the journal is there
        if not said.lines:
            process = get_context("fork").Process(target=second)
            process.start()
            process.join(100)
            assert process.exitcode == 7
            said.lines.append("done")
        return [value]

    predict_paths(predictor, paths, out, settings=SETTINGS, share=Share(0, 1, gather))
    assert len(list(out.glob("*.overlay.png"))) == PICTURES and not list(out.glob(".*"))
