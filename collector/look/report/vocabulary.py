"""Defines the figures about experts and their favourite tokens."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections import Counter
from typing import TYPE_CHECKING

import numpy as np

from collector.look.report import curves
from collector.look.report.experts import EXPERTS, panels_of, ranks_by_value
from collector.look.report.figure import Figure
from collector.look.report.tables import fetch, span

if TYPE_CHECKING:
    from collector.look.report.figure import Subject
    from collector.look.report.tables import Router, Table

WORDS = 8
"""Number of tokens to show for each expert."""
_PIECE = re.compile("<[0-9A-F]{2}>")
"""A single byte of a character that is split over several tokens."""
SHOWN_EXPERTS = 64
_NO_IDS = "This run has no token ids (or none that occurs ten times), so experts cannot be related to tokens."


def figures(subject: Subject) -> list[Figure]:
    """Returns all figures of this module, in the order of the page."""
    return [_vocabulary_by_layer(subject), _vocabulary(subject)]


def _vocabulary_by_layer(subject: Subject) -> Figure:
    panels = {"layer_topk": "among the k chosen", "layer_top1": "highest weight"}
    where = f"metric in ({', '.join(map(repr, panels))})"
    rows = fetch(
        subject.sides, "vocabulary_specialization", ("metric", "value", "baseline", "n", "tokens"), where=where
    )
    common = Figure(
        name="vocabulary-by-layer", section=EXPERTS, title="Vocabulary specialization over depth",
        text="The share of a token's occurrences that choose its favourite expert, mean over the vocabulary: at 1 the "
        "layer routes by token identity alone.",
    )  # fmt: skip
    if len(rows) == 0:
        return dataclasses.replace(common, text=_NO_IDS)
    return dataclasses.replace(
        common,
        draw=functools.partial(
            curves.by_depth, panels=panels_of(rows, panels), stacks=subject.stacks, curves=curves.Curves(
                series="run", main=subject.sides[0].name,
                tooltip={"run": "N", "layer": "O", "value": "Q", "baseline": "Q", "n": "Q", "tokens": "Q"},
            ),
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
    ranks = ranks_by_value(rows)
    rows = rows.having(_row=ranks)
    shown = rows.only(rows["_row"] <= SHOWN_EXPERTS)
    return dataclasses.replace(
        common,
        text="For each expert, the mean share that it gets of the occurrences of tokens whose favourite it is; the "
        "dashed line is chance. Next to it the most specialised of these tokens; ␣ is a space, and pieces of "
        "characters are left out.",
        draw=functools.partial(
            curves.bars_with_words,
            rows=min(SHOWN_EXPERTS, int(ranks.max())),
            words=WORDS,
            x_title="vocabulary specialization",
            y_title="expert",
        ),
        tables={"rows": shown, "words": _words(subject, shown)},
        notes=[*_told(ranks), f"{span(shown['n'])} token ids of each expert, of those that occur ten times or more."],
    )


def _told(ranks: np.ndarray) -> list[str]:
    return [f"Only the {SHOWN_EXPERTS} most specialised experts are shown."] if ranks.max() > SHOWN_EXPERTS else []


def _words(subject: Subject, shown: Table) -> Table:
    """Returns the first tokens of each expert in the figure, placed in the row of its bar."""
    rows_of = dict(zip(_keys(shown), shown["_row"].tolist(), strict=True))
    columns = ("expert", "rank", "token", "value", "baseline", "n")
    found = fetch(subject.main, "expert_tokens", columns, by_layer=True, n=2 * WORDS)
    found = found.only(np.array([key in rows_of for key in _keys(found)], bool))
    found = found.only(np.array([not _PIECE.search(token) for token in found["token"].tolist()], bool))
    given: Counter[tuple[Router, int]] = Counter()
    places = []
    for key in _keys(found):
        places.append(given[key])
        given[key] += 1
    found = found.having(
        _row=[rows_of[key] for key in _keys(found)], _place=places, _text=map(readable, found["token"].tolist())
    )
    return found.only(found["_place"] < WORDS)


def _keys(rows: Table) -> list[tuple[Router, int]]:
    """Returns router and expert of each row."""
    return list(zip(rows.routers(), rows["expert"].tolist(), strict=True))


def readable(token: str) -> str:
    """Makes a token's white space visible, and isolates its text direction from that of its neighbours."""
    return "\u2068" + token.translate({32: "␣", 10: "⏎", 9: "⇥"}) + "\u2069"
