"""`concat doctor`: what it finds, what it says to do, its exit code, and no traceback ever."""

from __future__ import annotations

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch

from concat_cli.app import main
from concat_cli.commands import doctor
from concat_cli.commands.doctor import Report, examine
from concat_cli.core.runs import BUILT_IN


@pytest.fixture(autouse=True)
def away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder, and an empty cache of the hub."""
    cache = str(tmp_path / "hub")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", cache)
    monkeypatch.setattr("huggingface_hub.utils._cache_manager.HF_HUB_CACHE", cache, raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def checks(report: Report, section: str) -> dict[str, doctor.Check]:
    return {check.name: check for check in report.sections[section]}


def test_a_good_machine(mini_world: Path, away: Path) -> None:
    before = sorted(away.rglob("*"))
    report = examine(mini_world)
    assert report.ok, report.block()
    assert checks(report, "packages")["torch"].found == torch.__version__.partition("+")[0]
    world = checks(report, "data")[str(mini_world)]
    assert "38 seen and 10 unseen classes" in world.found
    assert "train 24, dev 8, val 12" in world.found
    assert {"forward", "backward"} == checks(report, "trial").keys()
    assert "coco_panoptic_119_14" in checks(report, "splits")["class splits"].found
    assert "sha256" in checks(report, "weights")["segmentor (built in)"].found
    assert not [c for part in report.sections.values() for c in part if c.todo and c.state == "ok"]
    assert sorted(away.rglob("*")) == before, "it writes nothing"


def test_the_command_and_its_json(capsys: pytest.CaptureFixture[str]) -> None:
    """Data and a real CLIP are not there: that is said, with what to do, and is no failure."""
    assert main(["doctor", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["ok"] is True and found["version"]
    rows = {c["name"]: c for part in found["sections"].values() for c in part}
    assert rows["data"]["state"] == rows["hub's cache"]["state"] == "missing"
    assert rows["data"]["todo"] == "concat prepare-data shapes data/shapes"
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "✓ torch: " in out and "- data: no prepared data set" in out
    block = out.split("```")[1]
    assert "[machine]" in block and "torch: " in block and "forward: " in block
    assert out.strip().endswith("everything needed is there")


def test_data_that_is_asked_for_must_be_there(
    away: Path, mini_world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--data", str(away / "none")]) == 1
    out = capsys.readouterr().out
    assert "✗" in out and "concat prepare-data" in out and "Traceback" not in out
    assert "(FAILED)" in out and "something needed is missing" in out


def test_a_data_set_whose_pictures_are_gone(
    away: Path, mini_world: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import shutil

    shutil.copytree(mini_world, away / "data" / "moved")
    for picture in (away / "data" / "moved" / "val").glob("*.png"):
        picture.unlink()
    report = examine()
    moved = checks(report, "data")[str(Path("data/moved"))]
    assert moved.state == "missing" and moved.todo and report.ok


@pytest.mark.parametrize("installed", [None, "2.1.0"])
def test_packages_that_are_missing_or_old(
    installed: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    version = metadata.version

    def changed(name: str) -> str:
        if name != "torch":
            return version(name)
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(metadata, "version", changed)
    found = {check.name: check for check in doctor._packages()}
    assert found["torch"].state == "failed" and found["torch"].todo.startswith(
        "pip install 'torch>"
    )
    assert found["timm"].state == "ok"
    assert not Report({"packages": list(found.values())}).ok


def test_a_package_of_another_name_is_found_by_its_import() -> None:
    import yaml

    assert doctor._importable("yaml") == yaml.__version__  # of PyYAML
    assert doctor._importable("no_such_module") is None


def test_versions_are_compared_as_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "version", lambda name: "2.10.0+cpu")
    assert doctor._package("torch>=2.6").state == "ok"
    assert doctor._package("torch>=2.11; python_version >= '3.10'").state == "failed"


def test_whatever_breaks_is_a_finding(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], away: Path
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise ValueError("cannot allocate a tensor")

    monkeypatch.setattr("concat_cli.core.build.restore_segmentor", broken)
    monkeypatch.setattr("concat_cli.core.device.choose_device", broken)
    report = examine()
    assert not report.ok
    assert checks(report, "trial")["trial"].found == "ValueError: cannot allocate a tensor"
    assert checks(report, "machine")["machine"].state == "failed"
    assert checks(report, "packages")["torch"].state == "ok", "the rest is still examined"


def test_damaged_built_in_weights(monkeypatch: pytest.MonkeyPatch, away: Path) -> None:
    monkeypatch.setattr("concat_cli.core.runs.BUILT_IN", away / "gone.safetensors")
    assert {c.name: c.state for c in doctor._weights()}["segmentor (built in)"] == "failed"
    (away / "cut.safetensors").write_bytes(BUILT_IN.read_bytes()[:5000])
    monkeypatch.setattr("concat_cli.core.runs.BUILT_IN", away / "cut.safetensors")
    assert [check.state for check in doctor._all("trial", doctor._trial())] == ["failed"]


def test_values_that_are_not_finite() -> None:
    assert doctor._finite("forward", [torch.ones(2)], 0.1).state == "ok"
    assert doctor._finite("forward", [torch.tensor([1.0, float("nan")])], 0.1).state == "failed"
    assert doctor._finite("backward", [], 0.1).state == "failed"


def test_cached_models_are_named_by_their_keys(away: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for repository in ("timm/vit_base_patch16_clip_224.openai", "timm/resnet50.a1_in1k", "a/b"):
        root = away / "hub" / f"models--{repository.replace('/', '--')}"
        (root / "snapshots" / "abc").mkdir(parents=True)
        (root / "refs").mkdir()
        (root / "refs" / "main").write_text("abc")
        (root / "snapshots" / "abc" / "model.safetensors").write_bytes(b"x")
    scan = huggingface_hub.scan_cache_dir
    monkeypatch.setattr(huggingface_hub, "scan_cache_dir", lambda: scan(away / "hub"))
    found = {check.name: check.found for check in doctor._cache()}
    assert (
        "clip.model=ViT-B-16 clip.pretrained=openai"
        in found["timm/vit_base_patch16_clip_224.openai"]
    )
    assert "model.backbone=resnet50.a1_in1k" in found["timm/resnet50.a1_in1k"]
    assert "model.init=hf-hub:a/b" in found["a/b"]
