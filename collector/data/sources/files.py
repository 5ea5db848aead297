"""Lists and opens files, local or behind a URL, and detects whether one has changed.

A local file is a path, everything else a URL. s3://, gs://, az:// and abfs:// go through obstore, so
that no cloud's own SDK is needed, all others (https://, hf://, memory:// …) through fsspec. Files
are opened for reading only and read by range, never downloaded whole.
"""

from __future__ import annotations

import functools
import hashlib
import os
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from typing import BinaryIO

_OBSTORE_PROTOCOLS = ("s3", "s3a", "gs", "gcs", "az", "azure", "abfs", "abfss", "adl")
_ETAGS = ("e_tag", "ETag", "etag", "blob_id")
_EDGE = 1 << 20

KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "txt",
}
COMPRESSIONS = {".gz": "gz", ".zst": "zst"}
_ARCHIVES = (".tar", ".tgz", ".zip", ".7z")
_CLOSED = (*_ARCHIVES, ".bz2", ".xz", ".lz4", ".br")


def is_url(location: str) -> bool:
    """Whether a location is not a local path."""
    return "://" in location


def absolute(location: str) -> str:
    """Returns a location that denotes the same file in every working directory."""
    location = location.removeprefix("file://")
    return location if is_url(location) else os.path.normpath(Path(location).expanduser().absolute())


def file_name(location: str) -> PurePosixPath:
    """Returns the last part of a path or URL."""
    path = location.partition("?")[0] if location.startswith("http") else location
    return PurePosixPath(PurePosixPath(path).name)


def kind_of(location: str) -> str:
    """Returns the kind of a file from the extensions of its name: `jsonl`, `csv.gz` …; plain text if unknown.

    Raises:
        ValueError: the file is an archive, or its compression is not supported.
    """
    path = PurePosixPath(file_name(location).name.lower())
    compression = COMPRESSIONS.get(path.suffix)
    inner = path.with_suffix("") if compression else path
    if inner.suffix in _CLOSED:
        remedy = "extract it" if inner.suffix in _ARCHIVES else "decompress it, or compress it with gzip or zstd"
        raise ValueError(f"{location}: {inner.suffix} files are not supported; {remedy}")
    kind = KINDS.get(inner.suffix, "txt")
    if compression and kind == "parquet":
        raise ValueError(f"{location}: Parquet compresses its own columns and is read by range; decompress the file")
    return f"{kind}.{compression}" if compression else kind


def is_known(location: str) -> bool:
    """Whether the extensions of a file's name denote a known kind."""
    path = PurePosixPath(file_name(location).name.lower())
    return (path.with_suffix("") if path.suffix in COMPRESSIONS else path).suffix in KINDS


@functools.cache
def _register(protocol: str) -> None:
    import obstore.fsspec

    obstore.fsspec.register(protocol)


def _filesystem(location: str) -> tuple[Any, str]:
    """Returns the fsspec file system of a location, and the path in it."""
    import fsspec

    protocol = location.partition("://")[0]
    if protocol in _OBSTORE_PROTOCOLS:
        _register(protocol)
    return fsspec.core.url_to_fs(location)


def _type(filesystem: Any, path: str) -> str | None:
    try:
        return filesystem.info(path)["type"]
    except FileNotFoundError:
        return None


def list_files(spec: str) -> list[str]:
    """Returns the files that a path, URL or glob denotes: absolute, sorted.

    Raises:
        ValueError: there are none, or the path is a folder.
    """
    if "::" in spec:
        raise ValueError(f"--data {spec}: files inside other files are not supported; extract them first")
    filesystem, path = _filesystem(absolute(spec))
    found = _type(filesystem, path)
    if found == "directory":
        or_hf = "" if is_url(spec) else f", or hf:{spec}"
        raise ValueError(f"--data {spec} is a folder: give a glob such as {spec.rstrip('/')}/*.jsonl{or_hf}")
    if found is None:
        paths = [name for name, info in filesystem.glob(path, detail=True).items() if info["type"] == "file"]
        if not paths:
            raise ValueError(f"--data {spec}: no file matches {absolute(spec)}")
        return sorted(absolute(filesystem.unstrip_protocol(name)) for name in paths)
    return [absolute(spec)]


def open_file(location: str, *, scattered: bool = False) -> BinaryIO:
    """Opens a file for reading by range.

    Args:
        location: absolute path or URL.
        scattered: whether reads are random access, so that reading ahead would be wasted.
    """
    if not is_url(location):
        return Path(location).open("rb")
    filesystem, path = _filesystem(location)
    return filesystem.open(path, "rb", **({"cache_type": "none"} if scattered else {}))


def fingerprint(location: str) -> str:
    """Returns a string that changes with a file's content: the store's own tag, else size and a hash of both ends.

    Raises:
        ValueError: a server does not report the file's length, so the file cannot be read by range.
    """
    if is_url(location):
        filesystem, path = _filesystem(location)
        info = filesystem.info(path)
        if info.get("size") is None:
            raise ValueError(f"{location}: the server cannot be read from the middle of a file; download it first")
        if tag := next((info[key] for key in _ETAGS if info.get(key)), None):
            return f"etag:{tag}"
    with open_file(location) as file:
        size = file.seek(0, os.SEEK_END)
        digest = hashlib.sha256()
        for start in (0, max(0, size - _EDGE)):
            file.seek(start)
            digest.update(file.read(_EDGE))
    return f"size:{size}-sha256:{digest.hexdigest()}"
