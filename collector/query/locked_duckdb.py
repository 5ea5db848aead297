"""A DuckDB that opens the files it is given and nothing else.

Guarantees: no statement reads another file, lists a folder, goes to the network, loads an extension, sees a variable of
Python or changes a setting; what does not fit into memory goes to a folder of its own below the system's temporary one.
Files of an object store are read through `objectfiles`, which cannot write. Of local files one thing is left to a
statement that means harm: to write over the very files that it may read; `Run.sql` refuses such statements.
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
"""At least: threads that read an object store wait most of the time."""
_mounted: weakref.WeakKeyDictionary[duckdb.DuckDBPyConnection, list[str]] = weakref.WeakKeyDictionary()
"""Protocols of the file systems that a connection has."""


def connect(
    paths: Iterable[str], mounts: Sequence[RunFiles] = (), memory_limit: str | None = None
) -> duckdb.DuckDBPyConnection:
    """A locked DuckDB in memory.

    Args:
        paths: the files that it may open, spelled as statements spell them.
        mounts: file systems of those that are on an object store, `PROTOCOL://NAME`.
        memory_limit: what it may take, for example 4GB (default: 80 % of the machine's memory).
    """
    connection = _open(threads=_REMOTE_THREADS if mounts else 1)
    if memory_limit is not None:
        connection.execute("set memory_limit = $limit", {"limit": memory_limit})
    if mounts:
        connection.execute(
            "set enable_external_file_cache = false"
        )  # `objectfiles` has one that knows they never change
        _mounted[connection] = [files.protocol for files in mounts]
    for files in mounts:
        connection.register_filesystem(files)
    _lock(connection, paths)
    return connection


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """What DuckDB cannot do, as a ValueError of one line.

    Raises:
        ValueError: any error of DuckDB, or of reading an object store inside it.
    """
    try:
        yield
    except duckdb.Error as error:
        lines = str(error).strip().splitlines()
        # An error inside our file system arrives with its traceback, whose last line says what happened.
        raise ValueError(lines[-1 if lines[0].startswith("Traceback") else 0]) from error


def _open(threads: int = 1) -> duckdb.DuckDBPyConnection:
    """A DuckDB in memory, with this many threads at least."""
    config: dict[str, str | bool | int | float | list[str]] = {
        "python_enable_replacements": False,
        "autoinstall_known_extensions": False,
        "autoload_known_extensions": False,
        "allow_community_extensions": False,
        # By default it is `.tmp` in the current folder. DuckDB makes it when it needs it, and removes it.
        "temp_directory": str(Path(tempfile.gettempdir(), f"collector-{uuid.uuid4().hex}")),
    }
    connection = duckdb.connect(":memory:", config=config)
    if threads > connection.execute("select current_setting('threads')").fetchall()[0][0]:
        connection.execute(f"set threads = {threads}")
    return connection


def _lock(connection: duckdb.DuckDBPyConnection, paths: Iterable[str]) -> None:
    """From here on these files can be opened and nothing else, and no statement can change that."""
    connection.execute("set allowed_paths = $paths", {"paths": sorted(paths)})
    connection.execute("set enable_external_access = false")
    connection.execute("set lock_configuration = true")


@atexit.register
def _unmount_all() -> None:
    """Else DuckDB's binding complains of leaks on standard error when the interpreter ends."""
    for connection, protocols in list(_mounted.items()):
        for protocol in protocols:
            with contextlib.suppress(duckdb.Error):
                connection.unregister_filesystem(protocol)
