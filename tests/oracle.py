"""A stand-in segmentor that reads the truth off the image, and the scenes that it knows."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import torch
from data_helpers import VOCABULARY, simple_part, write_part
from torch import nn
from torch.nn import functional as F

from concat_cli.core.config import InferConfig
from concat_cli.core.data.dataset import PanopticDataset
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.vocabulary import Vocabulary

SCENES = {1: [3, 20], 2: [7, 3, 21], 3: [20], 4: [3, 7, 20], 5: [21, 3]}
SIZES = {3: (96, 160), 4: (160, 96), 5: (64, 200)}
CFG = InferConfig(size=128, max_size=256, batch=2)


class Oracle(nn.Module):
    """Segment i of a test scene is the band whose green is 60 + 30 i; its class is told."""

    def __init__(self, classes: dict[int, list[int]], swap: dict[int, int] | None = None) -> None:
        super().__init__()
        self.classes, self.swap, self.calls = classes, swap or {}, 0

    def forward(self, images, padding, text, last_only):
        self.calls += 1
        quarter = F.avg_pool2d(images.float(), 4)  # (B, 3, h, w)
        bands = [(quarter[:, 1] - 60 - 30 * i).abs() < 15 for i in range(4)]
        mask_logits = torch.stack(bands, 1).float() * 40 - 20  # (B, 4, h, w)
        class_logits = torch.full((len(images), 4, len(text) + 1), -20.0)
        class_logits[..., -1] = 0
        for b, image in enumerate(images):
            scene = int(image[0, 0, 0]) - 8
            for q, category in enumerate(self.classes[scene]):
                index = self.swap.get(category, category)
                if index in CLASS_OF:
                    class_logits[b, q, CLASS_OF[index]] = 20.0
        return SimpleNamespace(class_logits=class_logits[None], mask_logits=mask_logits[None])


CLASS_OF = VOCABULARY.index_of_id


def told_world(root: Path, scenes: dict[int, list[int]] | None = None) -> PanopticDataset:
    """The scenes as a data set in which cow and wall are unseen."""
    scenes = scenes or SCENES
    sizes = dict.fromkeys(scenes, (128, 128)) | {i: s for i, s in SIZES.items() if i in scenes}
    part = write_part(simple_part(root), scenes, sizes)
    return PanopticDataset(part, VOCABULARY.with_unseen({"cow", "wall"}), keep_crowd=True)


def predictor(
    dataset: PanopticDataset,
    swap: dict[int, int] | None = None,
    vocabulary: Vocabulary | None = None,
    scenes: dict[int, list[int]] | None = None,
) -> Predictor:
    """What names every band of the scenes, with some classes swapped."""
    vocabulary = vocabulary or dataset.vocabulary
    oracle = Oracle(scenes or SCENES, swap)
    return Predictor(oracle, torch.eye(len(vocabulary)), vocabulary, CFG)
