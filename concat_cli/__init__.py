"""CONCAT: zero-shot panoptic and semantic segmentation, from the command line and from Python.

`Predictor.load()`, or `load()`, opens weights and names the segments of pictures; `evaluate` scores
weights. What a name here stands for is imported when it is first asked for: `import concat_cli`
costs no torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from concat_cli.core.evaluate.weights import evaluate_weights as evaluate
    from concat_cli.core.infer.prediction import Prediction
    from concat_cli.core.infer.predictor import Predictor, load
    from concat_cli.core.vocabulary import Vocabulary

__version__ = "0.1.0"
__all__ = ["Prediction", "Predictor", "Vocabulary", "__version__", "evaluate", "load"]

_PLACES = {
    "Prediction": "concat_cli.core.infer.prediction:Prediction",
    "Predictor": "concat_cli.core.infer.predictor:Predictor",
    "Vocabulary": "concat_cli.core.vocabulary:Vocabulary",
    "evaluate": "concat_cli.core.evaluate.weights:evaluate_weights",
    "load": "concat_cli.core.infer.predictor:load",
}


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, attribute = _PLACES[name].partition(":")
    return getattr(import_module(module), attribute)


def __dir__() -> list[str]:
    return __all__
