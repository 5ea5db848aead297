"""Decides what of a query an imported run can answer, whose source did not have everything that a run has.

A query says in its header what it needs, and for what of its answer, if not for all of it:

    -- Needs: weights for metric top1_frequency, weighted_share; probabilities for metric load_balance_loss
    -- Needs: weights for column weights, weight_entropy
    -- Needs: weights for mode released

The first word is one of `imported.lacks` in run.json. `metric` (or `aspect`) names rows by their value there, `column`
columns; any other word is a parameter. A run without it gives the rest of the answer, and a remark; if nothing is left,
or the parameter has this value, the query refuses.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    import duckdb

_NAMES = {
    "weights": "weights of the chosen experts",
    "entropy": "entropies of the routers",
    "topk_mass": "top-k masses",
    "margin": "margins",
    "probabilities": "probabilities of all experts",
    "logits": "logits",
    "characters": "characters of the texts",
}
_NEED = re.compile(r"(?P<what>\w+)(?: for (?P<place>\w+) (?P<names>.+))?")
_METRIC = re.compile(r"'(\w+)' as metric")
_ROWS = ("metric", "aspect")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Need:
    """One entry of a query's header."""

    what: str
    place: str | None
    """`metric`, `aspect`, `column`, a parameter, or None for the whole query."""
    names: tuple[str, ...]
    """Values of the metric, aspect or parameter, or names of columns."""


def read_needs(text: str) -> tuple[Need, ...]:
    """Parses the header `Needs:` of a query.

    Raises:
        ValueError: it is none of the forms above.
    """
    needs = []
    for part in filter(None, (" ".join(each.split()) for each in text.split(";"))):
        match = _NEED.fullmatch(part)
        if match is None or match["what"] not in _NAMES:
            raise ValueError(
                f"Needs: takes NEED, or NEED for PLACE NAME, …, with one of {', '.join(_NAMES)}; got {part!r}"
            )
        names = tuple(name.strip() for name in (match["names"] or "").split(",") if name.strip())
        needs.append(Need(what=match["what"], place=match["place"], names=names))
    return tuple(needs)


class Needing(Protocol):
    """A query, see `catalog.Query`."""

    @property
    def name(self) -> str: ...  # noqa: D102
    @property
    def sql(self) -> str: ...  # noqa: D102
    @property
    def needs(self) -> tuple[Need, ...]: ...  # noqa: D102


@dataclasses.dataclass(frozen=True, kw_only=True)
class LeftOut:
    """What of a query's answer a run cannot give."""

    rows: Mapping[str, tuple[str, ...]]
    """`metric` or `aspect` -> values without rows."""
    columns: tuple[str, ...]
    remarks: tuple[str, ...]
    """Why, a line each."""

    def joined(self, other: LeftOut | None) -> LeftOut:
        """Returns what two runs together cannot give."""
        if other is None:
            return self
        places = {*self.rows, *other.rows}
        rows = {place: (*dict.fromkeys((*self.rows.get(place, ()), *other.rows.get(place, ()))),) for place in places}
        columns, remarks = (
            (*dict.fromkeys((*getattr(self, name), *getattr(other, name))),) for name in ("columns", "remarks")
        )
        return LeftOut(rows=rows, columns=columns, remarks=remarks)

    def taken_from(self, answer: duckdb.DuckDBPyRelation) -> duckdb.DuckDBPyRelation:
        """Returns the rest of the answer, in its order."""
        for column, values in self.rows.items():
            quoted = ", ".join(f"'{value}'" for value in values)
            answer = answer.filter(f"{column} not in ({quoted})")
        if self.columns:
            answer = answer.select(f"* exclude ({', '.join(self.columns)})")
        return answer


def left_out(query: Needing, values: Mapping[str, Any], lacks: Iterable[str], source: str) -> LeftOut | None:
    """Returns what a run cannot answer of a query; None if it can answer all.

    Args:
        query: the query.
        values: its parameters.
        lacks: what the run does not have.
        source: what it was imported from, for messages.

    Raises:
        ValueError: the query needs what the run lacks for all of its answer.
    """
    missing = [need for need in query.needs if need.what in set(lacks)]
    if not missing:
        return None
    for need in missing:
        if need.place is None or (need.place in values and str(values[need.place]) in need.names):
            told = "" if need.place is None else f" with --{need.place} {values[need.place]}"
            raise ValueError(f"{query.name}{told} cannot be answered: {_reason([need.what], source)}")
    rows = {place: _named(missing, place) for place in _ROWS if _named(missing, place)}
    if "metric" in rows and {*_METRIC.findall(query.sql), *_named(query.needs, "metric")} <= {*rows["metric"]}:
        needed = [need.what for need in missing if need.place == "metric"]
        raise ValueError(f"{query.name} cannot be answered: {_reason(needed, source)}")
    names = dict.fromkeys(name for need in missing if need.place not in values for name in need.names)
    needed = [need.what for need in missing if need.place not in values]
    remarks = (f"left out: {', '.join(names)}; {_reason(needed, source)}",) if names else ()
    return LeftOut(rows=rows, columns=_named(missing, "column"), remarks=remarks)


def _named(needs: Sequence[Need], place: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for need in needs if need.place == place for name in need.names))


def _reason(needed: Sequence[str], source: str) -> str:
    told = [_NAMES[what] for what in dict.fromkeys(needed)]
    listed = " and ".join(filter(None, (", ".join(told[:-1]), told[-1])))
    return f"{listed} are not in a dump of {source}, from which the run was imported"
