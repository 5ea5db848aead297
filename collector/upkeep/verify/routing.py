"""Checks the routing table of one shard: each recorded router has one decision for each token of its stack.

A decision consists of k distinct experts of the router, with finite weights and statistics, and repeats its token's
label and `is_special`. Whether the experts are the right ones cannot be checked here.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from collector.capture.routing_table import PER_EXPERT, STATISTICS, is_possible
from collector.upkeep.verify.reading import STACKS, Card, Documents, Tokens, codes, each_once, groups, numbers, told

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from collector.store.run_directory import Commit
    from collector.store.tables import Layer
    from collector.upkeep.verify.reading import Problems


def check_routing(path: Path, commit: Commit, card: Card, documents: Documents, tokens: Tokens) -> Problems:
    """Yields the problems of a routing table, one line each, given sound documents and tokens."""
    wrong: Counter[str] = Counter()
    routers = {(one.stack, one.layer): one for one in card.layers}
    seen = {router: np.zeros(len(tokens.doc), np.uint8) for router in routers}
    read = 0
    for group in groups(path, "routing", commit, card.schemas["routing"], wrong):
        read += len(group)
        for router, rows in _by_router(group):
            if router not in routers:
                wrong[f"routing of {router[0]} layer {router[1]}, which the run does not record,"] += len(rows)
                continue
            _check_rows(rows, routers[router], documents, tokens, seen[router], wrong, card)
    yield from told(wrong)
    if read < commit.rows:
        return
    for router, counts in seen.items():
        mine = tokens.stack == STACKS.index(routers[router].token_stack)
        yield from each_once(counts[mine], f"{routers[router].name}: of the tokens of its stack number")


def _by_router(group: pa.Table) -> Iterator[tuple[tuple[str, int], pa.Table]]:
    """Yields the rows of each router; most row groups hold a single router."""
    found = group.select(["stack", "layer"]).group_by(["stack", "layer"]).aggregate([]).to_pylist()
    for router in found:
        name = router["stack"], router["layer"]
        mask = pc.and_(pc.equal(group["stack"].cast(pa.string()), name[0]), pc.equal(group["layer"], name[1]))
        yield name, group if len(found) == 1 else group.filter(mask)


def _check_rows(
    rows: pa.Table, layer: Layer, documents: Documents, tokens: Tokens, seen: NDArray[np.uint8],
    wrong: Counter[str], card: Card,
) -> None:  # fmt: skip
    """Counts invalid values of a router's rows in `wrong`, and the tokens that it has routed in `seen`."""
    tok = numbers(rows["tok"])
    inside = tok < len(tokens.doc)
    wrong[f"{layer.name}: tok is no token"] += int((~inside).sum())
    if not inside.all():
        return
    other = tokens.stack[tok] != STACKS.index(layer.token_stack)
    wrong[f"{layer.name}: tok is not of its stack"] += int(other.sum())
    seen += np.minimum(np.bincount(tok, minlength=len(seen)), 2).astype(np.uint8)
    np.minimum(seen, 2, out=seen)
    label = codes(rows["label"], documents.labels) != documents.label[tokens.doc[tok]]
    wrong[f"{layer.name}: label is not its document's"] += int(label.sum())
    special = numbers(rows["is_special"]) != tokens.is_special[tok]
    wrong[f"{layer.name}: is_special is not its token's"] += int(special.sum())
    _check_picks(rows, layer, wrong, card.lacks)
    for name in STATISTICS:
        wrong[f"{layer.name}: {name} is not finite"] += int((~np.isfinite(numbers(rows[name]))).sum())
        if name in card.lacks:
            wrong[f"{layer.name}: {name} is set, and the run lacks it,"] += len(rows) - rows[name].null_count
    for name in PER_EXPERT:
        if name in rows.column_names:
            lengths = pc.list_value_length(rows[name]).to_numpy()
            wrong[f"{layer.name}: {name} are not of {layer.n_experts} experts"] += int(
                (lengths != layer.n_experts).sum()
            )
            values = pc.list_flatten(rows[name]).to_numpy()
            wrong[f"{layer.name}: {name} are not finite"] += int((~is_possible(name, values)).sum())


def _check_picks(rows: pa.Table, layer: Layer, wrong: Counter[str], lacks: Sequence[str]) -> None:
    """Checks that each token has k distinct experts of the router with finite weights, and nothing beyond the k."""
    mine = [f"{letter}{i}" for letter in ("e" if "weights" in lacks else "ew") for i in range(layer.top_k)]
    mine += [f"d{i}" for i in range(layer.top_k) if layer.has_capacity]
    nulls = {name: rows[name].null_count for name in rows.column_names if name[0] in "ewd" and name[1:].isdigit()}
    wrong[f"{layer.name}: an expert, weight or drop is null"] += max(nulls[name] for name in mine)
    others = [len(rows) - count for name, count in nulls.items() if name not in mine]
    wrong[f"{layer.name}: more picks than its k of {layer.top_k}"] += max(others, default=0)
    if any(nulls[name] for name in mine):
        return
    experts_tk = np.stack([numbers(rows[f"e{i}"]) for i in range(layer.top_k)], axis=1)
    wrong[f"{layer.name}: an expert id is not below {layer.n_experts}"] += _rows_with(experts_tk >= layer.n_experts)
    ordered = np.sort(experts_tk, axis=1)
    wrong[f"{layer.name}: an expert is chosen twice"] += _rows_with(ordered[:, 1:] == ordered[:, :-1])
    if "weights" in lacks:
        return
    weights_tk = np.stack([numbers(rows[f"w{i}"]) for i in range(layer.top_k)], axis=1)
    wrong[f"{layer.name}: a weight is not finite"] += _rows_with(~np.isfinite(weights_tk))


def _rows_with(marked_tk: NDArray[np.bool_]) -> int:
    return int(marked_tk.any(axis=1).sum())
