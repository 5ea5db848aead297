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
    from collections.abc import Iterator, Sequence

    from collector.look.export.engines import Engine
    from collector.store.run_directory import RunDirectory


@dataclasses.dataclass(frozen=True, kw_only=True)
class PlacementOptions:
    """What a placement of experts is for: the engine's GPUs and its traffic."""

    gpus: int | None = None
    """GPUs that hold the experts of a layer; needed by the formats of serving engines."""
    nodes: int = 1
    """Machines, each with as many of the GPUs."""
    groups: int = 1
    """Groups of experts, for models whose routers choose groups first; if they divide evenly among the nodes, a group
    stays on one node."""
    replicas: int | None = None
    """Experts in all that the GPUs hold of each layer, replicas included (default: as many as the layer has, rounded up
    to a multiple of the GPUs)."""
    mix: str | None = None
    """Shares of labels in the traffic, such as eng_Latn=0.7,kor_Hang=0.3 (default: all documents as they are)."""
    stack: str | None = None
    """The routers to place, where a run has those of several stacks."""
    include_special: bool = False
    """Also count the special tokens that the tokenizer added."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Export:
    """Export a run for other programs: `collector export RUN OUT --to hf`.

    hf: a folder to push to the Hugging Face hub, with a dataset card. delta: a Delta table per table. csv: a CSV file
    per table. A run is as private as its text: publish it only if you may publish the text.

    eplb, sglang, vllm-ascend: where a serving engine best puts the experts, by how often the run's documents, or a mix
    of their labels, choose them: `collector export RUN OUT --to sglang --gpus 8 --mix eng_Latn=0.7,kor_Hang=0.3`.
    """

    run_: RunPath
    """The run directory: a local path or the URL of an object store."""
    out: tyro.conf.Positional[str]
    """The folder to write, new or empty."""
    to: Literal["hf", "delta", "csv", "eplb", "sglang", "vllm-ascend"]
    """Format of the export."""
    gzip: bool = False
    """Compress the CSV files."""
    partial: bool = False
    """Also accept an incomplete run, and export the shards committed so far."""
    placement: tyro.conf.OmitArgPrefixes[PlacementOptions] = dataclasses.field(default_factory=PlacementOptions)

    def __post_init__(self) -> None:
        """Rejects options of other formats, and a placement without GPUs."""
        if self.gzip and self.to != "csv":
            raise ValueError(f"--gzip is for --to csv, not --to {self.to}")
        if self.to in ("hf", "delta", "csv"):
            given = [field.name for field in dataclasses.fields(PlacementOptions)
                     if getattr(self.placement, field.name) != field.default]  # fmt: skip
            if given:
                flag = given[0].replace("_", "-")
                raise ValueError(f"--{flag} is for --to eplb, sglang and vllm-ascend, not --to {self.to}")
        elif self.placement.gpus is None:
            raise ValueError(f"--to {self.to} needs --gpus, the number of GPUs that hold the experts of a layer")

    def run(self) -> int:
        """Writes the folder and prints its contents."""
        from collector.query import warehouse
        from collector.store.run_directory import RunDirectory

        with warehouse.one_line_errors():
            if self.to in ("hf", "delta", "csv"):
                from collector.look.export import export

                done = export(RunDirectory(self.run_), self.out, self.to, gzip=self.gzip, partial=self.partial)
                self._say(done.bytes, [f"{rows:>15,}  {table}" for table, rows in done.rows.items()])
            elif self.to in ("eplb", "sglang", "vllm-ascend"):
                self._place(RunDirectory(self.run_), self.to)
        return 0

    def _say(self, size: int, lines: Sequence[str]) -> None:
        sys.stdout.writelines(f"{line}\n" for line in (*lines, f"{self.out}: {size:,} bytes"))

    def _place(self, run: RunDirectory, engine: Engine) -> None:
        from collector.look.export import engine_card
        from collector.look.export.engines import export_placement
        from collector.query.placements.eplb import Cluster
        from collector.query.traffic import read_mix

        asked = self.placement
        assert asked.gpus is not None, "checked when the command was parsed"
        plan, size = export_placement(
            run, self.out, engine,
            Cluster(gpus=asked.gpus, nodes=asked.nodes, groups=asked.groups, replicas=asked.replicas),
            stack=asked.stack, mix=None if asked.mix is None else read_mix(asked.mix),
            include_special=asked.include_special, partial=self.partial,
        )  # fmt: skip
        self._say(size, ["balancedness of the GPUs in held-out documents", engine_card.table(plan)])


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
    min_documents: int = 20
    """Labels with fewer documents are marked, because what is special about them may be chance."""

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
                                 "resamples": self.resamples, "min_documents": self.min_documents}  # fmt: skip
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
