"""Which kind of segmentor a name, a folder or a file is, and the kind's own reader."""

from __future__ import annotations

from concat_cli.core.errors import UserError
from concat_cli.core.segmentors import PublishedSegmentor
from concat_cli.core.segmentors.mask2former import open_mask2former


def open_segmentor(source: str) -> PublishedSegmentor:
    """The segmentor of a short name of the list, `hf-hub:ORG/NAME`, a folder or a file.

    Nothing is downloaded. UserError where it is not here, damaged, or of no known kind.
    """
    found = open_mask2former(source)
    if found is None:
        raise UserError(
            f"{source} holds no segmentor of a kind that is known.",
            "Known are Mask2Former in the names of transformers and of detectron2.",
        )
    return found
