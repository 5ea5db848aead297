"""Text files behind gzip and Zstandard, read as if they were unpacked: `.gz`, `.zst`.

Several members or frames in one file are one text. Such a file cannot be entered in the middle:
planning unpacks it once to count its rows, and whoever reads rows of it unpacks all that lies before
them. So a process keeps the last few files open where it stopped reading: one that takes shards in
order unpacks a file about once, and only one that goes back begins anew. The fingerprint is that of
the compressed file.

Guarantees: the same bytes whatever the order of reading. Memory is bounded: the first and the
current MiB of a file, and what the unpacker itself needs. A file that is cut off, or fails its
check, gives all bytes up to there (but for the last 16 KiB before a wrong one), then `DamagedError`; where that
happens depends on the file alone. Bad bytes that still unpack are noticed by the checksum, that is at
the end of their member: the rows before were then read.
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
# At least what a reader of lines asks for at once: the next row then begins in the block that is at hand.
_BLOCK = 1 << 20
_KEPT_FILES = 4

_UNPACKERS: dict[str, Callable[[], Any]] = {
    "gz": functools.partial(zlib.decompressobj, wbits=16 + zlib.MAX_WBITS),
    "zst": zstd.ZstdDecompressor,
}
_ERRORS = (zlib.error, zstd.ZstdError)


def _unpack(file: BinaryIO, compression: str) -> Iterator[bytes]:
    """The content of all members or frames, in pieces of at most `_STEP` bytes.

    Raises:
        DamagedError: after all that could be unpacked.
    """
    packed = file.read(_PACKED)
    while packed:
        unpacker = _UNPACKERS[compression]()
        while not unpacker.eof:
            try:
                piece = unpacker.decompress(packed, _STEP)
            except _ERRORS as error:
                raise DamagedError(str(error)) from error
            # zlib gives back what it has not looked at yet, zstd keeps it.
            packed = getattr(unpacker, "unconsumed_tail", b"")
            if piece:
                yield piece
            elif not packed and not unpacker.eof and not (packed := file.read(_PACKED)):
                raise DamagedError("it ends too early")
        packed = unpacker.unused_data or file.read(_PACKED)
        # Tapes and block devices fill up with zeros, which begin no member: gzip passes over them too.
        while compression == "gz" and packed and not (packed := packed.lstrip(b"\0")):
            packed = file.read(_PACKED)


class _Stream:
    """A compressed file as it is unpacked, from its start: the first block, and the block where it stands."""

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
        """Closes the file; reading would begin anew."""
        self._rewind()
        if self._file is not None:
            self._file.close()
            self._file = None

    def read_at(self, position: int, size: int) -> bytes:
        """Up to `size` bytes from `position` on, at least one unless the content ends there.

        Raises:
            DamagedError: nothing behind `position` can be unpacked.
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
            # An unpacker that was interrupted must not be taken for one that is at its end.
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
    """One reader's place in a stream."""

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
    """Opens a compressed file as what it holds; a read may give fewer bytes than were asked for.

    Args:
        open_packed: opens the compressed file.
        location: absolute path or URL.
        compression: `gz` or `zst`.
        version: fingerprint of the file, under which it stays open in this process after it was closed; None if
            nobody will read on.
    """
    key = None if version is None else (location, version)
    stream = None if key is None else _kept.take(key)
    return cast("BinaryIO", _Unpacked(stream or _Stream(open_packed, location, compression), key))
