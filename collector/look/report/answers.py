"""Defines the figure about prompts and answers, of runs whose model wrote on from its documents."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import numpy as np

from collector.look.report import curves
from collector.look.report.figure import Figure
from collector.look.report.tables import fetch, in_labels, span

if TYPE_CHECKING:
    from collector.look.report.figure import Subject

_METRIC = "own_answer_nearer"
_WIDTH = 1.96
"""Standard errors from the middle to the edge of an interval of 95 %."""


def figures(subject: Subject) -> list[Figure]:
    """Returns the figures that the run has data for."""
    if not subject.sides[0].run.has("phases"):
        return []
    columns = ("metric", "label", "value", "baseline", "standard_error", "n")
    where = f"metric = '{_METRIC}' and {in_labels(subject.labels)}"
    rows = fetch(subject.main, "phase_divergence", columns, where=where)
    if len(rows) == 0:
        return []
    margin = np.ma.filled(rows["standard_error"].astype(float), 0) * _WIDTH
    rows = rows.having(low=np.clip(rows["value"] - margin, 0, 1), high=np.clip(rows["value"] + margin, 0, 1))
    panel = curves.Panel(metric=_METRIC, words="own answer is nearer (probability)", low=0.0, high=1.0)
    return [
        Figure(
            name="answers",
            section="While the model writes",
            title="Does the routing of a prompt tell that of its answer?",
            text="The probability that a document's own answer uses experts more like those of its prompt than the "
            "answer to another prompt of the same language does. At 1/2 (dashed) the prompt tells nothing that its "
            "language does not. Bands are intervals of 95 %, with documents as the unit.",
            draw=functools.partial(
                curves.by_depth, panels=[panel], stacks=subject.stacks,
                curves=curves.Curves(
                    series="label", main=subject.sides[0].name, band=("low", "high"), faint=True,
                    tooltip={"label": "N"} | dict.fromkeys(("value", "standard_error", "n"), "Q"),
                ),
            ),
            tables={"rows": rows},
            notes=[f"{span(rows['n'])} documents of each language."],
        )
    ]  # fmt: skip
