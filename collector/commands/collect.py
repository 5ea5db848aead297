"""`collector collect` makes a run, `collector status` tells how far it is.

Both answer 0 for a complete run and 1 for an incomplete one.
"""

from __future__ import annotations

import dataclasses
import sys

import tyro

from collector.commands.arguments import RunPath
from collector.config import CaptureConfig, DataConfig, LaunchConfig, ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collect:
    """Run a model over documents and record what its routers decide.

    Without arguments: the embedded demo model over held-out sentences of 60 languages, into
    runs/demo. The same command resumes an interrupted run.
    """

    out: str = "runs/demo"
    """The run directory: a local path or an object store's URL."""
    data: tyro.conf.OmitArgPrefixes[DataConfig] = dataclasses.field(default_factory=DataConfig)
    model: tyro.conf.OmitArgPrefixes[ModelConfig] = dataclasses.field(default_factory=ModelConfig)
    capture: tyro.conf.OmitArgPrefixes[CaptureConfig] = dataclasses.field(default_factory=CaptureConfig)
    launch: tyro.conf.OmitArgPrefixes[LaunchConfig] = dataclasses.field(default_factory=LaunchConfig)

    def run(self) -> int:
        """Collects, then says what there is."""
        from collector.fleet import driver
        from collector.look import terminal

        run = driver.collect(self.out, data=self.data, model=self.model, capture=self.capture, launch=self.launch)
        return 0 if terminal.status(run) else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """Tell how far a run is, what it skipped and what failed."""

    run_: RunPath
    """The run directory."""
    watch: float | None = None
    """Look again every so many seconds (5 if none are given), until the run is complete or all that is left failed."""
    summary: bool = False
    """Write a paragraph and a table for a paper's appendix instead, in Markdown."""

    def __post_init__(self) -> None:
        """Refuses a look that never comes."""
        if self.watch is not None and self.watch <= 0:
            raise ValueError(f"--watch takes seconds, got {self.watch}")

    def run(self) -> int:
        """Prints the status; 1 if the run is incomplete."""
        from collector.look import summary, terminal
        from collector.store.run_directory import RunDirectory

        run = RunDirectory(self.run_)
        if self.summary:
            text, complete = summary.summarize(run)
            sys.stdout.write(text)
        else:
            complete = terminal.status(run) if self.watch is None else terminal.watch(run, self.watch)
        return 0 if complete else 1


def give_watch_its_seconds(arguments: list[str]) -> list[str]:
    """Puts 5 behind a `--watch` without a number: parsers know options with a value and options without."""
    given = []
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
        given.append(argument)
        if argument == "--watch" and not after.replace(".", "", 1).removeprefix("-").isdecimal():
            given.append("5")
    return given
