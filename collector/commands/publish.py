"""What writes a run for others: `collector export` its rows, `collector report` its figures."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import tyro

from collector.commands.arguments import RunPath

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Write a run for other programs: `collector export RUN OUT --to hf`.

    hf: a folder to push to the Hugging Face hub, with a data set card. delta: a Delta table per table. csv: a CSV file
    per table. A run is as private as its text: publish it only if you may publish that.
    """

    run_: RunPath
    """The run directory: a path or an object store's URL."""
    out: tyro.conf.Positional[str]
    """The folder to write, new or empty."""
    to: Literal["hf", "delta", "csv"]
    """For whom."""
    gzip: bool = False
    """Compress the CSV files."""
    partial: bool = False
    """Also export an incomplete run, what is committed of it."""

    def __post_init__(self) -> None:
        """Refuses to compress what is compressed."""
        if self.gzip and self.to != "csv":
            raise ValueError(f"--gzip is for --to csv; the Parquet files of --to {self.to} are compressed")

    def run(self) -> int:
        """Writes the folder, and tells what is in it."""
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
    """Write a run's figures as one HTML page that opens from a disk, and as files for a paper.

    Every figure carries its query, the command line that writes its numbers, and its data as CSV.
    """

    run_: RunPath
    """The run directory."""
    compare: str | None = None
    """Another run beside it, for example the same model with random weights."""
    out: Path = Path("report.html")
    """The page to write."""
    figures: Path | None = None
    """A folder for the same figures as PDF, SVG and PNG, in the size and font of a paper."""
    layer: int | None = None
    """The layer that is shown first, and that figures of one layer are of (default: the one in the middle)."""
    labels: tuple[str, ...] | None = None
    """Labels whose curves are in colour, up to 8 (default: the 6 with the most tokens)."""
    resamples: int = 200
    """Bootstrap samples for intervals, and shuffles for the test of specialization; a paper wants 1,000. 0: neither,
    which is much faster."""

    def __post_init__(self) -> None:
        """Refuses too few resamples."""
        if self.resamples < 0 or self.resamples == 1:
            raise ValueError(f"--resamples takes 0, or 2 and more, got {self.resamples}")

    def run(self) -> int:
        """Writes the files and names them."""
        with _extra("report"):
            from collector.look import report
            from collector.query.warehouse import one_line_errors
        with one_line_errors():
            written = report.write(self.run_, self.out, compare=self.compare, figures=self.figures, layer=self.layer,
                                   labels=self.labels, resamples=self.resamples)  # fmt: skip
        sys.stdout.writelines(f"{path}\n" for path in written)
        return 0


@contextlib.contextmanager
def _extra(name: str) -> Iterator[None]:
    """Says which extra of this package brings what the block fails to import.

    Raises:
        ValueError: a package is missing.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        raise ValueError(f"this takes {error.name}: pip install 'moe-routing-collector[{name}]'") from error
