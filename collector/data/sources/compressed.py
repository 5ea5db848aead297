"""Reads text files compressed with gzip or Zstandard as if they were decompressed: `.gz`, `.zst`.

Several members or frames in one file are concatenated. Such a file cannot be entered in the middle:
planning decompresses it once to count its rows, and reading rows decompresses everything before
them. So a process keeps the last few files open where it stopped reading: if it takes shards in
order it decompresses a file about once, and it starts over only to go back. The fingerprint is that
of the compressed file.

Guarantees: reads give the same bytes in any order. Memory is bounded: the first and the current MiB
of a file, and what the decompressor itself needs. A file that is truncated or fails its checksum
gives all bytes up to there (except the last 16 KiB before a wrong one), then `DamagedError`; the place depends on
the file alone. Corrupt bytes that still decompress are detected by the checksum at the end of their
member, when the rows before have already been read.
"""

from __future__ import annotations

import functools
import io
import sys
import zlib
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from collector.data.formats.base import DamagedError
from collector.data.formats.kept import Kept

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

_PACKED = 64 << 10
_STEP = 16 << 10
# At least the size of a line reader's reads, so that the next row begins in the current block.
_BLOCK = 1 << 20
_KEPT_FILES = 4

_UNPACKERS: dict[str, Callable[[], Any]] = {
    "gz": functools.partial(zlib.decompressobj, wbits=16 + zlib.MAX_WBITS),
    "zst": zstd.ZstdDecompressor,
}
_ERRORS = (zlib.error, zstd.ZstdError)


def _unpack(file: BinaryIO, compression: str) -> Iterator[bytes]:
    """Yields the content of all members or frames, in pieces of at most `_STEP` bytes.

    Raises:
        DamagedError: after everything that could be decompressed.
    """
    packed = file.read(_PACKED)
    while packed:
        unpacker = _UNPACKERS[compression]()
        while not unpacker.eof:
            try:
                piece = unpacker.decompress(packed, _STEP)
            except _ERRORS as error:
                raise DamagedError(str(error)) from error
            # zlib returns its unconsumed input, zstd keeps it.
            packed = getattr(unpacker, "unconsumed_tail", b"")
            if piece:
                yield piece
            elif not packed and not unpacker.eof and not (packed := file.read(_PACKED)):
                raise DamagedError("it ends too early")
        packed = unpacker.unused_data or file.read(_PACKED)
        # Tapes and block devices pad with zeros, which no member starts with: like gzip, skip them.
        while compression == "gz" and packed and not (packed := packed.lstrip(b"\0")):
            packed = file.read(_PACKED)


class _Stream:
    """A compressed file that is decompressed from its start; holds the first and the current block."""

    def __init__(self, open_packed: Callable[[], BinaryIO], location: str, compression: str) -> None:
        self._open, self._location, self._compression = open_packed, location, compression
        self._file: BinaryIO | None = None
        self._head = b""
        self._rewind()

    def _rewind(self) -> None:
        self._begin, self._block = 0, b""
        self._pieces: Iterator[bytes] | None = None
        self._damage = ""

    def close(self) -> None:
        """Closes the file; a later read starts over."""
        self._rewind()
        if self._file is not None:
            self._file.close()
            self._file = None

    def read_at(self, position: int, size: int) -> bytes:
        """Returns up to `size` bytes from `position` on, and at least one unless the content ends there.

        Raises:
            DamagedError: nothing from `position` on can be decompressed.
        """
        if position < len(self._head):
            return self._head[position : position + size]
        if position < self._begin:
            self.close()
        while position >= self._begin + len(self._block):
            block = self._next_block()
            if not block:
                return b""
            self._begin, self._block = self._begin + len(self._block), block
            self._head = self._head or block
        start = position - self._begin
        return self._block[start : start + size]

    def _next_block(self) -> bytes:
        try:
            block = self._unpack_block()
        except BaseException:
            # An interrupted decompressor must not be mistaken for one at its end.
            self.close()
            raise
        if not block and self._damage:
            raise DamagedError(self._damage)
        return block

    def _unpack_block(self) -> bytes:
        if self._pieces is None:
            self._file = self._open()
            self._pieces = _unpack(self._file, self._compression)
        block = bytearray()
        try:
            while len(block) < _BLOCK and (piece := next(self._pieces, b"")):
                block += piece
        except DamagedError as error:
            place = self._begin + len(self._block) + len(block)
            self._damage = (
                f"{self._location} is damaged: {error}; it cannot be unpacked beyond byte {place} of its content. "
                f"The rows before are read, the others are lost: fetch or write the file anew"
            )
        return bytes(block)


_kept: Kept[_Stream] = Kept(_KEPT_FILES)


class _Unpacked(io.RawIOBase):
    """File object with one reader's position in a stream."""

    def __init__(self, stream: _Stream, key: tuple[str, str] | None) -> None:
        self._stream, self._key, self._position = stream, key, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        if whence != io.SEEK_SET:
            raise io.UnsupportedOperation("the length of a compressed file is not known before its end")
        self._position = offset
        return offset

    def read(self, size: int = -1, /) -> bytes:
        if size < 0:
            return self.readall()
        data = self._stream.read_at(self._position, size)
        self._position += len(data)
        return data

    def readinto(self, buffer: Any, /) -> int:
        data = self.read(len(buffer))
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            if self._key is None:
                self._stream.close()
            else:
                _kept.put(self._key, self._stream)
        super().close()


def open_unpacked(
    open_packed: Callable[[], BinaryIO], location: str, compression: str, version: str | None = None
) -> BinaryIO:
    """Opens a compressed file for reading its decompressed content; reads may return fewer bytes than requested.

    Args:
        open_packed: opens the compressed file.
        location: absolute path or URL.
        compression: `gz` or `zst`.
        version: fingerprint of the file, under which this process keeps it open after `close`; None to really
            close it.
    """
    key = None if version is None else (location, version)
    stream = None if key is None else _kept.take(key)
    return cast("BinaryIO", _Unpacked(stream or _Stream(open_packed, location, compression), key))
