"""Every key of the configuration is read by the code, and this is a check that can fail."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import yaml
from config_reads import Package

ROOT = Path(__file__).parents[1]
COMMON = "device dtype images mean path shape text values weights".split()
SMALL = """
class AConfig:
    lr: float = 0.1
    steps: int = 1
    size: int = 2
    def check(self): return self.size > 0
class BConfig:
    lr: float = 0.1
    beta: float = 0.2
class Config:
    a: AConfig
    def own(self, section): ...
class Session:
    cfg: "Config | None"
class Task:
    def __init__(self, session: Session):
        self.session = session
    def run(self, image):
        one, other = self.session.cfg, image.size
        two = replace(one.a, lr=1)
        if (three := two).steps: return image.lr
METHOD = Method(sections={"c": "package.module:CConfig"})
class CConfig:
    unread: int = 0
def plain(session: Session):
    return session.cfg.own(BConfig).beta
"""


@pytest.fixture(scope="module")
def package() -> Package:
    sources = sorted((ROOT / "concat_cli").rglob("*.py"))
    return Package(path.read_text(encoding="utf-8") for path in sources)


def test_no_key_is_dead(package: Package) -> None:
    assert package.dead() == []


def test_no_section_is_left_out(package: Package) -> None:
    """The keys are at least those that the shipped configurations set."""
    names = {key for _, key in package.section_keys()}
    files = sorted((ROOT / "configs").glob("*.yaml"))
    written = [section for file in files for section in yaml.safe_load(file.read_text()).values()]
    assert len(written) > 30 and {key for section in written for key in section} <= names
    assert (
        len(package.section_keys()) > 80
        and len({section for section, _ in package.section_keys()}) >= 10
    )


def test_what_is_read_of_a_section_is_there(package: Package) -> None:
    """No other word is taken for a key, so a key that nothing reads is found whatever its name."""
    sections = {section for section, _ in package.section_keys()}
    methods = {
        (section, node.name)
        for section in sections
        for node in package.classes[section].body
        if isinstance(node, ast.FunctionDef)
    }
    read = {(section, name) for section, name in package.reads if section in sections}
    assert read - methods <= set(package.section_keys())


def test_a_planted_key_is_found(package: Package) -> None:
    """In each section, under names that the code uses everywhere."""
    sections = sorted({section for section, _ in package.section_keys()})
    planted = ast.parse("\n".join(f"{word}: int = 0" for word in COMMON)).body
    for section in sections:
        there, body = set(package.section_keys()), package.classes[section].body
        package.classes[section].body = body + planted
        wanted = [f"{section}.{word}" for word in COMMON if (section, word) not in there]
        assert package.dead() == wanted and len(wanted) > 6
        package.classes[section].body = body


def test_reads_are_followed() -> None:
    """Through attributes, several names at once, replace, := and own; not on other things."""
    assert Package([SMALL]).dead() == [
        "AConfig.lr", "AConfig.size", "BConfig.lr", "CConfig.unread",
    ]  # fmt: skip
