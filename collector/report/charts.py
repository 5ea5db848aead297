"""The kinds of drawings, as Vega-Lite made by Altair: matrices, ranks, curves over depth, bars.

Each drawing reads data sets by name (`rows`, and what else it says), so that the page can show another layer without
another drawing. Colours are the configuration's (`themes`), sizes the layout's. Nothing is computed from the data but
scales.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import altair as alt

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

ROWS = alt.NamedData("rows")
COLOURED = "_coloured"
"""Column that says whether a row's label is one of those that are drawn in colour."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Sizes, in pixels of the page or points of the paper."""

    width: float
    """Of a matrix, and of all panels of a row together."""
    row: float
    """Height of a matrix's row."""
    panel: float
    """Height of a panel with curves."""
    text: float
    """Size of the names along a matrix."""


PAGE = Layout(width=880, row=13, panel=200, text=10)
PAPER = Layout(width=340, row=6.4, panel=95, text=5.4)
"""Fits the text width of a page of one column (5.5 in, 396 pt) with names and legends."""

_SMALLEST = 4.5
"""Letters that are smaller cannot be read."""
_SIGNIFICANT = "isValid(datum.q) && datum.q < 0.05"


def _place(field: str) -> alt.EncodingSortField:
    return alt.EncodingSortField(field, op="min")


def _axis(layout: Layout, cell: float, **options: Any) -> alt.Axis:
    """An axis with the name of every cell, if they are large enough to read."""
    size = min(layout.text, cell)
    return alt.Axis(labelFontSize=max(size, _SMALLEST), labelOverlap=size < _SMALLEST, **options)


def _tooltip(fields: Mapping[str, str]) -> list[alt.Tooltip]:
    return [
        alt.Tooltip(f"{field}:{kind}", format={"Q": ".3~g"}.get(kind, ""))
        if kind == "Q"
        else alt.Tooltip(f"{field}:{kind}")
        for field, kind in fields.items()
    ]


def matrix(
    layout: Layout, *, x: str, y: str, columns: int, rows: int, title: str, high: float, x_title: str,
    y_title: str | None = None, tooltip: Mapping[str, str], significant: bool = False, square: bool = False,
) -> alt.LayerChart | alt.FacetChart:  # fmt: skip
    """Cells coloured by `value`, rows and columns in the order of `_row` and `_column`.

    Args:
        layout: sizes.
        x: column of the table that names the columns of the matrix.
        y: that names the rows.
        columns: how many there are at most; few do not get the whole width.
        rows: how many there are.
        title: of the colours.
        high: value of the last colour; the first is 0.
        x_title: of the x axis.
        y_title: of the y axis.
        tooltip: column -> N or Q.
        significant: mark the cells whose `q` is below 0.05.
        square: as high as it is wide.
    """
    width = min(layout.width, columns * layout.row * (1 if square else 3))
    base = alt.Chart(ROWS).encode(
        x=alt.X(f"{x}:N", sort=_place("_column"), title=x_title, axis=_axis(layout, width / columns, labelAngle=-90)),
        y=alt.Y(f"{y}:N", sort=_place("_row"), title=y_title, axis=_axis(layout, layout.row)),
    )
    cells = base.mark_rect(aria=False).encode(
        color=alt.Color("value:Q", title=title, scale=alt.Scale(domain=[0, high or 1])), tooltip=_tooltip(tooltip)
    )
    layers = [cells]
    if significant:
        mark = base.mark_point(style="significant", shape="circle", size=layout.row / 2, aria=False, tooltip=False)
        layers.append(mark.encode(opacity=alt.condition(_SIGNIFICANT, alt.value(1), alt.value(0))))
    return alt.layer(*layers).properties(width=width, height=rows * layout.row)


def matrix_with_tree(layout: Layout, labels: int, *, title: str, high: float) -> alt.HConcatChart:
    """A square matrix of labels with the dendrogram of its rows to the right: the data set `branches`."""
    side = min(layout.width * 0.84, labels * layout.row)
    cells = (
        alt.Chart(ROWS)
        .mark_rect(aria=False)
        .encode(
            x=alt.X("label_b:N", sort=_place("_column"), title=None, axis=_axis(layout, side / labels, labelAngle=-90)),
            y=alt.Y("label_a:N", sort=_place("_row"), title=None, axis=_axis(layout, side / labels)),
            color=alt.Color("value:Q", title=title, scale=alt.Scale(domain=[0, high or 1])),
            tooltip=_tooltip({"label_a": "N", "label_b": "N", "value": "Q", "n": "Q"}),
        )
        .properties(width=side, height=side)
    )
    branches = (
        alt.Chart(alt.NamedData("branches"))
        .mark_line(style="tree", interpolate="linear", aria=False)
        .encode(
            x=alt.X("distance:Q", title="joined at (bits)", axis=alt.Axis(tickCount=4, grid=False)),
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
    """For each label its most used experts, first to last: the expert's number on a cell coloured by its share.

    Args:
        layout: sizes.
        metrics: metric -> name of its colours, and the value of the last colour.
        sides: names of the runs, side by side for each metric.
        rows: labels.
        ranks: experts of each.
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
            x=alt.X("rank:O", title="rank", axis=_axis(layout, layout.row, labelAngle=0)),
            y=alt.Y("label:N", sort=_place("_row"), title=None, axis=_axis(layout, layout.row)),
        )
    )
    fields = {"run": "N", "label": "N", "rank": "O", "expert": "N", "value": "Q", "baseline": "Q", "n": "Q"}
    cells = base.mark_rect(aria=False).encode(
        color=alt.Color("value:Q", title=words, scale=alt.Scale(domain=[0, high or 1])),
        tooltip=_tooltip(fields),
    )
    numbers = [
        base.mark_text(style=style, fontSize=layout.text, aria=False, tooltip=False)
        .transform_filter(f"datum.value {compared} {0.55 * high}")
        .encode(text="expert:N")
        for style, compared in (("on-pale", "<"), ("on-strong", ">="))
    ]
    return alt.layer(cells, *numbers, data=ROWS)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One metric over depth."""

    metric: str
    words: str
    low: float
    high: float


def by_depth(
    layout: Layout, *, panels: Sequence[Panel], series: str, stacks: Sequence[str], main: str, dash: bool = False,
    band: tuple[str, str] | None = None, faint: bool = False, tooltip: Mapping[str, str],
) -> alt.VConcatChart:  # fmt: skip
    """Curves over the layers, one panel per metric, and a row of panels per stack where there are several.

    Args:
        layout: sizes.
        panels: metrics, left to right.
        series: column that tells curves apart by colour.
        stacks: of the run.
        main: the run whose curves are also drawn faintly.
        dash: tell runs apart by dashes.
        band: columns of the lower and upper edge of a band around each coloured curve.
        faint: draw the curves of the main run that are not `_coloured`.
        tooltip: column -> N or Q.
    """
    width = min(layout.width / len(panels) - layout.row * 2.4, layout.panel * 2.6)
    rows = []
    for stack in stacks:
        drawn = []
        for panel in panels:
            where = f"datum.metric == '{panel.metric}' && datum.stack == '{stack}'"
            chart = alt.layer(*_curves(panel, where, series, main, dash, band, faint, layout, tooltip))
            title = panel.words if len(stacks) == 1 else f"{stack}: {panel.words}"
            drawn.append(chart.properties(width=width, height=layout.panel, title=title))
        rows.append(alt.hconcat(*drawn, spacing=layout.row))
    return alt.vconcat(*rows)


def _curves(
    panel: Panel, where: str, series: str, main: str, dash: bool, band: tuple[str, str] | None, faint: bool,
    layout: Layout, tooltip: Mapping[str, str],
) -> list[alt.Chart]:  # fmt: skip
    base = (
        alt.Chart(ROWS)
        .transform_filter(where)
        .encode(x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True)))
    )
    scale = alt.Scale(domain=[panel.low, panel.high], zero=False, nice=True)
    y = alt.Y("value:Q", title=None, scale=scale, axis=alt.Axis(tickCount=5))
    detail = [alt.Detail(f"{name}:N") for name in dict.fromkeys((series, "run"))]
    layers = [base.mark_line(style="baseline", aria=False).encode(y=alt.Y("min(baseline):Q", title=None, scale=scale))]
    coloured = base
    if faint:
        others = base.transform_filter(f"!datum.{COLOURED} && datum.run == {main!r}")
        layers.append(others.mark_line(style="faint", aria=False).encode(y=y, detail=detail, tooltip=_tooltip(tooltip)))
        coloured = base.transform_filter(f"datum.{COLOURED}")
    legend = alt.Legend(columns=6, symbolType="stroke", symbolOpacity=1)
    coloured = coloured.encode(color=alt.Color(f"{series}:N", title=None, legend=legend))
    if band:
        low, high = band
        area = coloured.transform_filter(f"isValid(datum.{low})").mark_area(opacity=0.18, aria=False)
        layers.append(area.encode(y=alt.Y(f"{low}:Q", title=None, scale=scale), y2=f"{high}:Q", detail=detail))
    line = coloured.mark_line(point=alt.OverlayMarkDef(size=layout.panel / 8, filled=True), aria=False)
    line = line.encode(y=y, detail=detail, tooltip=_tooltip(tooltip))
    if dash:
        runs = alt.Legend(symbolType="stroke")
        line = line.encode(strokeDash=alt.StrokeDash("run:N", title=None, legend=runs))
    return [*layers, line]


def loads(layout: Layout, *, high: float, compared: bool) -> alt.LayerChart | alt.FacetChart:
    """Experts by load, the most used first; another run's as a stepped line."""
    base = alt.Chart(ROWS).encode(
        x=alt.X("_rank:O", title="experts, most used first", axis=alt.Axis(labels=False)),
        y=alt.Y("value:Q", title="share of tokens", scale=alt.Scale(domain=[0, high])),
        tooltip=_tooltip({"run": "N", "expert": "N", "value": "Q", "baseline": "Q", "n": "Q", "is_dead": "N"}),
    )
    bars = base.transform_filter("datum._main").mark_bar(aria=False)
    dead = base.transform_filter("datum._main && datum.is_dead").mark_point(
        style="dead", shape="cross", filled=True, size=layout.row * 4, aria=False
    )
    layers = [bars, dead]
    if compared:
        other = base.transform_filter("!datum._main")
        layers.append(other.mark_line(interpolate="step", style="compared", aria=False, tooltip=False))
    rule = alt.Chart(ROWS).mark_rule(style="baseline", aria=False).encode(y="mean(baseline):Q")
    return alt.layer(*layers, rule).properties(width=layout.width, height=layout.panel)


def bars_with_words(layout: Layout, *, rows: int, x_title: str, y_title: str) -> alt.HConcatChart:
    """Bars from the longest down, each with the words of its column `_words` behind it."""
    base = alt.Chart(ROWS).encode(
        y=alt.Y("expert:N", sort=_place("_row"), title=y_title, axis=_axis(layout, layout.row))
    )
    tooltip = _tooltip({"expert": "N", "value": "Q", "baseline": "Q", "n": "Q", "tokens": "Q", "_words": "N"})
    scale = alt.Scale(domain=[0, 1])
    bars = base.mark_bar(size=layout.row * 0.4, aria=False).encode(
        x=alt.X("value:Q", title=x_title, scale=scale), tooltip=tooltip
    )
    rule = alt.Chart(ROWS).mark_rule(style="baseline", aria=False).encode(x="mean(baseline):Q")
    words = base.mark_text(
        style="on-pale", align="left", fontSize=layout.text, aria=False, limit=layout.width * 0.7
    ).encode(x=alt.value(0), text="_words:N", tooltip=tooltip)
    height = rows * layout.row * 1.15
    left = alt.layer(bars, rule).properties(width=layout.width * 0.2, height=height)
    right = words.encode(y=alt.Y("expert:N", sort=_place("_row"), axis=None)).properties(
        width=layout.width * 0.7, height=height
    )
    return alt.hconcat(left, right, spacing=layout.row).resolve_scale(y="shared")
