#!/usr/bin/env bash
# torch 2.14.1 (numpy 2.4.6), CPU, eager mode: nothing is compiled.
#
# Expected: `import torch` brings what an optimiser needs; making one of a single parameter and
# stepping it costs microseconds.
# Seen: making any optimiser imports torch._dynamo, and with it inductor's front end, torch.onnx and
# SymPy: hundreds of modules, in half to all of the time of `import torch` itself. Its methods are
# wrapped to keep torch.compile out, and the first call imports the compiler to say so. Forward and
# backward import none of it, and the same class with these methods unwrapped steps the same to the
# bit without it.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
cd "$work"
"$work/venv/bin/python" - <<'PY'
import inspect
import sys
import time

began = time.process_time()
import torch

imported = time.process_time() - began
METHODS = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")


def stepped(kind):
    torch.manual_seed(0)
    layer = torch.nn.Linear(3, 2)
    layer(torch.ones(4, 3)).square().sum().backward()
    before = "torch._dynamo" in sys.modules
    optimiser = kind(layer.parameters(), lr=0.1)
    optimiser.step()
    return before, layer.weight.detach().clone()


plain = {name: inspect.unwrap(getattr(torch.optim.AdamW, name)) for name in METHODS}
plain["step"] = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))
_, ours = stepped(type("Plain", (torch.optim.AdamW,), plain))
assert "torch._dynamo" not in sys.modules, "the behaviour has changed"

modules, began = set(sys.modules), time.process_time()
before, theirs = stepped(torch.optim.AdamW)
taken = time.process_time() - began
more = set(sys.modules) - modules
assert not before and torch.equal(ours, theirs)
for name in ("torch._dynamo", "torch._inductor", "torch.onnx", "sympy"):
    print(f"{name}: {'imported' if name in more else 'not imported'}")
print(f"{len(more)} more modules, {taken:.2f} s; import torch {imported:.2f} s")
assert {"torch._dynamo", "sympy"} <= more, "the behaviour has changed"
assert len(more) > 300 and taken > 0.25 * imported, "the behaviour has changed"
PY
