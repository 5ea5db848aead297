"""`collector collect` makes a run, `collector intervene` one with edits; `collector status` reports their progress.

All exit with 0 for a complete run, 1 for an incomplete one, and 2 for one without any document or, of `collect`, with
too few of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys

import tyro

from collector.commands.arguments import RunPath
from collector.config import CaptureConfig, DataConfig, LaunchConfig, ModelConfig, section


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collect:
    """Run a model over documents and record the decisions of its routers.

    Without arguments it runs the embedded demo model over held-out sentences of 60 languages and
    writes to runs/demo. To resume an interrupted run, repeat the same command.
    """

    out: str = "runs/demo"
    """The run directory: a local path or the URL of an object store."""
    data: tyro.conf.OmitArgPrefixes[DataConfig] = dataclasses.field(default_factory=DataConfig)
    model: tyro.conf.OmitArgPrefixes[ModelConfig] = dataclasses.field(default_factory=ModelConfig)
    capture: tyro.conf.OmitArgPrefixes[CaptureConfig] = dataclasses.field(default_factory=CaptureConfig)
    launch: tyro.conf.OmitArgPrefixes[LaunchConfig] = dataclasses.field(default_factory=LaunchConfig)

    def run(self) -> int:
        """Collects the run and prints its status.

        Raises:
            ValueError: settings, data or model are not usable, or too many rows were rejected.
        """
        from collector.fleet import driver
        from collector.fleet.rejected import complaint
        from collector.look import terminal
        from collector.store.totals import Totals

        run = driver.collect(self.out, data=self.data, model=self.model, capture=self.capture, launch=self.launch)
        totals, plan = Totals.of(run), terminal.read_plan(run)
        with contextlib.suppress(BrokenPipeError):  # nobody reads on, but the run is what it is
            terminal.status(run, totals)
        if said := complaint(totals.skipped, plan.documents, self.launch.max_rejected):
            raise ValueError(said)
        return 0 if len(totals.committed) == len(plan.shards) else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Intervene:
    """Measure what edits of the routing do to the model's predictions, over all documents of a run.

    Makes a run of its own with the same documents and model, in which each batch goes through the model as it is, and
    once more for every arm, a set of edits with a name. The query `expert_effect` tells the change of the loss and of
    the next token's distribution by arm and label. To resume an interrupted run, repeat the same command.

    Arms are rows with the columns arm, layer, expert, operation and, where they matter, stack and value: a CSV file, a
    SQL file over the views of the run, or one of queries/arms/ by its name: every_expert, language_experts,
    most_loaded. Operations are those of `collector trace --edit`.
    """

    run_: RunPath
    """The run whose documents and model are used: a local path or the URL of an object store."""
    arms: str
    """A file that ends with .csv or .sql, or the name of one of queries/arms/."""
    out: str
    """The run directory to write."""
    launch: tyro.conf.OmitArgPrefixes[LaunchConfig] = dataclasses.field(default_factory=LaunchConfig)

    def run(self) -> int:
        """Collects the effects and prints the run's status.

        Raises:
            FileNotFoundError: there is no run, or no such arms.
            ValueError: arms, data or model are not usable.
        """
        from collector.look import terminal
        from collector.query.arms import read_arms
        from collector.query.warehouse import open_run
        from collector.store.run_directory import RunDirectory

        settings = terminal.read_plan(RunDirectory(self.run_)).config
        capture = section(
            CaptureConfig, settings, record=("effects",), store=(), arms=read_arms(open_run(self.run_), self.arms)
        )
        return Collect(
            out=self.out, data=section(DataConfig, settings), model=section(ModelConfig, settings), capture=capture,
            launch=self.launch,
        ).run()  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """Report a run's progress, the rows it skipped and the shards that failed."""

    run_: RunPath
    """The run directory."""
    watch: float | None = None
    """Refresh every N seconds (5 if no number is given) until the run is complete or only failed shards are left."""
    summary: bool = False
    """Write a paragraph and a table for a paper's appendix instead, in Markdown."""

    def __post_init__(self) -> None:
        """Rejects an interval that is not positive."""
        if self.watch is not None and self.watch <= 0:
            raise ValueError(f"--watch takes seconds, got {self.watch}")

    def run(self) -> int:
        """Prints the status; returns 1 if the run is incomplete.

        Raises:
            FileNotFoundError: there is no run.
            ValueError: the run holds no document, and will not.
        """
        from collector.fleet.rejected import complaint
        from collector.look import summary, terminal
        from collector.store.run_directory import RunDirectory
        from collector.store.totals import Totals

        run = RunDirectory(self.run_)
        if self.summary:
            text, complete = summary.summarize(run)
            sys.stdout.write(text)
        else:
            complete = terminal.status(run) if self.watch is None else terminal.watch(run, self.watch)
        if said := complaint(Totals.of(run).skipped, terminal.read_plan(run).documents):
            raise ValueError(said)
        return 0 if complete else 1


def give_watch_its_seconds(arguments: list[str]) -> list[str]:
    """Inserts 5 after a `--watch` without a number, because an option of the parser cannot have an optional value."""
    given = []
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
        given.append(argument)
        if argument == "--watch" and not after.replace(".", "", 1).removeprefix("-").isdecimal():
            given.append("5")
    return given
