"""Collects the facts about a run: model, revision, what was really quantized, texts per language, padding, versions."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from collector.look import summary, terminal
from collector.store.run_directory import SUCCESS, RunDirectory

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collector.look.report.tables import Side

_LABELS = "select label, documents, tokens, characters, tokens / characters from labels order by tokens desc, label"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Card:
    """The facts that a reader needs about a run before its figures."""

    name: str
    model: str
    facts: Sequence[tuple[str, str]]
    complete: bool
    shards: tuple[int, int]
    """Numbers of committed and of planned shards."""
    documents: int
    tokens: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class LabelTable:
    """Documents, tokens and fertility of each label."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]
    commands: Sequence[str]
    """Command lines that write the table."""


def read_card(side: Side) -> Card:
    """Reads the card of a run.

    Raises:
        FileNotFoundError: there is no run.
    """
    run = RunDirectory(side.root)
    info, plan, totals = summary.read(run)
    labels = {label: documents for label, documents, *_ in side.run.sql(_LABELS).fetchall()}
    return Card(
        name=side.name, model=info["model"]["id"],
        facts=[("run", side.root), *summary.facts(info, plan, totals, labels)],
        complete=run.read_or_none(SUCCESS) is not None, shards=(len(totals.committed), len(plan.shards)),
        documents=totals.documents, tokens=totals.tokens,
    )  # fmt: skip


def label_table(side: Side) -> LabelTable:
    """Returns documents, tokens and fertility of each label, those with the most tokens first."""
    rows = side.run.sql(_LABELS).fetchall()
    return LabelTable(
        heads=("language", "documents", "tokens", "characters", "tokens per character"),
        rows=[(label, *(_count(n) for n in counts), _ratio(fertility)) for label, *counts, fertility in rows],
        commands=[f'collector sql {side.root} "{_LABELS}"'],
    )


def facts_beside(cards: Sequence[Card]) -> list[tuple[str, list[str]]]:
    """Returns each fact's name with the values of all cards, or a single value if all cards agree."""
    said = [dict(card.facts) for card in cards]
    names = dict.fromkeys(name for facts in said for name in facts)
    beside = [(name, [facts.get(name, "–") for facts in said]) for name in names]
    return [(name, values[:1] if len(set(values)) == 1 else values) for name, values in beside]


def lead(card: Card, routers: Sequence[Any], labels: int) -> str:
    """Returns the sentence under the title."""
    languages = f"{labels} languages" if labels > 1 else "one language"
    return (
        f"{card.tokens:,} tokens of {card.documents:,} documents in {languages}, "
        f"{card.name}: {terminal.routers(routers)}. "
        "Every number comes from the query shown below its figure."
    )


def _count(number: int | None) -> str:
    return "–" if number is None else f"{number:,}"


def _ratio(number: float | None) -> str:
    return "–" if number is None else f"{number:.3f}"
