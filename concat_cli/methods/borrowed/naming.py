"""From two opinions of a mask to its name: the segmentor's, of its own classes, and CLIP's.

Both are distributions over the K classes to be named:

- CLIP's, p_clip: the softmax over the classes of its logit scale times the cosine to their texts, a
  class with several names having the highest of theirs (FC-CLIP, Yu et al., NeurIPS 2023): a
  picture shows one of them, and a mean of texts lies between them all. SigLIP was trained with
  sigmoids; its bias is the same for all classes, and a softmax does not see it.
- the segmentor's, p_in: a closed set has an opinion of *known* classes alone, those one of whose
  names is literally one of its own classes': the share of their own classes in the softmax over all
  of its own classes, no_object left out. Of *new* classes it has none.

The score of a known class is FC-CLIP's geometric mean, that of a new one CLIP's word alone:

    score(k) = p_in(k)^(1-a) * p_clip(k)^a    k known, a = `borrowed.known`
    score(k) = p_clip(k)                      k new

both normalised over the classes. What the known names leave of p_in is not dealt out to new ones
[ours]: a vocabulary that holds all of a closed set's classes leaves nothing, and none would ever be
found.

Where no class is known this is p_clip itself. A segmentor whose classes are told by text (FC-CLIP)
has an opinion of all classes: its p_in is a softmax over them, as p_clip is, and a of new ones is
`borrowed.new`. Objectness is 1 - p(no_object) of the segmentor.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from concat_cli.core.clip.prompts import clean_name
from concat_cli.core.vocabulary import ClassEntry, Vocabulary, same_name
from concat_cli.methods.borrowed.config import BorrowedConfig


def names_of(entry: ClassEntry) -> tuple[str, ...]:
    """The names of a class, those apart that a data set joins by commas."""
    parts = (part.strip() for name in (entry.name, *entry.synonyms) for part in name.split(","))
    return tuple(dict.fromkeys(part for part in parts if part))


def one_by_one(vocabulary: Vocabulary) -> tuple[Vocabulary, Tensor]:
    """Each name as a class of its own, S of them, and (S,) the index of the class it is a name
    of."""
    pairs = [(n, k) for k, entry in enumerate(vocabulary.entries) for n in names_of(entry)]
    entries = (replace(vocabulary.entries[k], name=name, synonyms=()) for name, k in pairs)
    return Vocabulary(tuple(entries)), torch.tensor([k for _, k in pairs])


def matches(vocabulary: Vocabulary, own: Vocabulary) -> Tensor:
    """(K, C) bool: which of C own classes has a name of which of K classes. Names are compared as
    people write them: "sky-other-merged" is "sky"."""
    ours, theirs = ([_forms(e) for e in v.entries] for v in (vocabulary, own))
    return torch.tensor([[not a.isdisjoint(b) for b in theirs] for a in ours])


def _forms(entry: ClassEntry) -> frozenset[str]:
    return frozenset(same_name(clean_name(name)) for name in names_of(entry))


def best_names(logits: Tensor, owner: Tensor, classes: int) -> Tensor:
    """(..., S) of names -> (..., K) of classes: the highest of each class's names."""
    found = logits.new_full((*logits.shape[:-1], classes), -torch.inf)
    return found.scatter_reduce(-1, owner.expand(logits.shape), logits, "amax")


def agreed(own_logits: Tensor, clip_logits: Tensor, matched: Tensor, way: BorrowedConfig) -> Tensor:
    """(M, K) logarithms of the ensemble's scores, normalised over the classes.

    own_logits (M, C), without no_object; clip_logits (M, K); matched (K, C) as of `matches`.
    """
    by_clip = clip_logits.log_softmax(-1)
    known = matched.any(1)  # (K,)
    own = own_logits.softmax(-1)
    shares = own @ matched.T.to(own.dtype)  # (M, K)
    opinion = shares.clamp(min=torch.finfo(own.dtype).tiny).log()
    opinion = torch.where(known, opinion, by_clip)
    return ensemble(opinion, by_clip, known, way)


def ensemble(opinion: Tensor, by_clip: Tensor, known: Tensor, way: BorrowedConfig) -> Tensor:
    """(M, K) logarithms of p_in^(1-a) * p_clip^a, normalised over the classes, from those of p_in
    and p_clip (M, K); a is that of known (K,) bool or of new classes."""
    part = torch.where(known, way.known, way.new)  # (K,)
    return ((1 - part) * opinion + part * by_clip).log_softmax(-1)
