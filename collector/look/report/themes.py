"""Defines the style of figures: Vega-Lite configurations for a light page, a dark page, and paper.

Colours of categories are based on Okabe and Ito's, which are distinct for all kinds of colour vision. Colours of
numbers change steadily in lightness, so they also work in grey. Marks name a style (`faint`, `baseline` …), and each
configuration gives it a colour.
"""

from __future__ import annotations

from typing import Any

SANS = "system-ui, -apple-system, 'Segoe UI', 'Noto Sans', Helvetica, Arial, sans-serif"
PAPER_FONT = "Helvetica, Arial, Liberation Sans, Noto Sans, sans-serif"


def _config(
    *, ink: str, soft: str, grid: str, faint: str, page: str, main: str, alarm: str,
    numbers: list[str], categories: list[str], font: str, size: float,
) -> dict[str, Any]:  # fmt: skip
    text = {"labelColor": soft, "titleColor": ink, "labelFontSize": size, "titleFontSize": size + 1}
    return {
        "background": None,
        "font": font,
        "view": {"stroke": None},
        "axis": {
            **text, "titleFontWeight": "normal", "domainColor": soft, "tickColor": soft, "gridColor": grid,
            "labelLimit": 140, "tickSize": size / 3, "labelPadding": 3, "titlePadding": 5,
            "domainWidth": size / 11, "tickWidth": size / 11, "gridWidth": size / 11,
        },
        "axisBand": {"grid": False, "ticks": False, "domain": False},
        "legend": {
            **text, "titleFontWeight": "normal", "orient": "top", "gradientLength": 12 * size, "titleLimit": 400,
            "gradientThickness": size * 0.8, "symbolStrokeWidth": 2, "offset": 6, "labelLimit": 220,
            "layout": {"top": {"anchor": "start", "direction": "vertical", "margin": size / 2}},
        },
        "header": {**text, "labelFontSize": size + 1, "labelColor": ink, "labelPadding": 6},
        "title": {"color": ink, "fontSize": size + 1, "fontWeight": "normal", "anchor": "start",
                  "frame": "group", "offset": size * 0.8},
        "range": {"heatmap": numbers, "ramp": numbers, "category": categories},
        "mark": {"color": main},
        "style": {
            "curve": {"strokeWidth": size / 6},
            "faint": {"color": faint, "strokeWidth": size / 12},
            "baseline": {"color": soft, "strokeDash": [size / 3, size / 3], "strokeWidth": size / 12},
            "tree": {"color": soft, "strokeWidth": size / 10},
            "compared": {"color": categories[1], "strokeWidth": size / 6},
            "on-pale": {"color": ink},
            "on-strong": {"color": page},
            "significant": {"color": alarm, "filled": True},
            "dead": {"color": alarm, "filled": True},
        },
    }  # fmt: skip


LIGHT = _config(
    ink="#1d2129", soft="#5a6270", grid="#e6e8ec", faint="#c3c8d0", page="#ffffff", main="#22638f", alarm="#b3400e",
    numbers=["#f4f6f8", "#d3e5ee", "#9cc7db", "#559dc0", "#226a98", "#123f6b", "#0b2447"],
    categories=["#0072b2", "#d55e00", "#009e73", "#a6478b", "#8a6d00", "#3aa0dc", "#5a6270", "#b8860b"],
    font=SANS, size=11,
)  # fmt: skip
DARK = _config(
    ink="#e9ebf0", soft="#a4acba", grid="#2b313b", faint="#4a5260", page="#12151a", main="#6db8de", alarm="#ffa36b",
    numbers=["#1b2028", "#1d3a55", "#20597f", "#2b7599", "#63b0bd", "#addcc4", "#f6f7cf"],
    categories=["#56b4e9", "#ff9d4d", "#2ec99b", "#e08cc6", "#f0e442", "#9db4ff", "#b9c0cc", "#d9a84e"],
    font=SANS, size=11,
)  # fmt: skip
PAPER = _config(
    ink="#000000", soft="#333333", grid="#e4e4e4", faint="#c4c4c4", page="#ffffff", main="#1f5f8b", alarm="#b3400e",
    numbers=["#f7f7f7", "#d3e5ee", "#9cc7db", "#559dc0", "#226a98", "#123f6b", "#0b2447"],
    categories=["#0072b2", "#d55e00", "#009e73", "#a6478b", "#8a6d00", "#56b4e9", "#5a6270", "#b8860b"],
    font=PAPER_FONT, size=7,
) | {"background": "white"}  # fmt: skip
