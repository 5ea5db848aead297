"""A figure: its words, its tables, and how it is drawn."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from collector.look.report.charts import COLOURED

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from collector.look.report.charts import Layout
    from collector.look.report.tables import Router, Side, Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Subject:
    """What a report is about: the runs, and what of them is shown."""

    sides: Sequence[Side]
    """The run itself first."""
    routers: Sequence[Router]
    labels: Sequence[str]
    """Those that are shown: all, or those with the most tokens."""
    coloured: Sequence[str]
    """Labels whose curves are drawn in colour at first."""
    max_experts: int
    """Experts of a layer that matrices show."""
    resamples: int
    """Bootstrap samples of intervals and shuffles of the test of specialization; 0: neither."""

    @property
    def main(self) -> Sequence[Side]:
        """The run itself."""
        return self.sides[:1]

    @property
    def stacks(self) -> list[str]:
        """Stacks with a router."""
        return list(dict.fromkeys(stack for stack, _ in self.routers))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of a report, or the word why there is none."""

    name: str
    """File name and anchor."""
    section: str
    title: str
    text: str
    """What it shows and how to read it."""
    draw: Callable[[Layout], Any] | None = None
    """The drawing in a layout, an Altair chart; None where there is nothing to draw, and `text` says why."""
    tables: Mapping[str, Table] = dataclasses.field(default_factory=dict)
    """Data set of the drawing -> its rows."""
    notes: Sequence[str] = ()
    """Sample sizes, and what is left out."""

    @property
    def by_layer(self) -> bool:
        """Whether it shows one layer at a time."""
        return any(table.by_layer for table in self.tables.values())

    def data(self, table: Table, coloured: Sequence[str]) -> list[dict[str, Any]]:
        """Rows of a table as the drawing reads them."""
        columns = table.cells()
        if "label" in columns:
            columns[COLOURED] = [label in coloured for label in columns["label"]]
        return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]

    def spec(self, layout: Layout) -> dict[str, Any]:
        """The drawing as Vega-Lite, without data."""
        assert self.draw is not None
        found: dict[str, Any] = self.draw(layout).to_dict()
        return found | {"description": f"{self.title}. {self.text}"}
