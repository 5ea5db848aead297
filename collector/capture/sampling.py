"""Draws a sample of each shard's tokens, and keeps what some modules see of them on the device until the last pass.

The tokens are drawn by a hash of their document's ids and their position, special tokens apart, so the sample depends
on the shard alone; in the order of the hash they are mixed across documents, as batches, sorted by length, are not.

Shapes: R real tokens of a batch, m tokens of the sample, T tokens of a shard.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from numpy.typing import NDArray

    from collector.capture.batches import TokenTable
    from collector.capture.padding import Grid


def sample(table: TokenTable, size: int) -> NDArray[np.int64]:
    """Draws tokens, special ones apart; returns their slots in the order of their hash.

    Args:
        table: the tokens of a shard.
        size: how many tokens (all, if there are fewer).
    """
    digests = [
        int.from_bytes(hashlib.blake2b(table.ids[start:end].tobytes(), digest_size=8).digest(), "little")
        for start, end in zip(table.starts[:-1], table.starts[1:], strict=True)
    ]
    document_t = np.repeat(np.array(digests, np.uint64), table.lengths)
    hash_t = _mix(document_t ^ _mix(table.position.astype(np.uint64)))
    ordinary = np.flatnonzero(~table.is_special)
    # Documents of the same text would have equal hashes: the slot decides between them.
    return ordinary[np.lexsort([ordinary, hash_t[ordinary]])[:size]]


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Steele, Lea and Flood 2014, the finalizer of SplitMix64."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class Nothing(NamedTuple):
    """What leaves the device during the passes."""

    nothing: None = None


class SampledRows:
    """What modules see of the sampled tokens of one shard, on the device."""

    def __init__(self, size: int) -> None:
        """Holds nothing yet; `size` is the number of tokens to draw."""
        self._size = size
        self._rank_of: dict[str, NDArray[np.int64]] = {}
        """Stack -> [T] each token's place in the sample, -1 outside of it."""
        self._held: dict[Any, list[tuple[NDArray[np.int64], Any]]] = {}
        """Key -> the places of some tokens, on the host, and their rows."""

    def begin(self, tokens: Mapping[str, TokenTable], stacks: Iterable[str]) -> None:
        """Draws the sample of each of these stacks, and forgets the shard before."""
        self._held.clear()
        self._rank_of.clear()
        for stack in stacks:
            chosen = sample(tokens[stack], self._size)
            rank_t = np.full(len(tokens[stack].ids), -1)
            rank_t[chosen] = np.arange(len(chosen))
            self._rank_of[stack] = rank_t

    def keep(self, key: Any, stack: str, rows: Any, grid: Grid) -> Nothing:
        """Holds the rows of sampled tokens; before `begin`, as in the first, tiny pass, none.

        Args:
            key: names the module.
            stack: whose tokens it sees.
            rows: a NamedTuple of tensors with R rows.
            grid: the batch.
        """
        import torch

        if grid.slots is None or stack not in self._rank_of:
            return Nothing()
        rank_r = self._rank_of[stack][grid.slots]
        chosen = np.flatnonzero(rank_r >= 0)
        if len(chosen):
            device = rows[0].device
            index = torch.from_numpy(chosen)
            index = index.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else index.to(device)
            held = type(rows)(*(each.index_select(0, index) for each in rows))
            self._held.setdefault(key, []).append((rank_r[chosen], held))
        return Nothing()

    def slots(self, stack: str) -> NDArray[np.int64]:
        """Returns the sampled tokens' places in the shard's token table, in the order of the sample."""
        rank_t = self._rank_of[stack]
        slots = np.flatnonzero(rank_t >= 0)
        return slots[np.argsort(rank_t[slots])]

    def take(self, key: Any, stack: str) -> Any:
        """Hands over the rows of a module, in the order of the sample; None if the sample is empty."""
        import torch

        held = self._held.pop(key, [])
        if not held:
            return None
        # A batch that did not fit was given up in the middle, and its tokens came once more: the later ones count.
        rank, last = np.unique(np.concatenate([ranks for ranks, _ in held])[::-1], return_index=True)
        assert len(rank) == int((self._rank_of[stack] >= 0).sum()), "every token of the sample"
        parts = zip(*(rows for _, rows in held), strict=True)
        index = torch.from_numpy(last)
        return type(held[0][1])(*(torch.cat(each).flip(0)[index.to(each[0].device)] for each in parts))
