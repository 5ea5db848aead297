"""Chooses the next token of a text that a model writes: the most probable one, or one that is drawn.

A draw depends on the document, the place of the token in the answer and the seed alone, never on the batch: each
document has random numbers of its own, from a counter-based generator (Philox) whose key is the seed and a hash of the
document's name. Where the arithmetic of a device depends on the batch, two probabilities that are nearly alike may
still change places.

Top-p sampling ("nucleus", arXiv 1904.09751) keeps the most probable tokens whose probabilities first sum to p.

Shapes: B texts, V entries of the vocabulary, N tokens of an answer.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray


def random_numbers(names: Sequence[str], count: int, seed: int) -> NDArray[np.float64]:
    """Returns numbers from [0, 1), [documents, N], those of each document from its name and the seed.

    Args:
        names: of the documents; the same name gets the same numbers.
        count: N.
        seed: any integer.
    """
    numbers = np.empty((len(names), count))
    for row, name in enumerate(names):
        key = hashlib.blake2b(f"{seed}\0{name}".encode(), digest_size=16).digest()
        numbers[row] = np.random.Generator(np.random.Philox(key=np.frombuffer(key, np.uint64))).random(count)
    return numbers


def most_probable(logits_bv: torch.Tensor) -> torch.Tensor:
    """Returns the ids [B] of the largest logits; of equal ones the lowest."""
    return logits_bv.argmax(-1)


def draw(logits_bv: torch.Tensor, number_b: torch.Tensor, *, temperature: float, top_p: float) -> torch.Tensor:
    """Draws an id for each text, [B].

    Args:
        logits_bv: of the next token.
        number_b: a random number from [0, 1) for each text.
        temperature: logits are divided by it.
        top_p: the share of the probability that the tokens to draw from have together.
    """
    # In float64, so that neither the smallest temperature nor a sum over the vocabulary decides by its rounding.
    logits_bv = logits_bv.double()
    probabilities_bv = ((logits_bv - logits_bv.amax(-1, keepdim=True)) / temperature).softmax(-1)
    sorted_bv, ids_bv = probabilities_bv.sort(dim=-1, descending=True, stable=True)
    up_to_bv = sorted_bv.cumsum(-1)
    kept_bv = up_to_bv - sorted_bv < top_p
    kept_bv[:, 0] = True
    total_b1 = (sorted_bv * kept_bv).sum(-1, keepdim=True)
    below_bv = (up_to_bv <= number_b[:, None].to(up_to_bv) * total_b1) & kept_bv
    place_b1 = torch.minimum(below_bv.sum(-1, keepdim=True), kept_bv.sum(-1, keepdim=True) - 1)
    return ids_bv.gather(1, place_b1).squeeze(1)
