"""Defines the figures about languages: which experts they use, how similar they are, and in which layers."""

from __future__ import annotations

import dataclasses
import functools
import shlex
from typing import TYPE_CHECKING

import numpy as np

from collector.look.report import charts, clustering, curves
from collector.look.report.figure import Figure
from collector.look.report.tables import extent, fetch, in_labels, matrix, places, span
from collector.query import inference
from collector.query.document_counts import document_counts

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from collector.look.report.clustering import Tree
    from collector.look.report.figure import Subject
    from collector.look.report.tables import Router, Side, Table

SPECIALIZATION = "Which language uses which experts"
LIKENESS = "How much alike languages are"
RANKS = 8
_SHARES = {"topk": "share of all picks", "top1": "share of the picks with the highest weight"}


def figures(subject: Subject) -> list[Figure]:
    """Returns all figures of this module, in the order of the page."""
    overlap = _overlap(subject)
    trees = _trees(subject, overlap)
    return [
        *_specialization(subject, trees),
        _top_experts(subject, trees),
        _depth(subject),
        _matrices(subject, overlap, trees),
    ]


# ---- specialization ----


def _specialization(subject: Subject, trees: Mapping[Router, Tree]) -> list[Figure]:
    """Returns the heatmap of the main run, and that of the compared run in the same order."""
    columns = ("label", "expert", "value", "baseline", "lift", "n")
    tables = [
        fetch([side], "domain_specialization", columns, where=in_labels(subject.labels), by_layer=True)
        for side in subject.sides
    ]
    kept = {router: _most_specialised(tables[0].of(router), subject.max_experts) for router in subject.routers}
    experts = {router: _expert_order(tables[0].of(router), kept[router]) for router in subject.routers}
    labels = {router: trees[router].leaves for router in subject.routers}
    high = max((float(table["value"].max()) for table in tables if len(table)), default=1.0)
    found = []
    for side, table in zip(subject.sides, tables, strict=True):
        own = table.having(_row=places(table, "label", labels), _column=places(table, "expert", experts))
        own = own.only(own["_column"] < [len(experts.get(router, ())) for router in own.routers()])
        main = side is subject.sides[0]
        tested = main and subject.resamples > 0 and _can_be_tested(own)
        own = _tested(own, side, subject.resamples) if tested else own
        found.append(
            Figure(
                name="specialization" if main else "specialization-compared",
                section=SPECIALIZATION,
                title="Domain specialization" if main else f"Domain specialization, {side.name}",
                text="Share of a language's tokens for which the expert is among the k chosen. "
                + ("Languages are in the order of the dendrogram below; experts with similar columns are adjacent."
                   if main else "Same colours, languages and experts in the same order as above."),
                draw=functools.partial(
                    charts.matrix, x=charts.Side(column="expert", count=_most(own, "expert"), title="expert"),
                    y=charts.Side(column="label", count=len(subject.labels)),
                    title="share of tokens", high=high, significant=tested,
                    tooltip={"label": "N", "expert": "N", "value": "Q", "baseline": "Q", "lift": "Q", "n": "Q",
                             **({"q": "Q"} if tested else {})},
                ),
                tables={"rows": own},
                notes=[_tokens_each(own), _baselines(own), *([_significance(own, subject.resamples)] if main else []),
                       *_left_out(table, own)],
            )
        )  # fmt: skip
    return found


def _can_be_tested(rows: Table) -> bool:
    """Whether every router has at least two languages to compare; a label may have special tokens only."""
    return all(len(set(rows.of(router)["label"].tolist())) > 1 for router in set(rows.routers()))


def _tested(rows: Table, side: Side, resamples: int) -> Table:
    """Adds the q value of each cell, from one test of all cells."""
    test = inference.specialization_test(document_counts(side.run), resamples=resamples)
    keys = [test[name].to_pylist() for name in ("stack", "layer", "label", "expert")]
    q = dict(zip(zip(*keys, strict=True), test["q"].to_pylist(), strict=True))
    cells = zip(rows.routers(), rows["label"].tolist(), rows["expert"].tolist(), strict=True)
    command = f"collector test {shlex.quote(side.root)} --resamples {resamples}"
    tested = rows.having(q=[q[(*router, label, expert)] for router, label, expert in cells])
    return dataclasses.replace(tested, also=[command])


def _significance(rows: Table, resamples: int) -> str:
    if not resamples:
        return "No test of significance was requested (--resamples)."
    if "q" not in rows.columns:
        return "No test of significance: it compares a language with the others, and there are tokens of one only."
    found = int((rows["q"] < 0.05).sum())
    return (
        f"Dots: chosen significantly more than by the other languages (permutation test of the documents' labels, "
        f"{resamples:,} shuffles, q < 0.05 over all layers): {found:,} of {len(rows):,} cells."
    )


def _most_specialised(rows: Table, most: int) -> list[int]:
    """Returns the experts with the highest share in any language, at most `most` of them."""
    _, experts, values_de = matrix(rows, "label", "expert")
    best = np.argsort(-values_de.max(0), kind="stable")[:most]
    return sorted(experts[place] for place in best)


def _expert_order(rows: Table, kept: Sequence[int]) -> list[int]:
    _, experts, values_de = matrix(rows.only(np.isin(rows["expert"], kept)), "label", "expert")
    order: list[int] = clustering.by_profile(experts, values_de.T)
    return order


def _top_experts(subject: Subject, trees: Mapping[Router, Tree]) -> Figure:
    columns = ("metric", "label", "rank", "expert", "value", "baseline", "n")
    rows = fetch(subject.sides, "top_experts", columns, where=in_labels(subject.labels), by_layer=True, n=RANKS)
    rows = rows.having(_row=places(rows, "label", {router: tree.leaves for router, tree in trees.items()}))
    there = set(rows["metric"].tolist())  # without weights no expert has the highest one
    shares = {metric: (words, extent(rows, metric)[1]) for metric, words in _SHARES.items() if metric in there}
    beside = (
        f"For comparison {subject.sides[1].name}: favourites that all languages share are not specialization."
        if len(subject.sides) > 1
        else "Favourites that all languages share are not specialization: use --compare to show the same model with "
        "random weights next to it."
    )
    return Figure(
        name="top-experts",
        section=SPECIALIZATION,
        title="The most used experts of each language",
        text=f"Numbers are experts, colours their shares: of all k picks of each token, and of the picks with the "
        f"highest weight. Colours follow the square root. {beside}",
        draw=functools.partial(
            charts.ranks,
            metrics=shares,
            sides=[side.name for side in subject.sides],
            rows=len(subject.labels),
            ranks=RANKS,
        ),
        tables={"rows": rows},
        notes=[_tokens_each(rows), _baselines(rows)],
    )


# ---- likeness ----


def _overlap(subject: Subject) -> Table:
    columns = ("label_a", "label_b", "value", "n")
    labels = list(subject.labels)
    return fetch(subject.main, "language_overlap", columns, where="metric = 'jsd'", by_layer=True, labels=labels)


def _trees(subject: Subject, overlap: Table) -> dict[Router, Tree]:
    trees = {}
    for router in subject.routers:
        labels, _, distances_dd = matrix(overlap.of(router), "label_a", "label_b")
        trees[router] = clustering.tree(labels, distances_dd)
    return trees


def _matrices(subject: Subject, overlap: Table, trees: Mapping[Router, Tree]) -> Figure:
    common = Figure(
        name="overlap", section=LIKENESS, title="Divergence between languages",
        text="Jensen–Shannon divergence of two languages' shares of picks, in bits: 0 for the same experts, 1 for none "
        "in common. On the right the dendrogram by average linkage of these divergences.",
    )  # fmt: skip
    if len(subject.labels) < 2:
        return dataclasses.replace(common, text="There is one language only: nothing to compare.")
    orders = {router: tree.leaves for router, tree in trees.items()}
    rows = overlap.having(_row=places(overlap, "label_a", orders), _column=places(overlap, "label_b", orders))
    high = float(rows["value"].max())
    return dataclasses.replace(
        common,
        draw=functools.partial(
            charts.matrix_with_tree, labels=len(subject.labels), title="divergence (bits)", high=high
        ),
        tables={"rows": rows, "branches": _branches(overlap, trees)},
        notes=[f"{len(subject.labels)} languages; n of a pair is the smaller number of tokens: {span(rows['n'])}."],
    )


def _branches(overlap: Table, trees: Mapping[Router, Tree]) -> Table:
    """Returns the joints of all trees as points of lines, without the data columns of the query."""
    points = [
        (router, joint, step, place, height)
        for router, tree in trees.items()
        for joint, line in enumerate(tree.joints)
        for step, (place, height) in enumerate(zip(*line, strict=True))
    ]
    routers, joints, steps, where, heights = zip(*points, strict=True) if points else ([],) * 5
    columns = {
        "stack": np.array([stack for stack, _ in routers], object), "layer": np.array([layer for _, layer in routers]),
        "joint": np.array(joints), "step": np.array(steps), "place": np.array(where), "distance": np.array(heights),
    }  # fmt: skip
    return overlap.replacing(columns)


def _depth(subject: Subject) -> Figure:
    columns = ("metric", "value", "baseline", "n", "first_quartile", "median", "third_quartile")
    rows = fetch(subject.sides, "language_divergence", columns)
    common = Figure(
        name="divergence-by-layer", section=LIKENESS, title="Divergence over depth",
        text="Mean Jensen–Shannon divergence of all pairs of languages, layer by layer. Where it is low, languages "
        "share experts; multilingual models often have a valley in the middle.",
    )  # fmt: skip
    if len(rows) == 0:
        return dataclasses.replace(common, text="There is one language only: nothing to compare.")
    band = ("first_quartile", "third_quartile")
    metric = "language_divergence"
    low, high = extent(rows, metric, *band)
    return dataclasses.replace(
        common,
        draw=functools.partial(
            curves.by_depth, panels=[curves.Panel(metric=metric, words="mean divergence (bits)", low=low, high=high)],
            stacks=subject.stacks, curves=curves.Curves(
                series="run", band=band, main=subject.sides[0].name,
                tooltip={"run": "N", "layer": "O", "value": "Q", "median": "Q", "first_quartile": "Q",
                         "third_quartile": "Q", "n": "Q"},
            ),
        ),
        tables={"rows": rows},
        notes=[f"{span(rows['n'])} pairs of languages. Bands: the middle half of the pairs, not an interval."],
    )  # fmt: skip


# ---- notes ----


def _most(table: Table, column: str) -> int:
    """Returns the maximum number of distinct values of a column in any router."""
    return max((len(set(table.of(router)[column].tolist())) for router in set(table.routers())), default=0)


def _tokens_each(table: Table) -> str:
    labels = len(set(table["label"].tolist()))
    return f"{labels} languages, {span(table['n'])} tokens of each." if labels > 1 else f"{span(table['n'])} tokens."


def _baselines(table: Table) -> str:
    return f"Baseline, a router that chooses at random: {span(table['baseline'], '{:.3g}'.format)}."


def _left_out(table: Table, shown: Table) -> list[str]:
    most, kept = _most(table, "expert"), _most(shown, "expert")
    return [f"Only the {kept} most specialised of up to {most} experts are shown."] if kept < most else []
