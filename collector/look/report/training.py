"""Defines the figures of a sweep: what the routers do at each checkpoint of a training run."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

from collector.look.report import curves
from collector.look.report.figure import Figure
from collector.look.report.tables import INTERVAL, LEVEL, Side, Table, extent, in_labels, read_columns, span
from collector.query.sweeps import COLUMNS

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from collector.look.report.charts import Layout
    from collector.look.report.figure import Subject
    from collector.query.sweeps import Sweep

SPECIALIZATION = "When languages get experts of their own"
SATURATION = "When routing settles"
LOAD = "How evenly experts are used"
_ONE_LANGUAGE = "There is one language only: nothing to compare."
_TOOLTIP = {"checkpoint": "N", "step": "Q", "tokens_seen": "Q", "layer": "O", "value": "Q", "baseline": "Q", "n": "Q"}


def figures(subject: Subject, sweep: Sweep) -> list[Figure]:
    """Returns the figures of a sweep, in the order of the page.

    Args:
        subject: the last run, and what is shown of it.
        sweep: the opened sweep.
    """
    return [
        _specialization(subject, sweep),
        _favourites(subject, sweep),
        *_saturation(subject, sweep),
        _load(subject, sweep),
    ]


def across(sweep: Sweep) -> curves.Across:
    """Returns the horizontal axis: steps if all names tell different ones, else tokens, else the names."""
    for column, title in (("step", "step"), ("tokens_seen", "tokens seen")):
        values = [getattr(run, column) for run in sweep.runs]
        if None not in values and len(set(values)) == len(values):
            return curves.Across(column=column, title=title, values=sorted(values))
    return curves.Across(column="checkpoint", names=[run.name for run in sweep.runs])


def _fetch(
    subject: Subject, sweep: Sweep, query: str, columns: Sequence[str], *, where: str = "true", by_layer: bool = False,
    resamples: int = 0, first: str | None = None, **params: object,
) -> Table:  # fmt: skip
    """Asks every run of the sweep; the table has one row per checkpoint and row of the query.

    Args:
        subject: of the report.
        sweep: the opened sweep.
        query: its name.
        columns: to keep, besides checkpoint, step, tokens, stack, layer and interval.
        where: SQL condition of the rows to keep.
        by_layer: see `Table`.
        resamples: bootstrap samples for intervals; 0 for none.
        first: an SQL order; of each label in each router of each checkpoint only the first row is kept.
        **params: of the query.
    """
    if resamples:
        answer = sweep.intervals(query, level=LEVEL, resamples=resamples, **params)
    else:
        answer = sweep.query(query, **params)
    if first is not None:
        own = f"row_number() over (partition by checkpoint, stack, layer, label order by {first})"
        chosen = answer.query("answer", f"from answer qualify {own} = 1 order by all")
        assert chosen is not None, "a select has rows"
        answer = chosen
    side = Side(name="sweep", root=sweep.root, run=subject.sides[0].run)
    return Table(
        query=query, params=params, sides=[side], columns=read_columns(answer, (*COLUMNS, *columns), where),
        by_layer=by_layer, resamples=resamples,
    )  # fmt: skip


def _layer_curves(subject: Subject, sweep: Sweep, rows: Table, words: Mapping[str, str]) -> Callable[[Layout], Any]:
    """Draws a curve for each layer, and a panel for each metric of `words`."""
    band = INTERVAL if rows.resamples else None
    panels = [_panel(rows, metric, said, *(band or ())) for metric, said in words.items()]
    layers = [layer for _, layer in subject.routers]
    drawn = curves.Curves(
        series="layer", band=band, across=across(sweep), numbers=(min(layers), max(layers)),
        tooltip=_TOOLTIP | dict.fromkeys(band or (), "Q"),
    )  # fmt: skip
    return functools.partial(curves.by_depth, panels=panels, stacks=subject.stacks, curves=drawn)


def _label_curves(sweep: Sweep, rows: Table, metric: str, words: str) -> Callable[[Layout], Any]:
    """Draws a curve for each language, in the layer that the page shows."""
    tooltip = {"label": "N"} | {name: kind for name, kind in _TOOLTIP.items() if name != "layer"}
    drawn = curves.Curves(series="label", faint=True, across=across(sweep), tooltip=tooltip)
    return functools.partial(curves.by_depth, panels=[_panel(rows, metric, words)], stacks=[None], curves=drawn)


def _panel(rows: Table, metric: str, words: str, *columns: str) -> curves.Panel:
    low, high = extent(rows, metric, *columns)
    return curves.Panel(metric=metric, words=words, low=low, high=high)


# ---- the figures ----


def _specialization(subject: Subject, sweep: Sweep) -> Figure:
    metric = "normalized_mutual_information"
    empty = Figure(
        name="specialization-over-training", section=SPECIALIZATION, title="Specialization", text=_ONE_LANGUAGE
    )
    if len(subject.labels) < 2:
        return empty
    rows = _fetch(
        subject, sweep, "mutual_information", ("metric", "value", "bias", "n", "labels"),
        where=f"metric = '{metric}'", resamples=subject.resamples,
    )  # fmt: skip
    rows = rows.having(baseline=rows["bias"])
    interval = f" Bands: {LEVEL} % intervals, by a bootstrap over documents." if rows.resamples else ""
    return dataclasses.replace(
        empty, tables={"rows": rows},
        text="How much the choice of an expert says about the language: mutual information of both, as a share of the "
        "languages' entropy. 0: all languages choose alike; 1: no two share an expert.",
        draw=_layer_curves(subject, sweep, rows, {metric: "normalized mutual information"}),
        notes=[f"{span(rows['labels'])} languages, {span(rows['n'])} tokens. Dashed: what languages that say nothing "
               f"would give with as many independent tokens.{interval}"],
    )  # fmt: skip


def _favourites(subject: Subject, sweep: Sweep) -> Figure:
    empty = Figure(
        name="favourites-over-training", section=SPECIALIZATION, title="Each language's favourite expert",
        text=_ONE_LANGUAGE,
    )  # fmt: skip
    if len(subject.labels) < 2:
        return empty
    rows = _fetch(
        subject, sweep, "domain_specialization", ("label", "expert", "value", "lift", "n"),
        where=in_labels(subject.labels), by_layer=True, first="value desc, expert",
    )  # fmt: skip
    count = len(rows)
    rows = rows.having(
        metric=["lift"] * count, domain_specialization=rows["value"], value=rows["lift"], baseline=[1.0] * count
    )
    return dataclasses.replace(
        empty, tables={"rows": rows},
        text="How many times as often as languages do on average a language chooses the expert that it chooses most "
        "(lift). 1: its favourite is everybody's. The favourite may change from one checkpoint to the next.",
        draw=_label_curves(sweep, rows, "lift", "lift of the favourite expert"),
        notes=[f"{len(subject.labels)} languages, {span(rows['n'])} tokens of each. Column value: lift."],
    )  # fmt: skip


def _saturation(subject: Subject, sweep: Sweep) -> list[Figure]:
    metric = "router_saturation"
    title = f"Router saturation against {sweep.last.name}"
    if len(sweep.runs) < 2:
        return [Figure(name="saturation", section=SATURATION, title=title, text="There is one checkpoint only.")]
    columns, words = ("metric", "value", "baseline", "n"), "share of experts in common"
    pooled = _fetch(subject, sweep, metric, columns, pooled=True)
    labelled = _fetch(
        subject, sweep, metric, (*columns, "label"), where=in_labels(subject.labels), by_layer=True
    )  # fmt: skip
    note = f"{span(pooled['n'])} tokens. Dashed: two routers that choose at random."
    return [
        Figure(
            section=SATURATION, name="saturation", title=title, tables={"rows": pooled}, notes=[note],
            text="Of the k experts that a token chooses, the share that it also chooses at the last checkpoint. 1: the "
            "routers choose as they will in the end.",
            draw=_layer_curves(subject, sweep, pooled, {metric: words}),
        ),
        Figure(
            section=SATURATION, name="saturation-by-language", title="Router saturation by language",
            tables={"rows": labelled},
            text="The same for each language: whose experts are settled early, and whose late.",
            draw=_label_curves(sweep, labelled, metric, words),
            notes=[f"{len(subject.labels)} languages, {span(labelled['n'])} tokens of each."],
        ),
    ]  # fmt: skip


def _load(subject: Subject, sweep: Sweep) -> Figure:
    words = {"gini": "Gini coefficient", "dead_share": "share of dead experts"}
    chosen = " or ".join(f"metric = '{metric}'" for metric in words)
    rows = _fetch(subject, sweep, "load_balance", ("metric", "value", "baseline", "n"), where=chosen, pooled=True)
    return Figure(
        name="load-over-training", section=LOAD, title="Load balance", tables={"rows": rows},
        text="Gini coefficient of the experts' shares of picks, 0 if all get the same; and the share of experts that "
        "fewer than one token in a thousand chooses.",
        draw=_layer_curves(subject, sweep, rows, words), notes=[f"{span(rows['n'])} tokens of all languages."],
    )  # fmt: skip
