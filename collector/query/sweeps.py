"""Asks every run of a sweep the same question: how the answer changes over training.

    sweep = open_sweep("runs/sweep-demo")
    sweep.query("mutual_information").df()     # the rows of each checkpoint, with its name, step and tokens seen
    sweep.query("router_saturation").df()      # each checkpoint against the last one

One run is open at a time, or two where a query compares two, so memory does not grow with the number of checkpoints;
only the answers are kept. Runs that are not complete have other documents than the others, so they take no part.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa

from collector.query import inference
from collector.query.catalog import find_query
from collector.query.comparison import open_runs
from collector.query.groupings import LABEL, find_grouping
from collector.query.matching import find_strata
from collector.query.warehouse import open_run
from collector.store.sweep_directory import SweepDirectory

if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence

    from collector.query.comparison import Comparison
    from collector.query.warehouse import Run

COLUMNS = ("checkpoint", "step", "tokens_seen")
"""The first columns of every answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class SweptRun:
    """The run of one checkpoint."""

    name: str
    """Name of the checkpoint: its branch, tag or folder."""
    step: int | None
    """Optimizer steps, None if the name does not tell."""
    tokens_seen: int | None
    """Tokens seen in training, None if the name does not tell."""
    root: str
    """The run directory."""
    complete: bool
    """Whether every shard was committed when the sweep was opened."""


class Sweep:
    """The runs of several checkpoints of one training, in the order of training."""

    def __init__(
        self,
        root: str,
        runs: Sequence[SweptRun],
        *,
        by: str = LABEL,
        match: str | Sequence[str] | None = None,
        rollup: bool = True,
    ) -> None:
        self.root = root
        """The sweep's folder or URL."""
        self.runs = tuple(run for run in runs if run.complete)
        """The complete runs, which answer."""
        self.incomplete = tuple(run for run in runs if not run.complete)
        """The others, begun or not."""
        self.by = by
        """What `label` means, see `open_run`."""
        self.match = match
        """What labels are matched on, see `open_run`."""
        self._rollup = rollup

    @property
    def last(self) -> SweptRun:
        """The run of the last checkpoint that is complete."""
        return self.runs[-1]

    def query(self, name: str, **params: object) -> duckdb.DuckDBPyRelation:
        """Runs a query over every run.

        Args:
            name: of the query, see `list_queries`. One that compares two runs compares each with the last.
            **params: as for `Run.query`.

        Returns:
            The rows of all runs in the order of training, after the columns `checkpoint`, `step` and `tokens_seen`.

        Raises:
            ValueError: as `Run.query` and `Comparison.query` do, or there is no earlier run to compare.
        """
        if not find_query(name).of_two_runs:
            return self._gather(self.runs, lambda run: self._open(run).query(name, **params).to_arrow_table())
        if len(self.runs) < 2:
            raise ValueError(f"{name} compares checkpoints with the last, and only {self.last.name} is complete")
        return self._gather(self.runs[:-1], lambda run: self._beside_last(run).query(name, **params).to_arrow_table())

    def intervals(self, name: str, **options: object) -> duckdb.DuckDBPyRelation:
        """Runs a label-level query over every run, with a confidence interval in each row.

        Args:
            name: of the query.
            **options: of `inference.intervals`, and parameters of the query.

        Raises:
            ValueError: as `inference.intervals` does.
        """
        return self._gather(self.runs, lambda run: inference.intervals(self._open(run), name, **options))  # type: ignore[arg-type]

    def sql(self, statement: str) -> duckdb.DuckDBPyRelation:
        """Runs one read-only statement over the views of every run, see `Run.sql`."""
        return self._gather(self.runs, lambda run: self._open(run).sql(statement).to_arrow_table())

    def remarks(self) -> list[str]:
        """Returns what is to be said about every answer: which checkpoints have none."""
        missing = ", ".join(run.name for run in self.incomplete)
        return [f"without {missing}: not complete, collector status {self.root} says why"] if missing else []

    def _open(self, run: SweptRun) -> Run:
        return open_run(run.root, by=self.by, match=self.match, rollup=self._rollup)

    def _beside_last(self, run: SweptRun) -> Comparison:
        return open_runs(run.root, self.last.root, by=self.by, match=self.match, rollup=self._rollup)

    def _gather(self, runs: Sequence[SweptRun], ask: Callable[[SweptRun], pa.Table]) -> duckdb.DuckDBPyRelation:
        answers = [_marked(ask(run), run) for run in runs]
        return duckdb.connect().from_arrow(pa.concat_tables(answers, promote_options="permissive"))


def _marked(rows: pa.Table, run: SweptRun) -> pa.Table:
    """Returns the rows of a run after the columns that tell its checkpoint."""
    if taken := [name for name in COLUMNS if name in rows.column_names]:
        raise ValueError(
            f"the answer of a sweep begins with {', '.join(COLUMNS)}: give your own {' and '.join(taken)} another name"
        )
    kinds = (pa.string(), pa.int64(), pa.int64())
    told = (run.name, run.step, run.tokens_seen)
    columns = [pa.array([value] * rows.num_rows, kind) for value, kind in zip(told, kinds, strict=True)]
    return pa.Table.from_arrays([*columns, *rows.columns], names=[*COLUMNS, *rows.column_names])


def open_sweep(
    root: str | os.PathLike[str],
    *,
    by: str = LABEL,
    match: str | Sequence[str] | None = None,
    rollup: bool = True,
) -> Sweep:
    """Opens what `collector sweep` wrote, local or on an object store.

    Args:
        root: the sweep's folder or URL.
        by: what `label` means in all queries, see `open_run`.
        match: what labels are matched on in each run, see `open_run`.
        rollup: whether to read counts from the runs' rollups, see `open_run`.

    Raises:
        FileNotFoundError: there is no sweep.
        StoreError: the object store refuses or does not answer.
        ValueError: no run is complete, or the grouping does not exist.
    """
    find_grouping(by)
    find_strata(match, by)
    directory = SweepDirectory(root)
    runs = [
        SweptRun(
            name=each.name, step=each.step, tokens_seen=each.tokens_seen, root=directory.run(each).root,
            complete=directory.is_complete(each),
        )
        for each in directory.checkpoints()
    ]  # fmt: skip
    sweep = Sweep(directory.root, runs, by=by, match=match, rollup=rollup)
    if not sweep.runs:
        raise ValueError(f"no run of {directory.root} is complete yet: collector status {directory.root} says why")
    return sweep
