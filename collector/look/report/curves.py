"""Draws curves over depth or training, loads, and bars with words, as Vega-Lite specifications. See `charts`."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Any

import altair as alt

from collector.look.report.charts import COLOURED, ROWS, axis, place, tooltip_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from collector.look.report.charts import Layout


_NAME = 9
"""Width of a name in a legend, with its symbol, in multiples of the font size."""
_WIDE = 20
"""Largest ratio of numbers on a linear axis."""
_PALE = 0.5
"""Length of the ramp of colours that is too pale for curves, in multiples of the rest."""
_TICKS = 5
"""Approximate number of ticks; axes end at a tick, so that the titles of panels align."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Across:
    """The horizontal axis of curves."""

    column: str
    title: str | None = None
    values: Sequence[int] = ()
    """All values, in order, of an axis of numbers."""
    names: Sequence[str] = ()
    """All names, in order, of an axis of names; with neither the axis is one of few whole numbers."""

    def encode(self) -> alt.X:
        """Returns the encoding. Numbers of very different size are on a logarithmic axis, which is linear up to 0."""
        if not self.values:
            turned = alt.Axis(labelAngle=-90 if self.names else 0, labelOverlap=True)
            return alt.X(f"{self.column}:O", title=self.title, sort=list(self.names) or "ascending", axis=turned)
        positive = [value for value in self.values if value > 0]
        wide = bool(positive) and positive[-1] > _WIDE * positive[0]
        kind: dict[str, Any] = {"type": "symlog", "constant": positive[0]} if wide else {"zero": False}
        scale = alt.Scale(nice=False, **kind)
        ticks = alt.Axis(values=list(self.values), format="~s", labelOverlap="greedy", labelFlush=False)
        return alt.X(f"{self.column}:Q", title=self.title, scale=scale, axis=ticks)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Panel:
    """One metric of the vertical axis."""

    metric: str
    words: str
    low: float
    high: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curves:
    """How the curves of a panel are drawn."""

    series: str
    """Column that distinguishes curves by colour."""
    main: str = ""
    """The run whose curves are also drawn faintly; all if the rows are not by run."""
    tooltip: Mapping[str, str]
    """Type (N or Q) by column."""
    dash: bool = False
    """Distinguish runs by dashes."""
    band: tuple[str, str] | None = None
    """Columns of the lower and upper edge of a band around each coloured curve."""
    faint: bool = False
    """Draw the curves of the main run that are not `_coloured`."""
    across: Across = Across(column="layer", title="layer")
    """The horizontal axis."""
    numbers: tuple[float, float] | None = None
    """First and last number of the series, if it is one of numbers: colours then follow them."""


def by_depth(
    layout: Layout, *, panels: Sequence[Panel], stacks: Sequence[str | None], curves: Curves
) -> alt.VConcatChart:
    """Draws curves, usually over the layers: one panel per metric, and one row of panels per stack.

    Args:
        layout: sizes.
        panels: metrics, left to right.
        stacks: of the run; None for rows of a single router.
        curves: how they are drawn.
    """
    width = layout.column if len(panels) == 1 else layout.width / len(panels) - layout.row * 2.4
    columns = max(2, int(width * len(panels) / layout.text / _NAME))
    rows = []
    for stack in stacks:
        drawn = []
        for panel in panels:
            chart = alt.layer(*_layers(layout, panel, stack, curves, columns))
            title = panel.words if len(stacks) == 1 else f"{stack}: {panel.words}"
            drawn.append(chart.properties(width=width, height=layout.panel, title=title))
        rows.append(alt.hconcat(*drawn, spacing=layout.row))
    return alt.vconcat(*rows)


def _layers(layout: Layout, panel: Panel, stack: str | None, curves: Curves, columns: int) -> list[alt.Chart]:
    where = f"datum.metric == '{panel.metric}'" + (f" && datum.stack == '{stack}'" if stack else "")
    base = alt.Chart(ROWS).transform_filter(where).encode(x=curves.across.encode())
    scale = alt.Scale(domain=[panel.low, panel.high], zero=False, nice=_TICKS)
    y = alt.Y("value:Q", title=None, scale=scale, axis=alt.Axis(tickCount=_TICKS))
    detail = [alt.Detail(f"{name}:N") for name in dict.fromkeys((curves.series, "run"))]
    # a baseline of 0 is the axis
    chance = base.transform_filter("datum.baseline != 0").mark_line(style="baseline", aria=False)
    layers = [chance.encode(y=alt.Y("min(baseline):Q", title=None, scale=scale))]
    coloured = base
    if curves.faint:
        of_main = f" && datum.run == {json.dumps(curves.main)}" if curves.main else ""
        others = base.transform_filter(f"!datum.{COLOURED}{of_main}")
        layers.append(
            others.mark_line(style="faint", aria=False).encode(y=y, detail=detail, tooltip=tooltip_of(curves.tooltip))
        )
        coloured = base.transform_filter(f"datum.{COLOURED}")
    coloured = coloured.encode(color=_colour(curves, columns))
    if curves.band:
        low, high = curves.band
        area = coloured.transform_filter(f"isValid(datum.{low})").mark_area(opacity=0.18, aria=False)
        layers.append(area.encode(y=alt.Y(f"{low}:Q", title=None, scale=scale), y2=f"{high}:Q", detail=detail))
    line = coloured.mark_line(style="curve", point=alt.OverlayMarkDef(size=layout.panel / 8, filled=True), aria=False)
    line = line.encode(y=y, detail=detail, tooltip=tooltip_of(curves.tooltip))
    if curves.dash:
        runs = alt.Legend(symbolType="stroke")
        line = line.encode(strokeDash=alt.StrokeDash("run:N", title=None, legend=runs))
    return [*layers, line]


def _colour(curves: Curves, columns: int) -> alt.Color:
    if curves.numbers is None:
        legend = alt.Legend(columns=columns, symbolType="stroke", symbolOpacity=1)
        return alt.Color(f"{curves.series}:N", title=None, legend=legend)
    first, last = curves.numbers
    # The first colours of the ramp are those of empty cells.
    scale = alt.Scale(domain=[first - _PALE * max(last - first, 1), last], nice=False)
    ends = alt.Legend(values=sorted({first, (first + last) // 2, last}), format="d")
    return alt.Color(f"{curves.series}:Q", title=curves.series, scale=scale, legend=ends)


def loads(layout: Layout, *, high: float, compared: bool) -> alt.LayerChart | alt.FacetChart:
    """Draws the experts' loads as bars, the most used first, and another run's loads as a stepped line."""
    base = alt.Chart(ROWS).encode(
        x=alt.X("_rank:O", title="experts, most used first", axis=alt.Axis(labels=False)),
        y=alt.Y("value:Q", title="share of tokens", scale=alt.Scale(domain=[0, high])),
        tooltip=tooltip_of({"run": "N", "expert": "N", "value": "Q", "baseline": "Q", "n": "Q", "is_dead": "N"}),
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


def bars_with_words(layout: Layout, *, rows: int, words: int, x_title: str, y_title: str) -> alt.HConcatChart:
    """Draws bars from the longest down, each followed by its words (dataset `words`) at their `_place`."""
    base = alt.Chart(ROWS).encode(y=alt.Y("expert:N", sort=place("_row"), title=y_title, axis=axis(layout, layout.row)))
    tooltip = tooltip_of({"expert": "N", "value": "Q", "baseline": "Q", "n": "Q", "tokens": "Q"})
    scale = alt.Scale(domain=[0, 1])
    bars = base.mark_bar(size=layout.row * 0.4, aria=False).encode(
        x=alt.X("value:Q", title=x_title, scale=scale), tooltip=tooltip
    )
    rule = alt.Chart(ROWS).mark_rule(style="baseline", aria=False).encode(x="mean(baseline):Q")
    height, width = rows * layout.row * 1.15, layout.width * 0.75
    left = alt.layer(bars, rule).properties(width=layout.width * 0.2, height=height)
    right = (
        alt.Chart(alt.NamedData("words"))
        # one mark per word: a single line with many scripts would be set in one font
        .mark_text(style="on-pale", align="left", fontSize=layout.row * 0.92, aria=False, limit=width / words - 2)
        .encode(
            x=alt.X("_place:Q", scale=alt.Scale(domain=[0, words], nice=False), axis=None),
            y=alt.Y("expert:N", sort=place("_row"), axis=None),
            text="_text:N",
            tooltip=tooltip_of({"expert": "N", "token": "N", "value": "Q", "baseline": "Q", "n": "Q"}),
        )
        .properties(width=width, height=height)
    )
    return alt.hconcat(left, right, spacing=layout.row).resolve_scale(x="independent", y="shared")
