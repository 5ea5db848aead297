"""Prints the status of a sweep for the terminal: a row for each checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from collector.data.plan import Plan
from collector.look.terminal import console
from collector.store.sweep_directory import SWEEP_PLAN
from collector.store.totals import Totals

if TYPE_CHECKING:
    from collector.models.revisions import Checkpoint
    from collector.store.sweep_directory import SweepDirectory


def status(directory: SweepDirectory) -> bool:
    """Prints how far each checkpoint is, and why one failed; returns whether all are complete.

    Raises:
        FileNotFoundError: there is no sweep.
    """
    checkpoints, plan = directory.checkpoints(), Plan.from_parquet(directory.files.store.read(SWEEP_PLAN))
    done = [directory.is_complete(each) for each in checkpoints]
    out = console()
    out.print(f"[bold]{directory.root}[/]: {sum(done)} of {len(checkpoints)} checkpoints are complete, "
              f"{plan.documents:,} documents planned for each")  # fmt: skip
    table = Table("checkpoint", "step", "tokens seen", "documents", "tokens", "state", box=None)
    for column in table.columns[1:5]:
        column.justify = "right"
    for checkpoint, complete in zip(checkpoints, done, strict=True):
        table.add_row(*_row(directory, checkpoint, len(plan.shards), complete=complete))
    out.print(table)
    for checkpoint, complete in zip(checkpoints, done, strict=True):
        failure = None if complete else directory.noted("failures", checkpoint)
        if failure is not None:
            out.print(f"{checkpoint.name} failed: {failure['error']}", markup=False, soft_wrap=True)
    if not all(done):
        out.print("Run the same sweep command again to resume; it tries again what failed.")
    return all(done)


def _row(directory: SweepDirectory, checkpoint: Checkpoint, shards: int, *, complete: bool) -> list[str]:
    totals = Totals.of(directory.run(checkpoint))
    state = "complete" if complete else f"{len(totals.committed):,} of {shards:,} shards"
    if not complete and directory.noted("failures", checkpoint):
        state = "failed" if not totals.committed else f"failed, {state}"
    return [checkpoint.name, *map(_count, (checkpoint.step, checkpoint.tokens_seen)),
            *map(_count, (totals.documents, totals.tokens)), state]  # fmt: skip


def _count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"
