"""The toy's own section of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Gt, Le


@dataclass(frozen=True)
class ToyConfig:
    """The toy; `optim` holds the schedule."""

    scale: Annotated[float, Gt(0), Le(100)] = 20.0  # of the cosines
