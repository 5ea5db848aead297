"""Draws points as Vega-Lite specifications with Altair: experts in two measures, outputs on a map, labels in order.

Axes have fixed ends, so that they hold for every layer, and before there are points.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import altair as alt

from collector.look.report.charts import COLOURED, ROWS, axis, place, tooltip_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    from collector.look.report.charts import Layout

Ends = tuple[float, float]
"""Lowest and highest value of an axis."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plane:
    """The map of one router."""

    stack: str
    layer: int
    name: str
    x: Ends
    y: Ends
    experts: Ends


def ends_of(*columns: np.ndarray) -> Ends:
    """Returns the ends of an axis with a margin."""
    low, high = min(float(each.min()) for each in columns), max(float(each.max()) for each in columns)
    margin = (high - low) / 20 or 1.0
    return low - margin, high + margin


def experts(
    layout: Layout, *, x: str, y: str, titles: tuple[str, str], ends: tuple[Ends, Ends], even: str,
    tooltip: Mapping[str, str],
) -> alt.LayerChart | alt.FacetChart:  # fmt: skip
    """Draws experts as points, and a dashed line.

    Args:
        layout: sizes.
        x: column of the horizontal axis.
        y: column of the vertical axis.
        titles: of the two axes.
        ends: of the two axes.
        even: column with the height of the dashed line at `x`.
        tooltip: type (N or Q) by column.
    """
    across, up = (alt.Scale(domain=list(each), zero=False) for each in ends)
    base = alt.Chart(ROWS).encode(x=alt.X(f"{x}:Q", title=titles[0], scale=across))
    line = base.mark_line(style="baseline", aria=False, clip=True).encode(y=alt.Y(f"{even}:Q", scale=up))
    points = base.mark_circle(size=layout.panel / 5, opacity=0.8, aria=False).encode(
        y=alt.Y(f"{y}:Q", title=titles[1], scale=up), tooltip=tooltip_of(tooltip)
    )
    return alt.layer(line, points).properties(width=layout.column, height=layout.panel * 1.3)


def maps(layout: Layout, *, planes: Sequence[Plane], tooltip: Mapping[str, str]) -> alt.VConcatChart:
    """Draws outputs at `x` and `y` twice, side by side: coloured by label, and by expert; a row for each router.

    Args:
        layout: sizes.
        planes: one for each router.
        tooltip: type (N or Q) by column.
    """
    return alt.vconcat(*(_map(layout, plane, tooltip) for plane in planes))


def _map(layout: Layout, plane: Plane, tooltip: Mapping[str, str]) -> alt.HConcatChart:
    side = layout.width / 2 - layout.row * 2
    bare = alt.Axis(labels=False, ticks=False, grid=False, domain=False, title=None)
    across, up = (alt.Scale(domain=list(each), nice=False, zero=False) for each in (plane.x, plane.y))
    base = (
        alt.Chart(ROWS)
        .transform_filter(f"datum.stack == '{plane.stack}' && datum.layer == {plane.layer}")
        .encode(
            x=alt.X("x:Q", axis=bare, scale=across),
            y=alt.Y("y:Q", axis=bare, scale=up),
            tooltip=tooltip_of(tooltip),
        )
        .properties(width=side, height=side)
    )
    size = layout.panel / 12
    others = base.transform_filter(f"!datum.{COLOURED}").mark_circle(style="faint", size=size, aria=False)
    own = base.transform_filter(f"datum.{COLOURED}").mark_circle(size=size, opacity=0.9, aria=False)
    by_label = alt.layer(others, own.encode(color=alt.Color("label:N", title=None, legend=alt.Legend(columns=4))))
    # so many hues tell clusters apart, and do not name experts
    expert = alt.Color("expert:Q", title="expert", scale=alt.Scale(scheme="sinebow", domain=list(plane.experts)))
    by_expert = base.mark_circle(size=size, opacity=0.9, aria=False).encode(color=expert)
    return alt.hconcat(by_label, by_expert, spacing=layout.row, title=plane.name).resolve_scale(color="independent")


def clouds(layout: Layout, *, rows: int, title: str, ends: Ends) -> alt.LayerChart | alt.FacetChart:
    """Draws the effect of each arm as a point with an interval, in the order of `_row`, before its controls (`cloud`).

    Args:
        layout: sizes.
        rows: number of arms.
        title: of the value.
        ends: of its axis.
    """
    up = alt.Y("_title:N", sort=place("_row"), title=None, axis=axis(layout, layout.row))
    across = alt.X("value:Q", title=title, scale=alt.Scale(domain=list(ends), zero=False))
    controls = (
        alt.Chart(alt.NamedData("cloud"))
        .mark_circle(style="faint", size=layout.row * 1.5, aria=False)
        .encode(y=up, x=across, tooltip=tooltip_of({"arm": "N", "label": "N", "control": "N", "value": "Q", "n": "Q"}))
    )
    base = alt.Chart(ROWS).encode(y=up)
    spans = base.transform_filter("isValid(datum._low)").mark_rule(aria=False).encode(
        x=alt.X("_low:Q", title=title), x2="_high:Q"
    )  # fmt: skip
    fields = {"arm": "N", "label": "N"} | dict.fromkeys(("value", "baseline", "n", "controls"), "Q")
    arms = base.mark_circle(size=layout.row * 3, opacity=1, aria=False).encode(x=across, tooltip=tooltip_of(fields))
    return alt.layer(controls, spans, arms).properties(width=layout.column, height=rows * layout.row)


def ordered(
    layout: Layout, *, rows: int, title: str, ends: Ends, interval: tuple[str, str] | None
) -> alt.LayerChart | alt.FacetChart:
    """Draws a value of each label as a point, in the order of `_row`, in a colour for each run.

    Args:
        layout: sizes.
        rows: number of labels.
        title: of the value.
        ends: of its axis.
        interval: columns with the ends of an interval around it.
    """
    base = alt.Chart(ROWS).encode(
        y=alt.Y("label:N", sort=place("_row"), title=None, axis=axis(layout, layout.row)),
        color=alt.Color("run:N", title=None),
    )
    scale = alt.Scale(domain=list(ends), zero=False)
    points = base.mark_circle(size=layout.row * 2, opacity=1, aria=False).encode(
        x=alt.X("value:Q", title=title, scale=scale),
        tooltip=tooltip_of({"run": "N", "label": "N", "value": "Q", "baseline": "Q", "n": "Q"}),
    )
    layers: list[alt.Chart] = [points]
    if interval:
        low, high = interval
        spans = base.transform_filter(f"isValid(datum.{low})").mark_rule(aria=False)
        layers.insert(0, spans.encode(x=alt.X(f"{low}:Q", title=title, scale=scale), x2=f"{high}:Q"))
    return alt.layer(*layers).properties(width=layout.column, height=rows * layout.row)
