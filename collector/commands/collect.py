"""`collector collect` makes a run, `collector intervene` one with edits; `collector status` reports their progress.

All exit with 0 for a complete run, 1 for an incomplete one, and 2 for one without any document or, of `collect`, with
too few of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from typing import TYPE_CHECKING, Literal

import tyro

from collector.commands.arguments import RunPath
from collector.config import CaptureConfig, DataConfig, LaunchConfig, ModelConfig

if TYPE_CHECKING:
    from collector.data.plan import PartOf
    from collector.store.sweep_directory import SweepDirectory


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
        return _collect(self.out, self.data, self.model, self.capture, self.launch)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Intervene:
    """Measure what edits of the routing do to the model's predictions, over documents of a run.

    Makes a run of its own with the same documents and model, in which each batch goes through the model as it is, and
    once more for every arm, a set of edits with a name. The query `expert_effect` tells the change of the loss and of
    the next token's distribution by arm and label. What experts put out is recorded, too, if the run has it, so that
    `importance_agreement` can compare. To resume an interrupted run, repeat the same command.

    Arms are rows with the columns arm, layer, expert, operation and, where they matter, stack and value: a CSV file, a
    SQL file over the views of the run, or one of queries/arms/ by its name: every_expert, language_experts,
    super_experts, most_loaded, dead. Columns label, token_class and position limit an arm to some documents or tokens.
    Operations are those of `collector trace --edit`. A JSON file of `collector experts --save` has an arm for each of
    its sets, which drops the experts. Any edit costs something: --controls tells what an arm does from what other
    experts would do in its place.
    """

    run_: RunPath
    """The run whose documents and model are used: a local path or the URL of an object store."""
    arms: str
    """A file that ends with .csv, .sql or .json, or the name of one of queries/arms/."""
    out: str
    """The run directory to write."""
    controls: int = 0
    """Controls of each arm: random sets of experts of the same layers that are chosen about as often.
    Where the run has outputs, they also contribute about as much. Each control is one more arm.
    With N of them no p is below 1 / (N + 1)."""
    seed: int = 0
    """Seed of the controls."""
    documents: str | None = None
    """SQL over the views of the run that selects documents, by the columns shard and doc (default: all documents).
    For example "from documents where label in ('kor_Hang', 'eng_Latn')"."""
    split: bool = False
    """Choose experts in every other document of each label, and measure in the documents between them.
    Otherwise the choice flatters the arms. For language_experts, and SQL that reads specialization_test."""
    docs_per_shard: int | None = None
    """Documents per shard (default: those of the run, fewer where there are many arms).
    A shard is committed, and after a failure repeated, as a whole, with all arms."""
    store: tuple[Literal["token_effects"], ...] = ()
    """`token_effects` also stores what each arm does to the prediction of each token, controls apart."""
    launch: tyro.conf.OmitArgPrefixes[LaunchConfig] = dataclasses.field(default_factory=LaunchConfig)

    def run(self) -> int:
        """Collects the effects and prints the run's status.

        Raises:
            FileNotFoundError: there is no run, or no such arms.
            ValueError: arms, documents, data or model are not usable.
        """
        from collector.query.interventions import prepare_intervention

        found = prepare_intervention(
            self.run_, self.arms, controls=self.controls, seed=self.seed, documents=self.documents, split=self.split,
            docs_per_shard=self.docs_per_shard, store=self.store,
        )  # fmt: skip
        for line in found.said:
            sys.stderr.write(f"{line}\n")
        return _collect(self.out, found.data, found.model, found.capture, self.launch, found.part_of)


def _collect(
    out: str, data: DataConfig, model: ModelConfig, capture: CaptureConfig, launch: LaunchConfig,
    part_of: PartOf | None = None,
) -> int:  # fmt: skip
    """Collects a run, prints its status, and returns the exit status."""
    from collector.fleet import driver
    from collector.fleet.rejected import complaint
    from collector.look import terminal
    from collector.store.totals import Totals

    run = driver.collect(out, data=data, model=model, capture=capture, launch=launch, part_of=part_of)
    totals, plan = Totals.of(run), terminal.read_plan(run)
    with contextlib.suppress(BrokenPipeError):  # nobody reads on, but the run is what it is
        terminal.status(run, totals)
    if said := complaint(totals.skipped, plan.documents, launch.max_rejected):
        raise ValueError(said)
    return 0 if len(totals.committed) == len(plan.shards) else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """Report a run's progress, the rows it skipped and the shards that failed; of a sweep, a row per checkpoint."""

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
        from collector.store.sweep_directory import SweepDirectory
        from collector.store.totals import Totals

        run, sweep = RunDirectory(self.run_), SweepDirectory(self.run_)
        if sweep.exists():
            return self._of_sweep(sweep)
        if self.summary:
            text, complete = summary.summarize(run)
            sys.stdout.write(text)
        else:
            complete = terminal.status(run) if self.watch is None else terminal.watch(run, self.watch)
        if said := complaint(Totals.of(run).skipped, terminal.read_plan(run).documents):
            raise ValueError(said)
        return 0 if complete else 1

    def _of_sweep(self, sweep: SweepDirectory) -> int:
        from collector.look import terminal_sweep

        if self.summary or self.watch is not None:
            raise ValueError(f"{self.run_} is a sweep: --summary and --watch take one of its runs, "
                             f"for example {sweep.run(sweep.checkpoints()[-1]).root}")  # fmt: skip
        return 0 if terminal_sweep.status(sweep) else 1


def give_watch_its_seconds(arguments: list[str]) -> list[str]:
    """Inserts 5 after a `--watch` without a number, because an option of the parser cannot have an optional value."""
    given = []
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
        given.append(argument)
        if argument == "--watch" and not after.replace(".", "", 1).removeprefix("-").isdecimal():
            given.append("5")
    return given
