"""What the shards of a run hold, label by label and token by token."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import TypeVar

import numpy as np

from collector.capture.routing_table import STATISTICS, round_statistic
from collector.store.tables import Layer
from tests.helpers.synthetic import Shard, key, token_stacks

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Group:
    """The counted tokens of one label at one router, all shards together."""

    geometry: Layer
    label: str
    experts_tk: np.ndarray
    weights_tk: np.ndarray
    statistics: dict[str, np.ndarray]
    dropped_tk: np.ndarray

    @property
    def router(self) -> tuple[str, int]:
        """Stack and layer."""
        return self.geometry.stack, self.geometry.layer

    @property
    def tokens(self) -> int:
        return len(self.experts_tk)

    @property
    def picks(self) -> np.ndarray:
        """[E] times each expert was chosen."""
        return np.bincount(self.experts_tk.ravel(), minlength=self.geometry.n_experts)

    @property
    def top1(self) -> np.ndarray:
        """[E] times each expert had the highest weight."""
        best = np.take_along_axis(self.experts_tk, self.weights_tk.argmax(1)[:, None], axis=1)
        return np.bincount(best.ravel(), minlength=self.geometry.n_experts)

    @property
    def weight_sums(self) -> np.ndarray:
        """[E] sum of each expert's weights."""
        weights = self.weights_tk.astype(np.float64).ravel()
        return np.bincount(self.experts_tk.ravel(), weights, minlength=self.geometry.n_experts)


def groups(layers: Sequence[Layer], shards: Sequence[Shard], *, include_special: bool) -> Iterator[Group]:
    """Every label with tokens to count, in every layer."""
    for one in layers:
        for label in sorted({str(label) for shard in shards for label in shard.labels}):
            kept = [(shard.labels == label) & (include_special | ~shard.is_special) for shard in shards]
            if not np.concatenate(kept).any():
                continue

            def gather(arrays, kept=kept):
                return np.concatenate([array[keep] for array, keep in zip(arrays, kept, strict=True)])

            yield Group(
                geometry=one,
                label=label,
                experts_tk=gather([shard.experts[key(one)] for shard in shards]),
                weights_tk=gather([shard.weights[key(one)] for shard in shards]),
                dropped_tk=gather(
                    [s.dropped.get(key(one), np.zeros((len(s.labels), one.top_k), bool)) for s in shards]
                ),
                statistics={
                    name: gather([round_statistic(shard.statistics[key(one)][name]) for shard in shards])
                    for name in STATISTICS
                },
            )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """What one router decided about one token, and all there is about the token."""

    geometry: Layer
    shard: int
    tok: int
    doc: int
    position: int
    token_id: int
    label: str
    parallel_id: str | None
    is_special: bool
    experts: list[int]
    """In the model's own order."""
    weights: list[float]
    dropped: list[bool]
    """Pick by pick; empty for a router without a capacity."""
    probabilities: list[float] | None
    logits: list[float] | None
    statistics: dict[str, float]

    @property
    def router(self) -> tuple[str, int]:
        """Stack and layer."""
        return self.geometry.stack, self.geometry.layer

    @property
    def top1(self) -> int:
        """The expert with the highest weight, the first among equals."""
        return self.experts[self.weights.index(max(self.weights))]


def decisions(layers: Sequence[Layer], shards: Sequence[Shard], *, include_special: bool) -> list[Decision]:
    """All decisions about the tokens to count; by router, shard and token."""
    stacks = token_stacks(layers)
    found = []
    for one in layers:
        for number, shard in enumerate(shards):
            doc = np.repeat(np.arange(len(shard.documents)), shard.lengths)
            first = np.concatenate([[0], np.cumsum(shard.lengths)])
            logits = shard.logits[key(one)] if shard.probabilities else None
            offset = stacks.index(one.token_stack) * len(doc)
            for t in np.flatnonzero(include_special | ~shard.is_special).tolist():
                d = int(doc[t])
                found.append(
                    Decision(
                        geometry=one, shard=number, tok=offset + t, doc=d, position=t - int(first[d]),
                        token_id=int(shard.ids[t]), label=shard.documents[d][0],
                        parallel_id=shard.parallel_ids[d] if shard.parallel_ids else None,
                        is_special=bool(shard.is_special[t]), experts=shard.experts[key(one)][t].tolist(),
                        weights=shard.weights[key(one)][t].tolist(),
                        dropped=shard.dropped[key(one)][t].tolist() if one.has_capacity else [],
                        probabilities=shard.probabilities[key(one)][t].tolist() if shard.probabilities else None,
                        logits=logits[t].tolist() if logits is not None else None,
                        statistics={
                            name: float(round_statistic(shard.statistics[key(one)][name])[t]) for name in STATISTICS
                        },
                    )
                )  # fmt: skip
    return found


def by_router(found: Sequence[Decision]) -> dict[Layer, list[Decision]]:
    """Decisions of each router that has any."""
    return grouped(found, lambda decision: decision.geometry)


def grouped(items: Iterable[T], of: Callable[[T], K]) -> dict[K, list[T]]:
    """Items that agree in `of`, in their order."""
    groups: dict[K, list[T]] = {}
    for item in items:
        groups.setdefault(of(item), []).append(item)
    return groups


def entropy(p: np.ndarray) -> float:
    """In nats."""
    return float(-(p[p > 0] * np.log(p[p > 0])).sum())
