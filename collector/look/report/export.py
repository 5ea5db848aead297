"""Writes figures as files for a paper: PDF and SVG in points, PNG at 300 dots per inch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import vl_convert

from collector.look.report import charts, themes

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from collector.look.report.figure import Figure, Subject
    from collector.look.report.tables import Router

DPI = 300
_POINTS_PER_INCH = 72


def write_figures(subject: Subject, figures: Sequence[Figure], folder: Path, router: Router) -> list[Path]:
    """Writes every figure that has a drawing; single-layer figures show the given router.

    Args:
        subject: the subject of the report, which determines the coloured labels.
        figures: of the report.
        folder: target folder, created if necessary.
        router: stack and layer.

    Returns:
        The files, in the order of the figures.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for figure in figures:
        if not figure.draw:
            continue
        spec = _with_data(figure, subject, router)
        stem = folder / (f"{figure.name}-{router[0]}-{router[1]}" if figure.by_layer else figure.name)
        contents = {
            ".svg": vl_convert.vegalite_to_svg(spec, config=themes.PAPER).encode(),
            ".pdf": vl_convert.vegalite_to_pdf(spec, config=themes.PAPER),
            ".png": vl_convert.vegalite_to_png(
                spec, config=themes.PAPER, scale=DPI / _POINTS_PER_INCH, ppi=_POINTS_PER_INCH
            ),
        }
        for ending, content in contents.items():
            path = stem.with_name(stem.name + ending)
            path.write_bytes(content)
            written.append(path)
    return written


def _with_data(figure: Figure, subject: Subject, router: Router) -> dict[str, Any]:
    datasets = {
        name: figure.data(table.of(router) if table.by_layer else table, subject.coloured)
        for name, table in figure.tables.items()
    }
    return figure.spec(charts.PAPER, subject.few) | {"datasets": datasets}
