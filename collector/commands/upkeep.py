"""What keeps a run sound, fast and small: `collector verify`, `collector rollup`, `collector gc`.

None of them changes what was collected.
"""

from __future__ import annotations

import dataclasses
import sys

from collector.commands.arguments import RunPath


@dataclasses.dataclass(frozen=True, kw_only=True)
class Verify:
    """Re-read everything that a run committed, and name each shard that is not what it must be.

    Checks files by size and SHA-256, and tables by what they must hold: every token of every document once, and for
    each recorded router a decision about each token of its stack. Run it after a copy, before a publication, or when a
    disk is in doubt. A run that only lacks shards is incomplete, not unsound. A rollup is compared with what the tables
    give, counted by other means than those that made it.
    """

    run_: RunPath
    """The run directory: a path or an object store's URL, which is read as a whole."""
    recollect: bool = False
    """Set the commit records of wrong shards aside, so that the same collect command collects these shards again."""

    def run(self) -> int:
        """Prints the findings; 0 if the run is sound and complete, else 1."""
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
    """Count a run once, per document and per label, so that questions about labels and documents are answered at once.

    Writes two files into the run's folder `rollup`; from then on `query`, `sql` and `show` read them instead of
    counting tokens. A rollup of other commits than the run has now is not read: make it anew when shards were added.
    """

    run_: RunPath
    """The run directory: a path or an object store's URL, which is read as a whole."""
    again: bool = False
    """Count again although there is a rollup of exactly these commits."""

    def run(self) -> int:
        """Makes the rollup, unless it is there."""
        from collector.query.rollup import files, making
        from collector.store.run_directory import RunDirectory
        from collector.upkeep import verify

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

    run_: RunPath
    """The run directory."""
    older_than: str = "1d"
    """Only what was last written so long ago: 90m, 12h, 2d; an hour at least, so that shards in work are left alone.
    0 takes everything, and is right only while nothing collects into the run."""
    dry_run: bool = False
    """Only tell what would be removed."""

    def run(self) -> int:
        """Prints what goes, and removes it."""
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
