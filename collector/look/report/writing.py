"""Assembles a report: opens the runs, executes the queries, writes the page and the figures."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from collector.look import terminal
from collector.look.report import answers, card, experts, export, interventions, languages, outputs, page, vocabulary
from collector.look.report.figure import MARK, Figure, Subject
from collector.look.report.tables import Side
from collector.query.warehouse import FEW_DOCUMENTS, open_run

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collector.look.report.tables import Router
    from collector.query.warehouse import Run

MAX_LABELS = 60
"""Maximum number of languages in matrices, those with the most tokens."""
MAX_CELLS = 250_000
"""Maximum cells in the expert matrices of all layers together; beyond it the least used experts are left out."""
RESAMPLES = 200
"""Enough for a look; use 1,000 for a paper."""
FEW = 6
"""Number of languages whose curves are coloured initially."""


def write(
    root: str,
    out: Path,
    *,
    compare: str | None = None,
    figures: Path | None = None,
    layer: int | None = None,
    labels: Sequence[str] | None = None,
    resamples: int = RESAMPLES,
    min_documents: int = FEW_DOCUMENTS,
) -> list[Path]:
    """Writes the report of a run.

    Args:
        root: the run.
        out: the HTML file.
        compare: another run to compare with, usually of the same model with random weights.
        figures: folder for the figures as PDF, SVG and PNG.
        layer: layer that the page shows first and that single-layer figures show (default: the one in the middle).
        labels: labels whose curves are coloured (default: those with the most tokens).
        resamples: bootstrap samples of intervals and shuffles of the test of specialization; 0 omits both.
        min_documents: labels with fewer documents are marked.

    Returns:
        The written files.

    Raises:
        FileNotFoundError: there is no run.
        ValueError: a run has no committed shard, or lacks the layer or a label.
    """
    sides = _sides(root, compare)
    subject = subject_of(sides, labels, resamples, min_documents)
    start = start_of(subject, layer)
    drawn = [
        *languages.figures(subject), *experts.figures(subject), *vocabulary.figures(subject), *outputs.figures(subject),
        *interventions.figures(subject), *answers.figures(subject),
    ]  # fmt: skip
    cards = [card.read_card(side) for side in sides]
    table = card.label_table(sides[0])
    text = page.render(
        subject, drawn, cards=cards, labels=table, start=start, title=f"{cards[0].model}: who uses which experts",
        lead=card.lead(cards[0], sides[0].run.info["layers"], len(table.rows)),
        warnings=[*_warnings(cards, subject, len(table.rows)), *few_documents(subject, min_documents)],
    )  # fmt: skip
    return save(text, out, subject, drawn, figures, start)


def save(
    page_text: str, out: Path, subject: Subject, drawn: Sequence[Figure], figures: Path | None, start: int
) -> list[Path]:  # fmt: skip
    """Writes a page, and its figures if there is a folder for them; returns the written files."""
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(page_text, encoding="utf-8")
    written = [out]
    if figures:
        written += export.write_figures(subject, drawn, figures, subject.routers[start])
    return written


def _sides(root: str, compare: str | None) -> list[Side]:
    roots = [root, *([compare] if compare else [])]
    runs = [open_run(each) for each in roots]
    for each, run in zip(roots, runs, strict=True):
        if not run.sql("select label from labels limit 1").fetchall():
            raise ValueError(f"{each} holds no document to report on: collector status {each} says why")
    names = [terminal.origin(run.info) for run in runs]
    if len(set(names)) < len(names):
        names = [each.rstrip("/").rpartition("/")[2] for each in roots]
    if len(set(names)) < len(names):
        names = roots
    return [Side(name=name, root=each, run=run) for name, each, run in zip(names, roots, runs, strict=True)]


def subject_of(
    sides: Sequence[Side], coloured: Sequence[str] | None, resamples: int, min_documents: int
) -> Subject:  # fmt: skip
    """Decides what a report of these runs shows.

    Raises:
        ValueError: the first run lacks a label, or more labels are to be coloured than there are colours.
    """
    by_tokens = [row[0] for row in sides[0].run.sql("select label from labels order by tokens desc, label").fetchall()]
    if unknown := [label for label in coloured or () if label not in by_tokens]:
        raise ValueError(
            f"no document of {sides[0].root} has the label {unknown[0]!r}; it has {', '.join(sorted(by_tokens))}"
        )
    if coloured and len(coloured) > page.MAX_COLOURED:
        raise ValueError(
            f"--labels takes {page.MAX_COLOURED} at most, as many as there are colours; got {len(coloured)}"
        )
    few = sides[0].run.sql(f"select label from labels where documents < {min_documents} order by label").fetchall()
    first = list(dict.fromkeys([*(coloured or ()), *by_tokens]))[:MAX_LABELS]
    routers = _routers(sides[0].run)
    return Subject(
        sides=sides, routers=routers, labels=sorted(first), coloured=list(coloured or by_tokens[:FEW]),
        max_experts=math.isqrt(MAX_CELLS // len(routers)), resamples=resamples, few=[label for (label,) in few],
    )  # fmt: skip


def _routers(run: Run) -> list[Router]:
    return [(one["stack"], one["layer"]) for one in run.info["layers"]]


def start_of(subject: Subject, layer: int | None) -> int:
    """Returns the index of the router to show first.

    Raises:
        ValueError: the run has no such layer.
    """
    if layer is None:
        return len(subject.routers) // 2
    layers = [number for _, number in subject.routers]
    if layer not in layers:
        raise ValueError(
            f"layer {layer} is not recorded in this run; it has {', '.join(map(str, sorted(set(layers))))}"
        )
    return layers.index(layer)


def few_documents(subject: Subject, min_documents: int) -> list[dict[str, str]]:
    """Returns the warning that tells what the marks at names of labels mean, if there are any."""
    if not subject.few:
        return []
    text = (
        f"{MARK} marks {len(subject.few)} of the languages, which have fewer than {min_documents:,} documents: what is "
    )
    return [{"head": "Few documents.", "text": text + "special about them may be chance (--min-documents)."}]


def _warnings(cards: Sequence[card.Card], subject: Subject, labels: int) -> list[dict[str, str]]:
    found = [
        {
            "head": f"{each.name}: incomplete.",
            "text": f"{each.shards[0]:,} of {each.shards[1]:,} shards are committed; all numbers come from these.",
        }
        for each in cards
        if not each.complete
    ]
    if labels > len(subject.labels):
        text = f"Of {labels} languages the {len(subject.labels)} with the most tokens are shown."
        found.append(
            {"head": "Not all are shown.", "text": text + " Divergence over depth and load count all of them."}
        )
    return found
