"""Opens a DuckDB that can read the given files and nothing else.

Guarantees: no statement reads another file, lists a folder, accesses the network, loads an extension, sees a variable
of Python or changes a setting; data that does not fit into memory spills to a separate folder below the system's
temporary one. Files of an object store are read through `store.remote_files`, which cannot write. A malicious statement
could still overwrite the local files that it may read; `Run.sql` rejects such statements.
"""

from __future__ import annotations

import atexit
import contextlib
import tempfile
import uuid
import weakref
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from collector.store.remote_files import RunFiles

__all__ = ["connect", "one_line_errors"]

_REMOTE_THREADS = 16
"""Minimum number of threads for object stores, because they wait most of the time."""
_mounted: weakref.WeakKeyDictionary[duckdb.DuckDBPyConnection, list[str]] = weakref.WeakKeyDictionary()
"""Protocols of the file systems registered with each connection."""


def connect(
    paths: Iterable[str], mounts: Sequence[RunFiles] = (), memory_limit: str | None = None
) -> duckdb.DuckDBPyConnection:
    """Opens a locked in-memory DuckDB.

    Args:
        paths: the files that it may open, spelled as in statements.
        mounts: file systems for files on an object store, `PROTOCOL://NAME`.
        memory_limit: maximum memory, for example 4GB (default: 80 % of the machine's memory).
    """
    connection = _open(threads=_REMOTE_THREADS if mounts else 1)
    if memory_limit is not None:
        connection.execute("set memory_limit = $limit", {"limit": memory_limit})
    if mounts:
        connection.execute(
            "set enable_external_file_cache = false"
        )  # `RunFiles` has its own cache, which knows that the files never change
        _mounted[connection] = [files.protocol for files in mounts]
    for files in mounts:
        connection.register_filesystem(files)
    _lock(connection, paths)
    return connection


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turns errors of DuckDB into a ValueError of one line.

    Raises:
        ValueError: any error of DuckDB, or of reading an object store inside it.
    """
    try:
        yield
    except duckdb.Error as error:
        lines = str(error).strip().splitlines()
        # An error inside our file system arrives with a traceback, whose last line is the message.
        raise ValueError(lines[-1 if lines[0].startswith("Traceback") else 0]) from error


def _open(threads: int = 1) -> duckdb.DuckDBPyConnection:
    """Opens an in-memory DuckDB with at least this many threads."""
    config: dict[str, str | bool | int | float | list[str]] = {
        "python_enable_replacements": False,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "allow_community_extensions": False,
        # The default is `.tmp` in the current folder. DuckDB creates the folder when needed, and removes it.
        "temp_directory": str(Path(tempfile.gettempdir(), f"collector-{uuid.uuid4().hex}")),
    }
    connection = duckdb.connect(":memory:", config=config)
    if threads > connection.execute("select current_setting('threads')").fetchall()[0][0]:
        connection.execute(f"set threads = {threads}")
    return connection


def _lock(connection: duckdb.DuckDBPyConnection, paths: Iterable[str]) -> None:
    """Restricts the connection to these files; no statement can change that afterwards."""
    connection.execute("set allowed_paths = $paths", {"paths": sorted(paths)})
    connection.execute("set enable_external_access = false")
    connection.execute("set lock_configuration = true")


@atexit.register
def _unmount_all() -> None:
    """Unregisters all file systems at exit; otherwise DuckDB's binding reports leaks on standard error."""
    for connection, protocols in list(_mounted.items()):
        for protocol in protocols:
            with contextlib.suppress(duckdb.Error):
                connection.unregister_filesystem(protocol)
