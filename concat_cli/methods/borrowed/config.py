"""How borrowed masks are named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

Part = Annotated[float, Ge(0), Le(1)]


@dataclass(frozen=True)
class BorrowedConfig:
    """CLIP's part in the naming of a published segmentor's masks; the segmentor is
    `model.segmentor`."""

    naming: Literal["pool", "crops"] = "pool"  # one CLIP pass an image, or one for each mask
    known: Part = 0.4  # CLIP's exponent for names that the segmentor was trained on [FC-CLIP]
    new: Part = 0.8  # and for others, where the segmentor has an opinion of them [FC-CLIP]
    min_object: Part = 0.3  # least 1 - p(no object) of a mask that is named [ours]
