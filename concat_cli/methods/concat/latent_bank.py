"""What latent segments say of names: CLIP names those of the training part, without a label [ours].

Self-labelling, for finetuning alone, which is the stage that may know the names: a query whose
latent segment CLIP takes for a new class, and for no other, stands for a pseudo query of it.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from concat_cli.core.clip.encoder import Clip
from concat_cli.core.clip.tokens import segment_tokens
from concat_cli.core.data.loader import Batch
from concat_cli.core.model.layers import map_size
from concat_cli.core.model.segmentor import Segmentor, SegmentorOutput
from concat_cli.core.runs import Run
from concat_cli.methods.concat.bank_files import Columns
from concat_cli.methods.concat.latent import latent_of, match_apart
from concat_cli.methods.concat.latent_config import LatentConfig
from concat_cli.methods.concat.query_bank import EMPTY, BankWriter, grid, matched_queries

SAME = 0.5  # IoU from which a query's mask is that of its latent segment


@dataclass(frozen=True)
class LatentWriter(BankWriter):
    """Writes the queries of latent segments and their CLS tokens.

    queries (M, D) and tokens (M, E) of the M largest; classes (M,): 0, or EMPTY where there are
    fewer or no query has that mask.
    """

    clip: Clip
    latent: LatentConfig

    @staticmethod
    def of(plain: BankWriter, clip: Clip, latent: LatentConfig) -> LatentWriter:
        """With an identity of its own: what is written hangs on CLIP and on these keys, too."""
        facts = [plain.identity, clip.identity.sha256, asdict(latent)]
        identity = json.dumps(facts, sort_keys=True)
        return LatentWriter(plain.session, plain.segmentor, plain.text, identity, clip, latent)

    def columns(self) -> Columns:
        """See `BankWriter`."""
        most, decoder = self.latent.most, self.segmentor.query_decoder
        return {
            "queries": (np.float16, (most, decoder.width)),
            "classes": (np.int16, (most,)),
            "tokens": (np.float16, (most, self.clip.embed_dim)),
        }

    @torch.no_grad()
    def described(self, batch: Batch, to_trained: Tensor) -> dict[str, Tensor]:
        """See `BankWriter`."""
        cfg, segmentor = self.session.cfg, self.segmentor
        found = matched_queries(segmentor, batch, self.text, to_trained, cfg)
        out = found.out
        looks = None
        if isinstance(out, SegmentorOutput) and isinstance(segmentor, Segmentor):
            looks = segmentor.query_decoder, out.pixel
        latent = latent_of(found.truth, looks, self.latent)
        points = grid(cfg.loss.points, batch.images.device).expand(len(batch), -1, -1)
        weights = (cfg.loss.mask, cfg.loss.dice)
        apart = match_apart(out.mask_logits, found.matched[None], latent, weights, points)[0]
        image = torch.arange(len(batch), device=apart.device)[:, None]
        masks = out.mask_logits[-1][image, apart.clamp(min=0)] >= 0  # (B, M, h, w)
        fits = overlap(masks, latent.masks) > SAME
        valid = (apart >= 0) & fits
        tokens = out.vision_queries.new_zeros(*apart.shape, self.clip.embed_dim)
        select = valid.nonzero()
        tokens[valid] = segment_tokens(self.clip, batch.images, latent.masks, select).to(tokens)
        queries = out.vision_queries[-1][image, apart.clamp(min=0)]
        classes = torch.where(valid, 0, EMPTY)
        return {"queries": queries.half(), "classes": classes, "tokens": tokens.half()}


def overlap(small: Tensor, masks: Tensor) -> Tensor:
    """IoU (B, M) of masks (B, M, h, w) bool with others (B, M, H, W) bool, by the middle of each
    cell."""
    size = map_size(small)
    step = masks.shape[2] // size[0], masks.shape[3] // size[1]
    cut = masks[:, :, step[0] // 2 :: step[0], step[1] // 2 :: step[1]]
    both, either = ((small & cut), (small | cut))
    return both.flatten(2).sum(2) / either.flatten(2).sum(2).clamp(min=1)


@dataclass(frozen=True)
class Evidence:
    """Queries of latent segments that CLIP named, in the order of their classes.

    queries: (N, D) fp32. counts, starts: (K,) int64, of each class among the candidates. share: of
    pseudo queries that they stand for.
    """

    queries: Tensor
    counts: Tensor
    starts: Tensor
    share: float

    def mixed(self, made: Tensor, of: Tensor) -> Tensor:
        """Pseudo queries made (N, D) of classes (N,), a share of them drawn from these instead."""
        counts = self.counts[of]
        chosen = (torch.rand(len(of), device=of.device) < self.share) & (counts > 0)
        place = (torch.rand(len(of), device=of.device) * counts).long().clamp(max=counts - 1)
        drawn = self.queries[(self.starts[of] + place)[chosen]]
        return made.index_put((chosen.nonzero()[:, 0],), drawn.to(made))


def evidence(
    queries: NDArray[np.float16],
    tokens: NDArray[np.float16],
    text: Tensor,
    new: Tensor,
    cfg: LatentConfig,
) -> Evidence:
    """Of queries (N, D) with CLS tokens (N, E): those that CLIP names as one of `new` (indices into
    text (K, E)), surer than any other by `latent.margin`."""
    cosine = torch.as_tensor(tokens.astype(np.float32)).to(text) @ text.T  # (N, K)
    best, name = cosine.topk(2, dim=1)
    sure = (best[:, 0] - best[:, 1] >= cfg.margin) & torch.isin(name[:, 0], new)
    label, order = name[sure, 0].sort(stable=True)
    chosen = sure.nonzero()[:, 0][order].cpu().numpy()
    counts = torch.bincount(label, minlength=len(text))
    kept = torch.as_tensor(queries[chosen].astype(np.float32)).to(text)
    return Evidence(kept, counts, counts.cumsum(0) - counts, cfg.evidence)


def latent_bank(writer: LatentWriter, run: Run) -> tuple[NDArray[np.float16], NDArray[np.float16]]:
    """Queries (N, D) and tokens (N, E) of the latent segments of the train part, each image once;
    written to `runs/<name>/bank/latent/` if it must be."""
    folder = run.path / "bank" / "latent"
    writer.of_part(folder, "train")
    there = np.load(folder / "classes.npy", mmap_mode="r") != EMPTY
    queries, tokens = (np.load(folder / f"{n}.npy", mmap_mode="r") for n in ("queries", "tokens"))
    return queries[there], tokens[there]
