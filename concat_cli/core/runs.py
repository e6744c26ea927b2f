"""Run folders: `runs/<name>/<stage>/`, how a stage resumes, and where weights are found."""

from __future__ import annotations

import contextlib
import itertools
import json
import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, cast

from concat_cli.core.config import Config
from concat_cli.core.config_file import diff, dump_yaml, load_config
from concat_cli.core.errors import UserError
from concat_cli.core.files import (
    read_json,
    remove_leftovers,
    write_error,
    write_json,
    write_text,
)
from concat_cli.core.lock import locked
from concat_cli.core.method import methods, stage_named

RUNS = Path("runs")
DEFAULT_NAME = "shapes"
BUILT_IN = Path(__file__).parent / "weights" / "segmentor.safetensors"
HOW_TO_RUN = """data.workers data.cache optim.per_device optim.channels_last optim.save_every
    optim.log_every optim.preview_every infer.batch""".split()  # no result depends on these


def relevant_diff(stage: str, before: Config, after: Config) -> list[str]:
    """The lines of `diff` that matter for the result of a stage."""
    _, wanted = stage_named(stage)
    keys = {line: line.partition(":")[0] for line in diff(before, after)}
    return [line for line, key in keys.items() if key not in HOW_TO_RUN and wanted.reads(key)]


def numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The finite numbers of a row of metrics by name, without its step; on dev as `dev/NAME`."""
    dev = row.get("dev")
    own = cast("dict[str, Any]", dev) if isinstance(dev, dict) else {}
    flat = dict(row) | {f"dev/{name}": value for name, value in own.items()}
    is_number = {name: type(v) in (int, float) and math.isfinite(v) for name, v in flat.items()}
    return {name: flat[name] for name in flat if is_number[name] and name != "step"}


def curves(rows: Iterable[Mapping[str, Any]]) -> dict[str, list[tuple[int, float]]]:
    """Those of many rows by name, each with its step; not how long they took."""
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for row in rows:
        for name, value in numbers(row).items():
            if name != "seconds":
                found[name].append((row.get("step", 0), value))
    return found


def unread(stage: str, keys: Iterable[str]) -> list[str]:
    """What to say of keys that a stage does not read, and which later stages of the run do."""
    method, wanted = stage_named(stage)
    later = method.stages[method.stages.index(wanted) + 1 :]
    found: dict[tuple[str, ...], dict[str, None]] = {}
    for key in keys:
        free = key in (*HOW_TO_RUN, *method.at_test) or key.startswith("shapes.")  # of the world
        if not (free or wanted.reads(key)):
            found.setdefault(tuple(s.command for s in later if s.reads(key)), {})[key] = None
    return [
        f"{', '.join(group)}: not read by {wanted.command}"
        + (f"; what is given here counts in {' and '.join(readers)}" if readers else "")
        for readers, group in found.items()
    ]


class _In:
    """A file in the folder of a stage, by its name there."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __get__(self, stage: StageDir, _: type) -> Path:
        return stage.path / self.name


@dataclass(frozen=True)
class StageDir:
    """The folder of one stage of one run; `part`: one of it with a loop of its own."""

    path: Path
    stage: str
    part: str = ""

    @property
    def title(self) -> str:
        """What it is called while it runs: `con`, or `con warmup`."""
        return f"{self.stage} {self.part}".strip()

    config_yaml = _In("config.yaml")  # every key of the configuration that made it
    inputs_json = _In("inputs.json")  # what it was made from: hashes of weights, vocabulary
    metrics = _In("metrics.jsonl")  # one JSON object a line, each with `step`
    last = _In("last.safetensors")  # the newest weights
    best = _In("best.safetensors")  # those with the best score on dev; only if the stage chose
    state = _In("last.state.pt")  # what the loop resumes from
    previews = _In("previews")  # pictures made during training
    losses_png = _In("losses.png")  # both drawn from the metrics when the loop ends
    dev_png = _In("dev.png")

    @property
    def weights(self) -> Path | None:
        """`best` if there, else `last`, else None."""
        return next((path for path in (self.best, self.last) if path.exists()), None)

    def inner(self, name: str) -> StageDir:
        """A folder in this one for a part of the stage with a loop of its own."""
        return StageDir(self.path / name, self.stage, name)

    def open(
        self,
        cfg: Config,
        *,
        fresh: bool = False,
        main: bool = True,
        inputs: dict[str, str] | None = None,
    ) -> StageDir:
        """Makes the folder, or finds that it can be resumed with this configuration.

        Args:
            fresh: move an existing folder aside (`<stage>.old-1`) instead.
            main: False on ranks > 0, which touch nothing.
            inputs: what the stage is made from, by name; a change is a UserError as well.
        """
        if not main:
            return self
        aside = (self.path.with_name(f"{self.path.name}.old-{n}") for n in itertools.count(1))
        try:
            if fresh and self.path.exists():
                self.path.rename(next(path for path in aside if not path.exists()))
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise write_error(self.path, error) from error
        if self.config_yaml.exists():
            self._check_config(cfg)
            self._check_inputs(inputs or {})
        if not self.state.exists():
            self.metrics.unlink(missing_ok=True)
        if inputs:
            write_json(self.inputs_json, inputs, indent=1)
        write_text(self.config_yaml, dump_yaml(cfg, full=True))
        return self

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Adds a line to `metrics.jsonl`."""
        self.path.mkdir(parents=True, exist_ok=True)
        try:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        except OSError as error:
            raise write_error(self.metrics, error) from error

    def read_metrics(self) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl`; one that was cut off by a kill, or is none, is left out."""
        rows: list[Any] = []
        if self.metrics.exists():
            for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
                with contextlib.suppress(ValueError, RecursionError):
                    rows.append(json.loads(line))
        return [
            row
            for row in rows
            if isinstance(row, dict)
            and all(type(row.get(key, 0)) in (int, float) for key in ("step", "seconds"))  # pyright: ignore
        ]

    def forget_metrics_after(self, step: int) -> None:
        """Drops the lines of steps that a resumed loop will do again."""
        if self.metrics.exists():
            kept = [json.dumps(row) for row in self.read_metrics() if row.get("step", 0) <= step]
            write_text(self.metrics, "".join(f"{line}\n" for line in kept))

    def _check_config(self, cfg: Config) -> None:
        lines = relevant_diff(self.stage, load_config(self.config_yaml), cfg)
        if lines:
            shown = lines[:8] + ([f"... and {len(lines) - 8} more"] if len(lines) > 8 else [])
            raise UserError(
                f"{self.path} was made with another configuration: {'; '.join(shown)}.",
                "Run the command that made it to resume, add --fresh to start again (the old "
                "folder is kept), or choose another --name.",
            )

    def read_inputs(self) -> dict[str, Any]:
        """What `inputs.json` holds; empty without one. UserError where it is damaged."""
        if not self.inputs_json.exists():
            return {}
        again = "Add --fresh to make the stage again (the old folder is kept)."
        found = read_json(self.inputs_json, again)
        if not isinstance(found, dict):
            raise UserError(f"{self.inputs_json} holds no JSON object.", again)
        return cast("dict[str, Any]", found)

    def _check_inputs(self, inputs: dict[str, str]) -> None:
        old = self.read_inputs()
        changed = [name for name in {**old, **inputs} if old.get(name) != inputs.get(name)]
        if changed:
            raise UserError(
                f"{self.path} was made from other {' and '.join(changed)} than there are now.",
                "Add --fresh to make it again (the old folder is kept).",
            )


@dataclass(frozen=True)
class Run:
    """All stages of one name."""

    name: str
    root: Path = RUNS

    def __post_init__(self) -> None:
        if self.name in ("", ".", "..") or set(self.name) & set("/\\"):
            raise UserError(
                f"'{self.name}' cannot be the name of a run.", "It is one folder's name in runs/."
            )

    @property
    def path(self) -> Path:
        """`runs/<name>`."""
        return self.root / self.name

    @contextlib.contextmanager
    def alone(self, say: Callable[[str], None]) -> Generator[None]:
        """For the one process that writes: keeps others out of the folder, and removes what killed
        ones left there. UserError that names the process which is at work there; say: see `locked`.
        """
        with locked(self.path, say):
            remove_leftovers(self.path, alone=True)
            yield

    def stage(self, name: str) -> StageDir:
        """The folder of a stage, or of one that was taught a vocabulary: `finetune-<stem>`."""
        return StageDir(self.path / name, stage_named(name.partition("-")[0])[1].name)

    def last_weights(self, vocabulary: Path | None = None) -> Path | None:
        """Those of the last stage: of the one taught this vocabulary, else of the last stage of the
        first method that has any."""
        names = [stage.name for method in methods() for stage in reversed(method.stages)]
        if vocabulary is not None and self.was_taught(vocabulary):
            names.insert(0, taught(vocabulary))
        return next(filter(None, (self.stage(name).weights for name in names)), None)

    def was_taught(self, vocabulary: Path) -> bool | None:
        """Whether the weights taught a file of this name were taught what it holds now; None
        where there are none."""
        stage = self.stage(taught(vocabulary))
        if stage.weights is None:
            return None
        if not (made_of := stage.read_inputs()):
            return False
        from concat_cli.core.checkpoint import read_meta  # heavy, and seldom needed
        from concat_cli.core.vocabulary import Vocabulary, written
        from concat_cli.core.vocabulary_file import parse_vocabulary

        known = Vocabulary.from_json(read_meta(stage.weights)["vocabulary"])
        return made_of.get("vocabulary") == written(parse_vocabulary(vocabulary, known))

    def weights_of(self, name: str) -> Path:
        """The weights of a stage, `best` before `last`; UserError where there are none yet."""
        stage = self.stage(name)
        if stage.weights is None:
            method, wanted = stage_named(stage.stage)
            lacking = (s for s in method.stages if self.stage(s.name).weights is None)
            first = next(lacking, wanted)
            raise UserError(
                f"Run {self.name} has no weights of stage {name} yet (looked in {stage.path})."
                f"{_known_runs(self)}",
                f"Make them with `concat {first.command} --name {self.name}`, or give --weights.",
            )
        return stage.weights


def taught(vocabulary: Path) -> str:
    """The name of the stage that teaches the names of a vocabulary file."""
    return f"finetune-{vocabulary.stem}"


class FoundWeights(NamedTuple):
    """A weights file and how it was chosen."""

    path: Path
    reason: str


def find_weights(
    name: str | None,
    explicit: Path | None = None,
    *,
    root: Path = RUNS,
    vocabulary: Path | None = None,
) -> FoundWeights:
    """`--weights`, else the last stage of the run, else the built-in weights.

    Args:
        name: of the run; None: `shapes`, which need not be there.
        explicit: a file, the folder of a stage or a run, or published weights: a short name,
            `hf-hub:ORG/NAME` or a folder, which are handed through.
        vocabulary: weights that were taught this very file come first.
    """
    if explicit is not None and (not Path(explicit).is_dir() or is_published(Path(explicit))):
        return FoundWeights(Path(explicit), "as asked")
    if explicit is not None:
        run = Run(Path(explicit).name, Path(explicit).parent)
        found = run.last_weights(vocabulary) or StageDir(run.path, "con").weights
    else:
        run = Run(name or DEFAULT_NAME, root)
        found = run.last_weights(vocabulary)
    if found is not None:
        reason = "as asked" if explicit is not None else f"the last stage of run {run.name}"
        if vocabulary is not None and run.was_taught(vocabulary) is False:
            reason += f"; {taught(vocabulary)} was taught other names than {vocabulary} holds now"
        return FoundWeights(found, reason)
    if explicit is not None:
        listed = next(run.path.glob("*.json"), None)  # of `concat weights get NAME --to`
        hint = "Give a .safetensors file."
        if listed is not None:
            hint = f"Take it in first: concat weights get {listed.stem} --from {run.path}"
        raise UserError(f"The folder {run.path} holds no weights.", hint)
    if name is not None:
        raise UserError(
            f"Run {run.name} has no weights yet (looked in {run.path}).{_known_runs(run)}",
            f"Train it with `concat train-con --name {name}`.",
        )
    if not BUILT_IN.exists():
        raise UserError(
            f"There are no weights: no run in {run.path}, and none in the package.",
            "Train some with `concat train-con`, or give a file with --weights.",
        )
    return FoundWeights(BUILT_IN, f"built in; there is no run in {run.path}")


def is_published(folder: Path) -> bool:
    """Whether a folder is a published model's, or only has the name of one."""
    from concat_cli.core.weights_from.published import WEIGHT_FILES, pairs  # which loads torch

    names = ("config.json", *WEIGHT_FILES)
    return str(folder) in pairs() or any((folder / name).is_file() for name in names)


def _known_runs(run: Run) -> str:
    """The other runs beside this one that hold weights."""
    folders = sorted(run.root.iterdir()) if run.root.is_dir() else []
    others = [f.name for f in folders if f.is_dir() and f.name != run.name]
    names = [name for name in others if Run(name, run.root).last_weights() is not None]
    return f" Other runs have: {', '.join(names[:8])}." if names else ""
