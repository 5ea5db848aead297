"""Decides what kind a file is, from its name and from its first bytes.

The name decides among kinds of text. The first bytes decide about everything that is not text, whatever the name:
Parquet, Arrow, gzip and Zstandard are read as what they are, and other binaries are refused by their name.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import re
import sys
import zlib
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import BinaryIO

HEAD = 4096
"""Bytes that are looked at."""
_LONGEST_LINE = 64 << 20
KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".parq": "parquet",
    ".pq": "parquet",
    ".arrow": "arrow",
    ".feather": "arrow",
    ".ipc": "arrow",
    ".txt": "txt",
}
COMPRESSIONS = {".gz": "gz", ".gzip": "gz", ".zst": "zst", ".zstd": "zst"}
BINARY = ("parquet", "arrow")
"""Kinds that are read by range, never through a compression."""
_ARCHIVES = (".tar", ".tgz", ".zip", ".7z")
_CLOSED = (*_ARCHIVES, ".bz2", ".xz", ".lz4", ".br")
_PACKED = {b"\x1f\x8b": "gz", b"\x28\xb5\x2f\xfd": "zst"}
_READ = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
_REFUSED = {
    b"PK\x03\x04": "a zip archive (or an Office or NumPy file)",
    b"BZh": "compressed with bzip2",
    b"\xfd7zXZ": "compressed with xz",
    b"\x04\x22\x4d\x18": "compressed with lz4",
    b"7z\xbc\xaf": "a 7z archive",
    b"%PDF": "a PDF document",
    b"SQLite format 3": "an SQLite database",
    b"\x93NUMPY": "a NumPy array",
    b"\x89HDF": "an HDF5 file",
    b"Obj\x01": "an Avro file",
    b"ORC": "an ORC file",
    b"\x80\x02": "a pickle",
    b"\x80\x03": "a pickle",
    b"\x80\x04": "a pickle",
    b"\x80\x05": "a pickle",
}
"""First bytes -> what such a file is."""
_MARKS = (b"\xff\xfe", b"\xfe\xff", b"\x00\x00\xfe\xff")
"""Byte order marks of UTF-16 and UTF-32, which the formats name themselves."""


def file_name(location: str) -> PurePosixPath:
    """Returns the last part of a path or URL."""
    path = location.partition("?")[0] if location.startswith("http") else location
    return PurePosixPath(PurePosixPath(path).name)


def endings(location: str) -> tuple[str, str]:
    """Returns the endings of a file's name that tell its format and its compression; empty where there are none."""
    path = PurePosixPath(file_name(location).name.lower())
    packing = path.suffix if path.suffix in COMPRESSIONS else ""
    return (path.with_suffix("") if packing else path).suffix, packing


def is_known(location: str) -> bool:
    """Whether the extensions of a file's name denote a known kind."""
    return endings(location)[0] in KINDS


def kind_of(location: str, open_file: Callable[[], BinaryIO]) -> str:
    """Returns the kind of a file: `jsonl`, `csv.gz`, `arrow` …; plain text if nothing says otherwise.

    Raises:
        ValueError: it is an archive, a binary that is not read, or text in another encoding than UTF-8.
    """
    suffix, packing = endings(location)
    compression = COMPRESSIONS.get(packing, "")
    if suffix in _CLOSED:
        remedy = "extract it" if suffix in _ARCHIVES else "decompress it, or compress it with gzip or zstd"
        raise ValueError(f"{location}: {suffix} files are not supported; {remedy}")
    with open_file() as file:
        head = file.read(HEAD)
    packed = next((kind for magic, kind in _PACKED.items() if head.startswith(magic)), "")
    if compression and not packed and head and _is_text(head):
        compression = ""  # called .gz, but never compressed
    compression = packed or compression
    if packed:
        head = _unpacked(head, packed)
    kind = KINDS.get(suffix, "txt")
    if found := next((kind for magic, kind in _READ.items() if head.startswith(magic)), None):
        kind = found
    if kind in BINARY:
        if compression:
            raise ValueError(
                f"{location}: {kind} files compress their own columns and are read by range: decompress it"
            )
        return kind
    _refuse_binary(location, head, is_text=suffix in KINDS)
    if suffix not in KINDS and _is_object(head.partition(b"\n")[0]):
        kind = "jsonl"
    if suffix == ".json" or head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"["):
        if kind == "jsonl" and b"\n" not in head and len(head) == HEAD:
            head = _two_lines(open_file, compression)
        kind = _json_kind(kind, head)
    return f"{kind}.{compression}" if compression else kind


def _unpacked(head: bytes, compression: str) -> bytes:
    """Returns the first bytes of a compressed file's content, as far as they can be had."""
    try:
        if compression == "gz":
            return zlib.decompressobj(wbits=16 + zlib.MAX_WBITS).decompress(head, HEAD)
        return bytes(zstd.ZstdDecompressor().decompress(head, HEAD))
    except (zlib.error, zstd.ZstdError):  # told where its rows are located
        return b""


def _two_lines(open_file: Callable[[], BinaryIO], compression: str) -> bytes:
    """Returns the first line of a file, and the beginning of the next one."""
    with contextlib.ExitStack() as opened:
        file: Any = opened.enter_context(open_file())
        if compression:
            unpacked: Any = gzip.GzipFile(fileobj=file) if compression == "gz" else zstd.ZstdFile(file)
            file = opened.enter_context(unpacked)
        try:
            return bytes(file.readline(_LONGEST_LINE)) + bytes(file.read(64))
        except (OSError, EOFError, zlib.error, zstd.ZstdError):  # told where its rows are located
            return b""


def _is_text(head: bytes) -> bool:
    """Whether these bytes can be the beginning of a text in UTF-8."""
    try:
        head[: len(head) - 3 if len(head) == HEAD else None].decode()
    except UnicodeDecodeError as error:
        return len(head) == HEAD and error.start > HEAD - 8  # cut within a character
    return b"\0" not in head


def _refuse_binary(location: str, head: bytes, *, is_text: bool) -> None:
    """Refuses what is no text; of a file that is called text only what is certainly something else."""
    for magic, what in _REFUSED.items():
        if head.startswith(magic) and (b"\0" in head or not _is_text(head)):
            raise ValueError(f"{location} is {what}, which is not read: extract or convert it")
    if head[257:262] == b"ustar":
        raise ValueError(f"{location} is a tar archive, which is not read: extract it")
    if b"\0" not in head or head.startswith(_MARKS):
        return
    even, odd = head[::2].count(0), head[1::2].count(0)
    if len(head) >= 64 and max(even, odd) > 0.4 * (len(head) // 2) and min(even, odd) < 0.1 * len(head):
        order = "BE" if even > odd else "LE"
        raise ValueError(
            f"{location} is UTF-16 without a byte order mark: convert it to UTF-8 (iconv -f UTF-16{order} -t UTF-8)"
        )
    if not is_text:
        raise ValueError(
            f"{location} is binary, and neither Parquet nor Arrow nor compressed text: convert it, or give it the "
            "ending of its format"
        )


def _json_kind(kind: str, head: bytes) -> str:
    """Returns `json` for a file that begins with one JSON value over several lines, and the kind itself otherwise."""
    content = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    first, newline, rest = content.partition(b"\n")
    if content.startswith(b"[") and kind == "jsonl":
        # An array in a line of JSON lines is a bad row; one array is a file.
        return "jsonl" if _is_value(first) and rest.strip() else "json"
    if kind != "jsonl" or not content.startswith(b"{"):
        return kind
    if not newline:
        return "json" if len(head) >= HEAD or _wraps_rows(first) else "jsonl"
    return "jsonl" if _is_value(first) and (rest.strip() or not _wraps_rows(first)) else "json"


def _is_value(line: bytes) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        # A complete line may still be bad; one that ends inside of a value is a part of it.
        return not re.fullmatch(rb"\s*[\[{]\s*(\"[^\"]*\"\s*:?\s*[\[{]?\s*|.*,\s*|.*[\[{]\s*)?", line)
    return True


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _wraps_rows(line: bytes) -> bool:
    """Whether a JSON object holds an array of objects, and so may be a file of rows in one line."""
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and any(
        isinstance(rows, list) and rows and isinstance(rows[0], dict) for rows in value.values()
    )
