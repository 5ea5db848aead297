"""Gives queries the relation `path_counts`: the paths of tokens through the experts of consecutive layers.

A path is a token's top-1 experts at n consecutive recorded layers of a stack, which are a window. For each window there
is a row for each of its most frequent paths, and one, with `rank` null, of all its paths together.

Purity is the chance that two tokens of a group have the same id: sum over the ids of c (c - 1) / (m (m - 1)) in a group
of m tokens, c of them with an id (Simpson 1949, "Measurement of diversity"). It is averaged over the tokens of groups
of two and more. Its expectation does not depend on the sizes of the groups, so that many small paths compare with few
large experts, and shuffled ids give what all tokens together have. The share of the most frequent id, which is called
purity too, would be larger for small groups even then.

Guarantees: paths and ids are counted as numbers, one window at a time; memory is some 50 bytes for each token of the
run.

Axes: T tokens; E experts of a layer; G groups of tokens, which are paths or experts; C cells, each a group with a token
id that occurs in it.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from collector.query.numbering import Places

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    import duckdb
    from numpy.typing import NDArray

    from collector.query.catalog import Value
    from collector.store.tables import Layer

NAME = "path_counts"
_EXPERTS = """
select shard, tok, expert::usmallint as expert
from filtered('decisions', $stack, $layer, $labels, $include_special)
"""
_IDS = "select shard, tok, coalesce(token_id::integer, -1) as token_id from tokens where stack = $stack"
_NOBODY = np.iinfo(np.uint16).max
"""Expert of a token that does not count."""
_LARGEST = 2**62
"""Limit of the numbers of cells."""
_SCHEMA = pa.schema(
    [
        ("layers", pa.int32()), ("labels", pa.list_(pa.string())), ("include_special", pa.bool_()),
        ("stack", pa.string()), ("layer", pa.uint8()), ("rank", pa.int64()), ("path", pa.string()),
        ("tokens", pa.int64()), ("all_tokens", pa.int64()), ("share", pa.float64()), ("markov_share", pa.float64()),
        ("purity", pa.float64()), ("token_id", pa.int64()), ("token_share", pa.float64()), ("paths", pa.int64()),
        ("same_path", pa.float64()), ("same_markov", pa.float64()), ("expert_purity", pa.float64()),
        ("all_purity", pa.float64()),
    ]
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Router:
    """What is known of one router while its windows are counted."""

    experts: int
    expert_T: NDArray[np.uint16]
    """The top-1 expert of each token, `_NOBODY` for those that do not count."""
    purity: float | None
    """Of its experts; None without ids."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Groups:
    """Groups of tokens by number, ascending."""

    code_G: NDArray[np.int64]
    tokens_G: NDArray[np.int64]
    first_G: NDArray[np.int64]
    """The group's first cell."""
    id_C: NDArray[np.int64] | None
    """None without ids; cells are then groups."""
    tokens_C: NDArray[np.int64]

    @functools.cached_property
    def same_G(self) -> NDArray[np.int64]:
        """Ordered pairs of tokens of a group with the same id."""
        return np.add.reduceat(self.tokens_C * (self.tokens_C - 1), self.first_G)

    def purity(self) -> float | None:
        """Returns the mean over the tokens of groups of two and more; None if there are none, or no ids."""
        several_G = self.tokens_G > 1
        if self.id_C is None or not several_G.any():
            return None
        tokens_G = self.tokens_G[several_G]
        return float((self.same_G[several_G] / (tokens_G - 1)).sum() / tokens_G.sum())

    def top_id(self, group: int) -> tuple[int, int]:
        """Returns the most frequent id of a group, the lowest among equals, and its tokens."""
        assert self.id_C is not None
        end = self.first_G[group + 1] if group + 1 < len(self.first_G) else len(self.tokens_C)
        cell = self.first_G[group] + int(self.tokens_C[self.first_G[group] : end].argmax())
        return int(self.id_C[cell]), int(self.tokens_C[cell])


def rows(cursor: duckdb.DuckDBPyConnection, layers: Sequence[Layer], values: Mapping[str, Value]) -> pa.Table:
    """Computes the rows.

    Args:
        cursor: where the query will run.
        layers: the run's routers.
        values: the query's parameters: n, the layers of a window; top, the paths of each; and stack, layer (the
            window's first), labels and include_special as usual.
    """
    places, length = Places.of_run(cursor), int(values["n"])  # type: ignore[arg-type]
    asked = {"layers": length, "labels": values["labels"], "include_special": values["include_special"]}
    found: list[dict[str, Any]] = []
    for stack in dict.fromkeys(one.stack for one in layers if values["stack"] in (None, one.stack)):
        own = sorted((one for one in layers if one.stack == stack), key=lambda one: one.layer)
        windows = [own[first : first + length] for first in range(len(own) - length + 1)]
        windows = [window for window in windows if values["layer"] in (None, window[0].layer)]
        if not windows:
            continue
        id_T = places.column(cursor.sql(_IDS, params={"stack": own[0].token_stack}), np.int32, -1)
        routers: dict[Layer, _Router] = {}
        for window in windows:
            routers = {
                one: routers[one] if one in routers else _router(cursor, places, one, values, id_T) for one in window
            }
            where = {"stack": stack, "layer": window[0].layer}
            found += [asked | where | row for row in _of_window([*routers.values()], id_T, int(values["top"]))]  # type: ignore[arg-type]
    return pa.Table.from_pylist(found, schema=_SCHEMA)


def _router(
    cursor: duckdb.DuckDBPyConnection, places: Places, layer: Layer, values: Mapping[str, Value],
    id_T: NDArray[np.int32],
) -> _Router:  # fmt: skip
    chosen = {name: values[name] for name in ("labels", "include_special")}
    where = {"stack": layer.stack, "layer": layer.layer, **chosen}
    expert_T = places.column(cursor.sql(_EXPERTS, params=where), np.uint16, _NOBODY)
    counted_T = expert_T != _NOBODY
    groups = _groups(expert_T[counted_T].astype(np.int64), _known(id_T[counted_T])) if counted_T.any() else None
    return _Router(experts=layer.n_experts, expert_T=expert_T, purity=None if groups is None else groups.purity())


def _known(id_T: NDArray[np.int32]) -> NDArray[np.int32] | None:
    """Returns the ids, None if the run does not have them."""
    return None if (id_T < 0).any() else id_T


def _of_window(routers: Sequence[_Router], id_T: NDArray[np.int32], top: int) -> Iterator[dict[str, Any]]:
    """Yields the row of all paths, and those of the most frequent ones; none if no token counts."""
    counted_T = np.logical_and.reduce([router.expert_T != _NOBODY for router in routers])
    tokens = int(counted_T.sum())
    if tokens == 0:
        return
    experts_T = [router.expert_T[counted_T] for router in routers]
    sizes, ids = [router.experts for router in routers], _known(id_T[counted_T])
    code_T = _codes(experts_T, sizes, 1 if ids is None else int(ids.max()) + 1)
    groups = _groups(code_T, ids)
    start_E, transitions_EE = _chain(experts_T, sizes)
    purities = [router.purity for router in routers if router.purity is not None]
    yield {
        "tokens": int(groups.tokens_G[groups.tokens_G > 1].sum()), "all_tokens": tokens,
        "paths": len(groups.code_G), "same_path": _same(groups.tokens_G),
        "same_markov": _same_in_chain(start_E, transitions_EE),
        "purity": groups.purity(), "expert_purity": float(np.mean(purities)) if purities else None,
        "all_purity": None if ids is None else _same(np.bincount(ids)),
    }  # fmt: skip
    # in the order of their numbers, which is that of their experts, where they are equally frequent
    for rank, group in enumerate(np.argsort(-groups.tokens_G, kind="stable")[:top].tolist(), start=1):
        token = int(np.argmax(code_T == groups.code_G[group]))
        path = [int(expert_T[token]) for expert_T in experts_T]
        expected = start_E[path[0]] * np.prod([
            step_EE[pair] for step_EE, pair in zip(transitions_EE, itertools.pairwise(path), strict=True)
        ])  # fmt: skip
        own = int(groups.tokens_G[group])
        yield {
            "rank": rank, "path": "-".join(map(str, path)), "tokens": own, "all_tokens": tokens,
            "share": own / tokens, "markov_share": float(expected), **_ids_of(groups, group, own),
        }  # fmt: skip


def _ids_of(groups: _Groups, group: int, tokens: int) -> dict[str, Any]:
    """Returns what a path's ids are; nothing without ids."""
    if groups.id_C is None:
        return {}
    token_id, count = groups.top_id(group)
    purity = groups.same_G[group] / (tokens * (tokens - 1)) if tokens > 1 else None
    return {"purity": purity, "token_id": token_id, "token_share": count / tokens}


def _codes(experts_T: Sequence[NDArray[np.uint16]], sizes: Sequence[int], ids: int) -> NDArray[np.int64]:
    """Numbers the paths of tokens in the order of their experts, so that a number times `ids` is below `_LARGEST`."""
    code_T, codes = experts_T[0].astype(np.int64), sizes[0]
    for expert_T, experts in zip(experts_T[1:], sizes[1:], strict=True):
        if codes * experts * ids > _LARGEST:  # then those that occur are numbered anew
            _, code_T = np.unique(code_T, return_inverse=True)
            codes = int(code_T.max()) + 1
        code_T, codes = code_T * experts + expert_T, codes * experts
    return code_T


def _groups(code_T: NDArray[np.int64], ids: NDArray[np.int32] | None) -> _Groups:
    """Counts the groups of tokens, at least one, and the ids in each."""
    width = 1 if ids is None else int(ids.max()) + 1
    cell_T = code_T * width
    if ids is not None:
        cell_T += ids
    cell_T.sort()
    first_C = _starts(cell_T)
    cell_C = cell_T[first_C]
    tokens_C = np.diff(first_C, append=len(cell_T))
    code_C = cell_C // width
    first_G = _starts(code_C)
    return _Groups(
        code_G=code_C[first_G], tokens_G=np.add.reduceat(tokens_C, first_G), first_G=first_G,
        id_C=None if ids is None else cell_C % width, tokens_C=tokens_C,
    )  # fmt: skip


def _starts(sorted_N: NDArray[np.int64]) -> NDArray[np.int64]:
    """Returns where a run of equal numbers begins."""
    return np.flatnonzero(np.append(True, sorted_N[1:] != sorted_N[:-1]))


def _chain(
    experts_T: Sequence[NDArray[np.uint16]], sizes: Sequence[int]
) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
    """Returns the first layer's shares, [E], and those of the next layer by expert, [E, E] for each step."""
    start_E = np.bincount(experts_T[0], minlength=sizes[0]) / len(experts_T[0])
    transitions_EE = []
    for (one_T, next_T), (experts, others) in zip(
        itertools.pairwise(experts_T), itertools.pairwise(sizes), strict=True
    ):  # fmt: skip
        step_T = one_T.astype(np.int64) * others + next_T
        counts_EE = np.bincount(step_T, minlength=experts * others).reshape(experts, others)
        transitions_EE.append(counts_EE / np.maximum(counts_EE.sum(axis=1, keepdims=True), 1))
    return start_E, transitions_EE


def _same(tokens_G: NDArray[np.integer]) -> float | None:
    """Returns the chance that two of all tokens are of the same group; None if there is a single one."""
    tokens = int(tokens_G.sum())
    return float((tokens_G * (tokens_G - 1)).sum() / (tokens * (tokens - 1))) if tokens > 1 else None


def _same_in_chain(start_E: NDArray[np.float64], transitions_EE: Sequence[NDArray[np.float64]]) -> float:
    """Returns the chance that two draws of a Markov chain are the same path: the sum of all paths' squared shares."""
    square_E = start_E**2
    for step_EE in transitions_EE:
        square_E = square_E @ step_EE**2
    return float(square_E.sum())
