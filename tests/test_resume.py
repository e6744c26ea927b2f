"""An interrupted run continues as if nothing had happened; what cannot continue says why."""

from __future__ import annotations

import itertools
import json
import math
import os
import resource
import shlex
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from mini import Heard, Interrupt, KilledError, flat_state, metrics, mini_config, same

from concat_cli.app import main
from concat_cli.core.build import config_of, restore_segmentor
from concat_cli.core.checkpoint import load_weights, save_state
from concat_cli.core.config_file import dump_yaml
from concat_cli.core.data.dataset import PanopticDataset, read_dataset_info
from concat_cli.core.errors import UserError
from concat_cli.core.runs import Run
from concat_cli.core.train.distributed import Processes
from concat_cli.core.train.session import Session
from concat_cli.methods.concat.cat import train_cat
from concat_cli.methods.concat.con import train_con
from concat_cli.methods.concat.con_module import ConModule
from concat_cli.methods.concat.finetune import finetune
from concat_cli.methods.concat.query_bank import BankWriter, QueryBank

TEN = ("optim.steps=10", "optim.save_every=5", "warmup.steps=4", "optim.eval_every=5")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def straight(mini_world, tmp_path_factory) -> Run:
    """Ten steps without a break."""
    run = Run("straight", tmp_path_factory.mktemp("runs"))
    train_con(mini_config(mini_world, *TEN), run, device="cpu")
    return run


@pytest.fixture
def copied(mini_run, tmp_path) -> Run:
    shutil.copytree(mini_run.run.path, tmp_path / "runs" / "mini")
    return Run("mini", tmp_path / "runs")


def assert_same(run: Run, other: Run, stage: str) -> None:
    """Bit for bit: weights, optimiser, moving average, token banks, counters; and all metrics."""
    a, b = run.stage(stage), other.stage(stage)
    assert same(flat_state(a), flat_state(b)) == []
    first, second = load_weights(a.last), load_weights(b.last)
    assert same(first.tensors, second.tensors) == []
    assert first.meta["step"] == second.meta["step"]
    assert metrics(a) == metrics(b)


def assert_no_step_twice(run: Run, stage: str) -> None:
    rows = run.stage(stage).read_metrics()
    keys = [(row["step"], "dev" in row) for row in rows]
    assert rows and keys == sorted(set(keys))


@pytest.mark.parametrize(("call", "at"), [(1, 5), (1, 8), (1, 3), (0, 2)])
def test_con_is_ten_or_five_and_five(mini_world, straight, tmp_path, call, at):
    """KilledError after 5 steps, 8 (3 are lost), 3 (nothing saved yet), or within the warm-up."""
    cfg, run = mini_config(mini_world, *TEN), Run("broken", tmp_path)
    with pytest.raises(KilledError):
        train_con(cfg, run, device="cpu", progress=Interrupt("con", at, call))
    said = Heard()
    result = train_con(cfg, run, device="cpu", progress=said)
    assert result.finished and result.steps == 10
    resumed = [line for line in said.lines if line.startswith("resumed from step 5")]
    assert len(resumed) == (call == 1 and at >= 5)
    assert_same(straight, run, "con")
    assert_no_step_twice(run, "con")
    state = flat_state(run.stage("con"))
    assert state["/step"] == 10 and state["/module/segment_bank.valid"].any()
    assert any(key.startswith("/average/") for key in state)
    assert any(key.startswith("/optimiser/state/") for key in state)


def test_cat_is_ten_or_five_and_five(mini_run, tmp_path):
    cfg = replace(mini_run.cfg, cat=replace(mini_run.cfg.cat, steps=10, eval_every=5, fold=0))
    weights = mini_run.run.weights_of("con")
    straight, broken = Run("straight", tmp_path), Run("broken", tmp_path)
    train_cat(cfg, straight, weights=weights)
    with pytest.raises(KilledError):
        train_cat(cfg, broken, weights=weights, progress=Interrupt("cat", 7))
    said = Heard()
    assert train_cat(cfg, broken, weights=weights, progress=said).steps == 10
    assert any("resumed from step 5" in line for line in said.lines)
    assert_same(straight, broken, "cat")
    assert_no_step_twice(broken, "cat")


def test_cat_resumes_within_the_choice_of_its_steps(mini_run, tmp_path):
    """The fold's own loop is interrupted; then the final one."""
    cfg, weights = mini_run.cfg, mini_run.run.weights_of("con")
    run = Run("broken", tmp_path)
    for call in (0, 1):
        with pytest.raises(KilledError):
            train_cat(cfg, run, weights=weights, progress=Interrupt("cat", 2, call))
    result = train_cat(cfg, run, weights=weights)
    assert result.finished
    assert_same(mini_run.run, run, "cat")
    folds = [one.stage("cat").inner("fold") for one in (run, mini_run.run)]
    assert metrics(folds[0]) == metrics(folds[1]) != []


def test_finetuning_resumes(mini_run, tmp_path):
    run = Run("broken", tmp_path)
    shutil.copytree(mini_run.run.path / "cat", run.path / "cat")
    cfg, whole = mini_run.cfg, flat_state(mini_run.run.stage("finetune"))
    with pytest.raises(KilledError):
        finetune(cfg, run, progress=Interrupt("finetune", 3))
    assert finetune(cfg, run).steps == 4
    assert same(flat_state(run.stage("finetune")), whole) == []
    assert_no_step_twice(run, "finetune")


class Signalled(Interrupt):
    """Sends SIGTERM to this process instead of raising, once."""

    sent = False

    def track(self, items, what, total=None):
        try:
            yield from super().track(items, what, total)
        except KilledError:
            self.sent = True
            os.kill(os.getpid(), signal.SIGTERM)
            yield None


def test_sigterm_saves_and_ends_cleanly(mini_world, straight, tmp_path):
    cfg, run = mini_config(mini_world, *TEN), Run("stopped", tmp_path)
    before = signal.getsignal(signal.SIGTERM)
    result = train_con(cfg, run, device="cpu", progress=Signalled("con", 2, 1))
    assert not result.finished and result.steps == 3  # the step it came in is finished
    assert flat_state(run.stage("con"))["/step"] == 3
    assert load_weights(run.stage("con").last).meta["step"] == 3
    assert signal.getsignal(signal.SIGTERM) is before
    assert train_con(cfg, run, device="cpu").finished
    assert_same(straight, run, "con")


def test_sigterm_during_the_warm_up(mini_world, straight, tmp_path):
    cfg, run = mini_config(mini_world, *TEN), Run("stopped", tmp_path)
    result = train_con(cfg, run, device="cpu", progress=Signalled("con", 1, 0))
    assert not result.finished and not run.stage("con").state.exists()
    assert train_con(cfg, run, device="cpu").finished
    assert_same(straight, run, "con")


def test_sigterm_during_the_fold_of_cat(mini_run, tmp_path):
    """It must not go on with a number of steps that was chosen too early."""
    run, weights = Run("stopped", tmp_path), mini_run.run.weights_of("con")
    result = train_cat(mini_run.cfg, run, weights=weights, progress=Signalled("cat", 1, 0))
    assert not result.finished and not run.stage("cat").state.exists()
    assert train_cat(mini_run.cfg, run, weights=weights).finished
    assert_same(mini_run.run, run, "cat")


def test_a_process_that_is_terminated_or_killed(mini_world, tmp_path):
    """`concat train-con`: SIGTERM ends it with 143, SIGKILL at any moment is survived."""
    (tmp_path / "tiny.yaml").write_text(dump_yaml(mini_config(mini_world)))
    keys = ["optim.steps=40", "optim.save_every=2", "warmup.steps=0", "align.instance=0"]
    words = ["train-con", "-c", "tiny.yaml", *keys, "--device", "cpu"]
    stage, output = Run("tiny", tmp_path / "runs").stage("con"), tmp_path / "output"

    def send_after_a_save(number: int, process: int) -> tuple[int, str]:
        """How the process ended once it had the signal, and what it said."""
        before, deadline = modified(stage.state), time.monotonic() + 600
        ended = 0
        while modified(stage.state) == before and not ended:
            if time.monotonic() > deadline:
                number = signal.SIGKILL
                break
            time.sleep(0.01)
            ended, status = os.waitpid(process, os.WNOHANG)
        if not ended:
            os.kill(process, number)
            _, status = os.waitpid(process, 0)
        assert time.monotonic() < deadline
        return os.waitstatus_to_exitcode(status), output.read_text()

    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "concat_cli", *words], cwd=tmp_path, stdout=file,
            stderr=subprocess.STDOUT, env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
        )  # fmt: skip
        process.returncode, said = send_after_a_save(signal.SIGTERM, process.pid)
    assert process.returncode == 128 + signal.SIGTERM, said
    assert "\nstopped\n" in said and "done" not in said
    again = shlex.join(["concat", *words])
    assert "is saved" in said and f"{again}  # it resumes" in said
    stopped = saved_step(stage.state)
    assert 0 < stopped < 40
    code, said = send_after_a_save(signal.SIGKILL, forked(words, tmp_path, output))
    assert code == -signal.SIGKILL and f"from step {stopped}" in said
    assert stopped < saved_step(stage.state) < 40
    run = Run("tiny", tmp_path / "runs")
    cfg = mini_config(mini_world, *keys, "optim.save_every=100")
    assert train_con(cfg, run, device="cpu").steps == 40
    assert_no_step_twice(run, "con")
    steps = [row["step"] for row in run.stage("con").read_metrics() if "loss" in row]
    assert steps == list(range(1, 41))


def forked(words: list[str], folder: Path, output: Path) -> int:
    """The id of a process that runs `concat` there, of which everything is imported already."""
    process = os.fork()
    if process:
        return process
    try:
        os.chdir(folder)
        with output.open("w", buffering=1) as file:
            sys.stdout = sys.stderr = file
            main(words)
    finally:
        os._exit(9)  # pytest goes on in the other process alone


def modified(state: Path) -> int:
    return state.stat().st_mtime_ns if state.exists() else 0


def saved_step(state: Path) -> int:
    """A state file is always whole."""
    return torch.load(state, weights_only=True)["step"]


def test_another_configuration_stops_with_a_diff(mini_run, copied):
    cfg = mini_run.cfg
    changes = {
        train_con: ("optim.lr", replace(cfg, optim=replace(cfg.optim, lr=0.5))),
        train_cat: ("cat.contrast", replace(cfg, cat=replace(cfg.cat, contrast=9.0))),
        finetune: ("finetune.lr", replace(cfg, finetune=replace(cfg.finetune, lr=0.5))),
    }
    for train, (key, other) in changes.items():
        with pytest.raises(UserError, match=key) as caught:
            train(other, copied)
        assert "--fresh" in caught.value.hint and "->" in caught.value.what
    how = replace(cfg, optim=replace(cfg.optim, log_every=7, save_every=9, per_device=1))
    assert train_con(how, copied).finished  # keys that say only how to run


def test_other_weights_stop_a_later_stage(mini_run, copied):
    """A new stage 1 under an old stage 2 is noticed."""
    cfg = replace(mini_run.cfg, optim=replace(mini_run.cfg.optim, steps=1))
    train_con(cfg, copied, fresh=True)
    with pytest.raises(UserError, match="made from other weights"):
        train_cat(cfg, copied)
    train_cat(cfg, copied, fresh=True)
    with pytest.raises(UserError, match="made from other weights"):
        finetune(cfg, copied)


def test_fresh_moves_the_old_run_aside(mini_run, copied):
    stage = copied.stage("con")
    old = stage.last.read_bytes()
    cfg = replace(mini_run.cfg, optim=replace(mini_run.cfg.optim, steps=1, seed=5))
    for number in (1, 2):
        kept = stage.last.read_bytes()
        assert train_con(cfg, copied, fresh=True).steps == 1
        aside = copied.path / f"con.old-{number}"
        assert (aside / "last.safetensors").read_bytes() == kept
    assert (copied.path / "con.old-1" / "last.safetensors").read_bytes() == old
    assert [row["step"] for row in metrics(stage) if "loss" in row] == [1]


def test_a_loss_that_is_not_finite(mini_world, tmp_path, monkeypatch):
    """It stops with the term and the images; the last save stays and training can go on."""
    cfg = mini_config(mini_world, "optim.save_every=2", "warmup.steps=0")
    run, whole = Run("nan", tmp_path), ConModule.forward
    seen: list[str] = []
    steps = itertools.count()

    def broken(self, batch, counts):
        losses = whole(self, batch, counts)
        if next(steps) == 3:
            seen.extend(batch.file_names)
            losses["dice"] = losses["dice"] * math.nan
        return losses

    monkeypatch.setattr(ConModule, "forward", broken)
    with pytest.raises(UserError, match=r"the loss dice is not finite on images") as caught:
        train_con(cfg, run, device="cpu")
    assert len(seen) == 2 and all(name in caught.value.what for name in seen)
    assert "optim.lr" in caught.value.hint and "ep 4" in caught.value.what
    assert flat_state(run.stage("con"))["/step"] == 2
    saved = load_weights(run.stage("con").last)
    assert all(bool(torch.isfinite(value).all()) for value in saved.tensors.values())
    monkeypatch.undo()
    assert train_con(cfg, run, device="cpu").finished
    assert_no_step_twice(run, "con")


def test_a_gradient_that_is_not_finite(mini_world, tmp_path, monkeypatch):
    """The losses are fine, the step is not made."""
    cfg = mini_config(mini_world, "optim.save_every=2", "warmup.steps=0")
    run, whole, steps = Run("inf", tmp_path), ConModule.forward, itertools.count()

    def broken(self, batch, counts):
        losses = whole(self, batch, counts)
        if next(steps) == 3:
            assert all(math.isfinite(value.detach()) for value in losses.values())
            losses["dice"].register_hook(lambda gradient: gradient * math.inf)
        return losses

    monkeypatch.setattr(ConModule, "forward", broken)
    with pytest.raises(UserError, match=r"Step 4: the gradient is not finite on images") as caught:
        train_con(cfg, run, device="cpu")
    assert "optim.lr" in caught.value.hint
    assert flat_state(run.stage("con"))["/step"] == 2
    monkeypatch.undo()
    assert train_con(cfg, run, device="cpu").finished
    assert_no_step_twice(run, "con")


def test_a_damaged_state_is_named(mini_world, mini_run, copied):
    stage = copied.stage("con")
    stage.state.write_bytes(stage.state.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"last\.state\.pt is damaged"):
        train_con(mini_run.cfg, copied)
    save_state(stage.state, {"step": 3, "module": {"another": torch.ones(2)}})
    with pytest.raises(UserError, match=r"last\.state\.pt is damaged") as caught:
        train_con(mini_run.cfg, copied)
    assert "--fresh" in caught.value.hint


@pytest.mark.parametrize(
    "spoil",
    [
        lambda state: state.pop("module"),
        lambda state: state.update(optimiser=[1]),
        lambda state: state.update(step="five"),
        lambda state: state["module"].update(other=torch.zeros(1)),
        lambda state: state.update(figures=3),
    ],
)
def test_a_state_of_something_else_is_named(mini_run, tmp_path, spoil):
    """Readable, but not what this stage wrote."""
    run = Run("mini", tmp_path)
    for stage in ("cat", "finetune"):
        shutil.copytree(mini_run.run.stage(stage).path, run.stage(stage).path)
    stage = run.stage("finetune")
    state = torch.load(stage.state, weights_only=True)
    spoil(state)
    torch.save(state, stage.state)
    with pytest.raises(UserError, match=r"last\.state\.pt is damaged") as caught:
        finetune(mini_run.cfg, run)
    assert "--fresh" in caught.value.hint


def small_bank(folder: Path, mini_run, identity: str = "a", progress=None) -> QueryBank:
    """A bank of two views an image, written one image at a time."""
    cfg = replace(
        mini_run.cfg,
        bank=replace(mini_run.cfg.bank, views=2),
        infer=replace(mini_run.cfg.infer, batch=1),
    )
    info = read_dataset_info(Path(cfg.data.root))
    weights = load_weights(mini_run.run.weights_of("con"))
    assert config_of(weights).model == cfg.model
    text = torch.nn.functional.normalize(torch.ones(38, 38) + torch.eye(38, 38), dim=-1)
    width = weights.tensors["segmentor.classifier.no_object"].shape[0]
    text = torch.nn.functional.pad(text, (0, width - 38))
    session = Session(cfg, info, CPU, None, Processes(), progress or Heard())
    dataset = PanopticDataset(info.part("train"), info.vocabulary)
    writer = BankWriter(session, restore_segmentor(weights), text, identity)
    return writer.open(folder, dataset, augmented=True)


def test_the_bank_resumes(mini_run, tmp_path):
    whole = small_bank(tmp_path / "whole", mini_run)
    assert whole.queries.shape == (48, 10, 32) and np.isfinite(whole.queries).all()
    with pytest.raises(KilledError):
        small_bank(tmp_path / "broken", mini_run, progress=Interrupt("bank", 20))
    blocks = json.loads((tmp_path / "broken" / "bank.json").read_text())["blocks"]
    assert [end for end, _ in blocks] == [16]
    assert not list((tmp_path / "broken").glob("*.npy"))  # nothing that looks finished
    counted = Counted()
    again = small_bank(tmp_path / "broken", mini_run, progress=counted)
    assert counted.number == 32
    assert (again.queries == whole.queries).all() and (again.classes == whole.classes).all()
    small_bank(tmp_path / "broken", mini_run, progress=counted)
    assert counted.number == 32  # nothing is left to do
    assert (whole.queries[:24] != whole.queries[24:]).any()  # the second view is another one


class Counted(Heard):
    """Counts the batches that are done."""

    number = 0

    def track(self, items, what, total=None):
        for item in items:
            self.number += 1
            yield item


def test_a_bank_of_other_weights_is_written_anew(mini_run, tmp_path):
    first = np.array(small_bank(tmp_path / "bank", mini_run).queries)
    with pytest.raises(KilledError):  # killed before its first sync: the old bank is gone as well
        small_bank(tmp_path / "bank", mini_run, "b", Interrupt("bank", 3))
    counted = Counted()
    again = small_bank(tmp_path / "bank", mini_run, progress=counted)
    assert counted.number == 48 and (again.queries == first).all()


def test_rows_of_a_bank_that_were_changed_are_made_again(mini_run, tmp_path):
    """From the first block on that is not as written: zeroed, cut off, or its header damaged."""
    folder = tmp_path / "bank"
    first = np.array(small_bank(folder, mini_run).queries)
    blocks = json.loads((folder / "bank.json").read_text())["blocks"]
    assert [end for end, _ in blocks] == [16, 32, 48]
    row = first[0].nbytes

    def zero(path: Path, start: int, count: int) -> None:
        with path.open("r+b") as file:
            file.seek(start)
            file.write(bytes(count))

    damages = {
        16: lambda: zero(folder / "queries.npy", 128 + 32 * row, row),
        32: lambda: zero(folder / "classes.npy", 128 + 20 * 20 + 4, 2),
        48: lambda: zero(folder / "classes.npy", 0, 128),
        17: lambda: os.truncate(folder / "queries.npy", 128 + 47 * row),
    }
    for rows, damage in damages.items():
        damage()
        counted = Counted()
        again = small_bank(folder, mini_run, progress=counted)
        assert counted.number == (rows if rows != 17 else 16)
        assert any("of 48 rows are not what was written" in line for line in counted.lines)
        assert (again.queries == first).all()
    (folder / "bank.json").write_text('["nothing"]')
    counted = Counted()
    assert (small_bank(folder, mini_run, progress=counted).queries == first).all()
    assert counted.number == 48
    assert sorted(p.name for p in folder.iterdir()) == ["bank.json", "classes.npy", "queries.npy"]


@pytest.mark.skipif(os.name != "posix", reason="limits of a process are told there alone")
def test_a_full_disk_while_the_bank_is_written(mini_run, tmp_path):
    """Refused writes are the usual message, and the same call goes on after the last block."""
    folder, limit = tmp_path / "bank", resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that the write is refused instead
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (14000, limit[1]))
        with pytest.raises(UserError, match=r"Cannot write .*bank") as caught:
            small_bank(folder, mini_run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert caught.value.hint
    counted = Counted()
    whole = small_bank(folder, mini_run, progress=counted)
    assert counted.number == 32 and np.isfinite(whole.queries).all()


@pytest.mark.skipif(not hasattr(os, "O_NOFOLLOW"), reason="links are opened there")
def test_the_bank_is_not_written_through_a_link(mini_run, tmp_path):
    folder, theirs = tmp_path / "bank", tmp_path / "theirs"
    theirs.write_bytes(b"kept")
    folder.mkdir()
    for name in ("queries", "classes"):
        (folder / f"{name}.npy").symlink_to(theirs)
        (folder / f"{name}.npy.part").symlink_to(theirs)
    small_bank(folder, mini_run)
    assert theirs.read_bytes() == b"kept"
