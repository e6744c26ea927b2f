"""How borrowed masks are named."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le

Part = Annotated[float, Ge(0), Le(1)]
Side = Annotated[int, Ge(0), Le(1 << 12)]


@dataclass(frozen=True)
class BorrowedConfig:
    """CLIP's part in the naming of a published segmentor's masks; the segmentor is
    `model.segmentor`."""

    naming: Literal["pool", "crops"] = "pool"  # one CLIP pass an image, or one for each mask
    side: Side = 0  # pool: of the square that CLIP sees, in pixels; 0: as it was trained [ours]
    known: Part = 0.4  # CLIP's exponent for names that the segmentor was trained on [FC-CLIP]
    new: Part = 0.8  # and for others, of a segmentor whose classes are told by text [FC-CLIP]
    min_object: Part = 0.3  # least 1 - p(no object) of a mask that is named [ours]
