"""Commands that publish a run: `collector export` writes its rows, `collector report` its figures."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import tyro

from collector.commands.arguments import RunPath

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Export a run for other programs: `collector export RUN OUT --to hf`.

    hf: a folder to push to the Hugging Face hub, with a dataset card. delta: a Delta table per table. csv: a CSV file
    per table. A run is as private as its text: publish it only if you may publish the text.
    """

    run_: RunPath
    """The run directory: a local path or the URL of an object store."""
    out: tyro.conf.Positional[str]
    """The folder to write, new or empty."""
    to: Literal["hf", "delta", "csv"]
    """Format of the export."""
    gzip: bool = False
    """Compress the CSV files."""
    partial: bool = False
    """Also accept an incomplete run, and export the shards committed so far."""

    def __post_init__(self) -> None:
        """Rejects `--gzip` for formats that are compressed already."""
        if self.gzip and self.to != "csv":
            raise ValueError(f"--gzip is for --to csv; the Parquet files of --to {self.to} are compressed")

    def run(self) -> int:
        """Writes the folder and prints its contents."""
        from collector.look.export import export
        from collector.query import warehouse
        from collector.store.run_directory import RunDirectory

        with warehouse.one_line_errors():
            done = export(RunDirectory(self.run_), self.out, self.to, gzip=self.gzip, partial=self.partial)
        sys.stdout.writelines(f"{rows:>15,}  {table}\n" for table, rows in done.rows.items())
        sys.stdout.write(f"{self.out}: {done.bytes:,} bytes\n")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
    """Write a run's figures, or a sweep's curves over training, as one self-contained HTML page and for a paper.

    Every figure comes with its query, the command line that reproduces its numbers, and its data as CSV.
    """

    run_: RunPath
    """The run directory, or the folder of a sweep."""
    compare: str | None = None
    """Another run to compare with, for example of the same model with random weights."""
    out: Path = Path("report.html")
    """The page to write."""
    figures: Path | None = None
    """Also write the figures to this folder as PDF, SVG and PNG, in the size and font of a paper."""
    layer: int | None = None
    """Layer that the page shows first and that single-layer figures show (default: the one in the middle)."""
    labels: tuple[str, ...] | None = None
    """Labels whose curves are coloured, up to 8 (default: the 6 with the most tokens)."""
    resamples: int = 200
    """Bootstrap samples for intervals, and permutations for the test of specialization; use 1000 for a paper.
    0 omits both, which is much faster."""

    def __post_init__(self) -> None:
        """Rejects too few resamples."""
        if self.resamples < 0 or self.resamples == 1:
            raise ValueError(f"--resamples takes 0, or 2 and more, got {self.resamples}")

    def run(self) -> int:
        """Writes the files and prints their names."""
        with _extra("report"):
            from collector.look import report
            from collector.query.warehouse import one_line_errors
        from collector.store.sweep_directory import SweepDirectory

        shown: dict[str, Any] = {"figures": self.figures, "layer": self.layer, "labels": self.labels,
                                 "resamples": self.resamples}  # fmt: skip
        with one_line_errors():
            if not SweepDirectory(self.run_).exists():
                written = report.write(self.run_, self.out, compare=self.compare, **shown)
            elif self.compare is None:
                written = report.write_sweep(self.run_, self.out, **shown)
            else:
                raise ValueError(f"{self.run_} is a sweep, compared with its own last run: leave out --compare")
        sys.stdout.writelines(f"{path}\n" for path in written)
        return 0


@contextlib.contextmanager
def _extra(name: str) -> Iterator[None]:
    """Turns a failed import into an error that names the extra of this package to install.

    Raises:
        ValueError: a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"this takes {error.name}: pip install 'moe-routing-collector[{name}]'") from error
