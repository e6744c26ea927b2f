"""What users of concat 0.1.0 have on disk still opens, predicts the same, and goes on.

The files are made by `fixtures/make_version_0_1.py`; they are used through the command line alone.
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest

from concat_cli.app import main

pytestmark = pytest.mark.core

FOLDER = Path(__file__).parent / "fixtures" / "version_0_1"
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text(encoding="utf-8"))
STAGES = {
    "con": ("train-con", "former"),
    "cat": ("train-cat", "former"),
    "finetune": ("finetune", "former"),
    "zegformer": ("train-zegformer", "former_zegformer"),
    "clip_zss": ("train-clip-zss", "former_clip_zss"),
}


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which concat 0.1.0 was used: `shapes`, and `runs`."""
    folder = tmp_path_factory.mktemp("version_0_1")
    with tarfile.open(FOLDER / "files.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture(autouse=True)
def there(unpacked: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(unpacked)


def weights_of(stage: str) -> str:
    return f"runs/{STAGES[stage][1]}/{stage}/last.safetensors"


def close(found: list[Any], wanted: list[Any]) -> bool:
    """The same segments in each picture, of the same classes and nearly the same areas."""
    one, two = ([segment for row in rows for segment in (*row, None)] for rows in (found, wanted))
    return len(one) == len(two) and all(
        a == b or (a and b and a[:2] == b[:2] and abs(a[2] - b[2]) <= max(2, 0.02 * b[2]))
        for a, b in zip(one, two, strict=True)
    )


@pytest.mark.parametrize("stage", STAGES)
def test_its_weights_predict_the_same(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--weights", weights_of(stage), "--device", "cpu", "--json"]
    assert main(["predict", "shapes/val", "--out", f"predicted/{stage}", *common]) == 0
    told = json.loads(capsys.readouterr().out)
    index = Path(f"predicted/{stage}") / EXPECTED[stage]["index"]
    assert index.as_posix() in told.values()
    rows = json.loads(index.read_text())["annotations"]
    found = [[[s["id"], s["category_id"], s["area"]] for s in row["segments_info"]] for row in rows]
    assert close(found, EXPECTED[stage]["segments"]), found


@pytest.mark.parametrize("stage", STAGES)
def test_its_weights_score_the_same(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    """On the data set that it prepared."""
    assert main(["evaluate", "--weights", weights_of(stage), "--device", "cpu", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["images"] == 3 and report["protocol"]["stage"] == stage
    assert report["semantic"]["all"]["miou"] == pytest.approx(EXPECTED[stage]["miou"], abs=2e-4)


@pytest.mark.parametrize("stage", STAGES)
def test_its_finished_stages_are_done(stage: str, capsys: pytest.CaptureFixture[str]) -> None:
    command, run = STAGES[stage]
    weights = Path(weights_of(stage))
    before = weights.read_bytes()
    given = [] if stage in ("cat", "finetune") else ["-c", f"runs/{run}/{stage}/config.yaml"]
    assert main([command, "--name", run, *given, "--device", "cpu"]) == 0
    said = capsys.readouterr()
    assert "all 2 steps are already done" in " ".join((said.out + said.err).split())
    assert weights.read_bytes() == before


def test_its_stopped_run_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    """From the saved state of the second step of three, to the losses that it would have had."""
    stage = Path("runs/stopped/con")
    assert main(["train-con", "--name", "stopped", "-c", f"{stage}/config.yaml",
                 "--device", "cpu"]) == 0  # fmt: skip
    said = capsys.readouterr()
    assert "resumed from step 2" in " ".join((said.out + said.err).split())
    rows = [json.loads(line) for line in (stage / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3]
    last = next(row for row in rows if "loss" in row and row["step"] == 3)
    assert {k: v for k, v in last.items() if k != "seconds"} == pytest.approx(
        EXPECTED["resumed"], rel=5e-3
    )


def test_its_prepared_data_is_whole(capsys: pytest.CaptureFixture[str]) -> None:
    main(["doctor", "--data", "shapes", "--json"])
    (data,) = json.loads(capsys.readouterr().out)["sections"]["data"]
    assert data["state"] == "ok" and "train 6, dev 2, val 3" in data["found"]
