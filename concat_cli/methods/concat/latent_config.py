"""The section of the configuration for content without labels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from annotated_types import Ge, Gt, Le, Lt

from concat_cli.core.config import Share, Weight


@dataclass(frozen=True)
class LatentConfig:
    """Latent segments: what pixels without a label may hold. Off by default.

    That segments of seen and of latent classes are matched apart, by queries of their own, is from
    the abstract of Split Matching (arXiv 2505.05023); everything else is [ours].
    """

    weight: Weight = 0.0  # of their mask losses, beside those of labelled segments; 0: off
    align: bool = True  # they take part in instance alignment as labelled segments do
    split: bool = True  # void is parted by the segmentor's own masks too, not where it is cut alone
    overlap: Annotated[float, Gt(0), Le(1)] = 0.2  # such masks that share more of one are the same
    least: Annotated[float, Ge(0), Lt(1)] = 0.002  # of the view, for a latent segment
    most: Annotated[int, Ge(1), Le(1000)] = 8  # of a view, the largest ones
    evidence: Share = 0.0  # of a new class's pseudo queries, from latent segments CLIP names so
    margin: Annotated[float, Ge(0), Le(2)] = 0.05  # cosine of that name above that of any other
    alike: Share = 0.8  # CLS tokens of a greater cosine are no negatives of each other
