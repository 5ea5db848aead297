"""Renders the report as one self-contained HTML file that makes no network requests.

The file contains everything: the drawing library, the data (gzip in base64), the script. Its content security policy
allows only the two scripts written here, by their hashes, and no requests, so text in the data cannot run as code.
"""

from __future__ import annotations

import base64
import gzip
import hashlib
import importlib.resources
import json
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import jinja2
import vl_convert
from markupsafe import Markup

from collector.look.report import charts, themes
from collector.look.report.card import facts_beside
from collector.query.catalog import find_query

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from collector.look.report.card import Card, LabelTable
    from collector.look.report.figure import Figure, Subject
    from collector.look.report.tables import Router, Table

_PACKAGE = "moe-routing-collector"
MAX_COLOURED = 8
"""Number of colours in the themes."""


def render(
    subject: Subject, figures: Sequence[Figure], *, cards: Sequence[Card], labels: LabelTable, title: str, lead: str,
    warnings: Sequence[Mapping[str, str]], start: int,
) -> str:  # fmt: skip
    """Renders the page.

    Args:
        subject: the subject of the report.
        figures: in the order of the page; those of a section are consecutive.
        cards: of the runs.
        labels: table of the run's labels.
        title: of the page.
        lead: sentence under the title.
        warnings: `head` and `text` of each.
        start: index of the router that is shown first.
    """
    library, script, written_by = _library(), _read("page.js"), version(_PACKAGE)
    environment = jinja2.Environment(autoescape=True, trim_blocks=False, undefined=jinja2.StrictUndefined)
    return environment.from_string(_read("page.html.jinja")).render(
        title=title, lead=lead, warnings=warnings, cards=cards, facts=facts_beside(cards), label_table=labels,
        start=start,
        labels=subject.labels, coloured=subject.coloured, max_coloured=MAX_COLOURED,
        labels_note="Special tokens count here, and nowhere else in this report.",
        routers=[router_name(router, subject) for router in subject.routers],
        sections=_sections(figures), version=written_by,
        footer=f"Written by moe-routing-collector {written_by}. Numbers are rounded to four digits; the command lines "
        "write them in full with --format csv or parquet. Routing statistics do not show causal importance.",
        policy=_policy(library, script), style=Markup(_read("page.css")),
        library=Markup(library), script=Markup(script), data=_pack(_payload(subject, figures, start)),
    )  # fmt: skip


def router_name(router: Router, subject: Subject) -> str:
    """Returns the display name of a router."""
    stack, layer = router
    return f"layer {layer}" if len(subject.stacks) == 1 else f"{stack} layer {layer}"


def _payload(subject: Subject, figures: Sequence[Figure], start: int) -> dict[str, Any]:
    """Returns the input of the page's script."""
    drawn = [figure for figure in figures if figure.draw]
    tables = {f"{figure.name}/{name}": table for figure in drawn for name, table in figure.tables.items()}
    return {
        "routers": [
            {"stack": stack, "layer": layer, "name": router_name((stack, layer), subject)}
            for stack, layer in subject.routers
        ],
        "start": start, "stacks": len(subject.stacks), "coloured": subject.coloured, "max_coloured": MAX_COLOURED,
        "themes": {"light": themes.LIGHT, "dark": themes.DARK},
        "tables": {name: _columns(table, subject.routers) for name, table in tables.items()},
        "figures": [
            {
                "name": figure.name, "spec": figure.spec(charts.PAGE, subject.few), "by_layer": figure.by_layer,
                "coloured": "label" in figure.tables["rows"].columns and not figure.by_layer,
                "tables": {name: f"{figure.name}/{name}" for name in figure.tables},
            }
            for figure in drawn
        ],
    }  # fmt: skip


def _columns(table: Table, routers: Sequence[Router]) -> Any:
    """Returns columns for JSON; for a table that is drawn layer by layer, a list of those of each router."""
    if not table.by_layer:
        return table.cells()
    parts = [table.of(router).cells() for router in routers]
    return [{name: cells for name, cells in part.items() if name not in ("stack", "layer")} for part in parts]


def _sections(figures: Sequence[Figure]) -> list[dict[str, Any]]:
    titles = list(dict.fromkeys(figure.section for figure in figures))
    return [
        {"title": title, "figures": [_words(figure) for figure in figures if figure.section == title]}
        for title in titles
    ]


def _words(figure: Figure) -> dict[str, Any]:
    """Returns the template's input for a figure."""
    tables = {(table.query, tuple(table.commands())): table for table in figure.tables.values()}
    sources = []
    for table in tables.values():
        query = find_query(table.query)
        sources.append({"name": query.name, "question": query.question, "sql": query.sql, "commands": table.commands(),
                        "also": table.also, "by_layer": table.by_layer})  # fmt: skip
    return {"name": figure.name, "title": figure.title, "text": figure.text, "notes": figure.notes,
            "by_layer": figure.by_layer, "drawn": figure.draw is not None, "sources": sources}  # fmt: skip


def _library() -> str:
    """Returns Vega, Vega-Lite and vega-embed as one script that sets `vegaEmbed`."""
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    return bundle.replace("</script", "<\\/script")


def _policy(*scripts: str) -> str:
    """Returns the page's content security policy: these scripts, inline styles, and no requests."""
    hashes = " ".join(
        f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'" for script in scripts
    )
    return f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data: blob:"


def _pack(payload: dict[str, Any]) -> str:
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return base64.b64encode(gzip.compress(text.encode(), mtime=0)).decode()


def _read(name: str) -> str:
    return importlib.resources.files("collector.look.report").joinpath(name).read_text(encoding="utf-8")
