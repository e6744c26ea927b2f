"""The pages keep their word: commands parse, links lead somewhere, keys exist, blocks are fresh."""

from __future__ import annotations

import ast
import dataclasses
import importlib.util
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer.main

from concat_cli.app import app
from concat_cli.commands.options import every_example
from concat_cli.core.config import Config
from concat_cli.core.config_file import load_config
from concat_cli.core.runs import BUILT_IN

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
FILES = ("py", "onnx", "json", "yaml")  # endings, as of `model.onnx`: no keys of a configuration
MADE_OF_WEIGHTS = "docs/pictures/"  # pictures can be there only once the built-in weights are


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text("utf-8"), re.S | re.M)


def shell_lines() -> list[list[str]]:
    """The words of every command in the pages' shell blocks, without comments."""
    text = "".join(b for page in PAGES for b in blocks(page, "sh")).replace("\\\n", " ")
    commands = (part for line in text.splitlines() for part in line.split("&&"))
    return [words for command in commands if (words := shlex.split(command, comments=True))]


def concat_lines() -> list[list[str]]:
    """Arguments of every call of `concat`, also those under `torchrun`."""
    lines = []
    for words in shell_lines():
        if words[0] == "concat":
            lines.append(words[1:])
        elif "concat_cli" in words:
            lines.append(words[words.index("concat_cli") + 1 :])
    return lines


def parsed(words: list[str]) -> tuple[str, dict[str, Any]]:
    """The command's name and parameters; a usage error where the line does not parse."""
    command: Any = typer.main.get_command(app)
    context = None
    name = "concat"
    while hasattr(command, "commands"):
        context = command.make_context(name, words[:1], parent=context)
        if not words and command.invoke_without_command:
            return name, context.params
        assert words, name
        name, command = words[0], command.get_command(context, words[0])
        assert command is not None, name
        words = words[1:]
    return name, command.make_context(name, list(words), parent=context).params


def script(name: str) -> ModuleType:
    """A script of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def links(page: Path) -> Iterator[str]:
    """Targets of links and pictures."""
    text = page.read_text("utf-8")
    yield from re.findall(r"\]\(([^)\s]+)\)", text)
    yield from re.findall(r"^\[[^\]]+\]: (\S+)$", text, re.M)


def anchors(page: Path) -> set[str]:
    """What headings can be linked to by."""
    heads = re.findall(r"^#+ (.+)$", page.read_text("utf-8"), re.M)
    return {re.sub(r"[^\w -]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("words", concat_lines(), ids=" ".join)
def test_each_concat_line_parses_and_its_keys_exist(words: list[str]) -> None:
    name, params = parsed(words)
    assert name in {command.split()[-1] for command in every_example() if command}
    if params.get("overrides") is not None or params.get("config") is not None:
        load_config(params.get("config"), params["overrides"] or ())


def test_the_readme_is_short_and_begins_with_photos_and_what_takes_seconds() -> None:
    text = README.read_text("utf-8")
    assert len(text.splitlines()) <= 200 and len(text.encode()) <= 14_000
    photos, tried = (
        [shlex.split(line, comments=True) for line in block.splitlines()]
        for block in blocks(README, "sh")[:2]
    )
    assert [line[:3] for line in photos[1:]] == [
        ["concat", "weights", "get"], ["concat", "predict", "holiday/*.jpg"]
    ]  # fmt: skip
    assert tried[0][:2] == ["concat", "predict"] and (ROOT / tried[0][2]).is_file()
    assert tried[1:] == [["make", "demo"], ["make", "test"]]


def test_make_targets_and_scripts_exist() -> None:
    text = README.read_text("utf-8") + (ROOT / "docs" / "results.md").read_text("utf-8")
    makefile = (ROOT / "Makefile").read_text("utf-8")
    targets = set(re.findall(r"(?:`|^)make ([a-z][a-z-]+)", text, re.M))
    assert {"demo", "test", "lint", "ablation"} <= targets
    assert [t for t in targets if not re.search(rf"^{t}:", makefile, re.M)] == []
    scripts = set(re.findall(r"python ((?:docs|benchmarks)/\w+\.py)", text))
    assert scripts and [s for s in scripts if not (ROOT / s).is_file()] == []


def test_every_example_of_the_help_stands_in_the_pages() -> None:
    lines = [line for page in PAGES for b in blocks(page, "sh") for line in b.splitlines()]
    missing = [line for group in every_example().values() for line in group if line not in lines]
    assert missing == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    broken = []
    for target in links(page):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        if str(place.relative_to(ROOT)).startswith(MADE_OF_WEIGHTS) and not BUILT_IN.exists():
            continue
        if not place.exists() or (anchor and anchor not in anchors(place)):
            broken.append(target)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_configuration_keys_exist(page: Path) -> None:
    sections = Config().sections()
    named = re.findall(r"`([a-z_]+)\.([a-z_]+)(?:=[^`]*)?`", page.read_text("utf-8"))
    keys = [(section, key) for section, key in named if section in sections]
    wrong = [f"{s}.{k}" for s, k in keys if not hasattr(sections[s], k) and k not in FILES]
    assert wrong == []
    assert keys or page.name in ("README.md", "python.md", "results.md")


def test_generated_blocks_are_up_to_date() -> None:
    maker = script("make_readme")
    for page in maker.PAGES:
        text = page.read_text("utf-8")
        assert maker.filled(text, ROOT / "docs" / "results") == text, "python docs/make_readme.py"


def test_figures_come_from_files_alone(tmp_path: Path) -> None:
    maker = script("make_readme")
    for table in (maker.scores_table, maker.ablation_table, maker.figures_table):
        rows = table(tmp_path).splitlines()[2:]
        assert rows and all(maker.MISSING in row for row in rows)
    report = '{"panoptic": {"seen": {"pq": 0.5}, "unseen": {"pq": 0.25}, "harmonic": {"pq": 0.3}}}'
    (tmp_path / "demo.json").write_text(report)
    line = '{"split": "%s", "cell": "con", "seen": %s, "unseen": 0.2, "harmonic": 0.3}\n'
    (tmp_path / "ablation.jsonl").write_text(line % ("1", 0.4) + line % ("2", 0.5))
    assert "| 50.0 | 25.0 | 30.0 |" in maker.scores_table(tmp_path)
    assert "| 45.0 ± 7.1 | 20.0 ± 0.0 | 30.0 ± 0.0 |" in maker.ablation_table(tmp_path)
    assert all(maker.MISSING in row for row in maker.compare_table(tmp_path).splitlines()[2:])
    shares = '{"seen": %s, "unseen": 0.2, "harmonic": 0.3}'
    nothing = '{"seen": null, "unseen": null, "harmonic": null}'
    line = '{"split": "%s", "cell": "clip-zss", "mIoU": %s, "PQ": %s}\n'
    lines = [line % (split, shares % seen, nothing) for split, seen in (("1", 0.4), ("2", 0.5))]
    (tmp_path / "compare.jsonl").write_text("".join(lines))
    expected = "| 2 | 45.0 ± 7.1 | 20.0 ± 0.0 | 30.0 ± 0.0 | - | - | - |"
    assert expected in maker.compare_table(tmp_path)


def test_the_python_example_uses_what_there_is() -> None:
    from concat_cli.core.infer.prediction import Prediction
    from concat_cli.core.infer.predictor import Predictor

    (code,) = blocks(README, "python")
    tree = ast.parse(code)
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and getattr(node.value, "id", "") == "prediction"
    }
    fields = {field.name for field in dataclasses.fields(Prediction)}
    assert used and all(name in fields or hasattr(Prediction, name) for name in used)
    assert callable(Predictor.load)


def test_the_vocabulary_example_is_one(tmp_path: Path) -> None:
    from concat_cli.core.clip.prompts import check_words, known_words
    from concat_cli.core.vocabulary_file import parse_vocabulary

    example = next(b for b in blocks(README, "text") if "striped star" in b)
    (tmp_path / "classes.txt").write_text(example, "utf-8")
    vocabulary = parse_vocabulary(tmp_path / "classes.txt")
    assert vocabulary.names == ("striped star", "dotted crescent", "green water")
    assert vocabulary.is_thing == (True, True, False)
    words = known_words("tiny")
    assert check_words(vocabulary, words) == ()
    assert words is not None and f"{len(words)} words" in README.read_text()


def test_pictures_are_small() -> None:
    pictures = sorted((ROOT / "docs" / "pictures").glob("*.*"))
    if not pictures:
        pytest.skip("no pictures yet: python docs/make_pictures.py")
    assert [p.name for p in pictures if p.stat().st_size > 400_000] == []
