"""A read-only fsspec file system, `run://`, through which DuckDB reads the committed files of a remote run.

DuckDB's own reader of object stores is an extension that it downloads. This one needs no download, uses the credentials
that wrote the run, and shows only the files that it is given. It reads ranges, rounded to blocks: neighbouring blocks
come in one request and stay in memory, so that a footer is fetched once, and a column that no query reads is never
fetched.

Guarantees: it writes and lists nothing. Threads may share an open file, because each has its own position (DuckDB
seeks and reads in two steps). Committed files never change, so it never looks for changes.
"""

from __future__ import annotations

import datetime
import io
import itertools
import threading
from collections import OrderedDict
from typing import TYPE_CHECKING, Any

import fsspec

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from collector.store.run_directory import ObjectStore

PROTOCOL = "run"
OTHER_PROTOCOL = "other"
BLOCK = 64 * 2**10
"""Bytes. One expert's column in a row group takes some 20 to 100 KB, and a column that is not read lies between."""
CACHED_BLOCKS = 4096
_LONG_AGO = datetime.datetime(2000, 1, 1, tzinfo=datetime.UTC)


class BlockCache:
    """A thread-safe cache of the most recently used blocks of a store's files."""

    def __init__(self, store: ObjectStore, sizes: Mapping[str, int], capacity: int = CACHED_BLOCKS) -> None:
        """Reads nothing yet.

        Args:
            store: where the files are.
            sizes: bytes of each file.
            capacity: blocks that are kept.
        """
        self.store = store
        self.sizes = sizes
        self._capacity = capacity
        self._blocks: OrderedDict[tuple[str, int], bytes] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, name: str, start: int, end: int) -> bytes:
        """The bytes of a file from `start` to before `end`; both lie within the file."""
        if start >= end:
            return b""
        wanted = range(start // BLOCK, (end - 1) // BLOCK + 1)
        with self._lock:
            found = {index: self._blocks[name, index] for index in wanted if (name, index) in self._blocks}
        found |= self._fetch(name, [index for index in wanted if index not in found])
        self._keep(name, found)
        joined = b"".join(found[index] for index in wanted)
        return joined[start - wanted[0] * BLOCK : end - wanted[0] * BLOCK]

    def _fetch(self, name: str, missing: list[int]) -> dict[int, bytes]:
        runs = [(run[0], run[-1] + 1) for run in _consecutive(missing)]
        ranges = [(first * BLOCK, min(last * BLOCK, self.sizes[name])) for first, last in runs]
        fetched = self.store.read_ranges(name, ranges) if ranges else []
        return {
            first + i: data[i * BLOCK : (i + 1) * BLOCK]
            for (first, last), data in zip(runs, fetched, strict=True)
            for i in range(last - first)
        }

    def _keep(self, name: str, blocks: Mapping[int, bytes]) -> None:
        with self._lock:
            for index, data in blocks.items():
                self._blocks[name, index] = data
                self._blocks.move_to_end((name, index))
            while len(self._blocks) > self._capacity:
                self._blocks.popitem(last=False)


def _consecutive(numbers: Iterable[int]) -> list[list[int]]:
    groups = itertools.groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])
    return [[number for _, number in group] for _, group in groups]


class RangeFile(io.RawIOBase):
    """A file of a block cache, open for reading."""

    def __init__(self, cache: BlockCache, name: str) -> None:
        self._cache = cache
        self._name = name
        self._size = cache.sizes[name]
        self._own = threading.local()

    def readable(self) -> bool:
        """Always true."""
        return True

    def seekable(self) -> bool:
        """Always true."""
        return True

    def tell(self) -> int:
        """The position at which the calling thread reads next."""
        return getattr(self._own, "position", 0)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Moves the calling thread's position."""
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self.tell(), io.SEEK_END: self._size}[whence]
        self._own.position = max(0, start + offset)
        return self._own.position

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer, or as much of it as the file has left."""
        start = self.tell()
        data = self._cache.read(self._name, start, min(start + len(buffer), self._size))
        buffer[: len(data)] = data
        self._own.position = start + len(data)
        return len(data)


class RunFiles(fsspec.AbstractFileSystem):
    """A file system of the files that it is given, and no others."""

    protocol = PROTOCOL
    cachable = False  # codespell:ignore cachable
    """One per opened run; fsspec would share it between runs."""

    def __init__(self, store: ObjectStore, sizes: Mapping[str, int]) -> None:
        """Reads nothing yet.

        Args:
            store: where the files are.
            sizes: name relative to the run directory -> bytes.
        """
        super().__init__()
        self._cache = BlockCache(store, sizes)

    def _open(self, path: str, mode: str = "rb", **_: Any) -> RangeFile:
        if mode != "rb":
            raise PermissionError(f"{path}: the files of a run are only read")
        return RangeFile(self._cache, self.info(path)["name"])

    def info(self, path: str, **_: Any) -> dict[str, Any]:
        """Name and size of a file; FileNotFoundError for any that was not named."""
        name = str(self._strip_protocol(path))
        if name not in self._cache.sizes:
            raise FileNotFoundError(f"{path}: the run has no such committed file")
        return {"name": name, "size": self._cache.sizes[name], "type": "file"}

    def glob(self, path: str, **_: Any) -> list[str]:
        """The file of exactly this name: patterns mean nothing here."""
        name = str(self._strip_protocol(path))
        return [name] if name in self._cache.sizes else []

    def modified(self, path: str) -> datetime.datetime:
        """Long ago: committed files do not change."""
        self.info(path)
        return _LONG_AGO


class OtherRunFiles(RunFiles):
    """The files of the other run of a comparison, in the same DuckDB: `other://`."""

    protocol = OTHER_PROTOCOL
