"""Kills training at random times and before renames; it must go on as if nothing had happened.

    python tests/kills.py [KILLS] [MOMENTS] [SEED]

draws the built-in world and trains all stages in miniature: without a break, then with SIGKILL at
random times (100 by default), then killed before chosen ones of all renames (20). After each kill
the same command is typed again; nothing is cleaned by hand. Every stage must end with exactly the
files of the unbroken run, and leave no temporary one.
"""

from __future__ import annotations

import errno
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from mini import KEYS

from concat_cli.app import main

WORLD = ("--train", "16", "--dev", "4", "--val", "4", "--size", "64")
DRAWN = (
    "shapes.train=16",
    "shapes.dev=4",
    "shapes.val=4",
    "shapes.size=64",
    "shapes.unseen_pixels=drop",
)
MORE = (
    *KEYS, *DRAWN, "data.root=shapes", "optim.save_every=1", "optim.eval_every=3",
    "infer.batch=1", "bank.views=2",
)  # fmt: skip
ALIGNED_BY_NOTHING = ("align.image=0", "align.instance=0")
CHAIN = {
    "prepare-data": ("prepare-data", "shapes", "shapes", *WORLD),
    "train-con": ("train-con", "--name", "run", *MORE),
    "train-cat": ("train-cat", "--name", "run"),
    "finetune": ("finetune", "--name", "run"),
    "train-zegformer": ("train-zegformer", "--name", "zeg", *MORE, *ALIGNED_BY_NOTHING),
    "train-clip-zss": ("train-clip-zss", "--name", "zss", *MORE),
}
COMPARED = ("*.safetensors", "*.npy", "*.png", "dataset.json", "bank.json", "panoptic_*.json")
LEFT = ("*.tmp", "*.part", ".drawn")


def started(words: tuple[str, ...], folder: Path, hook: Callable[[], None] | None = None) -> int:
    """The id of a process that runs `concat` there, of which everything is imported already."""
    process = os.fork()
    if process:
        return process
    code = 9
    try:
        os.chdir(folder)
        os.environ |= {"CONCAT_CACHE": str(folder / "cache"), "CUDA_VISIBLE_DEVICES": ""}
        with (folder / "output").open("w", buffering=1) as file:
            sys.stdout = sys.stderr = file
            sys.argv[1:] = words
            if hook is not None:
                hook()
            code = main(list(words))
    finally:
        os._exit(code)


def ended(process: int) -> int:
    """Its exit code; that of a killed one is negative."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def killed_before(number: int) -> Callable[[], None]:
    """Makes this process kill itself before a rename (0 is the first)."""
    replace, rename, done = os.replace, Path.rename, []

    def count() -> None:
        if len(done) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(number)

    def counted_replace(*paths: object) -> None:
        count()
        replace(*paths)

    def counted_rename(path: Path, target: Path) -> Path:
        count()
        return rename(path, target)

    def hook() -> None:
        os.replace, Path.rename = counted_replace, counted_rename

    return hook


def full_at(number: int) -> Callable[[], None]:
    """Makes a disk of this process full from a write that is fsynced on (0 is the first)."""
    done: list[int] = []

    def refused(file: int) -> None:
        done.append(file)
        if len(done) > number:
            raise OSError(errno.ENOSPC, "No space left on device")

    def hook() -> None:
        os.fsync = refused

    return hook


def renames(words: tuple[str, ...], folder: Path) -> int:
    """How many renames a command makes there, which it ends with."""
    replace, rename, done = os.replace, Path.rename, folder / "renames"

    def note() -> None:
        with done.open("a") as file:
            file.write("x")

    def hook() -> None:
        os.replace = lambda *paths: (note(), replace(*paths))[1]
        Path.rename = lambda path, target: (note(), rename(path, target))[1]

    finish(words, folder, hook)
    count = done.stat().st_size
    done.unlink()
    return count


def finish(words: tuple[str, ...], folder: Path, hook: Callable[[], None] | None = None) -> None:
    """Runs a command to its end, which must be a good one."""
    code = ended(started(words, folder, hook))
    assert code == 0, f"{words[0]} ended with {code}:\n{(folder / 'output').read_text()}"


def compared(folder: Path) -> dict[str, bytes]:
    """What must be the same, bit for bit: weights, banks, pictures."""
    found = {path for pattern in COMPARED for path in folder.rglob(pattern)}
    own = (path for path in found if "cache" not in path.parts)
    return {str(path.relative_to(folder)): path.read_bytes() for path in own}


def check(folder: Path, whole: dict[str, bytes]) -> None:
    """Nothing else than in the unbroken run, nothing temporary."""
    found = compared(folder)
    assert found.keys() == whole.keys(), found.keys() ^ whole.keys()
    differing = [name for name in whole if found[name] != whole[name]]
    assert not differing, differing
    left = [str(path) for pattern in LEFT for path in folder.rglob(pattern)]
    assert not left, left


def random_kills(
    folder: Path, words: tuple[str, ...], kills: int, seconds: float, rng: random.Random
) -> int:
    """Kills a command so many times, if it does not end before, and lets it end; how many were."""
    done = 0
    for _ in range(kills):
        process = started(words, folder)
        time.sleep(rng.uniform(0, 0.8 * seconds))
        os.kill(process, signal.SIGKILL)  # one that has ended waits to be asked how
        code = ended(process)
        assert code in (0, -signal.SIGKILL), (folder / "output").read_text()
        done += code != 0
        if code == 0:
            break
    finish(words, folder)
    return done


def run(kills: int, moments: int, seed: int, work: Path) -> None:
    """The whole of it, told as it goes."""
    rng, before, seconds, count = random.Random(seed), {}, {}, {}
    folder = work / "whole"
    folder.mkdir()
    for name, words in CHAIN.items():
        before[name] = shutil.copytree(folder, work / f"before-{name}")
        began = time.monotonic()
        count[name] = renames(words, folder)
        seconds[name] = time.monotonic() - began
        shutil.copytree(folder, work / f"after-{name}")
        print(f"{name}: {seconds[name]:.1f} s, {count[name]} renames", flush=True)
    done: dict[str, int] = dict.fromkeys(CHAIN, 0)
    while sum(done.values()) < kills:
        shutil.rmtree(work / "broken", ignore_errors=True)
        (work / "broken").mkdir()
        for name, words in CHAIN.items():
            left = min(5, kills - sum(done.values()))
            done[name] += random_kills(work / "broken", words, left, seconds[name], rng)
            check(work / "broken", compared(work / f"after-{name}"))
    told = ", ".join(f"{name} {number}" for name, number in done.items())
    print(f"{sum(done.values())} random kills, each run ended as the unbroken one: {told}")
    every = [(name, number) for name in CHAIN for number in range(count[name])]
    chosen = sorted(rng.sample(range(len(every)), min(moments, len(every))))
    for name, number in (every[place] for place in chosen):
        shutil.rmtree(work / "broken", ignore_errors=True)
        shutil.copytree(before[name], work / "broken")
        code = ended(started(CHAIN[name], work / "broken", killed_before(number)))
        assert code == -signal.SIGKILL, (work / "broken" / "output").read_text()
        finish(CHAIN[name], work / "broken")
        check(work / "broken", compared(work / f"after-{name}"))
    told = ", ".join(f"{every[place][0]} {every[place][1]}" for place in chosen)
    print(f"{len(chosen)} kills before a rename, each run ended as the unbroken one: {told}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    given = [int(word) for word in sys.argv[1:]]
    with tempfile.TemporaryDirectory() as temporary:
        run(*(given + [100, 20, 0][len(given) :]), Path(temporary))
