#!/usr/bin/env bash
# torch 2.14.1 (numpy 2.4.6) on a machine without an accelerator.
#
# Expected: `torch.manual_seed` writes a number; what it takes does not depend on who calls it.
# Seen: it formats the whole call stack, with the source lines, for each kind of accelerator that is
# not there, so that it takes hundreds of times as long as the generator's own `manual_seed`, and
# the more the deeper the caller is nested. Both give the same numbers. It shows where every step of
# a training is seeded anew.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
cat > "$work/seeds.py" <<'PY'
import statistics
import time

import torch

assert not torch.accelerator.is_available()
seeds = {
    "torch.manual_seed": torch.manual_seed,
    "default_generator.manual_seed": torch.default_generator.manual_seed,
}


def nested(depth, call):
    return call() if depth == 0 else nested(depth - 1, call)


def microseconds(seed):
    taken = []
    for number in range(200):
        began = time.perf_counter()
        seed(number)
        taken.append(time.perf_counter() - began)
    return 1e6 * statistics.median(taken)


drawn, taken = {}, {}
for name, seed in seeds.items():
    seed(7)
    drawn[name] = torch.rand(1000)
    taken[name] = [nested(depth, lambda: microseconds(seed)) for depth in (0, 40)]
    print(f"{name}: {taken[name][0]:.1f} us, and {taken[name][1]:.1f} us in 40 calls more")
theirs, plain = (taken[name] for name in seeds)
assert torch.equal(*drawn.values())
assert theirs[0] > 10 * plain[0], "the behaviour has changed"
assert theirs[1] > 2 * theirs[0] and plain[1] < 2 * plain[0], "the behaviour has changed"
PY
"$work/venv/bin/python" "$work/seeds.py"
