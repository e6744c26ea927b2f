"""What every stage needs before it trains: device, data, text embeddings, facts for its file."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from concat_cli import __version__
from concat_cli.core.checkpoint import Weights, check_clip
from concat_cli.core.clip.encoder import Clip, ClipIdentity, load_clip
from concat_cli.core.clip.prompts import cached_texts, check_names, class_texts, text_embeddings
from concat_cli.core.clip.tokens import TokenCache
from concat_cli.core.config import Config
from concat_cli.core.config_file import to_dict
from concat_cli.core.data.dataset import DatasetInfo, read_dataset_info
from concat_cli.core.device import choose_device, choose_precision
from concat_cli.core.errors import UserError
from concat_cli.core.prepare.shapes import differing_keys, prepare_shapes
from concat_cli.core.progress import Progress
from concat_cli.core.runs import StageDir
from concat_cli.core.train.distributed import Processes, join, wait
from concat_cli.core.train.teacher import Teacher
from concat_cli.core.vocabulary import Vocabulary

M = TypeVar("M", bound=nn.Module)


@dataclass(frozen=True)
class Session:
    """The surroundings of one stage of one run."""

    cfg: Config
    info: DatasetInfo
    device: torch.device
    dtype: torch.dtype | None
    processes: Processes
    progress: Progress

    @property
    def teacher_dtype(self) -> torch.dtype | None:
        """What CLIP's image tower computes in beside the student: half precision where the run
        trains in it on a CUDA GPU, of the run's own kind where the GPU has that natively."""
        if self.dtype is None or self.device.type != "cuda":
            return None
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return self.dtype if native else torch.float16

    def teacher(self, clip: Clip, crops: int, source: str) -> Teacher:
        """CLIP as a teacher of so many segments an image; source: "cache" or "online"."""
        cache = None
        if source == "cache":
            folder = Path(self.cfg.data.root) / "clip"
            cache = TokenCache(
                folder, clip.identity, clip.embed_dim, clip.dtype, progress=self.progress
            )
        return Teacher(clip, crops, cache)

    def open_stage(
        self, stage: StageDir, *, fresh: bool = False, inputs: dict[str, str] | None = None
    ) -> StageDir:
        """`StageDir.open` by the first process; the others look into the folder only after it."""
        stage.open(self.cfg, fresh=fresh, main=self.processes.is_main, inputs=inputs)
        wait()
        return stage

    def place(self, module: M) -> M:
        """Moves a module to the device, before an optimiser or a warm-up knows it; returns it."""
        module.to(self.device)
        if self.cfg.optim.channels_last:
            module.to(memory_format=torch.channels_last)
        return module

    def meta(self, stage: str, clip: ClipIdentity, **facts: Any) -> dict[str, Any]:
        """The facts that a weights file carries about itself."""
        return {
            "format": 1,
            "version": __version__,
            "stage": stage,
            "config": to_dict(self.cfg),
            "vocabulary": self.info.vocabulary.to_json(),
            "trained": list(self.info.vocabulary.seen_only().names),
            "taught": [],
            "clip": {
                "model": clip.model,
                "pretrained": clip.pretrained,
                "sha256": clip.sha256,
            },
            "data": {
                "name": self.info.name,
                "class_split": self.info.class_split,
                "filtering": self.info.protocol,
            },
        } | facts


def open_session(cfg: Config, device: str, progress: Progress, force: bool = False) -> Session:
    """Chooses device and precision, draws the built-in world if it is asked for and not there.

    force: allow classes with words that the built-in CLIP never saw; else they are a UserError.
    """
    chosen, why = choose_device(device)
    chosen, processes = join(chosen)
    dtype, reason = choose_precision(cfg.optim.precision, chosen)
    precision = "fp32" if dtype is None else str(dtype).removeprefix("torch.")
    progress.say(f"device {chosen} ({why}); precision {precision} ({reason})")
    info = open_data(cfg, processes, progress)
    if unknown := check_names(info.vocabulary, cfg.clip, force):
        progress.say(f"the built-in CLIP has never seen: {', '.join(unknown)} (--force)")
    return Session(cfg, info, chosen, dtype, processes, progress)


def open_data(cfg: Config, processes: Processes, progress: Progress) -> DatasetInfo:
    """The data set at `data.root`; where a default-made world is missing, it is drawn first."""
    root = Path(cfg.data.root)
    if processes.is_main and not (root / "dataset.json").exists() and draws_shapes(cfg):
        progress.say(f"drawing the built-in world into {root} (it is not there yet)")
        prepare_shapes(root, cfg.shapes, progress)
    wait()
    info = read_dataset_info(root)
    check_world(cfg, info)
    return info


def check_world(cfg: Config, info: DatasetInfo) -> None:
    """UserError where the built-in world at `data.root` was drawn with other `shapes.*` values."""
    if not draws_shapes(cfg) or "world" not in info.source:
        return
    differing = differing_keys(info.source, cfg.shapes)
    if differing:
        found = "; ".join(
            f"shapes.{key} is {value!r}, not {getattr(cfg.shapes, key)!r}"
            for key, (value, _) in differing.items()
        )
        there = " ".join(shlex.quote(f"shapes.{key}={pair[0]}") for key, pair in differing.items())
        raise UserError(
            f"The scenes in {info.root} are not those of the configuration: {found}.",
            f"Give {there} to train on them, or another folder, like "
            f"data.root={info.root}-2, which is then drawn as configured.",
        )


def seed_torch(seed: int) -> None:
    """Seeds torch's generators, of every device there is. Where there is only a processor, torch's
    own function keeps a printed stack for each absent kind, 0.7 ms that a step need not take."""
    if torch.accelerator.is_available():
        torch.manual_seed(seed)  # pyright: ignore[reportUnknownMemberType]
    else:
        torch.default_generator.manual_seed(seed)


def draws_shapes(cfg: Config) -> bool:
    """True where `data.root` names the built-in world: its folder's name begins with shapes."""
    return Path(cfg.data.root).name.startswith("shapes")


def trained_names(source: Weights, vocabulary: Vocabulary) -> list[str]:
    """Every class whose labels the weights, or what they start from, were trained on."""
    return list(dict.fromkeys((*source.meta["trained"], *vocabulary.seen_only().names)))


def embed(clip: Clip, vocabulary: Vocabulary, cfg: Config, device: torch.device) -> Tensor:
    """Text embeddings (K, E) of a vocabulary on the device."""
    return text_embeddings(clip, vocabulary, cfg.clip).to(device)


def text_clip(cfg: Config, device: torch.device) -> Clip:
    """The teacher's text tower alone."""
    return load_clip(cfg.clip, device, image_tower=False)


class TextsOf:
    """Text embeddings of the CLIP that weights were trained with, for a stage that goes on from
    them. The text tower, which takes longer to load than such a stage to begin, is loaded only
    where the cache lacks some.

    UserError, at once where the configuration names another CLIP, else when the tower is loaded, if
    it is not the one of the weights.

    Attributes:
        identity: which CLIP it is.
    """

    def __init__(self, source: Weights, session: Session) -> None:
        self._source, self._session = source, session
        trained, asked = ClipIdentity(**source.meta["clip"]), session.cfg.clip
        same = (trained.model, trained.pretrained) == (asked.model, asked.pretrained)
        self.identity = trained if same and trained.sha256 else self._clip.identity

    def embed(self, vocabulary: Vocabulary) -> Tensor:
        """(K, E) of a vocabulary, on the session's device."""
        rows = class_texts(vocabulary, self._session.cfg.clip)
        found = cached_texts(self.identity.sha256, rows, lambda: self._clip)
        return found.to(self._session.device)

    @cached_property
    def _clip(self) -> Clip:
        clip = text_clip(self._session.cfg, self._session.device)
        check_clip(self._source, clip.identity)
        return clip
