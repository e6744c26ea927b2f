"""The one training loop: a task turns a batch into named losses, the loop knows nothing else.

And what it steps with: groups of parameters, the schedule, the moving average of the weights.
"""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import get_ema_multi_avg_fn

from concat_cli.core.checkpoint import damaged_state, load_state, save_state, save_weights
from concat_cli.core.config import OptimConfig
from concat_cli.core.errors import UserError
from concat_cli.core.runs import StageDir
from concat_cli.core.train.distributed import (
    largest,
    mean_over_processes,
    of_the_step,
    share_from_main,
    wait,
)
from concat_cli.core.train.optimisers import eager
from concat_cli.core.train.plots import HOW_TO_PLOT, draw_metrics
from concat_cli.core.train.session import Session, seed_torch

_NOT_FINITE = (
    "Lower optim.lr, or set optim.precision=fp32. The last saved step is kept; the same command "
    "continues from it."
)
DECAYED = (nn.Linear, nn.Conv2d)
TERMS = 5  # of the loss, at most, on the line of progress


class Task(Protocol):
    """What a stage gives the loop. The module's forward(batch, counts) returns weighted losses,
    divided by what `counts` says of the whole batch of the step."""

    @property
    def module(self) -> nn.Module:
        """What learns."""
        ...

    def batches(self, start: int) -> Iterator[list[Any]]:
        """Endless list of micro-batches, one list a step, from step `start` on."""
        ...

    def counts(self, batch: Any) -> Mapping[str, Tensor]:
        """What the losses of a batch are means over, by name; () each, known before the forward.
        Empty for steps of one forward that every process does alike."""
        ...

    def parameter_groups(self) -> list[dict[str, Any]]:
        """For the optimiser."""
        ...

    def describe(self, batch: Any) -> str:
        """Names of the images in a batch, for error messages."""
        ...

    def weights(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a weights file, from a state of `module`."""
        ...

    def score(self, step: int) -> dict[str, float]:
        """Figures on dev with the module's current weights; `score` among them chooses `best`."""
        ...

    def preview(self, path: Path) -> None:
        """Writes a picture of what the module does now."""
        ...


@dataclass(frozen=True)
class StageResult:
    """What a stage made.

    weights: where they are; if it was stopped, they need not be there yet. began: the step that it
    went on from. signal: the number of the one that stopped it, 0 for none.
    """

    weights: Path
    steps: int
    seconds: float
    finished: bool
    figures: dict[str, float]
    began: int = 0
    signal: int = 0


class _Stop:
    """Notes SIGTERM and Ctrl-C, so that the loop can save before it ends.

    impatient: a second Ctrl-C does not wait for that. Not so under `torchrun`, which hands on the
    one that its processes have already had from the terminal.
    """

    def __init__(self, impatient: bool) -> None:
        self.number, self.impatient = 0, impatient
        self.previous: dict[int, Any] = {}

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = number == self.number == signal.SIGINT
        self.number = self.number or number
        if again and self.impatient and callable(self.previous[number]):
            self.previous[number](number, frame)

    def __enter__(self) -> _Stop:
        with suppress(ValueError):  # not in the main thread: nobody sends us signals there
            for number in (signal.SIGTERM, signal.SIGINT):
                self.previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, previous in self.previous.items():
            signal.signal(number, previous)


class Fit:
    """One run of the loop over one task; `run()` does it. meta: the facts of its weights files."""

    def __init__(
        self,
        task: Task,
        optim: OptimConfig,
        stage: StageDir,
        session: Session,
        meta: dict[str, Any],
        optimiser: torch.optim.Optimizer | None = None,
    ) -> None:
        self.task, self.optim, self.stage, self.meta = task, optim, stage, meta
        self.device, self.dtype = session.device, session.dtype
        self.progress, self.processes = session.progress, session.processes
        self.optimiser = optimiser or eager(torch.optim.AdamW)(
            task.parameter_groups(), fused=self.device.type in ("cuda", "cpu")
        )
        self.base_lrs = [group["lr"] for group in self.optimiser.param_groups]
        self.average = MovingAverage(task.module, optim.ema) if optim.ema else None
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.dtype is torch.float16)
        self.step, self.best, self.trained_seconds = 0, float("-inf"), 0.0
        self.scored = -1  # the step of the newest figures
        self.figures: dict[str, float] = {}
        self.model: nn.Module = task.module
        if self.processes.world > 1:
            self.model = DistributedDataParallel(
                task.module, find_unused_parameters=True, broadcast_buffers=False
            )

    def run(self) -> StageResult:
        """Trains from the last saved state to the end, or to a signal."""
        self._restore()
        wait()  # until every process has looked for a state: the first one may soon write one
        began = time.monotonic()
        steps = range(self.step, self.optim.steps)
        batches = self.task.batches(self.step)
        stopped = 0
        with _Stop(impatient=self.processes.world == 1) as stop:
            for _ in self.progress.track(steps, self.stage.title, total=len(steps)):
                self._one_step(next(batches))
                self.trained_seconds += time.monotonic() - began
                began = time.monotonic()
                if _is_due(self.step, self.optim.preview_every) and self.processes.is_main:
                    self._with_average(self.task.preview, self.stage.previews / self._preview_name)
                if _is_due(self.step, self.optim.eval_every):
                    self._evaluate()
                stopped = largest(stop.number, self.device)
                if stopped or _is_due(self.step, self.optim.save_every):
                    self._save()
                if stopped:
                    name = signal.Signals(stopped).name
                    self.progress.say(f"stopped by {name}; step {self.step} is saved")
                    break
            finished = self.step >= self.optim.steps
            if finished and (self.scored < self.step or not self.stage.last.exists()):
                if self.scored < self.step:
                    self._evaluate()
                self._save()
        if self.processes.is_main:
            self._show(finished)
        wait()
        weights = self.stage.best if self.stage.best.exists() else self.stage.last
        return StageResult(
            weights,
            self.step,
            self.trained_seconds,
            finished,
            self.figures,
            began=steps.start,
            signal=0 if finished else stopped,
        )

    def _show(self, finished: bool) -> None:
        """What is looked at after training: the last preview, and the metrics as pictures."""
        preview = self.stage.previews / self._preview_name
        if finished and self.optim.preview_every and not preview.exists():
            self._with_average(self.task.preview, preview)
        if self.step and not draw_metrics(self.stage) and not self.stage.part:
            self.progress.say(HOW_TO_PLOT)

    @property
    def _preview_name(self) -> str:
        return f"step_{self.step:06d}.png"

    def _one_step(self, micro_batches: list[Any]) -> None:
        factor = lr_factor(self.step, self.optim)
        for group, lr in zip(self.optimiser.param_groups, self.base_lrs, strict=True):
            group["lr"] = lr * factor
        # What a step draws depends on the seed and the step alone, so that a resumed run is exact.
        seed_torch(self.optim.seed * 1_000_003 + self.step)
        self.task.module.train()
        self.optimiser.zero_grad(set_to_none=True)
        micro_batches = [batch.to(self.device) for batch in micro_batches]
        counts = of_the_step([self.task.counts(batch) for batch in micro_batches])
        sums: dict[str, Tensor] = {}
        for number, batch in enumerate(micro_batches, 1):
            with self._summed_up(last=number == len(micro_batches)):
                with torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None):
                    losses: dict[str, Tensor] = self.model(batch, counts[number - 1])
                self._check_finite(losses, batch)
                total = torch.stack(list(losses.values())).sum() / len(micro_batches)
                torch.autograd.backward(self.scaler.scale(total))
            for name, value in losses.items():
                sums[name] = sums.get(name, 0) + value.detach() / len(micro_batches)
        self.scaler.unscale_(self.optimiser)
        norm = nn.utils.clip_grad_norm_(
            [p for g in self.optimiser.param_groups for p in g["params"]], self.optim.clip_norm
        )
        self._check_gradient(norm, micro_batches)
        self.scaler.step(self.optimiser)
        self.scaler.update()
        if self.average:
            self.average.update(self.task.module)
        self.step += 1
        if self.step % self.optim.log_every == 0 or self.step == self.optim.steps:
            self._log(sums, norm, factor)

    def _summed_up(self, last: bool) -> AbstractContextManager[object]:
        """Processes exchange their gradients once a step, with the last forward's."""
        if isinstance(self.model, DistributedDataParallel) and not last:
            return self.model.no_sync()
        return nullcontext()

    def _check_finite(self, losses: dict[str, Tensor], batch: Any) -> None:
        values = torch.stack([v.detach() for v in losses.values()])
        if bool(torch.isfinite(values).all()):
            return
        bad = [name for name, v in losses.items() if not bool(torch.isfinite(v))]
        raise UserError(
            f"Step {self.step + 1}: the loss {', '.join(bad)} is not finite on "
            f"{self.task.describe(batch)}.",
            _NOT_FINITE,
        )

    def _check_gradient(self, norm: Tensor, micro_batches: list[Any]) -> None:
        """With fp16 the scaler skips such a step; elsewhere it would spoil every parameter."""
        if self.scaler.is_enabled() or bool(torch.isfinite(norm)):
            return
        raise UserError(
            f"Step {self.step + 1}: the gradient is not finite on "
            f"{'; '.join(self.task.describe(batch) for batch in micro_batches)}.",
            _NOT_FINITE,
        )

    def _log(self, sums: dict[str, Tensor], norm: Tensor, factor: float) -> None:
        names = list(sums)
        means = mean_over_processes(torch.stack([sums[n].float() for n in names])).cpu()
        values = [float(value) for value in means]
        row = {"step": self.step, "loss": round(sum(values), 5)}
        row |= {name: round(value, 5) for name, value in zip(names, values, strict=True)}
        # fp16 skips a step whose gradient is not finite; JSON has no number for it
        shown = round(float(norm), 4) if bool(torch.isfinite(norm)) else None
        row |= {"grad_norm": shown, "lr_factor": round(factor, 5)}
        row["seconds"] = round(self.trained_seconds, 2)
        if self.processes.is_main:
            self._note(row)
        largest_first = sorted(range(len(names)), key=lambda place: -abs(values[place]))
        shown_terms = sorted(largest_first[:TERMS])  # in their order, which the eye gets used to
        terms = [f"{names[place]} {values[place]:.3g}" for place in shown_terms]
        more = f" and {len(names) - TERMS} smaller" if len(names) > TERMS else ""
        self.progress.status(f"loss {sum(values):.3f} ({' '.join(terms)}{more})")

    def _note(self, row: dict[str, Any]) -> None:
        self.stage.append_metrics(row)
        self.progress.figures(self.stage.path, row)

    def _with_average(self, call: Any, *arguments: Any) -> Any:
        """Calls with the averaged weights in place, in evaluation mode, without gradients."""
        module = self.task.module
        own = {k: v.clone() for k, v in module.state_dict().items()} if self.average else None
        if self.average:
            module.load_state_dict(self.average.state)
        training = module.training
        module.eval()
        try:
            with torch.no_grad():
                return call(*arguments)
        finally:
            if own is not None:
                module.load_state_dict(own)
            module.train(training)

    def _evaluate(self) -> None:
        self.scored = self.step
        # running statistics differ between processes; all score what the first one would save
        share_from_main(self.average.state.values() if self.average else self.task.module.buffers())
        self.figures = self._with_average(self.task.score, self.step)
        if not self.figures:
            return
        if self.processes.is_main:
            self._note({"step": self.step, "dev": self.figures})
        if self.optim.eval_every and self.figures["score"] > self.best:
            self.best = self.figures["score"]
            if self.processes.is_main:
                self._save_weights(self.stage.best)

    def _save_weights(self, path: Path) -> None:
        state = self.average.state if self.average else self.task.module.state_dict()
        tensors = {k: v.detach().cpu() for k, v in self.task.weights(state).items()}
        save_weights(path, tensors, self.meta | {"step": self.step, "steps": self.optim.steps})

    def _save(self) -> None:
        if self.processes.is_main:
            self._save_weights(self.stage.last)
            state: dict[str, Any] = {
                "step": self.step,
                "best": self.best,
                "scored": self.scored,
                "seconds": self.trained_seconds,
                "figures": self.figures,
                "module": self.task.module.state_dict(),
                "optimiser": self.optimiser.state_dict(),
                "scaler": self.scaler.state_dict(),
            }
            if self.average:
                state["average"] = self.average.state
                state["updates"] = self.average.updates
            save_state(self.stage.state, state)
        wait()

    def _restore(self) -> None:
        if not self.stage.state.exists():
            if self.processes.is_main:  # lines of a run that was killed before its first save
                self.stage.forget_metrics_after(-1)
            return
        state = load_state(self.stage.state)
        try:
            self._take(state)
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise damaged_state(self.stage.state, f"it is not of this stage: {reason}") from error
        if self.processes.is_main:
            self.stage.forget_metrics_after(self.step)
        if self.step >= self.optim.steps:
            self.progress.say(f"all {self.step} steps are already done: {self.stage.state}")
        else:
            self.progress.say(f"resumed from step {self.step} (same command, {self.stage.state})")

    def _take(self, state: dict[str, Any]) -> None:
        self.task.module.load_state_dict(state["module"])
        self.optimiser.load_state_dict(state["optimiser"])
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.best = int(state["step"]), float(state["best"])
        self.scored = int(state.get("scored", -1))
        self.trained_seconds, self.figures = float(state["seconds"]), dict(state["figures"])
        if self.average:
            self.average.state = {k: v.to(self.device) for k, v in state["average"].items()}
            self.average.updates = int(state["updates"])


def _is_due(step: int, every: int) -> bool:
    """True at each multiple of `every`; never where it is 0."""
    return every > 0 and step % every == 0


def parameter_groups(
    module: nn.Module, lr: float, weight_decay: float, factors: dict[str, float]
) -> list[dict[str, Any]]:
    """Trainable parameters by learning rate and decay.

    Only the weights of linear layers and convolutions are decayed: no norms, embeddings, learned
    queries, biases and scalars (Mask2Former's recipe). `factors` maps a prefix of the parameter's
    name to a factor on the learning rate.
    """
    decayed = {
        id(p)
        for m in module.modules()
        if isinstance(m, DECAYED)
        for p in m.parameters(recurse=False)
        if p.ndim >= 2
    }
    groups: dict[tuple[float, float], list[Tensor]] = {}
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        factor = next((f for prefix, f in factors.items() if name.startswith(prefix)), 1.0)
        decay = weight_decay if id(parameter) in decayed else 0.0
        groups.setdefault((lr * factor, decay), []).append(parameter)
    return [{"params": p, "lr": lr, "weight_decay": d} for (lr, d), p in groups.items()]


def lr_factor(step: int, optim: OptimConfig) -> float:
    """The factor on the learning rate at a step (0-based)."""
    if step < optim.warmup:
        return (step + 1) / optim.warmup
    done = step / max(1, optim.steps)
    if optim.schedule == "constant":
        return 1.0
    if optim.schedule == "poly":
        return (1 - done) ** 0.9
    if optim.schedule == "step":
        return 0.1 ** sum(done >= at for at in optim.step_at)
    past = max(0.0, (done - optim.decay_from) / max(1e-9, 1 - optim.decay_from))
    return 0.5 * (1 + math.cos(math.pi * min(1.0, past)))


class MovingAverage:
    """Exponential moving average of a module's floating-point state; other buffers are copied."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.state = {k: v.detach().clone() for k, v in module.state_dict().items()}
        self.updates = 0

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        """Moves the average towards the module; early updates move faster."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        new = module.state_dict()
        moving = [key for key, value in new.items() if value.is_floating_point()]
        move = cast("Callable[..., None]", get_ema_multi_avg_fn(decay))
        move([self.state[key] for key in moving], [new[key] for key in moving], self.updates)
        for key in new.keys() - set(moving):
            self.state[key].copy_(new[key])
