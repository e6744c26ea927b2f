"""The house's storeys: a module imports from lower layers or from siblings in its folder only."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import concat_cli

ROOT = Path(concat_cli.__file__).parent
METHODS = "concat_cli.methods"
LAYERS = (
    ("errors", "progress", "method"),
    ("files", "lock"),
    ("config", "config_file", "device"),
    ("vocabulary", "vocabulary_file", "weights_from"),
    ("data", "clip", "model"),
    ("prepare",),
    ("losses", "build", "checkpoint", "metadata", "runs"),
    ("segmentors",),
    ("infer",),
    ("evaluate", "onnx"),
    ("train", "doctor"),
)  # of core; everything else stands above


def dotted(path: Path) -> str:
    """concat_cli/core/data/shapes.py -> concat_cli.core.data.shapes"""
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


TREES = {dotted(p): ast.parse(p.read_text("utf-8")) for p in sorted(ROOT.rglob("*.py"))}


def layer(module: str) -> int:
    """The index of a module's layer; of several entries that fit, the most specific wins."""
    inside = module.removeprefix("concat_cli.core.") + "."
    entries = [(e, i) for i, names in enumerate(LAYERS) for e in names]
    found = [(len(e), i) for e, i in entries if inside.startswith(f"{e}.")]
    if module.startswith("concat_cli.core."):
        assert found, f"{module} is in no layer"
        return max(found)[1]
    return len(LAYERS)


def imports(tree: ast.Module) -> Iterator[str]:
    """Our own modules that a tree imports at run time."""
    typing_only = (n for n in ast.walk(tree) if isinstance(n, ast.If) and "TYPE_CH" in ast.dump(n))
    skipped = {id(inner) for block in typing_only for inner in ast.walk(block)}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and id(node) not in skipped:
            base = node.module or ""
            for name in (f"{base}.{alias.name}" for alias in node.names):
                if base.startswith("concat_cli."):
                    yield name if name in TREES else base


@pytest.mark.parametrize("module", [m for m in TREES if m.startswith("concat_cli.core.")])
def test_imports_come_from_below_or_beside(module: str) -> None:
    folder = module.rpartition(".")[0]
    for other in imports(TREES[module]):
        beside = layer(other) == layer(module) and other.rpartition(".")[0].startswith(folder)
        inside = other.split(".")[:3] == module.split(".")[:3]
        assert layer(other) < layer(module) or beside or inside, f"{module} imports {other}"


def test_the_model_never_sees_a_config() -> None:
    inside = (tree for name, tree in TREES.items() if name.startswith("concat_cli.core.model"))
    assert not [other for tree in inside for other in imports(tree) if "config" in other]


def test_only_the_console_prints() -> None:
    calls = ((name, node) for name, tree in TREES.items() for node in ast.walk(tree))
    prints = [
        f"{name}:{node.lineno}"
        for name, node in calls
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "print"
    ]
    assert not prints


def test_only_import_strings_lead_to_a_method() -> None:
    """What stands outside of the methods names none of them in an import."""
    outside = (module for module in TREES if not module.startswith(METHODS))
    found = [f"{m} imports {o}" for m in outside for o in imports(TREES[m]) if METHODS in o]
    assert not found


def test_a_slice_stands_on_the_core_alone() -> None:
    """But for ZegFormer with this project's segmentor, which is trained as CON's is."""
    allowed = {"zegformer": ("zegformer", "concat")}
    for module in (m for m in TREES if m.startswith(f"{METHODS}.")):
        own = module.split(".")[2]
        beside = tuple(f"{METHODS}.{name}" for name in allowed.get(own, (own,)))
        for other in imports(TREES[module]):
            assert other.startswith(("concat_cli.core.", *beside)), f"{module} imports {other}"


def test_no_import_circles() -> None:
    """Imports inside of functions count, too."""
    graph = {module: {o for o in imports(tree) if o in TREES} for module, tree in TREES.items()}
    TopologicalSorter(graph).prepare()  # CycleError names the circle
