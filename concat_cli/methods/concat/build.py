"""From configuration to CONCAT's generator."""

from __future__ import annotations

from concat_cli.core.build import clip_width_of, config_of, part_of
from concat_cli.core.checkpoint import Weights
from concat_cli.core.config import CatConfig
from concat_cli.core.errors import UserError
from concat_cli.methods.concat.generator import Generator


def build_generator(cfg: CatConfig, clip_width: int, width: int) -> Generator:
    """A generator of vision queries of the given width from text embeddings of CLIP's width."""
    if width % cfg.heads:
        raise UserError(
            f"cat.heads={cfg.heads} does not divide the width of the queries, {width}.",
            "Take a number that does, such as 4.",
        )
    return Generator(clip_width, width, cfg.layers, cfg.primitives, cfg.heads, cfg.ffn, cfg.dropout)


def restore_generator(weights: Weights) -> Generator:
    """The generator of a weights file of stage `cat` or `finetune`, in evaluation mode."""
    cfg = config_of(weights)
    generator = build_generator(cfg.cat, clip_width_of(weights), cfg.model.width)
    generator.load_state_dict(part_of(weights, "generator"))
    return generator.eval()
