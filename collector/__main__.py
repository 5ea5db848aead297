"""Collect the routing of Mixture-of-Experts models over whole datasets, and query it in SQL.

The command line: one frozen dataclass per subcommand, parsed by tyro.
Exit status: 0 done, 1 the run is incomplete, 2 unusable input, 130 interrupted. Heavy modules are
imported by the command that needs them.
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from collector.config import CaptureConfig, DataConfig, Dtype, LaunchConfig, ModelConfig, Stack

if TYPE_CHECKING:
    from collections.abc import Callable

_QUERY_FLAGS = ("list", "format", "by", "beside", "help")


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
        from collector import driver, show

        run = driver.collect(self.out, data=self.data, model=self.model, capture=self.capture, launch=self.launch)
        return 0 if show.status(run) else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Query:
    """Answer a question about a run, or about two: `collector query RUN NAME [--beside OTHER] [--param value …]`.

    `collector query --list` tells every query's question, parameters and rows.
    """

    run_: Annotated[tyro.conf.Positional[str], tyro.conf.arg(name="run")] = ""
    """The run directory."""
    name: tyro.conf.Positional[str] = ""
    """The query."""
    beside: str | None = None
    """Another run of the same tokens, for example of the quantized or the untrained model.
    A query that compares two runs needs it; of any other, the other run's rows stand beside the first's."""
    list: bool = False
    """Tell which queries there are; with --format markdown everything about them, and with RUN and --beside OTHER, runs
    of the demo, also an example of each one's rows."""
    by: str = "label"
    """What labels are: label (as recorded), source, script, length, position or token_class."""
    format: Literal["table", "csv", "json", "parquet", "markdown"] = "table"
    """How the rows are written to standard output."""
    params: tyro.conf.Suppress[tuple[tuple[str, str], ...]] = ()

    def run(self) -> int:
        """Runs the query, or lists them."""
        from collector import comparison, show, warehouse

        if self.list:
            return self._list()
        if not (self.run_ and self.name):
            raise ValueError("collector query takes RUN and NAME; collector query --list tells the names")
        params = dict(self.params)
        with warehouse.one_line_errors():
            if self.beside is None:
                show.relation(warehouse.open_run(self.run_, by=self.by).query(self.name, **params), self.format)
                return 0
            pair = comparison.open_runs(self.run_, self.beside, by=self.by)
            rows = pair.query(self.name, **params)
            sys.stderr.writelines(f"not compared: {reason}\n" for reason in pair.unchecked())
            show.relation(rows, self.format)
        return 0

    def _list(self) -> int:
        from collector import comparison, manual, show

        if self.format == "markdown":
            runs = (self.run_, self.beside) if self.run_ and self.beside else None
            sys.stdout.write(manual.page(runs))
        else:
            show.queries([*comparison.list_queries(), *comparison.list_comparisons()])
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sql:
    """Run one read-only SQL statement over a run's views.

    It reads the run's committed files and nothing else: no other file, no network, no setting.
    """

    run_: Annotated[tyro.conf.Positional[str], tyro.conf.arg(name="run")]
    """The run directory."""
    statement: tyro.conf.Positional[str]
    """For example: select label, count(*) from documents group by all."""
    by: str = "label"
    """What labels are: label (as recorded), source, script, length, position or token_class."""
    format: Literal["table", "csv", "json", "parquet"] = "table"
    """How the rows are written to standard output."""

    def run(self) -> int:
        """Runs the statement."""
        from collector import show, warehouse

        with warehouse.one_line_errors():
            show.relation(warehouse.open_run(self.run_, by=self.by).sql(self.statement), self.format)
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Views:
    """Write the SQL script that creates the run's views in any DuckDB: `duckdb -init <(collector views RUN)`.

    It names every file by its full path or URL. For a run on an object store, DuckDB needs its extension httpfs (azure
    for az://) and the credentials; `collector query` and `sql` need neither.
    """

    run_: Annotated[tyro.conf.Positional[str], tyro.conf.arg(name="run")]
    """The run directory."""

    def run(self) -> int:
        """Writes the script to standard output."""
        from collector.storage import RunDirectory
        from collector.warehouse import views_sql

        sys.stdout.write(views_sql(RunDirectory(self.run_), in_place=True))
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Status:
    """Tell how far a run is, what it skipped and what failed."""

    run_: Annotated[tyro.conf.Positional[str], tyro.conf.arg(name="run")]
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
        from collector import show, summary
        from collector.storage import RunDirectory

        run = RunDirectory(self.run_)
        if self.summary:
            text, complete = summary.summarize(run)
            sys.stdout.write(text)
        else:
            complete = show.status(run) if self.watch is None else show.watch(run, self.watch)
        return 0 if complete else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Re-read everything that a run committed, and name each shard that is not what it must be.

    Checks files by size and SHA-256, and tables by what they must hold: every token of every document once, and for
    each recorded router a decision about each token of its stack. Run it after a copy, before a publication, or when a
    disk is in doubt. A run that only lacks shards is incomplete, not unsound. A rollup is compared with what the tables
    give, counted by other means than those that made it.
    """

    run_: Annotated[tyro.conf.Positional[str], tyro.conf.arg(name="run")]
    """The run directory: a path or an object store's URL, which is read as a whole."""
    recollect: bool = False
    """Set the commit records of wrong shards aside, so that the same collect command collects these shards again."""

    def run(self) -> int:
        """Prints the findings; 0 if the run is sound and complete, else 1."""
        from collector import verify
        from collector.storage import RunDirectory

        run = RunDirectory(self.run_)
        report = verify.verify(run, verify.Ticker())
        sys.stdout.writelines(f"{line}\n" for line in report.lines())
        if self.recollect and (report.wrong or report.run):
            aside = verify.recollect(run, report)
            sys.stdout.writelines(f"set aside: {name}\n" for name in aside)
            sys.stdout.write("Run the same collect command again.\n")
        return 0 if report.sound and report.complete else 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollup:
    """Count a run once, per document and per label, so that questions about labels and documents are answered at once.

    Writes two files into the run's folder `rollup`; from then on `query`, `sql` and `show` read them instead of
    counting tokens. A rollup of other commits than the run has now is not read: make it anew when shards were added.
    """

    run_: Annotated[tyro.conf.Positional[str], tyro.conf.arg(name="run")]
    """The run directory: a path or an object store's URL, which is read as a whole."""
    again: bool = False
    """Count again although there is a rollup of exactly these commits."""

    def run(self) -> int:
        """Makes the rollup, unless it is there."""
        from collector import verify
        from collector.rollup import files, making
        from collector.storage import RunDirectory

        run = RunDirectory(self.run_)
        if not self.again and (names := files.current(run)):
            sys.stdout.write(f"{' and '.join(names.values())}: there already, and of all that is committed\n")
            return 0
        made = making.make(run, verify.Ticker("counted"))
        sys.stdout.write(f"{' and '.join(made.files.values())}: {made.shards:,} shards, {made.tokens:,} tokens, "
                         f"{made.bytes:,} bytes, {made.bytes / max(1, made.tokens):.1f} a token\n")  # fmt: skip
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gc:
    """Remove the orphans of a run: files that no commit record names, left by replicas that died, and old rollups.

    They count for nothing and only take room. What is committed stays, whatever its age. On object stores the parts of
    uploads that were cut are out of sight: give the bucket a lifecycle rule that aborts incomplete uploads.
    """

    run_: Annotated[tyro.conf.Positional[str], tyro.conf.arg(name="run")]
    """The run directory."""
    older_than: str = "1d"
    """Only what was last written so long ago: 90m, 12h, 2d; an hour at least, so that shards in work are left alone.
    0 takes everything, and is right only while nothing collects into the run."""
    dry_run: bool = False
    """Only tell what would be removed."""

    def run(self) -> int:
        """Prints what goes, and removes it."""
        from collector import orphans
        from collector.storage import RunDirectory

        run, age = RunDirectory(self.run_), orphans.parse_age(self.older_than)
        if age == 0:
            sys.stderr.write("--older-than 0: a shard that is being collected now would lose its files\n")
        found = orphans.find(run, age)
        if not self.dry_run:
            orphans.remove(run, found)
        sys.stdout.writelines(f"{entry.size:>15,}  {entry.name}\n" for entry in found)
        done = "to remove" if self.dry_run else "removed"
        sys.stdout.write(f"{done}: {len(found):,} orphans, {sum(entry.size for entry in found):,} bytes\n")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Show:
    """Print the top expert of every label and layer, of one run or of two side by side."""

    run_: Annotated[tyro.conf.Positional[str], tyro.conf.arg(name="run")]
    """The run directory."""
    beside: str | None = None
    """Another run, for example the same model with random weights."""
    labels: tuple[str, ...] | None = None
    """Which labels (default: all)."""
    by: str = "label"
    """What labels are: label (as recorded), source, script, length, position or token_class."""

    def run(self) -> int:
        """Prints the table."""
        from collector import show, warehouse

        beside = warehouse.open_run(self.beside, by=self.by) if self.beside else None
        show.top_experts_by_layer(warehouse.open_run(self.run_, by=self.by), self.labels, beside)
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """Run a model over one text and show which expert each router chose for each token.

    The text appears once per router, each token in the colour of its expert and followed by its number; then, token by
    token, the expert with the highest weight, that weight and the router's entropy.
    """

    text: tyro.conf.Positional[str]
    """The text; `-` reads it from standard input."""
    model: tyro.conf.OmitArgPrefixes[ModelConfig] = dataclasses.field(default_factory=ModelConfig)
    layers: tuple[int, ...] | None = None
    """Router layers to show, by the model's own numbers (default: all)."""
    stacks: tuple[Stack, ...] | None = None
    """Which routers to show: `encoder`, `decoder` or both (default: as `collector collect` records them)."""
    max_length: int = 512
    """Tokens that are read at most; the rest of a longer text is left out, and that is told."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes a GPU where torch sees one."""
    html: str | None = None
    """Also write a page to this file, which loads nothing: all chosen experts of a token at the pointer."""

    def run(self) -> int:
        """Prints the trace, and writes the page if one is asked for."""
        from pathlib import Path

        from collector import show
        from collector.trace import collecting, page, read, terminal

        text = sys.stdin.read() if self.text == "-" else self.text
        capture = CaptureConfig(layers=self.layers, stacks=self.stacks, max_length=self.max_length)
        with collecting.collected(text, self.model, capture, self.device) as run:
            trace, title = read(run), f"{show.model(run.info)}: {show.routers(run.info['layers'])}"
            cut = f"; cut after {self.max_length} tokens" if collecting.was_cut(run) else ""
        terminal.show(trace, show.console(), title + cut)
        if self.html is not None:
            Path(self.html).write_text(page.page(trace, title + cut), encoding="utf-8")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Explore:
    """Look at a run in the browser: languages, layers, documents token by token, experts.

    A server on this machine alone; the URL that it prints holds the token that lets in.
    """

    run_: Annotated[tyro.conf.Positional[str], tyro.conf.arg(name="run")]
    """The run directory."""
    port: int = 0
    """Where the server listens (default: a port that is free)."""
    browser: bool = True
    """Open the page in the browser."""

    def run(self) -> int:
        """Serves until Ctrl-C."""
        from collector.explore import serving

        serving.serve(self.run_, self.port, browser=self.browser)
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Quantize:
    """Write a quantized copy of a model, so that each replica reads a quarter: `collector quantize MODEL OUT`.

    The copy loads with `collector collect --model OUT`.
    """

    source: Annotated[tyro.conf.Positional[str], tyro.conf.arg(name="model")]
    """A Mixture-of-Experts model: id on the Hugging Face hub, or local folder."""
    out: tyro.conf.Positional[str]
    """The folder to write, new or empty."""
    revision: str | None = None
    """Branch, tag or commit of the model on the hub."""
    quantization: Literal["nf4", "fp4"] = "nf4"
    """4-bit normal floats, or 4-bit floats."""
    double_quantization: bool = True
    """Also quantize the scales of 4-bit blocks."""
    dtype: Dtype = "auto"
    """Precision of what is not quantized."""
    unquantized_experts: bool = False
    """Accept a family whose experts cannot be quantized."""

    def run(self) -> int:
        """Loads tensor by tensor, quantizes, writes."""
        from pathlib import Path

        from collector import checkpoints, footprint, models

        config = ModelConfig(
            model=self.source, revision=self.revision, dtype=self.dtype, quantization=self.quantization,
            double_quantization=self.double_quantization, unquantized_experts=self.unquantized_experts,
        )  # fmt: skip
        out = Path(self.out)
        checkpoints.require_empty(out)
        loaded = models.load(config, "cpu")
        written = checkpoints.save(loaded.model, loaded.tokenizer, out)
        summary = footprint.describe(loaded.model, loaded.compute_dtype)["summary"]
        sys.stdout.write(f"{summary}\n{out}: {footprint.size(written)}\n")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Models:
    """List the model families whose routing can be collected, and how each one's is read."""

    format: Literal["table", "markdown"] = "table"
    """How the list is written to standard output."""

    def run(self) -> int:
        """Reads the families from the installed transformers and prints them."""
        from transformers.utils import logging

        from collector import families, show

        logging.set_verbosity_error()  # tiny configs draw warnings about their sizes
        show.models([families.describe(family) for family in families.families()], self.format)
        return 0


_COMMANDS: dict[str, Callable[..., Any]] = {
    "collect": Collect,
    "query": Query,
    "sql": Sql,
    "views": Views,
    "status": Status,
    "verify": Verify,
    "rollup": Rollup,
    "gc": Gc,
    "show": Show,
    "trace": Trace,
    "explore": Explore,
    "quantize": Quantize,
    "models": Models,
}


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
        if not token.startswith("--") or name in _QUERY_FLAGS or name == "":
            rest.append(token)
            continue
        if not given:
            value = next(tokens, "")
            if not value or value.startswith("--"):
                raise ValueError(f"--{name} needs a value")
        params.append((name.replace("-", "_"), value))
    return rest, tuple(params)


def give_watch_its_seconds(arguments: list[str]) -> list[str]:
    """Puts 5 behind a `--watch` without a number: parsers know options with a value and options without."""
    given = []
    for argument, after in zip(arguments, [*arguments[1:], ""], strict=True):
        given.append(argument)
        if argument == "--watch" and not after.replace(".", "", 1).removeprefix("-").isdecimal():
            given.append("5")
    return given


def parse(arguments: list[str]) -> Any:
    """Command-line arguments -> the command, ready to run.

    Raises:
        ValueError: a query's parameter has no value.
        SystemExit: help was asked for, or the arguments are not usable.
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
    """One line on standard error, in the form of the run's other lines."""
    if isinstance(command, Collect) and command.launch.log_format == "json":
        from collector.progress import json_line

        sys.stderr.write(json_line(event, message=message))
    else:
        sys.stderr.write(f"collector: {message}\n")


def main() -> None:
    """Entry point of the console script."""
    # Imported on some CPUs, it warns that a kernel which nothing here calls cannot be fetched from the hub.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    command = None
    try:
        command = parse(sys.argv[1:])
        status = command.run()
    except BrokenPipeError:
        status = 0
    except (ValueError, OSError, RuntimeError) as error:
        _complain(command, str(error), "error")
        status = 2
    except KeyboardInterrupt:
        hint = "; the same command resumes the run" if isinstance(command, Collect) else ""
        _complain(command, f"interrupted{hint}", "interrupted")
        status = 130
    sys.exit(status)


if __name__ == "__main__":
    main()
