"""Packages of the `onnx` extra."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from concat_cli.core.errors import UserError


def needed(package: str) -> Any:
    """A package of the `onnx` extra; UserError where it is not installed."""
    try:
        return import_module(package)
    except ModuleNotFoundError as error:
        raise UserError(
            f"To write ONNX, {error.name} is needed, and it is not installed.",
            "pip install onnx onnxscript, or concat-seg with its extra [onnx].",
        ) from error
