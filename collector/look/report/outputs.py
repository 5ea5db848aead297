"""Defines the figures about what experts put out: contribution, similarity, maps, and how well the model predicts.

Only runs that recorded it have them: a figure whose data was never recorded is left out.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any

import numpy as np

from collector.look.report import charts, clustering, points
from collector.look.report.figure import Figure
from collector.look.report.tables import INTERVAL, LEVEL, fetch, in_labels, matrix, places, span

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from collector.look.report.figure import Subject
    from collector.look.report.tables import Router, Table

OUTPUTS = "What experts put out"
PREDICTION = "How well the model predicts"
METHODS = {"umap": "UMAP", "tsne": "t-SNE", "pca": "principal components"}
"""Methods of maps, the one to show first."""


def figures(subject: Subject) -> list[Figure]:
    """Returns the figures that the run has data for, in the order of the page."""
    run = subject.sides[0].run
    found: list[Figure | None] = []
    orders: dict[Router, list[Any]] = {}
    if run.has("document_outputs"):
        found.append(_contribution(subject))
    if run.has("expert_pairs"):
        columns = ("expert", "other_expert", "value", "baseline", "n")
        rows = fetch(subject.main, "expert_similarity", columns, by_layer=True)
        orders = {router: _alike(rows.of(router), subject.max_experts) for router in set(rows.routers())}
        found.append(_similarity(rows, orders))
    if run.has("weights"):
        found.append(_weights(subject, orders))
    if run.has("maps"):
        found.append(_map(subject))
    if run.has("document_losses"):
        found.append(_loss(subject))
    return [figure for figure in found if figure is not None]


# ---- contribution ----


def _contribution(subject: Subject) -> Figure:
    rows = fetch(
        subject.main, "expert_contribution", ("expert", "value", "baseline", "n"), where="metric = 'contribution'",
        by_layer=True, pooled=True,
    )  # fmt: skip
    load = fetch(subject.main, "expert_load", ("expert", "value"), by_layer=True)
    chosen = dict(zip(_experts(load), load["value"].tolist(), strict=True))
    top_k = {(one["stack"], one["layer"]): one["top_k"] for one in subject.sides[0].run.info["layers"]}
    frequency = [chosen[key] for key in _experts(rows)]
    even = [share / top_k[router] for share, router in zip(frequency, rows.routers(), strict=True)]
    rows = rows.having(frequency=frequency, _even=even)
    return Figure(
        name="contribution",
        section=OUTPUTS,
        title="Contribution and frequency",
        text="Each expert's share of its layer's output, against the share of tokens that choose it. On the dashed "
        "line an expert contributes as much as it is chosen; above it, its picks count for more than others do.",
        draw=functools.partial(
            points.experts, x="frequency", y="value", even="_even",
            titles=("share of tokens that choose it", "share of the layer's output"),
            ends=(points.ends_of(rows["frequency"]), points.ends_of(rows["value"])),
            tooltip={"expert": "N", "frequency": "Q", "value": "Q", "baseline": "Q", "n": "Q"},
        ),
        tables={"rows": dataclasses.replace(rows, also=load.commands())},
        notes=[f"{span(rows['n'])} tokens, all languages together; shared experts apart.",
               "A contribution is no proof that the model needs the expert."],
    )  # fmt: skip


def _experts(rows: Table) -> list[tuple[Router, int]]:
    return list(zip(rows.routers(), rows["expert"].tolist(), strict=True))


# ---- similarity ----


def _similarity(rows: Table, orders: Mapping[Router, Sequence[Any]]) -> Figure | None:
    if len(rows) == 0:
        return None
    return _matrix(
        rows, orders, name="output-similarity", title="Similarity of outputs",
        text="Debiased CKA of what two experts put out for the same tokens, whether they chose them or not: 1 is the "
        "same up to rotation, 0 is unrelated. Experts that are alike are adjacent.",
        words="CKA", notes=[f"{span(rows['n'])} sampled tokens, through all experts."],
    )  # fmt: skip


def _weights(subject: Subject, orders: Mapping[Router, Sequence[Any]]) -> Figure | None:
    measures = subject.sides[0].run.sql("select distinct measure from weights").fetchall()
    measure = "matched" if ("matched",) in measures else "cosine"
    rows = fetch(subject.main, "weight_similarity", ("expert", "other_expert", "value", "place"), by_layer=True,
                 measure=measure)  # fmt: skip
    if len(rows) == 0:
        return None
    given = bool(orders)
    orders = {
        router: orders.get(router) or _alike(rows.of(router), subject.max_experts) for router in set(rows.routers())
    }
    how = "each neuron paired with one of the other expert" if measure == "matched" else "neurons in their order"
    return _matrix(
        rows, orders, name="weight-similarity", title="Similarity of weights",
        text=f"Mean cosine of two experts' weights, {how}. "
        + ("Experts are in the order of the figure above." if given else "Experts that are alike are adjacent."),
        words="cosine", notes=[],
    )  # fmt: skip


def _alike(rows: Table, most: int) -> list[Any]:
    """Returns the experts of a router, the first if they are too many, so that similar ones are adjacent."""
    kept = rows.only((rows["expert"] < most) & (rows["other_expert"] < most))
    names, _, values_ee = matrix(kept, "expert", "other_expert")
    distances_ee = 1 - np.clip((values_ee + values_ee.T) / 2, 0, 1)
    np.fill_diagonal(distances_ee, 0)
    return clustering.tree(names, distances_ee).leaves


def _matrix(
    rows: Table, orders: Mapping[Router, Sequence[Any]], *, name: str, title: str, text: str, words: str,
    notes: Sequence[str],
) -> Figure:  # fmt: skip
    rows = rows.having(_row=places(rows, "expert", orders), _column=places(rows, "other_expert", orders))
    shown = np.array([len(orders[router]) for router in rows.routers()])
    kept = rows.only((rows["_row"] < shown) & (rows["_column"] < shown))
    most = max(map(len, orders.values()))
    tooltip = {name: "Q" for name in ("value", "baseline", "n", "place") if name in rows.columns}
    return Figure(
        name=name, section=OUTPUTS, title=title, text=text,
        draw=functools.partial(
            charts.matrix, x=charts.Side(column="other_expert", count=most, title="expert"),
            y=charts.Side(column="expert", count=most, title="expert"), title=words, square=True,
            high=float(kept["value"].max()), tooltip={"expert": "N", "other_expert": "N"} | tooltip,
        ),
        tables={"rows": kept},
        notes=[*notes, *([f"Only {most} experts of a layer are shown."] if len(kept) < len(rows) else [])],
    )  # fmt: skip


# ---- maps ----


def _map(subject: Subject) -> Figure | None:
    columns = ("expert", "label", "token", "x", "y", "method", "trustworthiness", "n")
    rows = fetch(subject.main, "expert_map", columns)
    if len(rows) == 0:
        return None
    best: dict[Router, str] = {}
    for router, method in zip(rows.routers(), rows["method"].tolist(), strict=True):
        best[router] = min(best.get(router, method), method, key=list(METHODS).index)
    chosen = zip(rows.routers(), rows["method"].tolist(), strict=True)
    rows = rows.only(np.array([best[router] == method for router, method in chosen]))
    planes, notes = [], []
    for router in sorted(best):
        own = rows.of(router)
        name = f"layer {router[1]}" if len(subject.stacks) == 1 else f"{router[0]} layer {router[1]}"
        ends = {axis: points.ends_of(own[axis]) for axis in ("x", "y")}
        experts = (0.0, float(own["expert"].max()))
        planes.append(points.Plane(stack=router[0], layer=router[1], name=name, experts=experts, **ends))
        notes.append(f"{name}: {METHODS[best[router]]}, {int(own['n'][0]):,} outputs, trustworthiness "
                     f"{float(own['trustworthiness'][0]):.2f}.")  # fmt: skip
    return Figure(
        name="map",
        section=OUTPUTS,
        title="Map of outputs",
        text="What chosen experts put out for sampled tokens, in two dimensions: each point is a pick, coloured by the "
        "language of its text on the left and by its expert on the right. Neighbours are alike; distances between "
        "clusters and their sizes mean little. `collector map` makes one of a layer.",
        draw=functools.partial(points.maps, planes=planes, tooltip={"expert": "N", "label": "N", "token": "N"}),
        tables={"rows": rows},
        notes=notes,
    )


# ---- prediction ----


def _loss(subject: Subject) -> Figure | None:
    sides = [side for side in subject.sides if side.run.has("document_losses")]
    metric, words = "bits_per_character", "bits per character"
    ((known,),) = sides[0].run.query("loss").filter(f"metric = '{metric}' and value is not null").aggregate(
        "count(*)").fetchall()  # fmt: skip
    if not known:
        metric, words = "nats_per_token", "nats per token"
    where = f"metric = '{metric}' and {in_labels(subject.labels)}"
    rows = fetch(sides, "loss", ("label", "value", "baseline", "n"), where=where, resamples=subject.resamples)
    if len(rows) == 0:
        return None
    main = rows.only(rows["run"] == sides[0].name)
    order = {label: i for i, label in enumerate(main["label"][np.argsort(main["value"], kind="stable")].tolist())}
    rows = rows.having(_row=[order.get(label, len(order)) for label in rows["label"].tolist()])
    return Figure(
        name="loss",
        section=PREDICTION,
        title="Loss by language",
        text=f"How surprised the model is by each language's text, in {words}"
        + (", which compares languages whose tokens are of different length." if known else "."),
        draw=functools.partial(
            points.ordered, rows=len(order), title=words, interval=INTERVAL if rows.resamples else None,
            ends=points.ends_of(*(rows[name] for name in ("value", *INTERVAL) if name in rows.columns)),
        ),
        tables={"rows": rows},
        notes=[f"{span(rows['n'])} tokens of each language.",
               *([f"Lines: {LEVEL} % intervals, a bootstrap over documents ({rows.resamples:,} samples)."]
                 if rows.resamples else [])],
    )  # fmt: skip
