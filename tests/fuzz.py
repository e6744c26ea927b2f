"""`make fuzz`: spoilt files of every kind that is read end in success or in one error that names
a file; no traceback, no hang, no more than 4 GB.

Input N is drawn from (seed, N) alone: `python tests/fuzz.py --seed S --only N` tries it again.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing as mp
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from fuzz_mutations import spoilt_bytes, spoilt_json, spoilt_safetensors
from fuzz_targets import TARGETS, know_the_toy

from concat_cli.core.errors import UserError

SECONDS = 30.0  # longer is a hang
MEMORY = 4 << 30  # bytes that a worker may take beyond what importing took
FAILURES = ("traceback", "hang", "died", "memory", "unnamed")
_TEXTS = (".json", ".jsonl", ".yaml", ".txt")


@dataclass(frozen=True)
class Outcome:
    """What became of one input.

    end: "refused" (an error that names a file), "same" or "other" (accepted; its result is that of
    the sound files, or not), or one of FAILURES. peak: bytes that the worker had taken at most.
    """

    number: int
    target: str
    file: str
    mutation: str
    end: str
    detail: str = ""
    seconds: float = 0.0
    peak: int = 0


class Bench:
    """Sound files of each target, and what their use gives: made before workers are forked."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        know_the_toy()
        self.sound: dict[str, object] = {}
        for name, target in TARGETS.items():
            base = self.base(name)
            base.mkdir(parents=True)
            target.make(base)
            work = folder / "sound"
            shutil.copytree(base, work)
            self.sound[name] = target.use(work)
            shutil.rmtree(work)

    def base(self, name: str) -> Path:
        """Where a target's sound files are."""
        return self.folder / "base" / name.replace(" ", "-")

    def spoil(self, number: int, work: Path) -> tuple[str, Path, str]:
        """Writes input `number` into an empty place; its target, the spoilt file, and how."""
        rng = random.Random(f"{self.seed}:{number}")
        names = list(TARGETS)
        name = rng.choices(names, [TARGETS[one].share for one in names])[0]
        shutil.rmtree(work, ignore_errors=True)
        shutil.copytree(self.base(name), work)
        found = [sorted(p for p in work.glob(g) if p.is_file()) for g in TARGETS[name].files]
        path = rng.choice(rng.choice([paths for paths in found if paths]))
        path.write_bytes((spoilt := _spoilt(path, self._other(rng), rng))[0])
        return name, path, spoilt[1]

    def _other(self, rng: random.Random) -> bytes:
        """A sound file of any kind, for splices."""
        base = self.base(rng.choice(list(TARGETS)))
        paths = sorted(path for path in base.rglob("*") if path.is_file())
        return rng.choice(paths).read_bytes()[: 1 << 20]

    def run(self, number: int, work: Path) -> Outcome:
        """Tries one input."""
        name, path, mutation = self.spoil(number, work)
        file, start = str(path.relative_to(work)), time.monotonic()
        end, detail = "same", ""
        try:
            found = TARGETS[name].use(work)
            if found != self.sound[name]:
                end = "other"
        except UserError as error:
            text = f"{error.what} {error.hint}"
            names = {path.name, str(work), *(one.name for one in work.rglob("*"))}
            end = "refused" if any(one in text for one in names) else "unnamed"
            end = end if len(text) < 20_000 else "unnamed"
            detail = text[:300]
        except MemoryError:
            end, detail = "memory", traceback.format_exc(limit=-4)
        except BaseException:  # also what would end the process
            end, detail = "traceback", traceback.format_exc(limit=-12)
        seconds = time.monotonic() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
        return Outcome(number, name, file, mutation, end, detail, seconds, peak)


def _spoilt(path: Path, other: bytes, rng: random.Random) -> tuple[bytes, str]:
    """A file's bytes with something wrong, as fits its kind, and what."""
    whole, ending = path.read_bytes(), path.suffix
    if ending == ".safetensors":
        return spoilt_safetensors(whole, rng, other)
    values = _values(whole, ending) if ending in _TEXTS and rng.random() < 0.65 else None
    if values is None:
        return spoilt_bytes(whole, rng, other, ending in _TEXTS)
    if ending == ".jsonl":
        place = rng.randrange(len(values))
        lines = [json.dumps(one) for one in values]
        lines[place], kind = spoilt_json(values[place], rng)
        text = "\n".join(lines) + "\n"
    else:
        text, kind = spoilt_json(values, rng)
    return text.encode("utf-8", "surrogatepass"), kind


def _values(whole: bytes, ending: str) -> Any:
    """What a text file holds, as JSON has it; None where it is no JSON and no YAML."""
    if ending == ".jsonl":
        return [json.loads(line) for line in whole.decode().splitlines()]
    if ending == ".json":
        return json.loads(whole)
    if ending == ".yaml":
        import yaml

        return yaml.safe_load(whole)
    return None


def _work(bench: Bench, pipe: Connection, work: Path) -> None:
    """A worker: numbers in, outcomes out."""
    torch.set_num_threads(1)
    pages = int(Path("/proc/self/statm").read_text().split()[0]) if sys.platform == "linux" else 0
    if pages:
        most = pages * os.sysconf("SC_PAGE_SIZE") + MEMORY
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
    with Path(os.devnull).open("w") as nowhere:  # what libraries say is not looked at
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    while (number := pipe.recv()) is not None:
        pipe.send(bench.run(number, work))


class _Worker:
    def __init__(self, bench: Bench, work: Path) -> None:
        context = mp.get_context("fork")
        self.bench, self.work = bench, work
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=_work, args=(bench, other, work), daemon=True)
        self.process.start()
        other.close()
        self.number, self.since = -1, 0.0

    def give(self, number: int) -> None:
        """The next input."""
        self.number, self.since = number, time.monotonic()
        self.pipe.send(number)

    def ended(self) -> Outcome | None:
        """The outcome, where there is one by now; a worker that hangs is stopped."""
        if self.pipe.poll():
            try:
                return self.pipe.recv()
            except EOFError:
                self.process.join()
                return self._lost("died", f"exit code {self.process.exitcode}")
        if time.monotonic() - self.since > SECONDS:
            self.process.kill()
            self.process.join()
            return self._lost("hang", f"more than {SECONDS:.0f} s")
        return None

    def _lost(self, end: str, detail: str) -> Outcome:
        name, path, mutation = self.bench.spoil(self.number, self.work)
        return Outcome(
            self.number, name, str(path.relative_to(self.work)), mutation, end, detail, SECONDS
        )

    def stop(self) -> None:
        """After its last input."""
        if self.process.is_alive():
            self.pipe.send(None)
        self.process.join(5)


def fuzz(numbers: Iterable[int], seed: int, folder: Path, processes: int = 2) -> list[Outcome]:
    """The outcome of each input."""
    os.environ["CONCAT_CACHE"] = str(folder / "cache")
    bench = Bench(folder, seed)
    todo, found = iter(numbers), list[Outcome]()
    workers: list[_Worker] = []
    for place in range(processes):
        if (number := next(todo, None)) is not None:
            workers.append(_Worker(bench, folder / f"work{place}"))
            workers[-1].give(number)
    while workers:
        wait([worker.pipe for worker in workers], timeout=1.0)
        for worker in list(workers):
            outcome = worker.ended()
            if outcome is None:
                continue
            found.append(outcome)
            if len(found) % 500 == 0:
                print(f"{len(found)} inputs", file=sys.stderr, flush=True)
            if outcome.end in ("died", "hang"):
                workers[workers.index(worker)] = worker = _Worker(bench, worker.work)
            if (number := next(todo, None)) is not None:
                worker.give(number)
            else:
                worker.stop()
                workers.remove(worker)
    return sorted(found, key=lambda one: one.number)


def report(found: list[Outcome], seed: int, seconds: float) -> str:
    """Counts by target, what was accepted with another result and why, and failures in full."""
    ends = ("refused", "same", "other")
    rows = [f"{'target':34}" + "".join(f"{end:>9}" for end in (*ends, "failed", "seconds"))]
    for name in TARGETS:
        own = Counter(one.end for one in found if one.target == name)
        failed = sum(own[end] for end in FAILURES)
        spent = sum(one.seconds for one in found if one.target == name)
        rows.append(
            f"{name:34}" + "".join(f"{own[end]:9}" for end in ends) + f"{failed:9}{spent:9.1f}"
        )
    rows += ["", "accepted with another result, and why:"]
    others: dict[str, list[Outcome]] = defaultdict(list)
    for one in found:
        if one.end == "other":
            others[one.target].append(one)
    for name, some in others.items():
        kinds = Counter(f"{Path(one.file).suffix} {one.mutation}" for one in some)
        listed = ", ".join(f"{kind} {count}" for kind, count in kinds.most_common(6))
        numbers = ", ".join(str(one.number) for one in some[:4])
        rows.append(f"- {name}: {len(some)} ({listed}; such as {numbers}): {TARGETS[name].why}")
    failures = [one for one in found if one.end in FAILURES]
    for one in failures:
        where = f"{one.target}, {one.file}, {one.mutation}"
        again = f"python tests/fuzz.py --seed {seed} --only {one.number}"
        rows += ["", f"{one.end}: input {one.number}, {where}", f"again: {again}", one.detail]
    kinds = {one.mutation for one in found}
    peak, slowest = max(one.peak for one in found), max(found, key=lambda one: one.seconds)
    rows += [
        "",
        f"{len(found)} inputs, {len(kinds)} kinds and combinations of mutation, "
        f"{len(failures)} failures; slowest {slowest.seconds:.1f} s (input {slowest.number}), "
        f"most memory {peak / 1e9:.2f} GB; {seconds:.0f} s in all (seed {seed})",
    ]
    return "\n".join(rows)


def main() -> int:
    """The exit code is 1 where an input failed."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--inputs", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--only", type=int, help="this input alone; its files are kept")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="fuzz-"))
    numbers = range(asked.inputs) if asked.only is None else [asked.only]
    start = time.monotonic()
    found = fuzz(numbers, asked.seed, folder, asked.processes)
    print(report(found, asked.seed, time.monotonic() - start))
    if asked.only is None:
        shutil.rmtree(folder)
    else:
        print(f"{found[0].end}: {found[0].detail}\nthe input lies in {folder / 'work0'}")
    return int(any(one.end in FAILURES for one in found))


if __name__ == "__main__":
    sys.exit(main())
