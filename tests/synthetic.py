"""Small runs on disk with known routing, written as a replica writes them.

    shard = Shard.of_picks(layers, documents=[("en", 2)], experts={0: [[0, 1], [2, 0]]}, weights={0: …})
    shard = Shard.of_probabilities(layers, documents=[("en", 2)], probabilities={0: p_TE})
    shard = random_shard(rng, layers, documents=[("en", 30), ("ko", 20)])
    folder = write_run(tmp_path / "run", layers, [shard, …])

Arrays are per layer number: experts and weights [T, k], probabilities [T, E]; T tokens of the
shard, in document order. A special token is marked by `is_special` [T].
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from collector import records
from collector.records import STATISTICS, Layer, LayerRouting
from collector.storage import RUN, SUCCESS, VOCAB, Commit, Part, RunDirectory

Documents = Sequence[tuple[str, int]]
"""(label, tokens) of each document."""
VOCABULARY = 50


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """The routing of one shard's tokens."""

    documents: Documents
    is_special: np.ndarray
    experts: Mapping[int, np.ndarray]
    weights: Mapping[int, np.ndarray]
    statistics: Mapping[int, Mapping[str, np.ndarray]]
    probabilities: Mapping[int, np.ndarray] | None = None

    @classmethod
    def of_picks(
        cls, layers: Sequence[Layer], *, documents: Documents, experts, weights=None, is_special=None
    ) -> Shard:
        """Explicit picks; weights default to 1/k, the statistics are 0."""
        tokens = sum(length for _, length in documents)
        dtype = records.expert_dtype(layers)
        picked = {one.layer: np.array(experts[one.layer], dtype).reshape(tokens, one.top_k) for one in layers}
        weighed = {
            layer: np.full(e_tk.shape, 1 / e_tk.shape[1], np.float32)
            if weights is None
            else np.array(weights[layer], np.float32).reshape(e_tk.shape)
            for layer, e_tk in picked.items()
        }
        zeros = {name: np.zeros(tokens, np.float32) for name in STATISTICS}
        return cls(
            documents=documents, experts=picked, weights=weighed, statistics=dict.fromkeys(picked, zeros),
            is_special=np.zeros(tokens, bool) if is_special is None else np.array(is_special, bool),
        )  # fmt: skip

    @classmethod
    def of_probabilities(
        cls, layers: Sequence[Layer], *, documents: Documents, probabilities, is_special=None
    ) -> Shard:
        """The k most probable experts (ties: lower id), with their probabilities as weights."""
        p_te = {one.layer: np.array(probabilities[one.layer], np.float32) for one in layers}
        experts = {one.layer: np.argsort(-p_te[one.layer], axis=1, kind="stable")[:, : one.top_k] for one in layers}
        weights = {layer: np.take_along_axis(p_te[layer], e_tk, axis=1) for layer, e_tk in experts.items()}
        picks = cls.of_picks(layers, documents=documents, experts=experts, weights=weights, is_special=is_special)
        statistics = {one.layer: _statistics(p_te[one.layer], one.top_k) for one in layers}
        return dataclasses.replace(picks, statistics=statistics, probabilities=p_te)

    @property
    def labels(self) -> np.ndarray:
        """[T] each token's label."""
        return np.repeat([label for label, _ in self.documents], [length for _, length in self.documents])


def _statistics(p_te: np.ndarray, k: int) -> dict[str, np.ndarray]:
    p = p_te.astype(np.float64)
    ordered = np.sort(p, axis=1)[:, ::-1]
    following = ordered[:, k] if k < p.shape[1] else 0.0
    return {
        "entropy": -(p * np.log(np.where(p > 0, p, 1))).sum(1).astype(np.float32),
        "topk_mass": ordered[:, :k].sum(1).astype(np.float32),
        "margin": (ordered[:, k - 1] - following).astype(np.float32),
    }


def random_shard(
    rng: np.random.Generator, layers: Sequence[Layer], documents: Documents, special: float = 0.1
) -> Shard:
    """Router probabilities that depend on the label; picks in random order, as some models leave them."""
    labels = [label for label, _ in documents]
    lengths = [length for _, length in documents]
    probabilities = {}
    for one in layers:
        taste = {label: rng.standard_gamma(0.5, one.n_experts) + 0.01 for label in sorted(set(labels))}
        concentration = np.repeat([taste[label] for label in labels], lengths, axis=0)
        p_te = rng.standard_gamma(concentration) + 1e-6
        probabilities[one.layer] = p_te / p_te.sum(1, keepdims=True)
    is_special = rng.random(sum(lengths)) < special
    shard = Shard.of_probabilities(layers, documents=documents, probabilities=probabilities, is_special=is_special)
    order = {layer: rng.permuted(np.indices(e_tk.shape)[1], axis=1) for layer, e_tk in shard.experts.items()}
    return dataclasses.replace(
        shard,
        experts={layer: np.take_along_axis(e_tk, order[layer], axis=1) for layer, e_tk in shard.experts.items()},
        weights={layer: np.take_along_axis(w_tk, order[layer], axis=1) for layer, w_tk in shard.weights.items()},
    )


def write_run(
    folder: Path,
    layers: Sequence[Layer],
    shards: Sequence[Shard],
    *,
    probabilities: bool = False,
    complete: bool = True,
) -> Path:
    """Writes and commits all shards; returns the run's folder."""
    run = RunDirectory(folder)
    routers = [dataclasses.asdict(one) | {"router": f"layers.{one.layer}.mlp.gate"} for one in layers]
    config = {"model": "synthetic", "store": ["probabilities"] if probabilities else []}
    info = {"format": 1, "config": config, "plan_hash": "0", "plan": {"shards": len(shards)}, "layers": routers}
    run.store.put_new(RUN, json.dumps(info).encode())
    with run.scratch() as scratch:
        records.write_table(Path(scratch, VOCAB), _vocabulary())
        run.store.publish(Path(scratch, VOCAB), VOCAB)
    for number, shard in enumerate(shards):
        commit_shard(run, number, publish_shard(run, layers, number, shard, probabilities=probabilities), shard)
    if complete:
        run.store.put_new(SUCCESS, b"{}")
    return folder


def publish_shard(
    run: RunDirectory,
    layers: Sequence[Layer],
    number: int,
    shard: Shard,
    *,
    attempt: str = "a",
    probabilities: bool = False,
) -> dict[str, Part]:
    """Publishes the parts of a shard without committing them."""
    schema = records.routing_schema(layers, probabilities=probabilities)
    label = pa.array(shard.labels).dictionary_encode()
    parts = {}
    with run.scratch() as scratch:
        routing = Path(scratch, "routing")
        with records.routing_writer(routing, schema) as writer:
            for one in layers:
                routed = _layer_routing(one, shard, probabilities=probabilities)
                routed.check()
                writer.write_table(
                    records.routing_table(number, routed, schema, label=label, is_special=shard.is_special)
                )
        rows = len(shard.labels) * len(layers)
        parts["routing"] = run.publish_part(routing, number, attempt, "routing", rows)
        for name, table in (("tokens", _tokens(number, shard)), ("documents", _documents(number, shard))):
            records.write_table(Path(scratch, name), table)
            parts[name] = run.publish_part(Path(scratch, name), number, attempt, name, table.num_rows)
    return parts


def commit_shard(run: RunDirectory, number: int, parts: dict[str, Part], shard: Shard) -> Commit:
    """Makes published parts count."""
    tokens = len(shard.labels)
    record = Commit(
        shard=number, attempt="a", plan_hash="0", files=parts, documents=len(shard.documents), tokens=tokens,
        rows=parts["routing"].rows, characters=4 * tokens, truncated=0, skipped={}, batches=1,
        padded_tokens=tokens, seconds={}, node="synthetic",
    )  # fmt: skip
    return run.commit(record)


def _layer_routing(one: Layer, shard: Shard, *, probabilities: bool) -> LayerRouting:
    p_te = shard.probabilities[one.layer] if probabilities and shard.probabilities else None
    return LayerRouting(
        geometry=one, experts_tk=shard.experts[one.layer], weights_tk=shard.weights[one.layer],
        statistics=dict(shard.statistics[one.layer]), probabilities_te=p_te,
    )  # fmt: skip


def _tokens(number: int, shard: Shard) -> pa.Table:
    lengths = [length for _, length in shard.documents]
    tokens = np.arange(sum(lengths))
    columns = {
        "shard": np.full(len(tokens), number),
        "tok": tokens,
        "doc": np.repeat(np.arange(len(lengths)), lengths),
        "position": np.concatenate([np.arange(length) for length in lengths]) if lengths else tokens,
        "token_id": tokens % VOCABULARY,
        "is_special": shard.is_special,
    }
    return _table(columns, records.TOKENS_SCHEMA)


def _documents(number: int, shard: Shard) -> pa.Table:
    count = len(shard.documents)
    lengths = np.array([length for _, length in shard.documents])
    columns = {
        "shard": np.full(count, number),
        "doc": np.arange(count),
        "doc_id": [f"synthetic#{number}-{doc}" for doc in range(count)],
        "label": [label for label, _ in shard.documents],
        "source": ["synthetic"] * count,
        "parallel_id": [None] * count,
        "tokens": lengths,
        "characters": 4 * lengths,
        "truncated": np.zeros(count, bool),
    }
    return _table(columns, records.documents_schema(text=False))


def _vocabulary() -> pa.Table:
    ids = range(VOCABULARY)
    columns = {"token_id": ids, "token": [f"token {i}" for i in ids], "is_special": [i == 0 for i in ids]}
    return _table(columns, records.VOCAB_SCHEMA)


def _table(columns: dict, schema: pa.Schema) -> pa.Table:
    arrays = {name: pa.array(columns[name]) for name in schema.names}
    return pa.table(arrays).cast(schema)
