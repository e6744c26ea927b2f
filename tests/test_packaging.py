"""What is in the package: data files, the command, the dependencies."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The files that a build would put into the wheel."""
    out = tmp_path_factory.mktemp("build")
    code = (
        "import sys; from setuptools import setup\n"
        "out = sys.argv[1]\n"
        "setup(script_args=['-q', 'egg_info', '-e', out, 'build', '-b', out])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(out)], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    if "No module named 'setuptools'" in done.stderr:
        pytest.skip("setuptools is not installed here")
    assert done.returncode == 0, done.stderr
    library = out / "lib"
    return {path.relative_to(library).as_posix() for path in library.rglob("*") if path.is_file()}


def test_every_data_file_is_packaged(packaged: set[str]) -> None:
    there = {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "concat_cli").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and path.name != ".DS_Store"
    }
    assert there - packaged == set()
    assert {path.split("/")[0] for path in packaged} == {"concat_cli"}


@pytest.mark.parametrize(
    "name",
    [
        "concat_cli/core/splits/coco_panoptic_119_14.yaml",
        "concat_cli/core/evaluate/report.schema.json",
        "concat_cli/core/clip/tiny/open_clip_config.json",
        "concat_cli/core/clip/tiny/weights.safetensors",
        "concat_cli/configs/demo.yaml",
        "concat_cli/serve/page.html",
        "concat_cli/py.typed",
    ],
)
def test_what_runs_without_a_download_is_packaged(packaged: set[str], name: str) -> None:
    assert name in packaged


def test_every_shipped_configuration_is_packaged(packaged: set[str]) -> None:
    """The folder `configs` of the checkout is the package's own."""
    names = {path.name for path in (ROOT / "configs").glob("*.yaml")}
    assert len(names) > 10 and names == {
        path.rpartition("/")[2] for path in packaged if path.startswith("concat_cli/configs/")
    }


def test_built_in_weights_are_small() -> None:
    sizes = {p: p.stat().st_size for p in (ROOT / "concat_cli").rglob("*.safetensors")}
    tiny = sum(size for path, size in sizes.items() if "tiny" in path.parts)
    assert tiny <= 8e6
    assert sum(sizes.values()) - tiny <= 12e6


def test_the_command_is_installed() -> None:
    scripts = metadata.distribution("concat-seg").entry_points
    assert {e.name: e.value for e in scripts} == {"concat": "concat_cli.app:main"}


def test_the_oldest_versions_are_those_that_are_allowed() -> None:
    """constraints/oldest.txt, with which `.ci/oldest` runs, and pyproject.toml."""
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    text = (ROOT / "constraints" / "oldest.txt").read_text(encoding="utf-8")
    pinned = dict(line.split("==") for line in text.splitlines() if not line.startswith("#"))
    allowed = dict(line.split(">=") for line in project["dependencies"])
    assert pinned.keys() == allowed.keys()
    for name, version in allowed.items():
        parts = [*version.split("."), "0"]
        assert pinned[name].split(".")[: len(parts)] in (parts[:-1], parts), name


def test_no_dependency_comes_from_a_url() -> None:
    required = metadata.requires("concat-seg") or []
    assert required and not [line for line in required if "@" in line]
