"""Assembles the report of a sweep: opens the runs, asks the queries, writes the page and the figures."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from collector.look import terminal
from collector.look.report import card, page, training
from collector.look.report.tables import Side
from collector.look.report.writing import RESAMPLES, few_documents, save, start_of, subject_of
from collector.query.sweeps import open_sweep
from collector.query.warehouse import FEW_DOCUMENTS, open_run

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from collector.query.sweeps import Sweep


def write_sweep(
    root: str, out: Path, *, figures: Path | None = None, layer: int | None = None,
    labels: Sequence[str] | None = None, resamples: int = RESAMPLES,
    min_documents: int = FEW_DOCUMENTS,
) -> list[Path]:  # fmt: skip
    """Writes the report of a sweep; arguments and errors are those of `write`.

    Raises:
        FileNotFoundError: there is no sweep.
        ValueError: no run is complete, or the last lacks the layer or a label.
    """
    sweep = open_sweep(root)
    last = Side(name=sweep.last.name, root=sweep.last.root, run=open_run(sweep.last.root))
    subject = subject_of([last], labels, resamples, min_documents)
    start = start_of(subject, layer)
    drawn = training.figures(subject, sweep)
    facts = _card(sweep, last)
    table = card.label_table(last)
    text = page.render(
        subject, drawn, cards=[facts], labels=table, start=start, title="When specialization appears",
        lead=_lead(sweep, facts, last, len(table.rows)),
        warnings=[*_warnings(sweep), *few_documents(subject, min_documents)],
    )  # fmt: skip
    return save(text, out, subject, drawn, figures, start)


def _card(sweep: Sweep, last: Side) -> card.Card:
    """Returns the card of the last run, and of which sweep it is."""
    found = card.read_card(last)
    names = [run.name for run in sweep.runs]
    told = [("sweep", sweep.root), ("checkpoints", f"{len(names)}: {', '.join(names)}")]
    return dataclasses.replace(found, facts=[*told, *found.facts])


def _lead(sweep: Sweep, facts: card.Card, last: Side, labels: int) -> str:
    return (
        f"{len(sweep.runs)} checkpoints of one training, from {sweep.runs[0].name} to {sweep.last.name}, each over the "
        f"same {facts.tokens:,} tokens of {facts.documents:,} documents in {labels} languages: "
        f"{terminal.routers(last.run.info['layers'])}. Every number comes from the query shown below its figure."
    )


def _warnings(sweep: Sweep) -> list[dict[str, str]]:
    names = ", ".join(run.name for run in sweep.incomplete)
    return [{"head": "Not all are complete.", "text": f"The curves leave out {names}."}] if names else []
