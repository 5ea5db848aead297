"""Defines a figure: its texts, its tables, and its drawing."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

from collector.look.report.charts import COLOURED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from collector.look.report.charts import Layout
    from collector.look.report.tables import Router, Side, Table


MARK = "†"
"""Marks labels with few documents."""
_LABELS = ("label", "label_a", "label_b")
"""Columns of labels."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """The runs of a report, and the routers, labels and experts to show."""

    sides: Sequence[Side]
    """The main run, followed by the one to compare with, if any."""
    routers: Sequence[Router]
    labels: Sequence[str]
    """Labels to show: all, or those with the most tokens."""
    coloured: Sequence[str]
    """Labels whose curves are coloured initially."""
    max_experts: int
    """Maximum number of experts of a layer in matrices."""
    resamples: int
    """Bootstrap samples of intervals and shuffles of the test of specialization; 0 omits both."""
    few: Sequence[str] = ()
    """Labels with so few documents that their cells are marked."""

    @property
    def main(self) -> Sequence[Side]:
        """The main run, as a sequence of one."""
        return self.sides[:1]

    @property
    def stacks(self) -> list[str]:
        """Stacks with a router."""
        return list(dict.fromkeys(stack for stack, _ in self.routers))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a report, or the reason why it cannot be drawn."""

    name: str
    """File name and anchor."""
    section: str
    title: str
    text: str
    """What the figure shows and how to read it."""
    draw: Callable[[Layout], Any] | None = None
    """Draws an Altair chart in a layout; None if there is nothing to draw, and `text` says why."""
    tables: Mapping[str, Table] = dataclasses.field(default_factory=dict)
    """Rows by dataset of the drawing."""
    notes: Sequence[str] = ()
    """Sample sizes and omissions."""

    @property
    def by_layer(self) -> bool:
        """Whether the figure shows one layer at a time."""
        return any(table.by_layer for table in self.tables.values())

    def data(self, table: Table, coloured: Sequence[str]) -> list[dict[str, Any]]:
        """Returns the rows of a table in the form that the drawing reads."""
        columns = table.cells()
        if "label" in columns:
            columns[COLOURED] = [label in coloured for label in columns["label"]]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def spec(self, layout: Layout, few: Sequence[str] = ()) -> dict[str, Any]:
        """Returns the drawing as a Vega-Lite specification without data; the names of labels in `few` are marked."""
        assert self.draw is not None
        found: dict[str, Any] = self.draw(layout).to_dict()
        if few:
            _mark(found, f"indexof({json.dumps(list(few))}, datum.label) < 0 ? datum.label : datum.label + ' {MARK}'")
        return found | {"description": f"{self.title}. {self.text}"}


def _mark(spec: Any, expression: str) -> None:
    """Sets what the axes of labels write, everywhere in a specification."""
    if isinstance(spec, dict):
        if spec.get("field") in _LABELS and isinstance(spec.get("axis"), dict):
            spec["axis"]["labelExpr"] = expression
        spec = [*spec.values()]
    if isinstance(spec, list):
        for part in spec:
            _mark(part, expression)
