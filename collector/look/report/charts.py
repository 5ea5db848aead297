"""Draws matrices as Vega-Lite specifications with Altair; `curves` draws curves and bars.

Each drawing refers to its datasets by name (`rows` and others), so that the page can show another layer with the same
drawing. Colours come from the configuration (`themes`), sizes from the layout. Only scales are computed from the data.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import altair as alt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROWS = alt.NamedData("rows")
COLOURED = "_coloured"
"""Column that marks rows whose label is drawn in colour."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes, in pixels of the page or points of the paper."""

    width: float
    """Width of a matrix, and of all panels of a row together."""
    row: float
    """Height of a matrix's row."""
    panel: float
    """Height of a panel with curves."""
    column: float
    """Width of a panel with curves if it is the only one."""
    text: float
    """Font size of the names along a matrix."""


PAGE = Layout(width=880, row=13, panel=200, column=520, text=10)
PAPER = Layout(width=416, row=7.8, panel=110, column=202, text=7)
"""With names and legends a figure fits the text width (6.75 in, 486 pt), and a single panel fits a column (3.3 in)."""

_SMALLEST = 5
"""Smallest readable font size."""
_COUNTS = {"n", "tokens"}
"""Columns with whole numbers, shown in full."""
_SIGNIFICANT = "isValid(datum.q) && datum.q < 0.05"


def place(field: str) -> alt.EncodingSortField:
    """Returns an encoding that sorts the names of an axis by a column."""
    return alt.EncodingSortField(field, op="min")


def axis(layout: Layout, cell: float, **options: Any) -> alt.Axis:
    """Returns an axis that names every cell if the names are large enough to read."""
    size = min(layout.text, cell)
    return alt.Axis(labelFontSize=max(size, _SMALLEST), labelOverlap=size < _SMALLEST, **options)


def tooltip_of(fields: Mapping[str, str]) -> list[alt.Tooltip]:
    """Returns the tooltip for columns of the types N, O or Q."""
    formats = {field: "," if field in _COUNTS else ".3~g" for field, kind in fields.items() if kind == "Q"}
    return [alt.Tooltip(f"{field}:{kind}", format=formats.get(field, "")) for field, kind in fields.items()]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Side:
    """The rows or the columns of a matrix."""

    column: str
    """Column of the table that names them."""
    count: int
    """How many there are at most."""
    title: str | None = None


def matrix(
    layout: Layout, *, x: Side, y: Side, title: str, high: float, tooltip: Mapping[str, str],
    significant: bool = False, square: bool = False,
) -> alt.LayerChart | alt.FacetChart:  # fmt: skip
    """Draws a matrix with cells coloured by `value`, rows and columns in the order of `_row` and `_column`.

    Args:
        layout: sizes.
        x: the columns; a matrix with few is narrower than the layout.
        y: the rows.
        title: of the colour scale.
        high: value of the last colour; the first is 0.
        tooltip: type (N or Q) by column.
        significant: mark the cells whose `q` is below 0.05.
        square: make cells as high as they are wide.
    """
    width = min(layout.width, x.count * layout.row * (1 if square else 3))
    cell = min(layout.row, width / x.count) if square else layout.row
    turned = axis(layout, width / x.count, labelAngle=-90)
    base = alt.Chart(ROWS).encode(
        x=alt.X(f"{x.column}:N", sort=place("_column"), title=x.title, axis=turned),
        y=alt.Y(f"{y.column}:N", sort=place("_row"), title=y.title, axis=axis(layout, cell)),
    )
    cells = base.mark_rect(aria=False).encode(
        color=alt.Color("value:Q", title=title, scale=alt.Scale(domain=[0, high or 1], clamp=True)),
        tooltip=tooltip_of(tooltip),
    )
    layers = [cells]
    if significant:
        mark = base.mark_point(style="significant", shape="circle", size=layout.row / 2, aria=False, tooltip=False)
        layers.append(mark.encode(opacity=alt.condition(_SIGNIFICANT, alt.value(1), alt.value(0))))
    return alt.layer(*layers).properties(width=width, height=y.count * cell)


def matrix_with_tree(layout: Layout, labels: int, *, title: str, high: float) -> alt.HConcatChart:
    """Draws a square matrix of labels with the dendrogram of its rows (dataset `branches`) to the right."""
    side = min(layout.width * 0.84, labels * layout.row)
    cells = (
        alt.Chart(ROWS)
        .mark_rect(aria=False)
        .encode(
            x=alt.X("label_b:N", sort=place("_column"), title=None, axis=axis(layout, side / labels, labelAngle=-90)),
            y=alt.Y("label_a:N", sort=place("_row"), title=None, axis=axis(layout, side / labels)),
            color=alt.Color("value:Q", title=title, scale=alt.Scale(domain=[0, high or 1])),
            tooltip=tooltip_of({"label_a": "N", "label_b": "N", "value": "Q", "n": "Q"}),
        )
        .properties(width=side, height=side)
    )
    branches = (
        alt.Chart(alt.NamedData("branches"))
        .mark_line(style="tree", interpolate="linear", aria=False)
        .encode(
            x=alt.X("distance:Q", title="joined at (bits)", axis=alt.Axis(tickCount=3, grid=False, labelFlush=False)),
            y=alt.Y("place:Q", scale=alt.Scale(domain=[0, labels], reverse=True, nice=False), axis=None),
            detail="joint:N",
            order="step:Q",
        )
        .properties(width=layout.width * 0.13, height=side)
    )
    return alt.hconcat(cells, branches, spacing=layout.row / 2).resolve_scale(y="independent", x="independent")


def ranks(
    layout: Layout, *, metrics: Mapping[str, tuple[str, float]], sides: Sequence[str], rows: int, ranks: int
) -> alt.HConcatChart:
    """Draws the most used experts of each label by rank: the expert's number on a cell coloured by its share.

    A few shares are large and most are small, so colours follow the square root.

    Args:
        layout: sizes.
        metrics: title of the colour scale and value of the last colour, by metric.
        sides: names of the runs, side by side for each metric.
        rows: number of labels.
        ranks: number of experts per label.
    """
    width = min(layout.width / len(metrics) / len(sides) - layout.row * 1.5, ranks * layout.row * 2)
    return alt.hconcat(
        *(
            _ranks_of(layout, metric, words, high).properties(width=width, height=rows * layout.row)
            .facet(column=alt.Column("run:N", sort=list(sides), title=None), spacing=layout.row / 2)
            .resolve_axis(y="shared")
            for metric, (words, high) in metrics.items()
        ),
        spacing=layout.row,
    ).resolve_scale(color="independent")  # fmt: skip


def _ranks_of(layout: Layout, metric: str, words: str, high: float) -> alt.LayerChart | alt.FacetChart:
    base = (
        alt.Chart(ROWS)
        .transform_filter(f"datum.metric == '{metric}'")
        .encode(
            x=alt.X("rank:O", title="rank", axis=axis(layout, layout.row, labelAngle=0)),
            y=alt.Y("label:N", sort=place("_row"), title=None, axis=axis(layout, layout.row)),
        )
    )
    fields = {"run": "N", "label": "N", "rank": "O", "expert": "N", "value": "Q", "baseline": "Q", "n": "Q"}
    cells = base.mark_rect(aria=False).encode(
        color=alt.Color("value:Q", title=words, scale=alt.Scale(type="sqrt", domain=[0, high or 1])),
        tooltip=tooltip_of(fields),
    )
    numbers = [
        base.mark_text(style=style, fontSize=layout.text, aria=False, tooltip=False)
        .transform_filter(f"datum.value {compared} {0.55**2 * high}")
        .encode(text="expert:N")
        for style, compared in (("on-pale", "<"), ("on-strong", ">="))
    ]
    return alt.layer(cells, *numbers, data=ROWS)
