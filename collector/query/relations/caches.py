"""Gives queries the relation `cache_hits`: how many of a token's experts a small cache of each layer would hold.

A layer's cache holds the c experts that were used last. A token looks up its k experts at once, before any of them is
loaded; then these are the ones used last, among them the later in the model's own order. Each document starts with an
empty cache. Tokens that are left out (special ones, those that an engine lost) do not touch it. The same is counted
with the tokens of each document in a random order, which is the same in all layers.

The cache before token t thus holds the experts of as many tokens before t as have c together, and of the one before
these the last used, up to c. How many tokens these are is found for all t at once, by doubling: a set of experts is a
string of bits, and the union over 2^j tokens is that of two unions over 2^(j - 1).

Guarantees: memory holds one layer of a portion of the shards; time grows with the tokens, times the logarithm of a
document's length at most. The random order of a document depends on the seed, its id and its length alone.

Axes: T tokens in their order; S shards; K picks of a token; W words of 64 bits, in which a set has a bit per expert.
"""

from __future__ import annotations

import dataclasses
import itertools
import zlib
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from collector.query.numbering import LABEL_PLACES, Places, recorded_labels, shards
from collector.store import tables

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import duckdb
    from numpy.typing import NDArray

    from collector.query.catalog import Value
    from collector.store.tables import Layer

NAME = "cache_hits"
_PORTION = 2_000_000
"""Tokens of a portion, unless a single shard has more."""
_BLOCK = 32_000
"""Tokens that are worked on at a time, so that their sets fit the processor's cache, unless a document has more."""
_DOCUMENT = "(shard::bigint << 32) + doc as document"
_IDS = f"select {_DOCUMENT}, doc_id from documents where shard between $first and $last order by document"
_DOCUMENTS = f"""
select shard, tok, {_DOCUMENT}
from tokens
where stack = $stack and shard between $first and $last and ($include_special or not is_special)
"""
_LABELS = f"""
select shard, tok, coalesce(place, 0)::bigint - 1 as label
from routing
left join {LABEL_PLACES} using (label)
where stack = $stack and layer = $layer and shard between $first and $last
"""
_PICKS = """
select shard, tok, {picks}
from routing
where stack = $stack and layer = $layer and shard between $first and $last
"""
_SCHEMA = pa.schema(
    [
        ("asked_cache", pa.int32()), ("warm_up", pa.int32()), ("seed", pa.int32()), ("stack", pa.string()),
        ("layer", pa.uint8()), ("label", pa.string()), ("is_special", pa.bool_()), ("cache", pa.int64()),
        ("picks", pa.int64()), ("hits", pa.int64()), ("first_uses", pa.int64()), ("shuffled_picks", pa.int64()),
        ("shuffled_hits", pa.int64()),
    ]
)  # fmt: skip
_COUNTS = ("picks", "hits", "first_uses", "shuffled_picks", "shuffled_hits")


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Portion:
    """The tokens of some shards that a cache sees, in their order."""

    where: dict[str, int]
    """Numbers of the first and the last shard."""
    places: Places
    place_T: NDArray[np.int64]
    age_T: NDArray[np.int64]
    """Tokens of the document before this one."""
    label_T: NDArray[np.int64]
    shuffled_T: NDArray[np.int64]
    """Which of the T tokens stands here in the random order."""

    def blocks(self) -> Iterator[slice]:
        """Yields runs of whole documents."""
        start_D = np.flatnonzero(self.age_T == 0)
        block_D = start_D // _BLOCK
        first_B = start_D[np.flatnonzero(np.diff(block_D, prepend=-1))].tolist()
        for first, last in itertools.pairwise([*first_B, len(self.age_T)]):
            yield slice(first, last)


def rows(cursor: duckdb.DuckDBPyConnection, layers: Sequence[Layer], values: Mapping[str, Value]) -> pa.Table:
    """Computes the rows.

    Args:
        cursor: where the query will run.
        layers: the run's routers.
        values: the query's parameters: cache, the experts that it holds (null: 2 k); warm_up, the first tokens of a
            document that are not counted; seed of the random orders; and stack, layer, labels and include_special as
            usual.
    """
    names = recorded_labels(cursor)
    asked = tables.asked_layers(layers, values)
    counts = {one: np.zeros((len(_COUNTS), len(names)), np.int64) for one in asked}
    for numbers, tokens in _portions(*shards(cursor)):
        for stack in dict.fromkeys(one.token_stack for one in asked):
            own = [one for one in asked if one.token_stack == stack]
            portion = _portion(cursor, numbers, tokens, own[0], names, values)
            for one in own:
                counts[one] += _count(cursor, portion, one, len(names), values)
    given = {"asked_cache": values["cache"], "warm_up": values["warm_up"], "seed": values["seed"], "is_special": False}
    found = [
        {
            **given, "stack": one.stack, "layer": one.layer, "label": name, "cache": _capacity(one, values),
            **dict(zip(_COUNTS, column.tolist(), strict=True)),
        }
        for one, counts_NL in counts.items()
        for name, column in zip(names, counts_NL.T, strict=True)
    ]  # fmt: skip
    return pa.Table.from_pylist(found, schema=_SCHEMA)


def _capacity(layer: Layer, values: Mapping[str, Value]) -> int:
    return 2 * layer.top_k if values["cache"] is None else int(values["cache"])  # type: ignore[arg-type]


def _portions(
    shard_S: NDArray[np.int64], tokens_S: NDArray[np.int64]
) -> Iterator[tuple[NDArray[np.int64], NDArray[np.int64]]]:
    """Yields runs of shards, with their tokens."""
    portion_S = np.cumsum(tokens_S) // _PORTION
    for number in np.unique(portion_S):
        yield shard_S[portion_S == number], tokens_S[portion_S == number]


def _portion(
    cursor: duckdb.DuckDBPyConnection, shard_S: NDArray[np.int64], tokens_S: NDArray[np.int64], layer: Layer,
    names: Sequence[str], values: Mapping[str, Value],
) -> _Portion:  # fmt: skip
    """Finds the tokens of the documents that have a label asked for, with those that they have at this layer."""
    places, where = Places(shard_S, tokens_S), {"first": int(shard_S[0]), "last": int(shard_S[-1])}
    chosen = {**where, "stack": layer.token_stack, "include_special": values["include_special"]}
    document_T = places.column(cursor.sql(_DOCUMENTS, params=chosen), np.int64, -1)
    of_layer = {**where, "stack": layer.stack, "layer": layer.layer, "names": list(names)}
    label_T = places.column(cursor.sql(_LABELS, params=of_layer), np.int64, -1)
    kept_T = document_T >= 0
    if values["labels"] is not None:  # labels may be groups of tokens, and a cache sees all of the document
        own_T = np.isin(label_T, [names.index(label) for label in values["labels"]])  # type: ignore[union-attr]
        kept_T &= np.isin(document_T, np.unique(document_T[own_T]))
    place_T = np.flatnonzero(kept_T)
    document_D, start_D, length_D = np.unique(document_T[place_T], return_index=True, return_counts=True)
    age_T = np.arange(len(place_T)) - np.repeat(start_D, length_D)
    named, seed = cursor.sql(_IDS, params=where).fetchnumpy(), int(values["seed"])  # type: ignore[arg-type]
    ids = named["doc_id"][np.searchsorted(named["document"], document_D)].tolist()
    orders = (
        np.random.default_rng([seed, zlib.crc32(name.encode())]).permutation(length)
        for name, length in zip(ids, length_D.tolist(), strict=True)
    )
    shuffled_T = np.concatenate([np.empty(0, np.int64), *orders]) + np.repeat(start_D, length_D)
    return _Portion(
        where=where, places=places, place_T=place_T, age_T=age_T, label_T=label_T[place_T], shuffled_T=shuffled_T
    )


def _count(
    cursor: duckdb.DuckDBPyConnection, portion: _Portion, layer: Layer, labels: int, values: Mapping[str, Value]
) -> NDArray[np.int64]:
    """Returns the counts of a layer by label, in the order of `_COUNTS`."""
    where = {**portion.where, "stack": layer.stack, "layer": layer.layer}
    select = _PICKS.format(picks=", ".join(f"e{pick}::usmallint" for pick in range(layer.top_k)))
    pick_TK = np.empty((portion.places.tokens, layer.top_k), np.uint16)
    for place_t, picks_t in portion.places.batches(cursor.sql(select, params=where)):
        for pick, pick_t in enumerate(picks_t):
            pick_TK[place_t, pick] = pick_t
    pick_TK = pick_TK[portion.place_T]
    counts_NL, cache = np.zeros((len(_COUNTS), labels), np.int64), _capacity(layer, values)
    for block in portion.blocks():
        age_T, label_T = portion.age_T[block], portion.label_T[block]
        shuffled_T = portion.shuffled_T[block] - block.start
        block_TK = pick_TK[block]
        set_WT = sets(block_TK, layer.n_experts)
        shuffled_WT, shuffled_TK = set_WT.take(shuffled_T, axis=1), block_TK.take(shuffled_T, axis=0)
        counted_T = age_T >= values["warm_up"]  # type: ignore[operator]
        one_T, shuffled_label_T = np.full(len(age_T), layer.top_k), label_T[shuffled_T]
        for row, (of_T, number_T) in enumerate((
            (label_T, one_T),
            (label_T, hits(set_WT, block_TK, age_T, cache)),
            (label_T, first_uses(set_WT, age_T)),
            (shuffled_label_T, one_T),
            (shuffled_label_T, hits(shuffled_WT, shuffled_TK, age_T, cache)),
        )):  # fmt: skip
            summed = np.bincount(of_T[counted_T], number_T[counted_T], minlength=labels)
            counts_NL[row] += summed.astype(np.int64)
    return counts_NL


def sets(pick_TK: NDArray[np.integer], experts: int) -> NDArray[np.uint64]:
    """Returns the set of each token's experts, [W, T]."""
    words = -(-experts // 64)
    set_WT = np.zeros((words, len(pick_TK)), np.uint64)
    for pick_T in pick_TK.T:
        bit_T = _bit(pick_T)
        for word in range(words):
            set_WT[word] |= bit_T if words == 1 else np.where(pick_T >> 6 == word, bit_T, np.uint64(0))
    return set_WT


def first_uses(set_WT: NDArray[np.uint64], age_T: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns how many experts of each token no token of its document used before, [T]."""
    union_WT, length, longest = set_WT.copy(), 1, age_T.max(initial=0)
    while length <= longest:  # union over the 2^j tokens up to each, or as many as the document has
        union_WT[:, length:] |= np.where(age_T[length:] >= length, union_WT[:, :-length], np.uint64(0))
        length *= 2
    new_WT = set_WT.copy()
    new_WT[:, 1:] &= np.where(age_T[1:] > 0, ~union_WT[:, :-1], ~np.uint64(0))
    return _size(new_WT)


def hits(
    set_WT: NDArray[np.uint64], pick_TK: NDArray[np.integer], age_T: NDArray[np.int64], cache: int
) -> NDArray[np.int64]:
    """Returns how many of each token's experts are in the cache before it, [T].

    Args:
        set_WT: the sets of their experts, see `sets`.
        pick_TK: the experts, in the model's own order.
        age_T: tokens of the document before each; documents are whole.
        cache: experts that the cache holds, 1 at least.
    """
    first_T = np.arange(len(age_T)) - age_T
    unions_WT, fits_T = _unions(set_WT, age_T, cache)
    cached_WT, back_T = np.zeros_like(set_WT), np.arange(len(age_T))  # from back on, the tokens before fit whole
    for union_WT, fit_T, length in reversed([*zip(unions_WT, fits_T, (1 << j for j in range(64)), strict=False)]):
        open_T = np.flatnonzero(back_T > first_T)
        last_T = back_T.take(open_T) - 1
        possible = fit_T.take(last_T)
        open_T, last_T = open_T[possible], last_T[possible]
        longer_WT = cached_WT.take(open_T, axis=1) | union_WT.take(last_T, axis=1)
        fits = _size(longer_WT) <= cache
        open_T = open_T[fits]
        cached_WT[:, open_T] = longer_WT[:, fits]
        back_T[open_T] -= length
    _fill(cached_WT, pick_TK, back_T, np.flatnonzero(back_T > first_T), cache)
    return _size(cached_WT & set_WT)


def _bit(expert_T: NDArray[np.integer]) -> NDArray[np.uint64]:
    return np.uint64(1) << (expert_T & 63).astype(np.uint64)


def _size(set_WT: NDArray[np.uint64]) -> NDArray[np.int64]:
    return np.bitwise_count(set_WT).sum(axis=0, dtype=np.int64)


def _unions(
    set_WT: NDArray[np.uint64], age_T: NDArray[np.int64], cache: int
) -> tuple[list[NDArray[np.uint64]], list[NDArray[np.bool_]]]:
    """Returns the unions over the 2^j tokens up to each, and whether there are as many, with `cache` experts at most.

    For j from 0 on, as long as there are any.
    """
    unions_WT, fits_T, union_WT, length = [], [], set_WT, 1
    while (fits := (age_T >= length - 1) & (_size(union_WT) <= cache)).any():
        unions_WT.append(union_WT)
        fits_T.append(fits)
        union_WT = union_WT.copy()
        union_WT[:, length:] |= unions_WT[-1][:, :-length]
        length *= 2
    return unions_WT, fits_T


def _fill(
    cached_WT: NDArray[np.uint64], pick_TK: NDArray[np.integer], back_T: NDArray[np.int64], open_T: NDArray[np.int64],
    cache: int,
) -> None:  # fmt: skip
    """Adds as many experts as there is room for of the token before those that fit whole, the last of its order."""
    room_T = cache - _size(cached_WT.take(open_T, axis=1))
    open_T, room_T = open_T[room_T > 0], room_T[room_T > 0]
    token_T, held_WT = back_T.take(open_T) - 1, cached_WT.take(open_T, axis=1)
    column_T = np.arange(len(open_T))
    for pick_T in pick_TK.take(token_T, axis=0).T[::-1]:
        word_T, bit_T = pick_T >> 6, _bit(pick_T)
        old_T = held_WT[word_T, column_T]
        added_T = ((old_T & bit_T) == 0) & (room_T > 0)
        held_WT[word_T, column_T] = np.where(added_T, old_T | bit_T, old_T)
        room_T -= added_T
    cached_WT[:, open_T] = held_WT
