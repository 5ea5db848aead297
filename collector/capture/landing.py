"""Pinned memory in which the results of a GPU arrive on the host.

Taking pinned memory can wait for the device, so a batch lands in one piece of it, which a later batch uses again.
"""

from __future__ import annotations

from typing import Any

import torch

_ALIGNMENT = 64


class PinnedPool:
    """Pieces of pinned memory that batches use in turns, each as large as the largest batch needed so far."""

    def __init__(self, *, pinned: bool = True) -> None:
        """Takes no memory yet; memory that is not pinned is for tests."""
        self.pinned = pinned
        self.needed = 0
        """Bytes of the largest batch."""
        self._free: list[torch.Tensor] = []

    def take(self) -> Landing:
        """Returns the memory for a batch: a free piece, or a new one where none is large enough."""
        while self._free:
            piece = self._free.pop()
            if len(piece) >= self.needed:
                return Landing(self, piece)
        return Landing(self, None)

    def give_back(self, piece: torch.Tensor) -> None:
        """Takes a piece that nobody reads any more."""
        self._free.append(piece)


class Landing:
    """The memory of one batch."""

    def __init__(self, pool: PinnedPool, piece: torch.Tensor | None) -> None:
        self._pool, self._piece, self._used = pool, piece, 0

    def copy(self, part: Any) -> Any:
        """Starts copying a tensor to the host; whatever is on the host already is returned as it is."""
        if not isinstance(part, torch.Tensor) or part.device.type == "cpu":
            return part
        return self.room(part).copy_(part, non_blocking=True)

    def room(self, part: torch.Tensor) -> torch.Tensor:
        """Returns an uninitialized tensor like this one, in the batch's memory while it lasts."""
        size = part.numel() * part.element_size()
        if self._piece is None and self._pool.needed:
            self._piece = torch.empty(self._pool.needed, dtype=torch.uint8, pin_memory=self._pool.pinned)
        start = self._used
        self._used = start + -(-size // _ALIGNMENT) * _ALIGNMENT
        self._pool.needed = max(self._pool.needed, self._used)
        if self._piece is None or self._used > len(self._piece):
            return torch.empty(part.shape, dtype=part.dtype, pin_memory=self._pool.pinned)
        return self._piece[start : start + size].view(part.dtype).view(part.shape)

    def release(self) -> None:
        """Lets another batch use the memory; what was copied must not be read any more."""
        if self._piece is not None:
            self._pool.give_back(self._piece)
            self._piece = None
