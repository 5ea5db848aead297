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


PAGE = Layout(width=800, row=13, panel=200, text=10)
PAPER = Layout(width=330, row=6.4, panel=95, text=5.4)
"""Fits the text width of a page of one column (5.5 in, 396 pt) with names and legends."""

_SIGNIFICANT = "isValid(datum.q) && datum.q < 0.05"


def _place(field: str) -> alt.EncodingSortField:
    return alt.EncodingSortField(field, op="min")


def _axis(layout: Layout, **options: Any) -> alt.Axis:
    return alt.Axis(labelFontSize=layout.text, labelOverlap=True, **options)


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
) -> alt.LayerChart:  # fmt: skip
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
        x=alt.X(f"{x}:N", sort=_place("_column"), title=x_title, axis=_axis(layout, labelAngle=-90 if square else 0)),
        y=alt.Y(f"{y}:N", sort=_place("_row"), title=y_title, axis=_axis(layout)),
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
    side = min(layout.width * 0.8, labels * layout.row)
    cells = (
        alt.Chart(ROWS)
        .mark_rect(aria=False)
        .encode(
            x=alt.X("label_b:N", sort=_place("_column"), title=None, axis=_axis(layout, labelAngle=-90)),
            y=alt.Y("label_a:N", sort=_place("_row"), title=None, axis=_axis(layout)),
            color=alt.Color("value:Q", title=title, scale=alt.Scale(domain=[0, high or 1])),
            tooltip=_tooltip({"label_a": "N", "label_b": "N", "value": "Q", "n": "Q"}),
        )
        .properties(width=side, height=labels * side / max(labels, 1))
    )
    branches = (
        alt.Chart(alt.NamedData("branches"))
        .mark_line(style="tree", interpolate="linear", aria=False)
        .encode(
            x=alt.X("distance:Q", title="joined at (bits)", axis=alt.Axis(tickCount=4, grid=False)),
            y=alt.Y("place:Q", scale=alt.Scale(domain=[0, max(labels, 1)], reverse=True, nice=False), axis=None),
            detail="joint:N",
            order="step:Q",
        )
        .properties(width=layout.width * 0.17, height=side)
    )
    return alt.hconcat(cells, branches, spacing=layout.row / 2).resolve_scale(y="independent", x="independent")


def ranks(layout: Layout, *, panels: Sequence[str], rows: int, ranks: int, high: float) -> alt.FacetChart:
    """For each label its most used experts, first to last: the expert's number on a cell coloured by its share.

    Args:
        layout: sizes.
        panels: values of `_panel`, in order; a | breaks the line.
        rows: labels.
        ranks: experts of each.
        high: value of the last colour.
    """
    base = alt.Chart().encode(
        x=alt.X("rank:O", title="rank", axis=_axis(layout, labelAngle=0)),
        y=alt.Y("label:N", sort=_place("_row"), title=None, axis=_axis(layout)),
    )
    cells = base.mark_rect(aria=False).encode(
        color=alt.Color("value:Q", title="share", scale=alt.Scale(domain=[0, high or 1])),
        tooltip=_tooltip({"run": "N", "label": "N", "rank": "O", "expert": "N", "value": "Q", "baseline": "Q", "n": "Q"}),
    )
    numbers = {
        style: base.mark_text(style=style, fontSize=layout.text, aria=False, tooltip=False)
        .transform_filter(f"datum.value {compared} {0.45 * high}")
        .encode(text="expert:N")
        for style, compared in (("on-pale", "<"), ("on-strong", ">="))
    }
    width = min(layout.width / len(panels) - layout.row, ranks * layout.row * 2.2)
    return (
        alt.layer(cells, *numbers.values(), data=ROWS)
        .properties(width=width, height=rows * layout.row)
        .facet(
            column=alt.Column(
                "_panel:N", sort=list(panels), title=None, header=alt.Header(labelExpr="split(datum.label, '|')")
            ),
            spacing=layout.row,
        )
    )


def by_depth(
    layout: Layout, *, panels: Mapping[str, str], series: str, stacks: Sequence[str], dash: str | None = None,
    band: tuple[str, str] | None = None, faint: bool = False, zero: bool = True, tooltip: Mapping[str, str],
) -> alt.FacetChart:  # fmt: skip
    """Curves over the layers, one panel per metric, and per stack where there are several.

    Args:
        layout: sizes.
        panels: metric -> its name.
        series: column that tells curves apart by colour.
        stacks: of the run.
        dash: column that tells curves apart by their dashes.
        band: columns of the lower and upper edge of a band around each coloured curve.
        faint: draw the curves that are not `_coloured` too, faintly.
        zero: begin the axes at zero.
        tooltip: column -> N or Q.
    """
    y = alt.Y("value:Q", title=None, scale=alt.Scale(zero=zero), axis=alt.Axis(tickCount=5))
    base = alt.Chart().encode(x=alt.X("layer:O", title="layer", axis=alt.Axis(labelAngle=0, labelOverlap=True)))
    detail = [alt.Detail(f"{name}:N") for name in dict.fromkeys((series, "run"))]
    layers = [base.mark_line(style="baseline", aria=False).encode(y=alt.Y("min(baseline):Q", title=None))]
    coloured = base
    if faint:
        layers.append(
            base.transform_filter(f"!datum.{COLOURED}")
            .mark_line(style="faint", aria=False)
            .encode(y=y, detail=detail, tooltip=_tooltip(tooltip))
        )
        coloured = base.transform_filter(f"datum.{COLOURED}")
    coloured = coloured.encode(color=alt.Color(f"{series}:N", title=None, legend=alt.Legend(columns=4)))
    if band:
        low, high = band
        area = coloured.transform_filter(f"isValid(datum.{low})").mark_area(opacity=0.18, aria=False)
        layers.append(area.encode(y=alt.Y(f"{low}:Q", title=None), y2=f"{high}:Q", detail=detail))
    line = coloured.mark_line(point=alt.OverlayMarkDef(size=layout.panel / 8, filled=True), aria=False)
    line = line.encode(y=y, detail=detail, tooltip=_tooltip(tooltip))
    if dash:
        line = line.encode(strokeDash=alt.StrokeDash(f"{dash}:N", title=None))
    layers.append(line)
    width = min((layout.width + 40) / len(panels) - layout.row * 3, layout.panel * 2.4)
    names = "{" + ", ".join(f"'{metric}': '{name}'" for metric, name in panels.items()) + "}"
    facets: dict[str, Any] = {
        "column": alt.Column("metric:N", sort=list(panels), title=None,
                             header=alt.Header(labelExpr=f"{names}[datum.label]"))
    }  # fmt: skip
    if len(stacks) > 1:
        facets["row"] = alt.Row("stack:N", sort=list(stacks), title=None)
    chart = alt.layer(*layers, data=ROWS).properties(width=width, height=layout.panel)
    return chart.facet(**facets, spacing=layout.row).resolve_scale(y="independent")


def loads(layout: Layout, *, compared: bool) -> alt.LayerChart:
    """Experts by load, the most used first; another run's as a stepped line."""
    base = alt.Chart(ROWS).encode(
        x=alt.X("_rank:O", title="experts, most used first", axis=alt.Axis(labels=False)),
        y=alt.Y("value:Q", title="share of tokens"),
        tooltip=_tooltip({"run": "N", "expert": "N", "value": "Q", "baseline": "Q", "n": "Q", "is_dead": "N"}),
    )
    bars = base.transform_filter("datum._main").mark_bar(aria=False)
    dead = base.transform_filter("datum._main && datum.is_dead").mark_point(
        style="dead", shape="cross", filled=True, size=layout.row * 4, aria=False
    )
    layers = [bars, dead]
    if compared:
        other = base.transform_filter("!datum._main")
        layers.append(other.mark_line(interpolate="step", style="soft", aria=False, tooltip=False))
    rule = alt.Chart(ROWS).mark_rule(style="baseline", aria=False).encode(y="mean(baseline):Q")
    return alt.layer(*layers, rule).properties(width=layout.width, height=layout.panel)


def bars_with_words(layout: Layout, *, rows: int, x_title: str, y_title: str) -> alt.HConcatChart:
    """Bars from the longest down, each with the words of its column `_words` behind it."""
    base = alt.Chart(ROWS).encode(
        y=alt.Y("expert:N", sort=_place("_row"), title=y_title, axis=alt.Axis(labelFontSize=layout.row * 0.85))
    )
    tooltip = _tooltip({"expert": "N", "value": "Q", "baseline": "Q", "n": "Q", "tokens": "Q", "_words": "N"})
    scale = alt.Scale(domain=[0, 1])
    bars = base.mark_bar(aria=False).encode(x=alt.X("value:Q", title=x_title, scale=scale), tooltip=tooltip)
    rule = alt.Chart(ROWS).mark_rule(style="baseline", aria=False).encode(x="mean(baseline):Q")
    words = base.mark_text(align="left", aria=False, limit=layout.width * 0.62).encode(
        x=alt.value(0), text="_words:N", tooltip=tooltip
    )
    height = rows * layout.row * 1.5
    left = alt.layer(bars, rule).properties(width=layout.width * 0.3, height=height)
    right = words.encode(y=alt.Y("expert:N", sort=_place("_row"), axis=None)).properties(
        width=layout.width * 0.62, height=height
    )
    return alt.hconcat(left, right, spacing=layout.row).resolve_scale(y="shared")
