"""Collect the routing of Mixture-of-Experts models over whole datasets, and query it in SQL.

This is the entry point of the command line. It has tyro parse the arguments, runs the command, and reports an error in
one line. Exit status: 0 done, 1 the run is incomplete or unsound, 2 unusable input, 130 interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import tyro

from collector.commands.collect import Collect, Intervene, Status, give_watch_its_seconds
from collector.commands.experts import Experts
from collector.commands.importing import Import
from collector.commands.look import Explore, Profile, Show, Trace
from collector.commands.models import Models, Quantize
from collector.commands.publish import Export, Report
from collector.commands.query import Query, Sql, Views, split_query_params
from collector.commands.sweep import Sweep
from collector.commands.test import Test
from collector.commands.upkeep import Gc, Map, Rollup, Verify, Weights

if TYPE_CHECKING:
    from collections.abc import Callable

_COMMANDS: dict[str, Callable[..., Any]] = {
    "collect": Collect,
    "sweep": Sweep,
    "import": Import,
    "query": Query,
    "test": Test,
    "sql": Sql,
    "views": Views,
    "status": Status,
    "intervene": Intervene,
    "verify": Verify,
    "rollup": Rollup,
    "weights": Weights,
    "map": Map,
    "gc": Gc,
    "show": Show,
    "profile": Profile,
    "trace": Trace,
    "explore": Explore,
    "export": Export,
    "experts": Experts,
    "report": Report,
    "quantize": Quantize,
    "models": Models,
}


def parse(arguments: list[str]) -> Any:
    """Parses command-line arguments into a command that is ready to run.

    Raises:
        ValueError: a query parameter has no value.
        SystemExit: the arguments ask for help or are invalid.
    """
    params: tuple[tuple[str, str], ...] = ()
    if arguments[:1] == ["query"]:
        arguments, params = split_query_params(arguments)
    if arguments[:1] == ["status"]:
        arguments = give_watch_its_seconds(arguments)
    description = (__doc__ or "").splitlines()[0]
    command = tyro.extras.subcommand_cli_from_dict(_COMMANDS, prog="collector", args=arguments, description=description)
    return dataclasses.replace(command, params=params) if isinstance(command, Query) else command


def _complain(command: Any, message: str, event: str) -> None:
    """Writes one line to standard error, in the format of the run's other messages; if nobody reads it, nothing."""
    line = f"collector: {message}\n"
    if isinstance(command, Collect | Sweep) and command.launch.log_format == "json":
        from collector.fleet.progress import json_line

        line = json_line(event, message=message)
    with contextlib.suppress(BrokenPipeError):
        sys.stderr.write(line)
        sys.stderr.flush()


def _take_every_character() -> None:
    """Has standard output and error escape what their encoding lacks, and drop everything if they were closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115  # for good
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _flush() -> None:
    """Flushes standard output; drops what nobody reads any more, because the end of the process would fail on it."""
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def main() -> None:
    """Runs the command line and exits."""
    command = None
    _take_every_character()
    try:
        command = parse(sys.argv[1:])
        status = command.run()
    except BrokenPipeError:
        status = 0
    except (ValueError, OSError, RuntimeError) as error:
        _complain(command, str(error), "error")
        status = 2
    except KeyboardInterrupt:
        resumes = isinstance(command, Collect | Sweep | Intervene | Import)
        hint = "; the same command resumes the run" if resumes else ""
        _complain(command, f"interrupted{hint}", "interrupted")
        status = 130
    _flush()
    sys.exit(status)


if __name__ == "__main__":
    main()
