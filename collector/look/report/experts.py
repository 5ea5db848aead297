"""Defines the figures about routers and experts: decisiveness, load, and co-activation."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

import numpy as np

from collector.look.report import charts, clustering, curves
from collector.look.report.figure import Figure
from collector.look.report.tables import INTERVAL, LEVEL, extent, fetch, in_labels, matrix, places, span

if TYPE_CHECKING:
    from collections.abc import Mapping

    from collector.look.report.figure import Subject
    from collector.look.report.tables import Table

DECISIVENESS = "How decided routers are"
EXPERTS = "What experts do"


def figures(subject: Subject) -> list[Figure]:
    """Returns all figures of this module, in the order of the page."""
    return [
        *_decisiveness(subject),
        _effective(subject),
        _load(subject),
        _load_by_layer(subject),
        _coactivation(subject),
    ]


# ---- decisiveness ----


def _decisiveness(subject: Subject) -> list[Figure]:
    if any({"entropy", "topk_mass"} <= side.run.lacks for side in subject.sides):
        return []  # an engine does not return them
    columns = ("metric", "label", "value", "baseline", "n")
    where = f"metric in ('router_entropy', 'topk_mass') and {in_labels(subject.labels)}"
    figure = _by_label(
        subject,
        fetch(subject.sides, "router_entropy", columns, where=where, resamples=subject.resamples),
        name="decisiveness",
        title="Router entropy and top-k mass",
        text="How widely the router's distribution is spread over all experts, and the share of the k chosen; means "
        "over the tokens of each language. The dashed line is a router without preference.",
        panels={"router_entropy": "router entropy (nats)", "topk_mass": "top-k mass"},
    )
    return [figure]


def _effective(subject: Subject) -> Figure:
    columns = ("metric", "label", "value", "baseline", "n", "used_experts", "half_experts")
    return _by_label(
        subject,
        fetch(
            subject.sides, "effective_experts", columns, where=in_labels(subject.labels), resamples=subject.resamples
        ),
        name="effective-experts",
        title="Effective number of experts",
        text="The number of equally loaded experts with the same entropy as a language's load. It grows with sample "
        "size, so compare languages with similar numbers of tokens. The dashed line is the number of experts.",
        panels={"effective_experts": "effective experts"},
    )


def _by_label(subject: Subject, rows: Table, *, name: str, title: str, text: str, panels: dict[str, str]) -> Figure:
    labels = len(subject.labels)
    return Figure(
        name=name,
        section=DECISIVENESS,
        title=title,
        text=text,
        draw=functools.partial(
            curves.by_depth, panels=panels_of(rows, panels, zero=False), stacks=subject.stacks, curves=curves.Curves(
                series="label", main=subject.sides[0].name, faint=True, dash=len(subject.sides) > 1,
                band=INTERVAL if rows.resamples else None,
                tooltip={"run": "N", "label": "N", "layer": "O", "value": "Q", "baseline": "Q", "n": "Q"},
            ),
        ),
        tables={"rows": rows},
        notes=[
            f"{labels} languages, {span(rows['n'])} tokens of each; grey: the languages without a colour.",
            f"Bands: {LEVEL} % intervals, a bootstrap over documents ({rows.resamples:,} samples). A band that cannot "
            "be seen is narrower than the curve."
            if rows.resamples
            else "No intervals were requested (--resamples).",
        ],
    )  # fmt: skip


def panels_of(rows: Table, names: Mapping[str, str], *, zero: bool = True) -> list[curves.Panel]:
    """Returns a panel per metric that has any row, with an axis that fits the values of all runs and layers."""
    found, there = [], set(rows["metric"].tolist())
    for metric, words in ((metric, words) for metric, words in names.items() if metric in there):
        low, high = extent(rows, metric, "low", "high", zero=zero)
        found.append(curves.Panel(metric=metric, words=words, low=low, high=high))
    return found


# ---- load ----


def _load(subject: Subject) -> Figure:
    rows = fetch(subject.sides, "expert_load", ("expert", "value", "baseline", "n", "is_dead"), by_layer=True)
    main = subject.sides[0].name
    rows = rows.having(_rank=ranks_by_value(rows), _main=[run == main for run in rows["run"].tolist()])
    own = rows.only(rows["_main"])
    dead = int(own["is_dead"].sum())
    compared = (
        f" The stepped line is {subject.sides[1].name}, with its own order of experts."
        if len(subject.sides) > 1
        else ""
    )
    return Figure(
        name="load",
        section=EXPERTS,
        title="Load of the experts",
        text="Share of all tokens for which each expert is among the k chosen, the most used first. Crosses mark dead "
        f"experts (below 0.1 % of the tokens), the dashed line an even load.{compared}",
        draw=functools.partial(curves.loads, high=float(rows["value"].max()), compared=len(subject.sides) > 1),
        tables={"rows": rows},
        notes=[
            f"{span(own['n'])} tokens, all languages together; {dead} of {len(own)} experts of all layers are dead.",
            "In a small sample more experts appear dead.",
        ],
    )


def ranks_by_value(rows: Table) -> np.ndarray:
    """Returns for each row the rank of its expert by value within its router and run, from 1."""
    ranks = np.zeros(len(rows), int)
    keys = np.array(
        [f"{run}\0{stack}\0{layer}" for run, (stack, layer) in zip(rows["run"], rows.routers(), strict=True)]
    )
    for key in np.unique(keys):
        own = np.flatnonzero(keys == key)
        ranks[own[np.argsort(-rows["value"][own], kind="stable")]] = np.arange(1, len(own) + 1)
    return ranks


def _load_by_layer(subject: Subject) -> Figure:
    panels = {"gini": "Gini coefficient", "max_over_mean": "largest / mean load", "dead_share": "share of dead experts"}
    where = f"metric in ({', '.join(map(repr, panels))})"
    rows = fetch(subject.sides, "load_balance", ("metric", "value", "baseline", "n"), where=where, pooled=True)
    none_dead = not rows.only(rows["metric"] == "dead_share")["value"].any()
    if none_dead:
        del panels["dead_share"]
    return Figure(
        name="load-by-layer",
        section=EXPERTS,
        title="Load balance over depth",
        text="All languages together: inequality of the load (0 is even), the largest load relative to the mean, and "
        "dead experts, which less than 0.1 % of the tokens choose.",
        draw=functools.partial(
            curves.by_depth, panels=panels_of(rows, panels), stacks=subject.stacks, curves=curves.Curves(
                series="run", main=subject.sides[0].name,
                tooltip={"run": "N", "layer": "O", "value": "Q", "baseline": "Q", "n": "Q"},
            ),
        ),
        tables={"rows": rows},
        notes=[f"{span(rows['n'])} tokens.", *(["No expert of any layer is dead."] if none_dead else [])],
    )  # fmt: skip


# ---- co-activation ----


def _coactivation(subject: Subject) -> Figure:
    rows = fetch(subject.main, "coactivation", ("expert", "other_expert", "value", "baseline", "n"), by_layer=True)
    common = Figure(
        name="coactivation", section=EXPERTS, title="Co-activation",
        text="Share of the row expert's tokens for which the column expert was chosen too. Experts with similar rows "
        "are adjacent.",
    )  # fmt: skip
    if len(rows) == 0:
        return dataclasses.replace(common, text="Every token has one expert (k = 1), so no two are chosen together.")
    orders = {router: _companions(rows.of(router), subject.max_experts) for router in set(rows.routers())}
    rows = rows.having(_row=places(rows, "expert", orders), _column=places(rows, "other_expert", orders))
    shown = np.array([len(orders[router]) for router in rows.routers()])
    kept = rows.only((rows["_row"] < shown) & (rows["_column"] < shown))
    most = max(map(len, orders.values()))
    notes = [f"{span(rows['n'])} tokens of each expert; baseline, experts chosen at random: "
             f"{span(rows['baseline'], '{:.3g}'.format)}."]  # fmt: skip
    notes += [f"Only the {most} most used experts are shown."] if len(kept) < len(rows) else []
    return dataclasses.replace(
        common,
        draw=functools.partial(
            charts.matrix, x=charts.Side(column="other_expert", count=most, title="chosen together with"),
            y=charts.Side(column="expert", count=most, title="expert"), title="share of tokens", square=True,
            high=float(kept["value"].max()),
            tooltip={"expert": "N", "other_expert": "N", "value": "Q", "baseline": "Q", "n": "Q"},
        ),
        tables={"rows": kept},
        notes=notes,
    )  # fmt: skip


def _companions(rows: Table, most: int) -> list[int]:
    """Returns the most used experts of a router, ordered so that similar co-activation profiles are adjacent."""
    names, first = np.unique(rows["expert"].tolist(), return_index=True)
    used = names[np.argsort(-rows["n"][first], kind="stable")[:most]]
    kept = rows.only(np.isin(rows["expert"], used) & np.isin(rows["other_expert"], used))
    found, _, values_ee = matrix(kept, "expert", "other_expert")
    order: list[int] = clustering.by_profile(found, values_ee + np.eye(len(found)))
    return order
