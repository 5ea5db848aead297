"""Compares labels within strata of tokens or documents that they share: `--match position,token_class`.

Labels differ in more than what a question is about. Documents of one language are longer, another has more digits, and
a router that looks at positions or at digits then seems to prefer a language. A matched run weighs tokens so that all
labels have the same mix: a stratum counts as often as in the label that has the fewest tokens there, and not at all
where one has none (`queries/macros/stratum_weights.sql`). All labels then have the same number of tokens, too, and so
the same bias.

Strata are groupings of `queries/groupings/`, crossed. The views of a matched run's strata, whose labels are pairs of a
label and a stratum, are in a schema of their own; the relations of `queries/matched/` weigh their sums, and stand in
for the views of the same name when a query runs.

Guarantees: label-level queries alone are answered, and every other one is refused; only the labels that a query
compares decide which strata are shared.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Protocol

from collector.query.catalog import LABEL_SUMS, find_query, label_level_names, query_folder
from collector.query.groupings import LABEL, Grouping, find_grouping, reads_of

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import duckdb
    import pyarrow as pa

    from collector.query.catalog import Query, Value

SEPARATOR = "\x1f"
"""Between a label and its stratum: the unit separator of ASCII."""
_TOLD = 6
"""Labels that a remark names."""
_SHARES = """-- Reads: {relation}
with first_layers as (
    select stack, min(layer) as layer
    from filtered('{relation}', $stack, $layer, null, true)
    group by stack
),

cells as (
    select
        weights.*,
        count(distinct stratum) over (partition by stack) as strata,
        count(*) over (partition by stack, stratum) = 1 as is_alone
    from stratum_weights('{relation}', $stack, $layer, $labels, $include_special) as weights
    where (stack, layer) in (from first_layers) or layer is null
)

select
    stack,
    label,
    sum(tokens)::bigint as tokens,
    coalesce(sum(tokens) filter (where not is_shared), 0)::bigint as unmatched,
    coalesce(sum(least) filter (where is_shared), 0)::bigint as matched,
    coalesce(sum(tokens) filter (where is_alone), 0)::bigint as alone,
    count_if(is_shared) as shared,
    any_value(strata) as strata
from cells
group by stack, label
order by unmatched / sum(tokens) desc, label, stack
"""


class Opened(Protocol):
    """What is needed of `warehouse.Run`."""

    def cursor(self) -> duckdb.DuckDBPyConnection:
        """Opens a connection that finds the run's views."""

    def require(self, query: Query) -> None:
        """Checks that the run has what a query reads."""

    def answer(self, query: Query, values: Mapping[str, Value]) -> duckdb.DuckDBPyRelation:
        """Runs a query."""


def find_strata(match: str | Sequence[str] | None, by: str) -> list[Grouping]:
    """Returns the groupings to match labels on.

    Args:
        match: names of groupings, or a text of names separated by commas.
        by: what `label` means.

    Raises:
        ValueError: there is no such grouping, or labels are what they would be matched on.
    """
    names = match.split(",") if isinstance(match, str) else [*(match or ())]
    names = [*dict.fromkeys(name.strip() for name in names if name.strip())]
    if by in names or LABEL in names:
        raise ValueError(f"labels cannot be matched on themselves: --by {by} --match {','.join(names)}")
    found = [find_grouping(name) for name in names]
    return [dataclasses.replace(one, option="--match") for one in found if one is not None]


def crossed(by: Grouping | None, strata: Sequence[Grouping]) -> Grouping:
    """Returns the grouping by label and stratum; it groups documents if `by` and all `strata` do, else tokens."""
    parts = [*([] if by is None else [by]), *strata]
    # Every token and document has a stratum; DuckDB may take inner joins in another order, by shards alone.
    joins = "\n".join(
        f"left join (\n{part.sql}\n) as part_{place} using (shard, {'tok' if part.of == 'token' else 'doc'})"
        for place, part in enumerate(parts)
    )
    label, *names = ["documents.label"] * (by is None) + [f"part_{place}.label" for place in range(len(parts))]
    pair = f"{label} || chr({ord(SEPARATOR)}) || concat_ws(' × ', {', '.join(names)}) as label"
    reads = {name for part in parts for name in reads_of(part.sql)}
    if any(part.of == "token" for part in parts):
        of, reads = "token", reads - {"recorded_documents"} | {"tokens", "documents"}
        # Groupings of documents read them under the name that they have where documents are grouped.
        select = (
            "with recorded_documents as (\n    select *\n    from documents\n)\n\n"
            f"select tokens.shard, tokens.tok, {pair}\nfrom tokens\nleft join documents using (shard, doc)\n{joins}"
        )
    else:
        of, reads = "document", reads | {"recorded_documents"}
        select = f"select documents.shard, documents.doc, {pair}\nfrom recorded_documents as documents\n{joins}"
    name = ",".join(part.name for part in strata)
    question = f"Which label, and which stratum of {name}?"
    return Grouping(
        name=name, question=question, of=of, option="--match",
        needs=tuple(dict.fromkeys(need for part in parts for need in part.needs)),
        sql=f"-- Question: {question}\n-- Groups: {of}s\n-- Reads: {', '.join(sorted(reads))}\n{select}",
    )  # fmt: skip


def compared(run: Opened, values: Mapping[str, Value]) -> list[str] | None:
    """Returns the labels that a query compares, None for all: those that it is asked about, and its reference.

    Args:
        run: the run.
        values: the query's parameters.
    """
    labels, reference = values.get("labels"), values.get("reference")
    if not isinstance(labels, list) or "reference" not in values:
        return labels if isinstance(labels, list) else None
    if reference is None:
        largest = "select label from labels order by tokens desc, label limit 1"
        (reference,) = run.cursor().sql(largest).fetchall()[0]
    return [*labels, str(reference)]


class Matching:
    """Weighs the sums by label of a run so that all labels have the same mix of strata."""

    def __init__(self, name: str, run: Opened, strata: Opened) -> None:
        self.run = run
        """The run, with its labels."""
        self.name = name
        """Names of the groupings, separated by commas."""
        self.strata = strata
        """The same run, whose labels are a label and a stratum, with `SEPARATOR` between them."""

    def check(self, query: Query) -> None:
        """Checks that a query can be matched.

        Raises:
            ValueError: it does not follow from sums by label, or these are not known by stratum.
        """
        if not query.is_label_level:
            raise ValueError(
                f"{query.name} reads {', '.join(query.reads)}, and --match weighs the sums in "
                f"{', '.join(sorted(LABEL_SUMS))} alone; queries that follow from these are {label_level_names()}"
            )
        self.strata.require(query)

    def provide(self, cursor: duckdb.DuckDBPyConnection, query: Query, values: Mapping[str, Value]) -> None:
        """Makes the weighted sums that a query reads visible to the cursor on which it will run.

        Args:
            cursor: where the query will run.
            query: the query.
            values: its parameters.

        Raises:
            ValueError: the labels share no stratum.
        """
        for name in sorted(LABEL_SUMS & {*query.reads}):
            sums = self._sums(name, query, values)
            if not sums.num_rows and (told := self._shares(query, values)):
                labels = len({row["label"] for row in told})
                raise ValueError(
                    f"no stratum of {self.name} has tokens of all {labels} labels: compare fewer with --labels, or "
                    "match on less"
                )
            cursor.register(name, sums)

    def remarks(self, query: Query, values: Mapping[str, Value]) -> list[str]:
        """Returns how much of each label's text was matched."""
        rows = self._shares(query, values)
        told: list[str] = []
        for stack in dict.fromkeys(row["stack"] for row in rows):
            own = [row for row in rows if row["stack"] == stack]
            unmatched = [f"{row['unmatched'] / row['tokens']:.1%} of {row['label']}" for row in own if row["unmatched"]]
            more = f" and less of {len(unmatched) - _TOLD} more" if len(unmatched) > _TOLD else ""
            where = f" of the {stack}" if len({row["stack"] for row in rows}) > 1 else ""
            none = f"; without a match: {', '.join(unmatched[:_TOLD])}{more}" if unmatched else ""
            told.append(
                f"matched on {self.name}{where}: {len(own)} labels share {own[0]['shared']} of {own[0]['strata']} "
                f"strata and count as {own[0]['matched']:,} tokens each{none}"
            )
        return told

    def test_remarks(self, values: Mapping[str, Value]) -> list[str]:
        """Returns how much of the text a test of each label against the others leaves out, because no other has it.

        Args:
            values: stack, layer, labels and include_special, as parameters of queries.
        """
        rows = self._shares(find_query("domain_specialization"), values)
        alone, tokens = (sum(row[name] for row in rows) for name in ("alone", "tokens"))
        return [
            f"matched on {self.name}: {alone / max(tokens, 1):.1%} of the tokens are in strata of one label alone, and "
            "are left out"
        ]

    def _sums(self, name: str, query: Query, values: Mapping[str, Value]) -> pa.Table:
        return self._ask((query_folder() / "matched" / f"{name}.sql").read_text(encoding="utf-8"), query, values)

    def _shares(self, query: Query, values: Mapping[str, Value]) -> list[dict[str, Any]]:
        """Returns for each label and stack how many tokens there are, have no match, and count, by the first layer."""
        relation = "label_losses" if "label_losses" in query.reads else "label_tokens"
        return self._ask(_SHARES.format(relation=relation), query, values).to_pylist()

    def _ask(self, sql: str, query: Query, values: Mapping[str, Value]) -> pa.Table:
        params = {name: values.get(name) for name in ("stack", "layer")}
        params |= {"labels": compared(self.run, values), "include_special": values["include_special"]}
        return self.strata.answer(dataclasses.replace(query, reads=reads_of(sql), sql=sql), params).to_arrow_table()
