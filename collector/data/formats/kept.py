"""Keeps readers open from one span to the next.

To reach a shard in the middle of a gzip file or of a Parquet row group, everything before it must be
decoded. A replica that takes shards in order therefore leaves a shard's reader open at the place where
the next shard begins. A reader belongs to one thread between `take` and `put`. The few readers that
were put back last are kept; the others are closed.
"""

from __future__ import annotations

import atexit
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable


class Closeable(Protocol):
    """An object that can be closed."""

    def close(self) -> None:
        """Releases files and memory."""


Reader = TypeVar("Reader", bound=Closeable)


class Kept(Generic[Reader]):
    """Cache of the open readers of this process, at most `room` of them."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._readers: OrderedDict[Hashable, Reader] = OrderedDict()
        self._lock = threading.Lock()
        atexit.register(self.clear)

    def take(self, key: Hashable) -> Reader | None:
        """Removes and returns the reader under this key, or None; it now belongs to the caller alone."""
        with self._lock:
            return self._readers.pop(key, None)

    def put(self, key: Hashable, reader: Reader) -> None:
        """Keeps a reader for the next span, and closes the oldest ones beyond the limit."""
        with self._lock:
            leaving = [self._readers.pop(key)] if key in self._readers else []
            self._readers[key] = reader
            while len(self._readers) > self._room:
                leaving.append(self._readers.popitem(last=False)[1])
        for each in leaving:
            each.close()

    def clear(self) -> None:
        """Closes all readers."""
        with self._lock:
            leaving = list(self._readers.values())
            self._readers.clear()
        for each in leaving:
            each.close()
