"""Puts the points of `faults` into a process of the collector, from outside.

Functions are wrapped when their module is imported: the few that the protocol consists of (`plan.read_shard`,
`Capture.run`, `ParquetWriter.write_table`, the writing methods of `LocalStore`, `Replica.collect`) and below them
the system calls that make a name durable (`os.fsync`, `os.link`, `os.rename`) on paths of the run. Each becomes two
points, NAME.before and NAME.after. The product has no hook for any of this.
"""

from __future__ import annotations

import functools
import importlib.abc
import importlib.util
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.chaos.faults import Board

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from importlib.machinery import ModuleSpec
    from types import ModuleType

FOLDERS = {"commits": "commit", "failures": "failure"}
"""Folder of the run -> how points call the files in it; any other file is called by its own name."""


class AfterImport(importlib.abc.MetaPathFinder):
    """Calls a function with a module right after the module was executed for the first time."""

    def __init__(self, patches: dict[str, Callable[[ModuleType], None]]) -> None:
        self.patches = patches

    def find_spec(self, name: str, path: Any, target: ModuleType | None = None) -> ModuleSpec | None:  # noqa: ARG002
        """See `MetaPathFinder`; finds what the other finders find."""
        patch = self.patches.pop(name, None)
        spec = importlib.util.find_spec(name) if patch else None
        if patch is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            patch(module)

        spec.loader.exec_module = exec_module
        return spec


def install() -> None:
    """Wraps everything, in the process of a driver or of a replica."""
    board, root = Board(Path(os.environ["CHAOS_BOARD"])), os.environ["CHAOS_ROOT"]
    patches: dict[str, Callable[[ModuleType], None]] = {
        "collector.data.plan": lambda module: setattr(module, "read_shard", _reading(board, module.read_shard)),
        "collector.models.loading": lambda module: setattr(
            module, "load", _between(board, module.load, lambda *_: "load")
        ),
        "collector.capture.hooks": lambda module: _wrap(board, module.Capture, "run", lambda *_: "forward"),
        "pyarrow.parquet.core": lambda module: _wrap(
            board, module.ParquetWriter, "write_table", lambda writer, *_: _below(root, writer.where, "write")
        ),
        "collector.store.local_store": lambda module: _wrap_store(board, module.LocalStore),
        "collector.replica.replica": lambda module: _wrap_replica(board, module.Replica),
    }
    sys.meta_path.insert(0, AfterImport(patches))
    os.fsync = _between(board, os.fsync, lambda file: _below(root, f"/proc/self/fd/{file}", "fsync"))
    os.link = _between(board, os.link, lambda _, target: _below(root, target, "link"))
    os.rename = _between(board, os.rename, lambda _, target: _below(root, target, "rename"))


def _below(root: str, path: Any, name: str) -> str | None:
    """The point's name if a path is that of a part or of a commit record, finished or not."""
    if not isinstance(path, (str, os.PathLike)):
        return None
    real = os.path.realpath(path)
    return name if real.startswith((f"{root}/data", f"{root}/commits", f"{root}/.scratch")) else None


def _between(board: Board, function: Callable[..., Any], name: Callable[..., str | None]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        point = name(*args)
        if point is None:
            return function(*args, **kwargs)
        shard = next((found for arg in args if (found := getattr(arg, "shard", None)) is not None), None)
        board.visit(f"{point}.before", shard)
        result = function(*args, **kwargs)
        board.visit(f"{point}.after", shard)
        return result

    return wrapped


def _wrap(board: Board, owner: type, method: str, name: Callable[..., str | None]) -> None:
    setattr(owner, method, _between(board, getattr(owner, method), name))


def _reading(board: Board, read_shard: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    @functools.wraps(read_shard)
    def wrapped(shard: Any, *args: Any, **kwargs: Any) -> Iterator[Any]:
        board.visit("read.before", shard.shard)
        yield from read_shard(shard, *args, **kwargs)
        board.visit("read.after", shard.shard)

    return wrapped


def _wrap_store(board: Board, store: type) -> None:
    def file(_: Any, name: str, *__: Any) -> str:
        return FOLDERS.get(name.partition("/")[0], name)

    _wrap(board, store, "put_new", file)
    _wrap(board, store, "put", file)
    _wrap(board, store, "publish", lambda _, __, name: f"publish.{name.split('.')[-2]}")


def _wrap_replica(board: Board, replica: type) -> None:
    board.enter()
    collect = replica.collect

    @functools.wraps(collect)
    def wrapped(self: Any, shard: Any, *args: Any, **kwargs: Any) -> Any:
        commit = collect(self, shard, *args, **kwargs)
        board.visit("answer.before", shard.shard)
        return commit

    replica.collect = wrapped
