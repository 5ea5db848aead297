"""What stays open from one span to the next.

A shard in the middle of a gzip file, or of a Parquet row group, is reached only through what lies
before it. A replica that takes shards in order therefore leaves the reader of one shard standing
where the next one begins. A reader belongs to one thread between `take` and `put`; the few that were
put back last are kept, the others are closed.
"""

from __future__ import annotations

import atexit
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Generic, Protocol, TypeVar

if TYPE_CHECKING:
    from collections.abc import Hashable


class Closeable(Protocol):
    """What can be closed."""

    def close(self) -> None:
        """Gives back files and memory."""


Reader = TypeVar("Reader", bound=Closeable)


class Kept(Generic[Reader]):
    """The readers of this process that stand ready, at most `room` of them."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._readers: OrderedDict[Hashable, Reader] = OrderedDict()
        self._lock = threading.Lock()
        atexit.register(self.clear)

    def take(self, key: Hashable) -> Reader | None:
        """The reader put back under this key, which now belongs to the caller alone."""
        with self._lock:
            return self._readers.pop(key, None)

    def put(self, key: Hashable, reader: Reader) -> None:
        """Keeps a reader for whoever reads on."""
        with self._lock:
            leaving = [self._readers.pop(key)] if key in self._readers else []
            self._readers[key] = reader
            while len(self._readers) > self._room:
                leaving.append(self._readers.popitem(last=False)[1])
        for each in leaving:
            each.close()

    def clear(self) -> None:
        """Closes all of them."""
        with self._lock:
            leaving = list(self._readers.values())
            self._readers.clear()
        for each in leaving:
            each.close()
