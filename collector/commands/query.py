"""SQL over a run: `collector query` runs a query of `queries/`, `sql` runs any statement, `views` writes a script.

Each query has its own parameters, and reading them takes DuckDB, so they are not declared as flags of the command.
They are taken out of the command line before it is parsed, and checked where the query runs.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Any, Literal

import tyro

from collector.commands.arguments import RowFormat, RunPath

_FLAGS = ("list", "format", "by", "match", "beside", "interval", "column", "resamples", "seed", "help")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Query:
    """Answer a question about a run, or about two: `collector query RUN NAME [--beside OTHER] [--param value …]`.

    Of a sweep every complete checkpoint answers, in the order of training; queries that compare two runs compare each
    with the last. `collector query --list` shows the question, parameters and columns of every query.
    """

    run_: RunPath = ""
    """The run directory, or the folder of a sweep."""
    name: tyro.conf.Positional[str] = ""
    """Name of the query."""
    beside: str | None = None
    """Another run of the same tokens, for example of the quantized or the untrained model.
    Queries that compare two runs need it; for any other query, both runs' rows are put side by side."""
    list: bool = False
    """List the queries. With --format markdown the list is their complete documentation.
    Given RUN and --beside OTHER, two runs of the demo, it also contains example rows of each query."""
    by: str = "label"
    """What to group by: label (as recorded), source, script, length, position, token_class, span, role or phase."""
    match: str | None = None
    """Compare labels within strata that they share, weighted alike: groupings, for example position,token_class.
    Only for queries over sums by label, which also take --interval; what had no match is counted."""
    format: Literal["table", "csv", "json", "parquet", "markdown"] = "table"
    """Format of the rows on standard output."""
    interval: float | None = None
    """Add a confidence interval of this level, for example 95, to each row, by a bootstrap over documents."""
    column: str = "value"
    """Column of the query for which the interval is computed."""
    resamples: int = 1000
    """Bootstrap samples."""
    seed: int = 0
    """Seed of the bootstrap."""
    params: tyro.conf.Suppress[tuple[tuple[str, str], ...]] = ()

    def run(self) -> int:
        """Runs the query, or lists all queries."""
        from collector.query import warehouse
        from collector.store.sweep_directory import SweepDirectory

        if self.list:
            return self._list()
        if not (self.run_ and self.name):
            raise ValueError("collector query takes RUN and NAME; collector query --list shows the names")
        params: dict[str, Any] = dict(self.params)
        with warehouse.one_line_errors():
            if SweepDirectory(self.run_).exists():
                self._over_training(params)
            elif self.beside is not None:
                self._compare(params)
            elif self.interval is not None:
                self._resample(params)
            else:
                self._ask(params)
        return 0

    def _ask(self, params: dict[str, Any]) -> None:
        import duckdb

        from collector.look import terminal
        from collector.query import inference, warehouse
        from collector.query.catalog import find_query

        run = warehouse.open_run(self.run_, by=self.by, match=self.match)
        remarks: list[str] = []
        if not find_query(self.name).biased:
            rows = run.query(self.name, **params)
        elif inference.is_quick(run, self.name, **params):
            rows = duckdb.from_arrow(inference.corrected(run, self.name, **params))
        else:
            rows = run.query(self.name, **params)
            remarks = [
                f"without the column `corrected`: it takes counts of documents, see `collector rollup {self.run_}`"
            ]
        terminal.relation(rows, self.format)
        remarks += run.remarks(self.name, **params) + run.warnings(self.name, **params)
        sys.stderr.writelines(f"{remark}\n" for remark in remarks)

    def _over_training(self, params: dict[str, Any]) -> None:
        from collector.look import terminal
        from collector.query.sweeps import open_sweep

        if self.beside is not None:
            raise ValueError(f"{self.run_} is a sweep, whose runs are compared with its last one: leave out --beside")
        sweep = open_sweep(self.run_, by=self.by, match=self.match)
        if self.interval is None:
            rows = sweep.query(self.name, **params)
        else:
            rows = sweep.intervals(self.name, column=self.column, **self._draws(), **params)
        sys.stderr.writelines(f"{remark}\n" for remark in sweep.remarks())
        terminal.relation(rows, self.format)

    def _draws(self) -> dict[str, Any]:
        return {"level": self.interval, "resamples": self.resamples, "seed": self.seed}

    def _compare(self, params: dict[str, Any]) -> None:
        from collector.look import terminal
        from collector.query import comparison

        if self.interval is not None:
            raise ValueError("--interval resamples the documents of one run: give it without --beside")
        pair = comparison.open_runs(self.run_, self.beside or "", by=self.by, match=self.match)
        rows = pair.query(self.name, **params)
        sys.stderr.writelines(f"not compared: {reason}\n" for reason in pair.unchecked())
        terminal.relation(rows, self.format)
        sys.stderr.writelines(f"{remark}\n" for remark in pair.remarks(self.name, **params))

    def _resample(self, params: dict[str, Any]) -> None:
        from collector.look import terminal
        from collector.query import inference, warehouse

        run = warehouse.open_run(self.run_, by=self.by, match=self.match)
        terminal.uncertain(
            inference.intervals(run, self.name, column=self.column, **self._draws(), **params), self.format
        )
        sys.stderr.writelines(f"{remark}\n" for remark in run.matched(self.name, **params))

    def _list(self) -> int:
        from collector.look import metrics_page, terminal
        from collector.query import comparison

        if self.format == "markdown":
            runs = (self.run_, self.beside) if self.run_ and self.beside else None
            sys.stdout.write(metrics_page.page(runs))
        else:
            terminal.queries([*comparison.list_queries(), *comparison.list_comparisons()])
        return 0


def split_query_params(arguments: list[str]) -> tuple[list[str], tuple[tuple[str, str], ...]]:
    """Takes the parameters of a query (`--layer 5`, `--labels=a,b`) out of a command line.

    Raises:
        ValueError: a parameter has no value.
    """
    rest: list[str] = []
    params: list[tuple[str, str]] = []
    tokens = iter(arguments)
    for token in tokens:
        name, given, value = token.removeprefix("--").partition("=")
        if not token.startswith("--") or name in _FLAGS or name == "":
            rest.append(token)
            continue
        if not given:
            value = next(tokens, "")
            if not value or value.startswith("--"):
                raise ValueError(f"--{name} needs a value")
        params.append((name.replace("-", "_"), value))
    return rest, tuple(params)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sql:
    """Run one read-only SQL statement over a run's views.

    The statement can read the run's committed files only. It has no access to other files, the network or settings.
    Of a sweep it runs over every complete checkpoint, one after the other.
    """

    run_: RunPath
    """The run directory, or the folder of a sweep."""
    statement: tyro.conf.Positional[str]
    """For example: select label, count(*) from documents group by all."""
    by: str = "label"
    """What to group by: label (as recorded), source, script, length, position, token_class, span, role or phase."""
    format: RowFormat = "table"
    """Format of the rows on standard output."""

    def run(self) -> int:
        """Runs the statement."""
        from collector.look import terminal
        from collector.query import warehouse
        from collector.query.sweeps import open_sweep
        from collector.store.sweep_directory import SweepDirectory

        with warehouse.one_line_errors():
            opener = open_sweep if SweepDirectory(self.run_).exists() else warehouse.open_run
            terminal.relation(opener(self.run_, by=self.by).sql(self.statement), self.format)
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Views:
    """Write the SQL script that creates the run's views in any DuckDB: `duckdb -init <(collector views RUN)`.

    The script names every file by its full path or URL. To read a run on an object store, DuckDB needs its extension
    httpfs (azure for az://) and the credentials; `collector query` and `sql` need neither.
    """

    run_: RunPath
    """The run directory."""

    def run(self) -> int:
        """Writes the script to standard output."""
        from collector.query.warehouse import views_sql
        from collector.store.run_directory import RunDirectory

        sys.stdout.write(views_sql(RunDirectory(self.run_), in_place=True))
        return 0
