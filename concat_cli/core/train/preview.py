"""Pictures of what a segmentor does during training."""

from __future__ import annotations

from pathlib import Path

from concat_cli.core.data.dataset import PanopticDataset
from concat_cli.core.files import atomic_path
from concat_cli.core.infer.predictor import Predictor
from concat_cli.core.infer.render import Drawing, side_by_side, stack

PICTURES = 4


def write_preview(predictor: Predictor, dataset: PanopticDataset, path: Path) -> None:
    """Writes image, truth and prediction of the first images of a data set, a row each."""
    samples = [dataset[index] for index in range(min(PICTURES, len(dataset)))]
    predictions = predictor.predict_batch([sample.image for sample in samples])
    rows = [
        side_by_side(
            sample.image,
            Drawing.of_sample(sample, dataset.vocabulary),
            Drawing.of_prediction(prediction),
        )
        for sample, prediction in zip(samples, predictions, strict=True)
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(path) as temporary:
        stack(rows).save(temporary, format="PNG")
