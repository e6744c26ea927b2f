"""`concat doctor`: what is found on a machine, and whether it is enough.

Nothing heavy is imported before its own check runs, so that a broken package is a finding and no
traceback. Nothing is written and nothing is downloaded.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import typer

from concat_cli import __version__
from concat_cli.commands.options import Json
from concat_cli.console import Console
from concat_cli.core.errors import UserError

OPTIONAL = {  # what it is for, and what pip is given
    "panopticapi": (
        "`evaluate --official` compares with it",
        "--no-deps 'panopticapi-lite>=0.2'",
    ),
    "starlette": ("`concat serve`", "concat-seg[serve]"),
    "transformers": ("some published segmentors and CLIPs; the tests", "concat-seg[hub]"),
    "triton": ("fused kernels on NVIDIA GPUs", "triton"),
}
_SIZE = 128  # side of the images of the trial, in pixels
State = Literal["ok", "missing", "failed"]
_MARKS: dict[State, tuple[str, str]] = {  # on the screen, and in the block for a bug report
    "ok": ("✓", ""),
    "missing": ("-", " (missing)"),
    "failed": ("✗", " (FAILED)"),
}


def doctor(
    data: Annotated[
        Path | None, typer.Option(help="A prepared data set to check. Default: all in data/.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check machine, packages, weights, data and a trial batch."""
    console = Console(json_only=as_json)
    report = examine(data)
    if as_json:
        console.json(report.to_json())
    else:
        for section, checks in report.sections.items():
            console.result(section)
            for check in checks:
                console.result(f"  {_MARKS[check.state][0]} {check.name}: {check.found}")
                if check.todo:
                    console.result(f"      {check.todo}")
        console.result("\nFor a bug report:\n")
        console.text(f"```\n{report.block()}\n```")
        fine = "everything needed is there" if report.ok else "something needed is missing (✗)"
        console.result(f"\n{fine}")
    if not report.ok:
        raise typer.Exit(1)


@dataclass(frozen=True)
class Check:
    """A finding. `missing`: some commands want it; `failed`: nothing works without it."""

    name: str
    state: State
    found: str
    todo: str = ""


@dataclass(frozen=True)
class Report:
    """Findings by section; `ok` where nothing that is needed failed."""

    sections: dict[str, list[Check]]

    @property
    def ok(self) -> bool:
        """Whether everything needed works."""
        return all(check.state != "failed" for part in self.sections.values() for check in part)

    def to_json(self) -> dict[str, Any]:
        """The report as plain values."""
        parts = {name: [asdict(check) for check in part] for name, part in self.sections.items()}
        return {"version": __version__, "ok": self.ok, "sections": parts}

    def block(self) -> str:
        """Plain lines for a bug report."""
        lines = [f"concat {__version__}"]
        for name, part in self.sections.items():
            lines.append(f"[{name}]")
            lines += [f"{check.name}: {check.found}{_MARKS[check.state][1]}" for check in part]
        return "\n".join(lines)


def examine(data: Path | None = None) -> Report:
    """Looks at machine, packages, weights, data and splits, and tries the built-in model.

    data: a prepared data set that must be there. Without it, those in `data/` are listed.
    """
    sections = {  # generators: nothing is looked at before its turn
        "machine": _machine(),
        "packages": _packages(),
        "weights": _weights(),
        "data": _data_sets(data),
        "splits": _splits(),
        "trial": _trial(),
    }
    return Report({name: list(_all(name, found)) for name, found in sections.items()})


def _all(section: str, found: Iterator[Check]) -> Iterator[Check]:
    """The findings of a section; one more where it ends in an error."""
    try:
        yield from found
    except UserError as error:
        yield Check(section, "failed", error.what, error.hint)
    except Exception as error:  # whatever it is, it is what was looked for
        what = " ".join(str(error).split())[:300]
        yield Check(section, "failed", f"{type(error).__name__}: {what}", "Install concat again.")


def _machine() -> Iterator[Check]:
    yield Check("system", "ok", platform.platform())
    yield Check("Python", "ok", platform.python_version())
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    yield Check("processors", "ok", f"{count} of {os.cpu_count()} for this process")
    if hasattr(os, "sysconf"):  # there is no such call on Windows
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        yield Check("memory", "ok", f"{memory / 1e9:.1f} GB")
    import torch

    from concat_cli.core.device import choose_device, choose_precision

    device, why = choose_device("auto")
    yield Check("device", "ok", f"{device} ({why})")
    dtype, reason = choose_precision("auto", device)
    chosen = "fp32" if dtype is None else str(dtype).removeprefix("torch.")
    yield Check("precision", "ok", f"{chosen} ({reason})")
    for index in range(torch.cuda.device_count() if device.type == "cuda" else 0):
        free, total = torch.cuda.mem_get_info(index)
        name = torch.cuda.get_device_name(index)
        yield Check(f"GPU {index}", "ok", f"{name}, {free / 1e9:.1f} of {total / 1e9:.1f} GB free")
    if device.type == "cpu" and Path("/proc/driver/nvidia/version").exists():
        todo = f"This torch is built for CUDA {torch.version.cuda}: install one for your driver."
        yield Check("GPU", "missing", "an NVIDIA driver is there, but torch cannot use it", todo)


def _packages() -> Iterator[Check]:
    for line in metadata.requires("concat-seg") or ():
        if "extra ==" not in line:
            yield _package(line)
    for name, (use, source) in OPTIONAL.items():
        version = _importable(name)
        todo = "" if version else f"Only if you want it ({use}): pip install {source}"
        yield Check(name, "ok" if version else "missing", version or "not installed", todo)


def _package(requirement: str) -> Check:
    """A line like `torch>=2.6` against what is installed."""
    name, _, least = requirement.partition(";")[0].strip().partition(">=")
    version = _version(name)
    if version is not None and _numbers(version) >= _numbers(least):
        return Check(name, "ok", version)
    found = f"{version}, needed {least}" if version else "not installed"
    return Check(name, "failed", found, f"pip install '{requirement}'")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _importable(name: str) -> str | None:
    """The version of what is imported by that name, whatever the package is called."""
    if find_spec(name) is None:
        return None
    packages = metadata.packages_distributions().get(name)
    return metadata.version(packages[0]) if packages else "of no package"


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(n) for n in re.findall(r"\d+", version.partition("+")[0])[:3])


def _weights() -> Iterator[Check]:
    from concat_cli.core.clip import tiny
    from concat_cli.core.runs import BUILT_IN

    files = {"segmentor (built in)": BUILT_IN}
    files |= {f"CLIP {name} (built in)": path for name, path in tiny.FILES.items()}
    for name, path in files.items():
        if path.is_file():
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            yield Check(name, "ok", f"{path.stat().st_size / 1e6:.1f} MB, sha256 {digest[:16]}")
        else:
            yield Check(name, "failed", f"nothing in {path}", "Install concat again.")
    yield from _published()
    yield from _cache()


def _cache() -> Iterator[Check]:
    """Models in the hub's cache that a configuration can name."""
    import open_clip  # pyright: ignore[reportMissingTypeStubs]
    from huggingface_hub import constants, scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    keys: dict[str, str] = {}
    for model, tag in open_clip.list_pretrained():
        facts = cast("dict[str, str]", open_clip.get_pretrained_cfg(model, tag))
        repository = facts.get("hf_hub", "").rpartition("/")[0]
        keys.setdefault(repository, f"clip.model={model} clip.pretrained={tag}")
    try:
        found = [repo for repo in scan_cache_dir().repos if repo.repo_type == "model"]
    except CacheNotFound:
        found = []
    for repo in sorted(found, key=lambda repo: repo.repo_id):
        owner, _, name = repo.repo_id.partition("/")
        of_timm = f"model.backbone={name} model.backbone_weights=timm" if owner == "timm" else ""
        key = keys.get(repo.repo_id) or of_timm or f"model.init=hf-hub:{repo.repo_id}, if it fits"
        yield Check(repo.repo_id, "ok", f"{repo.size_on_disk / 1e6:.0f} MB, cached: {key}")
    if not found:
        yield Check(
            "hub's cache",
            "missing",
            f"no models in {constants.HF_HUB_CACHE}",
            "Only for training with a real CLIP: `concat train-con -c "
            "concat_coco_119_14 --dry-run` says what it needs.",
        )


def _published() -> Iterator[Check]:
    """The published pairs that are here, wholly or in part."""
    from concat_cli.core.weights_from.fetch import state_of
    from concat_cli.core.weights_from.published import CLASSES, TRAINED_ON, pairs

    states = {name: state_of(pair.parts) for name, pair in pairs().items()}
    for name in (name for name in states if states[name] == "here"):
        what = f"here, trained with the labels of {CLASSES} classes of {TRAINED_ON}"
        yield Check(f"--weights {name}", "ok", what)
    if "here" not in states.values():
        begun = next((name for name in states if states[name]), "photos")
        todo = f"Only for photos: concat weights get {begun}"
        yield Check("published weights", "missing", f"none of {len(states)} is here", todo)


def _data_sets(data: Path | None) -> Iterator[Check]:
    """Name, classes and images of prepared data sets, the first image of each part opened."""
    from concat_cli.core.data.dataset import PanopticDataset, read_dataset_info

    root = Path("data")
    found = sorted(p.parent for deep in ("*", "*/*") for p in root.glob(f"{deep}/dataset.json"))
    for folder in found if data is None else [data]:
        try:
            info = read_dataset_info(folder)
            counts: list[str] = []
            for name, part in info.parts.items():
                samples = PanopticDataset(part, info.vocabulary)
                if len(samples):
                    _ = samples[0]
                counts.append(f"{name} {len(samples)}")
        except UserError as error:
            state = "missing" if data is None else "failed"
            yield Check(str(folder), state, error.what, error.hint)
            continue
        seen, unseen = len(info.vocabulary.seen_indices), len(info.vocabulary.unseen_indices)
        kinds = f"{seen} seen and {unseen} unseen classes ({info.class_split})"
        yield Check(str(folder), "ok", f"{info.name}: {kinds}; images: {', '.join(counts)}")
    if data is None and not found:
        what = f"no prepared data set below {root}"
        yield Check("data", "missing", what, "concat prepare-data shapes data/shapes")


def _splits() -> Iterator[Check]:
    from concat_cli.core.data.class_split import class_split_names

    yield Check("class splits", "ok", ", ".join(class_split_names()))


def _trial() -> Iterator[Check]:
    """One batch through the built-in model, forward and backward, named by the built-in CLIP."""
    import torch

    from concat_cli.core.build import restore_segmentor
    from concat_cli.core.checkpoint import load_weights
    from concat_cli.core.clip.encoder import load_clip
    from concat_cli.core.config import ClipConfig
    from concat_cli.core.device import choose_device, choose_precision
    from concat_cli.core.runs import BUILT_IN

    device, _ = choose_device("auto")
    dtype, _ = choose_precision("auto", device)
    weights = load_weights(BUILT_IN)
    names = weights.meta["trained"][:8]
    text = load_clip(ClipConfig(), image_tower=False).encode_text([f"a {n}" for n in names])
    segmentor = restore_segmentor(weights).to(device).train()
    images = torch.randint(0, 256, (2, 3, _SIZE, _SIZE), dtype=torch.uint8, device=device)
    start = time.monotonic()
    with torch.autocast(device.type, dtype, enabled=dtype is not None):
        out = segmentor(images, None, text.to(device))
    done = time.monotonic()
    yield _finite("forward", [out.class_logits, out.mask_logits], done - start)
    (out.class_logits.float().square().mean() + out.mask_logits.float().sigmoid().mean()).backward()
    gradients = [p.grad for p in segmentor.parameters() if p.grad is not None]
    yield _finite("backward", gradients, time.monotonic() - done)


def _finite(name: str, tensors: list[Any], seconds: float) -> Check:
    what = f"one batch of two {_SIZE} x {_SIZE} images in {seconds:.2f} s"
    if tensors and all(bool(tensor.isfinite().all()) for tensor in tensors):
        return Check(name, "ok", what)
    todo = "Try `--device cpu`, or optim.precision=fp32; then tell us with the block below."
    return Check(name, "failed", f"{what}: values are not finite", todo)
