"""What a method is to the rest of the house: its stages, its configuration, its predictor.

A method is a folder with a `METHOD`. It is found by one line: in `BUILT_IN`, or, for a package of
somebody else's, in its `[project.entry-points."concat.methods"]`. Everything heavy is named by an
import string ("package.module:function"), so that a help text costs no torch.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import entry_points
from typing import Any

from concat_cli.core.errors import UserError

BUILT_IN = (
    "concat_cli.methods.concat:METHOD",
    "concat_cli.methods.zegformer:METHOD",
    "concat_cli.methods.clip_zss:METHOD",
    "concat_cli.methods.borrowed:METHOD",
)
ENTRY_POINTS = "concat.methods"
TASKS = ("panoptic", "semantic", "instance")  # that weights can be scored for


@dataclass(frozen=True)
class Stage:
    """One stage of training, and the command that runs it.

    name: of its folder in a run, and in its weights. command, help: `concat COMMAND`, and what it
    does in one line. train: (cfg, run, *, device, fresh, progress, and `options`) -> StageResult.
    plan: (cfg, run, weights, vocabulary) -> what it would do, for `--dry-run`. options: of
    "weights", "vocabulary", "force", "preview". relevant: the sections and keys of the
    configuration that its result depends on. following: the command to run next. Without a
    command, such weights are not trained here but opened (`Method.opens`).
    """

    name: str
    command: str = ""
    help: str = ""
    train: str = ""
    plan: str = ""
    relevant: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    following: str = "evaluate"

    def reads(self, key: str) -> bool:
        """Whether its result depends on a key of the configuration."""
        return key in self.relevant or key.partition(".")[0] in self.relevant


@dataclass(frozen=True)
class Method:
    """A method; `stages` in the order in which they train.

    reference: the shipped configuration that is taken without `-c`. sections: its own sections of
    the configuration, by name, each an import string of a frozen dataclass. restore: (Weights) ->
    the model of a weights file of any of its stages, in evaluation mode. predictor: (Loading) ->
    Predictor, of such weights. tasks: (cfg) -> what its weights can be scored for. at_test: keys
    that may be changed when it predicts, beside those of `infer`. inductive: True where no unseen
    name can enter training, whatever the configuration says. opens: (what `--weights` was given) ->
    Weights of somebody else's making as this method uses them, or None where it does not know them.
    examples: by command, the lines below its help.
    """

    name: str
    stages: tuple[Stage, ...]
    reference: str
    restore: str
    predictor: str
    tasks: str
    sections: Mapping[str, str] = field(default_factory=dict[str, str])
    at_test: tuple[str, ...] = ()
    inductive: bool = False
    opens: str = ""
    examples: Mapping[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])


def loaded(name: str) -> Any:
    """What an import string names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


@cache
def methods() -> tuple[Method, ...]:
    """Every method: the built-in ones first, then those of installed packages by name."""
    found = [loaded(name) for name in BUILT_IN]
    found += [point.load() for point in sorted(entry_points(group=ENTRY_POINTS))]
    return tuple(found)


@cache
def own_sections() -> dict[str, type]:
    """The methods' own sections of the configuration, by name."""
    return {name: loaded(kind) for method in methods() for name, kind in method.sections.items()}


def stages() -> Iterator[tuple[Method, Stage]]:
    """Every stage of every method, with its method."""
    return ((method, stage) for method in methods() for stage in method.stages)


def stage_named(name: str) -> tuple[Method, Stage]:
    """The stage of a weights file or a run's folder; UserError where no method has it."""
    for method, stage in stages():
        if stage.name == name:
            return method, stage
    raise UserError(
        f"No method here has a stage '{name}'.",
        "Install the package that made these weights, or a newer concat.",
    )
