"""What limits a score: masks that miss their segment, or classes of masks that fit.

Both are measured on the queries before panoptic merging, so that thresholds play no part.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from concat_cli.core.infer.postprocess import Size, resized_strips
from concat_cli.core.vocabulary import Vocabulary


def mask_ious(
    mask_logits: Tensor, segment_map: NDArray[np.integer], segments: int, valid: Size
) -> NDArray[np.float32]:
    """(N, Q) IoU of truth segments and query masks (probability >= 0.5), void left out.

    mask_logits (Q, h, w) at stride 4 of the padded input; segment_map (H, W): 0 = void, i+1 =
    segment i of N.
    """
    truth_map = torch.from_numpy(np.ascontiguousarray(segment_map)).to(mask_logits.device)
    shared = torch.zeros(len(mask_logits), segments + 1, device=mask_logits.device)
    top, size = 0, (truth_map.shape[0], truth_map.shape[1])
    width = len(mask_logits) + segments + 1
    for strip in resized_strips(mask_logits[None], size, valid, width):
        rows = strip.shape[2]
        truth = F.one_hot(truth_map[top : top + rows].long().flatten(), segments + 1).float()
        shared += (strip[0].flatten(1) >= 0).float() @ truth  # (Q, P) @ (P, N+1)
        top += rows
    areas = torch.bincount(truth_map.flatten().long(), minlength=segments + 1)[1:]  # (N,)
    inner = shared[:, 1:]  # (Q, N)
    union = inner.sum(1, keepdim=True) + areas - inner
    return (inner / union.clamp(min=1)).T.cpu().numpy()


class MaskDiagnostics:
    """Counts truth segments per class; `counts` (3, K) is the whole state: all, those that some
    query's mask fits (IoU > 0.5), those whose best-fitting query also has the right class."""

    def __init__(self, classes: int) -> None:
        self.counts: NDArray[np.float64] = np.zeros((3, classes))

    def add(
        self,
        ious: NDArray[np.floating],
        named: NDArray[np.integer],
        labels: NDArray[np.integer],
        crowd: NDArray[np.bool_],
    ) -> None:
        """One image: IoUs (N, Q), class index each query would name (Q,) where no_object does not
        compete, labels (N,), crowd (N,)."""
        if not len(labels):
            return
        query = ious.argmax(1)
        fits = (ious.max(1) > 0.5) & ~crowd
        classes = self.counts.shape[1]
        for row, chosen in enumerate((~crowd, fits, fits & (named[query] == labels))):
            self.counts[row] += np.bincount(labels[chosen], minlength=classes)

    def result(self, vocabulary: Vocabulary) -> dict[str, float | None]:
        """Recall of masks and accuracy of the fitting ones, for all, seen and unseen classes."""
        groups: dict[str, Sequence[int]] = {
            "": range(len(vocabulary)),
            "_seen": vocabulary.seen_indices,
            "_unseen": vocabulary.unseen_indices,
        }
        found: dict[str, float | None] = {}
        for suffix, classes in groups.items():
            segments, fits, right = (float(row[list(classes)].sum()) for row in self.counts)
            found[f"mask_recall{suffix}"] = fits / segments if segments else None
            found[f"matched_accuracy{suffix}"] = right / fits if fits else None
        return found
