"""Counts the choices of each router per document, as arrays for the resampling of documents.

The counts come from the view `document_counts`, and so from the run's rollup if there is a current one; what experts
put out comes from `document_outputs`, and losses, which no router has, from `document_losses`. Guarantees: one router
is in memory at a time; documents come in the order of the run, and only those with tokens to count.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from collector.query.matching import SEPARATOR
from collector.query.rollup import counting
from collector.query.rollup import files as rollups
from collector.store import tables

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    import duckdb
    from numpy.typing import NDArray

    from collector.query.warehouse import Run
    from collector.store.tables import Layer

STATISTICS = (*rollups.STATISTICS, "dropped_picks", "dropped_tokens")
"""Columns of the views `document_counts` and `label_statistics` that are sums over tokens, besides `tokens`."""
LOSSES = ("nats", "whole_nats", "characters")
"""Columns of the views `document_losses` and `label_losses` that are sums over tokens, besides `tokens`."""
OUTPUTS = {
    "picks": "picks", "weight_sum": "weight_sums", "norm": "norms", "squared_norm": "squared_norms",
    "weighted_norm": "weighted_norms", "squared_weighted_norm": "squared_weighted_norms",
    "contribution": "contributions",
}  # fmt: skip
"""Column of the view `label_outputs` -> list of the view `document_outputs` that it sums."""
_ROWS = f"""
select shard, doc, label, tokens, {", ".join(STATISTICS)}, experts, picks, top1, weight_sums
from document_counts
where stack = $stack and layer = $layer
    and ($labels is null or list_contains($labels, split_part(label, chr(31), 1)))
    and ($include_special or not is_special)
order by shard, doc, label, is_special
"""
_GROUPS = """
select shard, tok, doc, label
from labelled_tokens
where ($labels is null or list_contains($labels, split_part(label, chr(31), 1)))
    and ($include_special or not is_special)
order by shard, tok
"""
_EMPTY = rollups.SCHEMAS[rollups.DOCUMENTS].empty_table().append_column("label", pa.array([], pa.string()))
_BATCH = 100_000
"""Rows of a router that are read at a time."""
_OUTPUT_ROWS = f"""
select shard, doc, experts, {", ".join(OUTPUTS.values())}
from document_outputs
where stack = $stack and layer = $layer
    and ($labels is null or list_contains($labels, split_part(label, chr(31), 1)))
    and ($include_special or not is_special)
"""
_LOSS_ROWS = """
select shard, doc, label, stack, sum(tokens)::bigint as tokens, sum(nats) as nats, sum(whole_nats) as whole_nats,
    sum(characters)::double as characters
from document_losses
where ($labels is null or list_contains($labels, split_part(label, chr(31), 1)))
    and ($include_special or not is_special)
group by shard, doc, label, stack
order by shard, doc, label
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentCounts:
    """Counts of one router for a run's documents. D documents with tokens there, E experts, M `STATISTICS`.

    A document with several labels has one row, under its labels joined. If labels are groups of tokens (for example
    with `by="position"`), a document has a row for each group of its tokens: rows with the same `shard_D` and `doc_D`
    belong together. If labels are matched, it has a row for each of its strata, with the same label.
    """

    stack: str
    layer: int
    n_experts: int
    """Number of experts, E."""
    top_k: int
    labels: tuple[str, ...]
    """The recorded labels, sorted; that of a document with several labels is these, joined by `LABEL_SEPARATOR`."""
    label_D: NDArray[np.int64]
    """Index into `labels`."""
    shard_D: NDArray[np.int64]
    doc_D: NDArray[np.int64]
    """The document's number in its shard."""
    tokens_D: NDArray[np.int64]
    statistics_DM: NDArray[np.float64]
    """Sums over the document's tokens, in the order of `STATISTICS`."""
    picks_DE: NDArray[np.uint32]
    """How often each expert was chosen, dropped or not; a row sums to k times its tokens."""
    top1_DE: NDArray[np.uint32]
    """For how many tokens each expert has the highest weight; a row sums to its tokens. 0 where an imported run has no
    weights."""
    weight_sum_DE: NDArray[np.float32]
    """Sum of the weights that the model applied. NaN for the chosen where an imported run has no weights."""
    statistics: tuple[str, ...] = STATISTICS
    """Names of the columns of `statistics_DM`."""
    outputs_ODE: NDArray[np.float32] | None = None
    """Sums over what each expert put out, in the order of `OUTPUTS`, if they were asked for."""
    strata: tuple[str, ...] = ()
    """The G strata that labels are matched on, sorted; none if they are not."""
    stratum_D: NDArray[np.int64] | None = None
    """Index into `strata`, if labels are matched: a document then has a row for each stratum."""
    expected_DE: NDArray[np.float64] | None = None
    """Picks that the strata of each document's tokens let expect, if they were asked for (see `standardization`)."""

    def of(self, kept: NDArray[np.bool_]) -> DocumentCounts:
        """Returns the counts of some documents; `kept` is [D]."""
        rows = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        rows = {name: values for name, values in rows.items() if values is not None}
        some = {name: values[kept] for name, values in rows.items() if name.endswith(("_D", "_DE", "_DM"))}
        outputs = None if self.outputs_ODE is None else self.outputs_ODE[:, kept]
        return dataclasses.replace(self, **some, outputs_ODE=outputs)


def document_counts(
    run: Run,
    *,
    stack: str | None = None,
    layer: int | None = None,
    labels: Sequence[str] | None = None,
    include_special: bool = False,
    outputs: bool = False,
) -> Iterator[DocumentCounts]:
    """Yields the counts of a run's documents, router by router; skips routers without tokens to count.

    Args:
        run: the run.
        stack: only the routers of this stack.
        layer: only this layer, numbered as in the model.
        labels: only documents with these labels.
        include_special: also count the special tokens that the tokenizer adds.
        outputs: also sum what the experts put out; labels are then those of whole documents.

    Raises:
        ValueError: a stack, layer or label that the run does not have.
    """
    chosen = None if labels is None else list(labels)
    run.check(stack=stack, layer=layer, labels=chosen)
    params = {"labels": None if chosen is None else run.with_sets(chosen), "include_special": include_special}
    by_token = None if run.has_rollup else _Counting(run, params)
    for router in tables.asked_layers(tables.recorded_layers(run.info), {"stack": stack, "layer": layer}):
        where: dict[str, Any] = {"stack": router.stack, "layer": router.layer}
        if by_token is None:
            rows = _counted(run).sql(_ROWS, params={**where, **params}).to_arrow_table()
        else:
            rows = by_token.count(router)
        if rows.num_rows:
            counts = _dense(rows, n_experts=router.n_experts, top_k=router.top_k, **where)
            if outputs:
                of_experts = _counted(run).sql(_OUTPUT_ROWS, params={**where, **params}).to_arrow_table()
                counts = dataclasses.replace(counts, outputs_ODE=_outputs(counts, of_experts))
            yield counts if run.matching is None else _by_stratum(counts)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Groups:
    """Groups of the tokens of one shard: those of a document with the same label. g groups."""

    of_tok: NDArray[np.int32]
    """Group of each token by its number; -1 for those that do not count."""
    doc_g: NDArray[np.int64]
    label_g: pa.Array


class _Counting:
    """Counts a run without a rollup by document and label, as the view `document_counts` does in SQL, but in numpy.

    Memory holds 4 bytes per token, and the rows of one shard and router.
    """

    def __init__(self, run: Run, params: Mapping[str, object]) -> None:
        """Groups the tokens to count; `params` are those of `_GROUPS`."""
        self._run, self._lacks = run, tuple(run.lacks)
        tokens = _counted(run).sql(_GROUPS, params=params)
        self._groups = {shard: _groups(rows) for shard, rows in _by_shard(tokens.to_arrow_reader(_BATCH))}

    def count(self, router: Layer) -> pa.Table:
        """Returns the rows of a router, of the columns of `_ROWS` in its order."""
        columns = ", ".join(counting.columns_of(router, self._lacks))
        found = self._run.cursor().sql(
            f"select shard, tok, {columns} from {self._run.base('routing')} where stack = $stack and layer = $layer",
            params={"stack": router.stack, "layer": router.layer},
        )
        counted = [self._of_shard(shard, router, rows) for shard, rows in _by_shard(found.to_arrow_reader(_BATCH))]
        whole = pa.concat_tables([_EMPTY, *filter(None, counted)])
        return whole.sort_by([(name, "ascending") for name in ("shard", "doc", "label", "is_special")])

    def _of_shard(self, shard: int, router: Layer, rows: pa.Table) -> pa.Table | None:
        if shard not in self._groups:
            return None
        groups, tok_t = self._groups[shard], rows["tok"].to_numpy()
        group_t = np.where(tok_t < len(groups.of_tok), groups.of_tok[np.minimum(tok_t, len(groups.of_tok) - 1)], -1)
        rows, group_t = rows.filter(group_t >= 0), group_t[group_t >= 0].astype(np.int64)
        table = counting.count_rows(shard, router, rows, group_t, self._lacks).table()
        group = table["doc"].to_numpy()
        doc = pa.array(groups.doc_g[group], pa.uint32())
        table = table.set_column(table.column_names.index("doc"), "doc", doc)
        table = table.append_column("label", groups.label_g.take(pa.array(group)))
        return table.select(_EMPTY.column_names).cast(_EMPTY.schema)


def _groups(tokens: pa.Table) -> _Groups:
    label = tokens["label"].combine_chunks().dictionary_encode()
    tok_t, doc_t = (tokens[name].to_numpy().astype(np.int64) for name in ("tok", "doc"))
    pair_t = doc_t * len(label.dictionary) + label.indices.to_numpy()
    pair_g, group_t = np.unique(pair_t, return_inverse=True)
    doc_g, label_g = np.divmod(pair_g, len(label.dictionary))
    of_tok = np.full(int(tok_t.max()) + 1, -1, np.int32)
    of_tok[tok_t] = group_t
    return _Groups(of_tok=of_tok, doc_g=doc_g, label_g=label.dictionary.take(pa.array(label_g)))


def _by_shard(batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[int, pa.Table]]:
    """Joins batches to one table for each shard, whose rows are recorded together."""
    open_shard = -1
    parts: list[pa.RecordBatch] = []
    for batch in batches:
        shard_t = batch["shard"].to_numpy()
        starts = np.flatnonzero(np.append(True, shard_t[1:] != shard_t[:-1])).tolist()
        for start, end in itertools.pairwise([*starts, len(shard_t)]):
            if shard_t[start] != open_shard:
                if parts:
                    yield open_shard, pa.Table.from_batches(parts)
                open_shard, parts = int(shard_t[start]), []
            parts.append(batch.slice(start, end - start))
    if parts:
        yield open_shard, pa.Table.from_batches(parts)


def document_losses(
    run: Run, *, labels: Sequence[str] | None = None, include_special: bool = False
) -> Iterator[DocumentCounts]:
    """Yields the losses of a run's documents as those of one router without experts, if there are any.

    Args:
        run: the run.
        labels: only documents with these labels.
        include_special: also count the special tokens that the tokenizer adds.

    Raises:
        ValueError: a label that the run does not have.
    """
    chosen = None if labels is None else list(labels)
    run.check(labels=chosen)
    params = {"labels": None if chosen is None else run.with_sets(chosen), "include_special": include_special}
    rows = _counted(run).sql(_LOSS_ROWS, params=params).to_arrow_table()
    if not rows.num_rows:
        return
    names, label = np.unique(rows["label"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
    none = np.zeros((rows.num_rows, 0))
    counts = DocumentCounts(
        stack=rows["stack"][0].as_py(), layer=0, n_experts=0, top_k=0, labels=tuple(names.tolist()), label_D=label,
        shard_D=rows["shard"].to_numpy().astype(np.int64), doc_D=rows["doc"].to_numpy().astype(np.int64),
        tokens_D=rows["tokens"].to_numpy(), statistics=LOSSES,
        statistics_DM=np.stack([rows[name].to_numpy() for name in LOSSES], axis=1),
        picks_DE=none.astype(np.uint32), top1_DE=none.astype(np.uint32), weight_sum_DE=none.astype(np.float32),
    )  # fmt: skip
    yield counts if run.matching is None else _by_stratum(counts)


def _counted(run: Run) -> duckdb.DuckDBPyConnection:
    """Returns a cursor to the views that count documents: by stratum, if labels are matched."""
    return run.cursor() if run.matching is None else run.matching.strata.cursor()


def _by_stratum(counts: DocumentCounts) -> DocumentCounts:
    """Divides labels into a label and a stratum."""
    pairs = [name.split(SEPARATOR) for name in counts.labels]
    labels, label = np.unique([label for label, _ in pairs], return_inverse=True)
    strata, stratum = np.unique([stratum for _, stratum in pairs], return_inverse=True)
    return dataclasses.replace(
        counts, labels=tuple(labels.tolist()), label_D=label[counts.label_D], strata=tuple(strata.tolist()),
        stratum_D=stratum[counts.label_D],
    )  # fmt: skip


def document_numbers(counts: DocumentCounts) -> NDArray[np.intp]:
    """Returns the number of each row's document, from 0, of shape [D]."""
    names = np.stack([counts.shard_D, counts.doc_D])
    return np.unique(names, axis=1, return_inverse=True)[1].ravel()


def _dense(rows: pa.Table, *, stack: str, layer: int, n_experts: int, top_k: int) -> DocumentCounts:
    """Turns rows in document order into arrays over all experts; adds the separate row of special tokens, if any."""
    shard, doc = rows["shard"].to_numpy().astype(np.int64), rows["doc"].to_numpy().astype(np.int64)
    names, label = np.unique(rows["label"].to_numpy(zero_copy_only=False).astype(str), return_inverse=True)
    keys = np.stack([shard, doc, label], axis=1)
    opens = np.append(True, (keys[1:] != keys[:-1]).any(axis=1))
    document = np.cumsum(opens) - 1
    lists = {name: rows[name].combine_chunks() for name in ("experts", "picks", "top1", "weight_sums")}
    lengths = lists["experts"].value_lengths().to_numpy()
    cells = np.repeat(document, lengths) * n_experts + lists["experts"].flatten().to_numpy()

    def summed(name: str) -> NDArray[np.float64]:
        return np.add.reduceat(rows[name].to_numpy(), np.flatnonzero(opens), dtype=np.float64)

    def spread(name: str, dtype: type[np.uint32 | np.float32]) -> NDArray:
        counts = np.zeros(int(opens.sum()) * n_experts, dtype)
        values = lists[name].flatten()
        if values.null_count:  # of an imported run
            values = values.fill_null(np.nan if pa.types.is_floating(values.type) else 0)
        np.add.at(counts, cells, values.to_numpy())
        return counts.reshape(-1, n_experts)

    return DocumentCounts(
        stack=stack, layer=layer, n_experts=n_experts, top_k=top_k,
        labels=tuple(names.tolist()), label_D=label[opens].astype(np.int64), shard_D=shard[opens], doc_D=doc[opens],
        tokens_D=summed("tokens").astype(np.int64), statistics_DM=np.stack([*map(summed, STATISTICS)], axis=1),
        picks_DE=spread("picks", np.uint32), top1_DE=spread("top1", np.uint32),
        weight_sum_DE=spread("weight_sums", np.float32),
    )  # fmt: skip


def _outputs(counts: DocumentCounts, rows: pa.Table) -> NDArray[np.float32]:
    """Spreads the rows of `document_outputs` over the counted documents and all experts, [O, D, E]."""
    documents, experts = len(counts.doc_D), counts.n_experts
    known = counts.shard_D << 32 | counts.doc_D
    row_d = rows["shard"].to_numpy().astype(np.int64) << 32 | rows["doc"].to_numpy().astype(np.int64)
    ids = rows["experts"].combine_chunks()
    document = np.repeat(np.searchsorted(known, row_d), ids.value_lengths().to_numpy())
    cells = document * experts + ids.flatten().to_numpy()
    summed = np.zeros((len(OUTPUTS), documents * experts), np.float32)
    for values, column in zip(summed, OUTPUTS.values(), strict=True):
        np.add.at(values, cells, rows[column].combine_chunks().flatten().to_numpy())
    return summed.reshape(-1, documents, experts)
