"""Maintenance of a run: `verify` checks it, `rollup` speeds it up, `gc` cleans it up, `weights` and `map` add to it.

None of them changes the collected data.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Literal

from collector.commands.arguments import RunPath


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Re-read everything that a run committed, and name each shard with damaged or inconsistent data.

    Checks the size and SHA-256 of files and the contents of tables: every token of every document occurs once, and each
    recorded router has a decision for each token of its stack. Run it after copying a run, before publishing it, or
    when you suspect a failing disk. A run that only lacks shards is incomplete, not unsound. A rollup is compared with
    counts that are computed from the tables by independent code.
    """

    run_: RunPath
    """The run directory: a local path or the URL of an object store. All of it is read."""
    recollect: bool = False
    """Set the commit records of wrong shards aside, so that the same collect command collects these shards again."""

    def run(self) -> int:
        """Prints the findings; returns 0 if the run is sound and complete, else 1."""
        from collector.store.run_directory import RunDirectory
        from collector.upkeep import verify

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
    """Aggregate a run once, per document and per label, so that queries about labels and documents answer quickly.

    Writes two files into the run's folder `rollup`; from then on `query`, `sql` and `show` read them instead of
    counting tokens. A rollup is ignored once the run has other commits: make a new one after adding shards.
    """

    run_: RunPath
    """The run directory: a local path or the URL of an object store. All of it is read."""
    again: bool = False
    """Recompute the rollup even if it is up to date."""

    def run(self) -> int:
        """Makes the rollup, unless it is up to date."""
        from collector.query.rollup import files, making
        from collector.query.views import read_info
        from collector.store.run_directory import RunDirectory
        from collector.upkeep import verify

        run = RunDirectory(self.run_)
        read_info(run)
        if not self.again and (names := files.current(run)):
            sys.stdout.write(f"{' and '.join(names.values())}: already there, and up to date\n")
            return 0
        made = making.make(run, verify.Ticker("counted"))
        each = f", {made.bytes / made.tokens:.1f} a token" if made.tokens else ""
        sys.stdout.write(f"{' and '.join(made.files.values())}: {made.shards:,} shards, {made.tokens:,} tokens, "
                         f"{made.bytes:,} bytes{each}\n")  # fmt: skip
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Weights:
    """Compare the weights of a run's experts, pair by pair, for the query `weight_similarity`.

    Loads the run's model again and writes one file into the run's folder `weights`: cosines of the matrices, with
    neurons in their order and matched to each other, of router rows, and of routers with experts.
    """

    run_: RunPath
    """The run directory: a local path or the URL of an object store."""
    match: bool = True
    """Match the neurons of each pair, which takes nearly all of the time: `--no-match` leaves it out."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where matrices are multiplied. Matching runs on the CPU."""
    again: bool = False
    """Compare even if the run has the file already."""

    def run(self) -> int:
        """Makes the table, unless it is there."""
        from collector.query.views import read_info
        from collector.store.run_directory import RunDirectory
        from collector.upkeep import verify, weights

        run = RunDirectory(self.run_)
        read_info(run)
        if not self.again and (name := weights.current(run)):
            sys.stdout.write(f"{name}: already there\n")
            return 0
        made = weights.make(run, device=self.device, match=self.match, progress=verify.Ticker("matched", "pairs"))
        for router in made.unmatched:
            sys.stderr.write(f"{router}: experts of more than {weights.MOST_NEURONS:,} neurons are not matched\n")
        sys.stdout.write(f"{made.file}: {made.rows:,} rows; see collector query {self.run_} weight_similarity\n")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Map:
    """Lay out what a layer's experts put out in two dimensions, for the query `expert_map`, report and explorer.

    Needs a run with `--record similarity`, which keeps the outputs of some sampled tokens, and the packages umap-learn
    and scikit-learn. Writes files into the run's folder `maps`: the points of the method, and always those of PCA
    beside them. Distances in a map of UMAP or t-SNE mean little; trustworthiness says how many of a point's neighbours
    in the map are neighbours among the outputs.
    """

    run_: RunPath
    """The run directory: a local path or the URL of an object store."""
    layer: int
    """The layer, by the model's own number."""
    stack: str | None = None
    """Its stack, where several routers have this number."""
    method: Literal["umap", "pca", "tsne"] = "umap"
    """How to lay out the points."""
    points: int = 5000
    """Most points, drawn at random if there are more outputs."""
    seed: int = 0
    """Of the drawing and of the method."""

    def run(self) -> int:
        """Makes the maps."""
        from collector.store.run_directory import RunDirectory
        from collector.upkeep import maps

        made = maps.make(
            RunDirectory(self.run_), layer=self.layer, stack=self.stack, method=self.method, points=self.points,
            seed=self.seed,
        )  # fmt: skip
        for each in made:
            sys.stdout.write(f"{each.file}: {each.points:,} of {each.outputs:,} outputs, trustworthiness "
                             f"{each.trustworthiness:.3f}\n")  # fmt: skip
        sys.stdout.write(f"See collector query {self.run_} expert_map --layer {self.layer}\n")
        return 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gc:
    """Remove the orphans of a run: files that no commit record names, left by replicas that died, and old rollups.

    Orphans are never read and only take space. Committed files stay, whatever their age. On object stores this command
    cannot see incomplete multipart uploads: give the bucket a lifecycle rule that aborts them.
    """

    run_: RunPath
    """The run directory."""
    older_than: str = "1d"
    """Remove only files last written at least this long ago: 90m, 12h, 2d.
    The minimum is an hour, to protect shards in progress. 0 is safe only while nothing collects into the run."""
    dry_run: bool = False
    """Only print what would be removed."""

    def run(self) -> int:
        """Prints the orphans and removes them."""
        from collector.store.run_directory import RunDirectory
        from collector.upkeep import orphans

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
