"""Configuration of the built-in world; see `config.py` for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from concat_cli.core.config_check import check as _check


@dataclass(frozen=True)
class ShapesConfig:
    """The built-in world, drawn when `data.root` is not there yet. All [ours]."""

    train: int = 4000  # scenes for training; no label of an unseen class is in them
    dev: int = 300  # such scenes for selection and calibration
    val: int = 500  # scenes with every class, scored once at the end
    size: int = 128  # side of a scene in pixels
    seed: int = 0
    unseen: str = ""  # "striped star; green water": these names; empty: the default split
    unseen_seed: int = -1  # >= 0: another split of the default's kind
    unseen_pixels: Literal["drop", "void"] = "drop"  # in train and dev: not drawn, or without label

    def __post_init__(self) -> None:
        _check(min(self.train, self.dev, self.val) >= 1, "train, dev and val must be at least 1")
        _check(self.size >= 32, "size must be at least 32")
        _check(not (self.unseen and self.unseen_seed >= 0), "give unseen or unseen_seed, not both")
