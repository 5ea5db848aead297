"""Figures about routers and experts: how decided, how loaded, chosen together, and for which tokens."""

from __future__ import annotations

import dataclasses
import functools
import re
from typing import TYPE_CHECKING

import numpy as np

from collector.report import charts, clustering
from collector.report.figure import Figure
from collector.report.tables import INTERVAL, LEVEL, extent, fetch, in_labels, matrix, places, span

if TYPE_CHECKING:
    from collections.abc import Mapping

    from collector.report.figure import Subject
    from collector.report.tables import Table

DECISIVENESS = "How decided routers are"
EXPERTS = "What experts do"
WORDS = 8
"""Tokens of each expert that are shown."""
_PIECE = re.compile("<[0-9A-F]{2}>")
"""A byte of a character that several tokens make up."""
SHOWN_EXPERTS = 64
_NO_IDS = "This run holds no token ids (or none that occurs ten times), so tokens and experts cannot be told together."


def figures(subject: Subject) -> list[Figure]:
    """All of this family, in the order of the page."""
    return [
        _decisiveness(subject),
        _effective(subject),
        _load(subject),
        _load_by_layer(subject),
        _coactivation(subject),
        _vocabulary_by_layer(subject),
        _vocabulary(subject),
    ]


# ---- decisiveness ----


def _decisiveness(subject: Subject) -> Figure:
    columns = ("metric", "label", "value", "baseline", "n")
    where = f"metric in ('router_entropy', 'topk_mass') and {in_labels(subject.labels)}"
    return _by_label(
        subject,
        fetch(subject.sides, "router_entropy", columns, where=where),
        name="decisiveness",
        title="Router entropy and top-k mass",
        text="How spread the router's distribution is over all experts, and how much of it the chosen k have; means "
        "over the tokens of each language. The dashed line is a router that prefers nothing.",
        without="No intervals: this query looks at single tokens, and intervals come from sums over documents.",
        panels={"router_entropy": "router entropy (nats)", "topk_mass": "top-k mass"},
    )


def _effective(subject: Subject) -> Figure:
    columns = ("metric", "label", "value", "baseline", "n", "used_experts", "half_experts")
    return _by_label(
        subject,
        fetch(
            subject.sides, "effective_experts", columns, where=in_labels(subject.labels), resamples=subject.resamples
        ),
        name="effective-experts",
        title="Effective number of experts",
        text="How many equally loaded experts would have the entropy of a language's load. It grows with the number of "
        "tokens: compare languages of similar size. The dashed line is the number of experts.",
        without="No intervals were asked for (--resamples).",
        panels={"effective_experts": "effective experts"},
    )


def _by_label(
    subject: Subject, rows: Table, *, name: str, title: str, text: str, without: str, panels: dict[str, str]
) -> Figure:
    labels = len(subject.labels)
    return Figure(
        name=name,
        section=DECISIVENESS,
        title=title,
        text=text,
        draw=functools.partial(
            charts.by_depth, panels=_panels(rows, panels, zero=False), series="label", stacks=subject.stacks,
            faint=True, main=subject.sides[0].name, dash=len(subject.sides) > 1,
            band=INTERVAL if rows.resamples else None,
            tooltip={"run": "N", "label": "N", "layer": "O", "value": "Q", "baseline": "Q", "n": "Q"},
        ),
        tables={"rows": rows},
        notes=[
            f"{labels} languages, {span(rows['n'])} tokens of each; grey: those that are not in colour.",
            f"Bands: {LEVEL} % intervals, a bootstrap over documents ({rows.resamples:,} samples)."
            if rows.resamples
            else without,
        ],
    )  # fmt: skip


def _panels(rows: Table, names: Mapping[str, str], *, zero: bool = True) -> list[charts.Panel]:
    """A panel per metric, its axis as long as the values of all runs and layers want it."""
    found = []
    for metric, words in names.items():
        low, high = extent(rows, metric, "low", "high", zero=zero)
        found.append(charts.Panel(metric=metric, words=words, low=low, high=high))
    return found


# ---- load ----


def _load(subject: Subject) -> Figure:
    rows = fetch(subject.sides, "expert_load", ("expert", "value", "baseline", "n", "is_dead"), by_layer=True)
    main = subject.sides[0].name
    rows = rows.having(_rank=_ranks(rows), _main=[run == main for run in rows["run"].tolist()])
    own = rows.only(rows["_main"])
    dead = int(own["is_dead"].sum())
    compared = f" The line is {subject.sides[1].name}." if len(subject.sides) > 1 else ""
    return Figure(
        name="load",
        section=EXPERTS,
        title="Load of the experts",
        text="Share of all tokens for which each expert is among the k chosen, the most used first; crosses are dead "
        f"experts (below 0.1 % of the tokens), the dashed line an even load.{compared}",
        draw=functools.partial(charts.loads, high=float(rows["value"].max()), compared=len(subject.sides) > 1),
        tables={"rows": rows},
        notes=[
            f"{span(own['n'])} tokens, all languages together; {dead} of {len(own)} experts of all layers are dead.",
            "In a small sample more experts seem dead.",
        ],
    )


def _ranks(rows: Table) -> np.ndarray:
    """Row by row the expert's place by load, in its router and run."""
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
    return Figure(
        name="load-by-layer",
        section=EXPERTS,
        title="Load balance over depth",
        text="All languages together: inequality of the load (0, even), the largest load beside the mean, and the "
        "share of experts that less than 0.1 % of the tokens choose.",
        draw=functools.partial(
            charts.by_depth, panels=_panels(rows, panels), series="run", stacks=subject.stacks,
            main=subject.sides[0].name,
            tooltip={"run": "N", "layer": "O", "value": "Q", "baseline": "Q", "n": "Q"},
        ),
        tables={"rows": rows},
        notes=[f"{span(rows['n'])} tokens."],
    )  # fmt: skip


# ---- co-activation ----


def _coactivation(subject: Subject) -> Figure:
    rows = fetch(subject.main, "coactivation", ("expert", "other_expert", "value", "baseline", "n"), by_layer=True)
    common = Figure(
        name="coactivation", section=EXPERTS, title="Co-activation",
        text="Share of the row's expert's tokens for which the column's expert was chosen too. Experts stand by the "
        "likeness of their companions.",
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
            charts.matrix, x="other_expert", y="expert", columns=most, rows=most, title="share of tokens", square=True,
            high=float(kept["value"].max()), x_title="chosen together with", y_title="expert",
            tooltip={"expert": "N", "other_expert": "N", "value": "Q", "baseline": "Q", "n": "Q"},
        ),
        tables={"rows": kept},
        notes=notes,
    )  # fmt: skip


def _companions(rows: Table, most: int) -> list[int]:
    """The most used experts of a router, by the likeness of their companions."""
    names, first = np.unique(rows["expert"].tolist(), return_index=True)
    used = names[np.argsort(-rows["n"][first], kind="stable")[:most]]
    kept = rows.only(np.isin(rows["expert"], used) & np.isin(rows["other_expert"], used))
    found, _, values_ee = matrix(kept, "expert", "other_expert")
    order: list[int] = clustering.by_profile(found, values_ee + np.eye(len(found)))
    return order


# ---- vocabulary ----


def _vocabulary_by_layer(subject: Subject) -> Figure:
    panels = {"layer_topk": "among the k chosen", "layer_top1": "highest weight"}
    where = f"metric in ({', '.join(map(repr, panels))})"
    rows = fetch(
        subject.sides, "vocabulary_specialization", ("metric", "value", "baseline", "n", "tokens"), where=where
    )
    common = Figure(
        name="vocabulary-by-layer", section=EXPERTS, title="Vocabulary specialization over depth",
        text="How much of a token's occurrences its favourite expert gets, mean over the vocabulary: 1, the layer "
        "routes by token identity alone.",
    )  # fmt: skip
    if len(rows) == 0:
        return dataclasses.replace(common, text=_NO_IDS)
    return dataclasses.replace(
        common,
        draw=functools.partial(
            charts.by_depth, panels=_panels(rows, panels), series="run", stacks=subject.stacks,
            main=subject.sides[0].name,
            tooltip={"run": "N", "layer": "O", "value": "Q", "baseline": "Q", "n": "Q", "tokens": "Q"},
        ),
        tables={"rows": rows},
        notes=[f"{span(rows['n'])} token ids that occur ten times or more, {span(rows['tokens'])} occurrences."],
    )  # fmt: skip


def _vocabulary(subject: Subject) -> Figure:
    common = Figure(name="vocabulary", section=EXPERTS, title="Experts and their tokens", text=_NO_IDS)
    columns = ("expert", "value", "baseline", "n", "tokens")
    rows = fetch(
        subject.main, "vocabulary_specialization", columns, where="metric = 'expert_topk' and n > 0", by_layer=True
    )
    if len(rows) == 0:
        return common
    words = _words(fetch(subject.main, "expert_tokens", ("expert", "rank", "token"), by_layer=True, n=2 * WORDS))
    ranks = _ranks(rows)
    keys = zip(rows.routers(), rows["expert"].tolist(), strict=True)
    rows = rows.having(_row=ranks, _words=["   ".join(words.get((*router, e), [])[:WORDS]) for router, e in keys])
    shown = rows.only(rows["_row"] <= SHOWN_EXPERTS)
    return dataclasses.replace(
        common,
        text="For each expert the tokens whose favourite it is, and the mean share of their occurrences that it gets; "
        "the dashed line is chance. Behind it the most specialised of these tokens (no pieces of characters).",
        draw=functools.partial(
            charts.bars_with_words,
            rows=min(SHOWN_EXPERTS, int(ranks.max())),
            x_title="vocabulary specialization",
            y_title="expert",
        ),
        tables={"rows": shown},
        notes=[*_told(ranks), f"{span(shown['n'])} token ids of each expert, of those that occur ten times or more."],
    )


def _told(ranks: np.ndarray) -> list[str]:
    return [f"Only the {SHOWN_EXPERTS} most specialised experts are shown."] if ranks.max() > SHOWN_EXPERTS else []


def _words(rows: Table) -> dict[tuple[str, int, int], list[str]]:
    """(stack, layer, expert) -> its tokens, readable."""
    words: dict[tuple[str, int, int], list[str]] = {}
    for router, expert, token in zip(rows.routers(), rows["expert"].tolist(), rows["token"].tolist(), strict=True):
        if not _PIECE.search(token):
            words.setdefault((*router, expert), []).append(readable(token))
    return words


def readable(token: str) -> str:
    """A token with its white space visible, kept from mixing with tokens that are written the other way."""
    return "\u2068" + token.translate({32: "␣", 10: "⏎", 9: "⇥"}) + "\u2069"
