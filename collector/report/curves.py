"""Drawings of curves over depth, of loads and of bars with words, as Vega-Lite made by Altair. See `charts`."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING

import altair as alt

from collector.report.charts import COLOURED, ROWS, axis, place, tooltip_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from collector.report.charts import Layout


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
        others = base.transform_filter(f"!datum.{COLOURED} && datum.run == {json.dumps(main)}")
        layers.append(
            others.mark_line(style="faint", aria=False).encode(y=y, detail=detail, tooltip=tooltip_of(tooltip))
        )
        coloured = base.transform_filter(f"datum.{COLOURED}")
    legend = alt.Legend(columns=6, symbolType="stroke", symbolOpacity=1)
    coloured = coloured.encode(color=alt.Color(f"{series}:N", title=None, legend=legend))
    if band:
        low, high = band
        area = coloured.transform_filter(f"isValid(datum.{low})").mark_area(opacity=0.18, aria=False)
        layers.append(area.encode(y=alt.Y(f"{low}:Q", title=None, scale=scale), y2=f"{high}:Q", detail=detail))
    line = coloured.mark_line(point=alt.OverlayMarkDef(size=layout.panel / 8, filled=True), aria=False)
    line = line.encode(y=y, detail=detail, tooltip=tooltip_of(tooltip))
    if dash:
        runs = alt.Legend(symbolType="stroke")
        line = line.encode(strokeDash=alt.StrokeDash("run:N", title=None, legend=runs))
    return [*layers, line]


def loads(layout: Layout, *, high: float, compared: bool) -> alt.LayerChart | alt.FacetChart:
    """Experts by load, the most used first; another run's as a stepped line."""
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


def bars_with_words(layout: Layout, *, rows: int, x_title: str, y_title: str) -> alt.HConcatChart:
    """Bars from the longest down, each with the words of its column `_words` behind it."""
    base = alt.Chart(ROWS).encode(y=alt.Y("expert:N", sort=place("_row"), title=y_title, axis=axis(layout, layout.row)))
    tooltip = tooltip_of({"expert": "N", "value": "Q", "baseline": "Q", "n": "Q", "tokens": "Q", "_words": "N"})
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
    right = words.encode(y=alt.Y("expert:N", sort=place("_row"), axis=None)).properties(
        width=layout.width * 0.7, height=height
    )
    return alt.hconcat(left, right, spacing=layout.row).resolve_scale(y="shared")
