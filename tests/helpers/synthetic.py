"""Small runs on disk with known routing, written as a replica writes them.

    shard = Shard.of_picks(layers, documents=[("en", 2)], experts={0: [[0, 1], [2, 0]]}, weights={0: …})
    shard = Shard.of_probabilities(layers, documents=[("en", 2)], probabilities={0: p_TE})
    shard = random_shard(rng, layers, documents=[("en", 30), ("ko", 20)])
    folder = write_run(tmp_path / "run", layers, [shard, …])

Arrays are per router, see `key`: experts, weights, drops and effects [T, k], probabilities [T, E]; T tokens of
the shard, in document order. A special token is marked by `is_special` [T]. Where there are routers
of an encoder and of a decoder, both see the same T tokens, which then are in the tokens table twice.
What else a document or token has, ids for example, has defaults, see `Shard`.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from collector.capture import effects_table, outputs, routing_table, similarity, vocabulary
from collector.capture.loss import LossRecorder
from collector.capture.routing_table import STATISTICS, LayerRouting
from collector.data.sources import LABEL_SEPARATOR
from collector.models.edits import NO_EDIT, parse_arm
from collector.store import tables
from collector.store.run_directory import MAPS, RUN, SUCCESS, VOCAB, Commit, Part, RunDirectory, weights_name
from collector.store.tables import Layer

Documents = Sequence[tuple[str, int]]
"""(label, tokens) of each document."""
RECORDED = ("outputs", "loss", "similarity", "vocabulary", "effects")
"""All that is recorded beside the routing."""
EFFECTS = ("norms", "largest", "contributions")
VOCABULARY = 50
VOCABULARY_ENTRIES = tuple((f"token {i}", i == 0) for i in range(VOCABULARY))
Key = int | tuple[str, int]


def key(router: Layer) -> Key:
    """How arrays are found: the layer's number, or (stack, layer) of any other stack than the decoder."""
    return router.layer if router.stack == "decoder" else (router.stack, router.layer)


def token_stacks(layers: Sequence[Layer]) -> list[str]:
    """The stacks whose tokens there are, in the order of the tokens table."""
    return sorted({one.token_stack for one in layers}, reverse=True)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shard:
    """The routing of one shard's tokens."""

    documents: Documents
    is_special: np.ndarray
    experts: Mapping[Key, np.ndarray]
    weights: Mapping[Key, np.ndarray]
    statistics: Mapping[Key, Mapping[str, np.ndarray]]
    dropped: Mapping[Key, np.ndarray]
    """Of routers with a capacity only."""
    effects: Mapping[Key, Mapping[str, np.ndarray]]
    """Norms, largest entries and contributions of what the picks put out, see `EFFECTS`."""
    losses: np.ndarray
    """[T], NaN for the first of a document."""
    probabilities: Mapping[Key, np.ndarray] | None = None
    similarity: Sequence[Mapping[str, Any]] = ()
    """Rows of the table, without their shard."""
    promotions: Sequence[Mapping[str, Any]] = ()
    """Rows of the table, without their shard; `tok` counts the tokens of the decoder."""
    arms: Sequence[Mapping[str, Any]] = ()
    """Rows of the table `effects`, without their shard."""
    token_ids: np.ndarray | None = None
    """[T], or all ids in turn."""
    spans: Sequence[str | None] | None = None
    """[T], or none."""
    characters: np.ndarray | None = None
    """[documents], or 4 per token."""
    truncated: np.ndarray | None = None
    """[documents], or none."""
    parallel_ids: Sequence[str | None] | None = None
    """[documents], or none."""
    document_ids: Sequence[str] | None = None
    """[documents], or synthetic#SHARD-DOC."""
    sources: Sequence[str | None] | None = None
    """[documents], or the same for all."""
    prompt_tokens: np.ndarray | None = None
    """[documents] the tokens that the model did not write, or the first half of each, rounded up."""

    @classmethod
    def of_picks(
        cls, layers: Sequence[Layer], *, documents: Documents, experts, weights=None, is_special=None, dropped=None,
        effects=None, losses=None,
    ) -> Shard:  # fmt: skip
        """Explicit picks; weights default to 1/k, effects and losses to 1, statistics to 0; nothing is dropped."""
        tokens = sum(length for _, length in documents)
        dtype = routing_table.expert_dtype(layers)
        picked = {key(one): np.array(experts[key(one)], dtype).reshape(tokens, one.top_k) for one in layers}
        weighed = {
            layer: np.full(e_tk.shape, 1 / e_tk.shape[1], np.float32)
            if weights is None
            else np.array(weights[layer], np.float32).reshape(e_tk.shape)
            for layer, e_tk in picked.items()
        }
        drops = {
            key(one): np.zeros((tokens, one.top_k), bool)
            if dropped is None
            else np.array(dropped[key(one)], bool).reshape(tokens, one.top_k)
            for one in layers
            if one.has_capacity
        }
        put_out = {
            router: {
                name: np.array((effects or {}).get(router, {}).get(name, np.ones(e_tk.shape)), np.float32)
                for name in EFFECTS
            }
            for router, e_tk in picked.items()
        }
        lost = np.array(np.ones(tokens) if losses is None else losses, np.float32)
        lost[np.cumsum([0, *(length for _, length in documents[:-1])])[: len(documents)]] = np.nan
        zeros = {name: np.zeros(tokens, np.float32) for name in STATISTICS}
        return cls(
            documents=documents, experts=picked, weights=weighed, statistics=dict.fromkeys(picked, zeros),
            is_special=np.zeros(tokens, bool) if is_special is None else np.array(is_special, bool), dropped=drops,
            effects=put_out, losses=lost,
        )  # fmt: skip

    @classmethod
    def of_probabilities(
        cls, layers: Sequence[Layer], *, documents: Documents, probabilities, is_special=None
    ) -> Shard:
        """The k most probable experts (ties: lower id), with their probabilities as weights."""
        p_te = {key(one): np.array(probabilities[key(one)], np.float32) for one in layers}
        experts = {key(one): np.argsort(-p_te[key(one)], axis=1, kind="stable")[:, : one.top_k] for one in layers}
        weights = {layer: np.take_along_axis(p_te[layer], e_tk, axis=1) for layer, e_tk in experts.items()}
        picks = cls.of_picks(layers, documents=documents, experts=experts, weights=weights, is_special=is_special)
        statistics = {key(one): _statistics(p_te[key(one)], one.top_k) for one in layers}
        return dataclasses.replace(picks, statistics=statistics, probabilities=p_te)

    @property
    def logits(self) -> dict[Key, np.ndarray]:
        """Of which the probabilities are the softmax."""
        assert self.probabilities is not None
        with np.errstate(divide="ignore"):
            return {layer: np.log(p_te) - np.float32(0.5) for layer, p_te in self.probabilities.items()}

    @property
    def lengths(self) -> np.ndarray:
        """[documents] tokens of each."""
        return np.array([length for _, length in self.documents], np.int64)

    @property
    def labels(self) -> np.ndarray:
        """[T] each token's label."""
        return np.repeat(np.array([label for label, _ in self.documents], str), self.lengths)

    @property
    def ids(self) -> np.ndarray:
        """[T] each token's id."""
        return np.arange(len(self.is_special)) % VOCABULARY if self.token_ids is None else self.token_ids

    @property
    def prompts(self) -> np.ndarray:
        """[documents] tokens that the model did not write."""
        return (self.lengths + 1) // 2 if self.prompt_tokens is None else self.prompt_tokens

    @property
    def character_counts(self) -> np.ndarray:
        """[documents] characters of each."""
        return 4 * self.lengths if self.characters is None else self.characters


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
    rng: np.random.Generator, layers: Sequence[Layer], documents: Documents, special: float = 0.1,
    vocabulary: int | None = None,
) -> Shard:  # fmt: skip
    """Router probabilities that depend on the label; picks in random order, as some models leave them.

    Args:
        rng: source of everything random.
        layers: geometry of the routers.
        documents: label and tokens of each.
        special: share of special tokens.
        vocabulary: random token ids below it, random numbers of characters and truncated documents, and
            parallel ids; without it the defaults of `Shard`.
    """
    labels = [label for label, _ in documents]
    lengths = [length for _, length in documents]
    probabilities = {}
    for one in layers:
        taste = {label: rng.standard_gamma(0.5, one.n_experts) + 0.01 for label in sorted(set(labels))}
        concentration = np.repeat([taste[label] for label in labels], lengths, axis=0)
        p_te = rng.standard_gamma(concentration) + 1e-6
        probabilities[key(one)] = p_te / p_te.sum(1, keepdims=True)
    is_special = rng.random(sum(lengths)) < special
    shard = Shard.of_probabilities(layers, documents=documents, probabilities=probabilities, is_special=is_special)
    order = {layer: rng.permuted(np.indices(e_tk.shape)[1], axis=1) for layer, e_tk in shard.experts.items()}
    own = np.random.default_rng(len(is_special))  # what experts put out leaves all else as it was
    return dataclasses.replace(
        shard,
        experts={layer: np.take_along_axis(e_tk, order[layer], axis=1) for layer, e_tk in shard.experts.items()},
        weights={layer: np.take_along_axis(w_tk, order[layer], axis=1) for layer, w_tk in shard.weights.items()},
        dropped={layer: rng.random(d_tk.shape) < 0.2 for layer, d_tk in shard.dropped.items()},
        effects={
            layer: {name: own.normal(1, 0.5, e_tk.shape).astype(np.float32) for name in EFFECTS}
            for layer, e_tk in shard.experts.items()
        },
        similarity=[row for one in layers for row in _random_blocks(own, one)],
        promotions=[row for one in layers for row in _random_promotions(own, one, shard)],
        arms=_random_effects(own, layers, shard),
        losses=(shard.losses * own.gamma(2, 1, len(is_special))).astype(np.float32),
        **({} if vocabulary is None else _random_texts(rng, documents, vocabulary)),
    )


def _random_blocks(rng: np.random.Generator, layer: Layer) -> list[dict[str, Any]]:
    """Two blocks of sampled tokens, one with a massive activation; the sums are no sums of anything."""
    pairs = layer.n_experts * (layer.n_experts - 1) // 2
    rows = []
    for block, overs in enumerate((("sampled", "either", "both"), ("sampled", "either", "both", "usual"))):
        for over in overs:
            lists = {name: rng.normal(3, 1, pairs).tolist() for name in similarity.LISTS}
            lists["n"] = rng.integers(2, 20, pairs).tolist()
            key_columns = {"stack": layer.stack, "layer": layer.layer, "block": block, "over": over, "tokens": 20}
            rows.append(key_columns | {"experts": layer.n_experts} | lists)
    return rows


def _random_promotions(rng: np.random.Generator, layer: Layer, shard: Shard) -> list[dict[str, Any]]:
    """What the picks of some tokens promote; experts have tastes of their own."""
    if layer.token_stack != "decoder":
        return []
    doc = np.repeat(np.arange(len(shard.documents)), shard.lengths)
    rows = []
    for t in np.flatnonzero(~shard.is_special & (rng.random(len(doc)) < 0.8)).tolist():
        is_last = t + 1 == len(doc) or doc[t + 1] != doc[t]
        for expert in sorted(shard.experts[key(layer)][t].tolist()):
            if rng.random() < 0.9:  # a capacity limit dropped the others
                promoted = (rng.permutation(5)[:3] + expert % 3).tolist()
                row = {"stack": layer.stack, "layer": layer.layer, "tok": t, "expert": expert}
                row |= dict(zip(vocabulary.PROMOTED, promoted, strict=True))
                rows.append(row | {"attribution": None if is_last else float(np.float32(rng.normal(expert, 1)))})
    return rows


def arms_of(layers: Sequence[Layer]) -> list[str]:
    """The arms of `random_shard`: with and without controls, named after a label, and one for each expert."""
    first = layers[0]
    at = f"stack={first.stack} layer={first.layer}"
    return [
        f"no-1: {at} expert=0 operation=replace",
        *(f"no-1 #{number}: {at} expert={number % first.n_experts} operation=replace" for number in range(1, 5)),
        f"ko: {at} expert=0 operation=scale value=0.5; {at} expert={first.n_experts - 1} operation=drop",
        *(f"ko #{number}: {at} expert=0 operation=drop" for number in range(1, 3)),
        *(
            f"{one.stack} {one.layer} {expert}: stack={one.stack} layer={one.layer} expert={expert} operation=drop"
            for one in layers
            for expert in range(min(one.n_experts, 12))
        ),
    ]


def _random_effects(rng: np.random.Generator, layers: Sequence[Layer], shard: Shard) -> list[dict[str, Any]]:
    """What arms and controls do to each document; some have no token with a prediction."""
    tokens = [int(rng.integers(0, length + 1)) for length in shard.lengths]
    base = [count * float(rng.gamma(2)) for count in tokens]
    return [
        {
            "doc": doc, "arm": arm, "control": control, "tokens": count, "loss": count * float(rng.gamma(2)),
            "base_loss": base[doc], "divergence": count * float(rng.gamma(1)),
            "flips": int(rng.integers(0, count + 1)), "decisions": 3 * count,
            "rerouted": int(rng.integers(0, count + 1)),
        }
        for arm, control in [*((each.name, each.control) for each in map(parse_arm, arms_of(layers))), (NO_EDIT, 0)]
        for doc, count in enumerate(tokens)
    ]  # fmt: skip


def joined(shards: Sequence[Shard]) -> Shard:
    """The documents of several shards in one; each has all ids of its own."""

    def join(name: str) -> Any:
        return np.concatenate([getattr(shard, name) for shard in shards])

    def join_routing(name: str) -> dict[Key, Any]:
        return {one: np.concatenate([getattr(s, name)[one] for s in shards]) for one in getattr(shards[0], name)}

    def join_named(name: str) -> dict[Key, Any]:
        each = [getattr(shard, name) for shard in shards]
        return {
            one: {column: np.concatenate([own[one][column] for own in each]) for column in columns}
            for one, columns in each[0].items()
        }

    return Shard(
        documents=[document for shard in shards for document in shard.documents],
        similarity=[
            {**row, "block": 10 * number + row["block"]}
            for number, shard in enumerate(shards)
            for row in shard.similarity
        ],
        promotions=[
            {**row, "tok": first + row["tok"]}
            for first, shard in zip(
                itertools.accumulate((len(shard.labels) for shard in shards), initial=0), shards, strict=False
            )
            for row in shard.promotions
        ],
        arms=[
            {**row, "doc": first + row["doc"]}
            for first, shard in zip(
                itertools.accumulate((len(shard.documents) for shard in shards), initial=0), shards, strict=False
            )
            for row in shard.arms
        ],
        document_ids=[name for shard in shards for name in shard.document_ids or ()],
        parallel_ids=[name for shard in shards for name in shard.parallel_ids or ()],
        **{name: join(name) for name in ("is_special", "losses", "token_ids", "characters", "truncated")},
        **{name: join_routing(name) for name in ("experts", "weights", "dropped", "probabilities")},
        **{name: join_named(name) for name in ("statistics", "effects")},
    )


def _random_texts(rng: np.random.Generator, documents: Documents, vocabulary: int) -> dict[str, Any]:
    lengths = np.array([length for _, length in documents])
    return {
        "token_ids": rng.integers(0, vocabulary, lengths.sum()),
        "characters": rng.integers(1, 6 * lengths + 1),
        "truncated": rng.random(len(documents)) < 0.3,
        "parallel_ids": [None if rng.random() < 0.2 else f"sentence {rng.integers(3)}" for _ in documents],
    }


def write_run(
    folder: Path,
    layers: Sequence[Layer],
    shards: Sequence[Shard],
    *,
    store: Sequence[str] = (),
    complete: bool = True,
    settings: Mapping[str, Any] | None = None,
    vocabulary: Sequence[tuple[str, bool]] | None = VOCABULARY_ENTRIES,
    record: Sequence[str] = RECORDED,
    compute: bool = True,
    generated: bool = True,
    weights: Sequence[Mapping[str, Any]] | None = (),
    maps: Sequence[Mapping[str, Any]] | None = (),
) -> Path:
    """Writes and commits all shards; returns the run's folder.

    `store` says which of `probabilities` and `logits` are stored, `record` what was recorded beside the routing.
    `generated` says whether the model wrote the second half of each document.
    `weights` and `maps` are the rows of `collector weights` and `map`; None writes none. `settings` are some of
    run.json's config. `vocabulary` says of each token id its text and whether it is special; None writes none, as a
    run that drops ids.
    """
    run = RunDirectory(folder)
    routers = [dataclasses.asdict(one) | {"router": f"layers.{one.layer}.mlp.gate"} for one in layers]
    token_ids = "drop" if vocabulary is None else "keep"
    config = {
        "model": "synthetic", "store": [*store], "token_ids": token_ids,
        "record": [*record], "arms": arms_of(layers) if "effects" in record else [],
        "generate": 1 if generated else None,
    }  # fmt: skip
    info = {
        "format": 2, "config": config | dict(settings or {}), "plan_hash": "0", "plan": {"shards": len(shards)},
        "model": {"fingerprint": 64 * "0"}, "layers": routers, "compute": components(layers) if compute else None,
    }  # fmt: skip
    run.store.put_new(RUN, json.dumps(info).encode())
    if weights is not None:
        with run.scratch() as scratch:
            tables.write_table(Path(scratch, "weights"), pa.Table.from_pylist([*weights], schema=tables.WEIGHTS_SCHEMA))
            run.store.publish(Path(scratch, "weights"), weights_name(info))
    if maps is not None:
        with run.scratch() as scratch:
            tables.write_table(Path(scratch, "maps"), pa.Table.from_pylist([*maps], schema=tables.MAPS_SCHEMA))
            run.store.publish(Path(scratch, "maps"), f"{MAPS}/all.parquet")
    if vocabulary is not None:
        with run.scratch() as scratch:
            tables.write_table(Path(scratch, VOCAB), _vocabulary(vocabulary))
            run.store.publish(Path(scratch, VOCAB), VOCAB)
    for number, shard in enumerate(shards):
        parts = publish_shard(run, layers, number, shard, store=store, record=record, generated=generated)
        commit_shard(run, number, parts, shard)
    if complete:
        run.store.put_new(SUCCESS, b"{}")
    return folder


def components(layers: Sequence[Layer]) -> list[dict[str, Any]]:
    """A model around the routers: its first layer has a window, and the last of three experts or more does nothing."""
    empty = dict.fromkeys(("context_flops", "flops"), 0) | dict.fromkeys(("window", "experts"))
    stacks = token_stacks(layers)
    found = [empty | {"stack": stack, "layer": None, "component": "embedding", "parameters": 500} for stack in stacks]
    for number, stack in enumerate((stack for stack in stacks for _ in range(2)), start=0):
        own = {"stack": stack, "layer": number % 2, "component": "attention", "parameters": 40}
        found.append(empty | own | {"flops": 60, "context_flops": 4, "window": None if number % 2 else 3})
    for one in layers:
        where = {"stack": one.stack, "layer": one.layer}
        found.append(
            empty | where | {"component": "router", "parameters": 10, "flops": 20} | {"stack": one.token_stack}
        )
        computing = one.n_experts if one.n_experts <= 2 else one.n_experts - 1
        sizes = {"parameters": 100 * computing, "flops": 200, "experts": computing}
        found.append(empty | where | {"component": "experts"} | sizes)
    return found


def publish_shard(
    run: RunDirectory,
    layers: Sequence[Layer],
    number: int,
    shard: Shard,
    *,
    attempt: str = "a",
    store: Sequence[str] = (),
    record: Sequence[str] = RECORDED,
    generated: bool = True,
) -> dict[str, Part]:
    """Publishes the parts of a shard without committing them."""
    schema = routing_table.schema(layers, store)
    stacks = token_stacks(layers)
    label = pa.array(shard.labels).dictionary_encode()
    parts = {}
    with run.scratch() as scratch:
        routing = Path(scratch, "routing")
        with routing_table.writer(routing, schema) as writer:
            for one in layers:
                routed = _layer_routing(one, shard, store)
                routed.check()
                first = stacks.index(one.token_stack) * len(shard.labels)
                writer.write_table(
                    routing_table.rows(
                        number, routed, schema, label=label, is_special=shard.is_special, first_tok=first
                    )
                )
        rows = len(shard.labels) * len(layers)
        parts["routing"] = run.publish_part(routing, number, attempt, "routing", rows)
        small = {"tokens": _tokens(number, shard, stacks), "documents": _documents(number, shard, generated=generated)}
        if "loss" not in record:
            small["tokens"] = small["tokens"].drop_columns("loss")
        if "outputs" in record:
            small["outputs"] = _outputs(number, layers, shard)
        if "similarity" in record:
            rows = [{"shard": number, **row} for row in shard.similarity]
            small["similarity"] = pa.Table.from_pylist(rows, schema=similarity.SCHEMA)
        if "vocabulary" in record:
            first = (len(stacks) - 1) * len(shard.labels)  # the decoder's come last
            rows = [{"shard": number, **row, "tok": first + row["tok"]} for row in shard.promotions]
            small[vocabulary.TABLE] = pa.Table.from_pylist(rows, schema=vocabulary.SCHEMA)
        if "effects" in record:
            rows = [{"shard": number, **row} for row in shard.arms]
            small[effects_table.TABLE] = pa.Table.from_pylist(rows, schema=effects_table.SCHEMA)
        for name, table in small.items():
            tables.write_table(Path(scratch, name), table)
            parts[name] = run.publish_part(Path(scratch, name), number, attempt, name, table.num_rows)
    return parts


def commit_shard(run: RunDirectory, number: int, parts: dict[str, Part], shard: Shard) -> Commit:
    """Makes published parts count."""
    tokens = parts["tokens"].rows
    record = Commit(
        shard=number, attempt="a", plan_hash="0", files=parts, documents=len(shard.documents), tokens=tokens,
        rows=parts["routing"].rows, characters=4 * tokens, truncated=0, skipped={}, batches=1,
        several_labels=sum(LABEL_SEPARATOR in label for label, _ in shard.documents),
        padded_tokens=tokens, seconds={}, node="synthetic",
    )  # fmt: skip
    return run.commit(record)


def _layer_routing(one: Layer, shard: Shard, store: Sequence[str]) -> LayerRouting:
    known = {name: getattr(shard, name)[key(one)] for name in store} if shard.probabilities else {}
    return LayerRouting(
        geometry=one, experts_tk=shard.experts[key(one)], weights_tk=shard.weights[key(one)],
        statistics=dict(shard.statistics[key(one)]), dropped_tk=shard.dropped.get(key(one)), per_expert_te=known,
    )  # fmt: skip


def _tokens(number: int, shard: Shard, stacks: Sequence[str]) -> pa.Table:
    lengths = [length for _, length in shard.documents]
    each = np.arange(sum(lengths))
    columns = {
        "shard": np.full(len(each) * len(stacks), number),
        "stack": np.repeat(stacks, len(each)),
        "tok": np.arange(len(each) * len(stacks)),
        "doc": np.tile(np.repeat(np.arange(len(lengths)), lengths), len(stacks)),
        "position": np.tile(np.concatenate([np.arange(n) for n in lengths]) if lengths else each, len(stacks)),
        "token_id": np.tile(shard.ids, len(stacks)),
        "is_special": np.tile(shard.is_special, len(stacks)),
        "span": [*(shard.spans or [None] * len(each))] * len(stacks),
    }
    predicted = {"decoder": shard.losses, "encoder": np.full(len(each), np.nan, np.float32)}
    losses = pa.array(np.concatenate([predicted[stack] for stack in stacks]), from_pandas=True)
    return _table(columns | {"loss": losses}, tables.tokens_schema(added=LossRecorder.token_fields))


def _outputs(number: int, layers: Sequence[Layer], shard: Shard) -> pa.Table:
    """What experts put out, added up by document, expert and whether the token is special."""
    group_t = 2 * np.repeat(np.arange(len(shard.documents)), shard.lengths) + shard.is_special
    rows = []
    for one in layers:
        e_tk = shard.experts[key(one)].astype(np.int64)
        kept_tk = ~shard.dropped.get(key(one), np.zeros(e_tk.shape, bool))
        cell = (group_t[:, None] * one.n_experts + e_tk)[kept_tk]
        norm, largest, c = (shard.effects[key(one)][name][kept_tk].astype(np.float64) for name in EFFECTS)
        g = shard.weights[key(one)][kept_tk].astype(np.float64)
        added = zip(outputs.SUMS, (g, norm, norm**2, g * norm, (g * norm) ** 2, c), strict=True)
        sums = {name: np.bincount(cell, values) for name, values in added}
        sums["largest"] = np.full(int(cell.max(initial=-1)) + 1, -np.inf)
        np.maximum.at(sums["largest"], cell, largest)
        picks = np.bincount(cell)
        chosen = np.flatnonzero(picks)
        for group in np.unique(group_t).tolist():
            first = np.searchsorted(chosen, [group * one.n_experts, (group + 1) * one.n_experts])
            own = chosen[slice(*first)].tolist()
            key_columns = {"shard": number, "stack": one.stack, "layer": one.layer, "doc": group // 2}
            lists = {name: values[own].tolist() for name, values in sums.items()}
            experts = {"experts": [at % one.n_experts for at in own], "picks": picks[own].tolist()}
            rows += [key_columns | {"is_special": group % 2 == 1} | experts | lists] if own else []
    return pa.Table.from_pylist(rows, schema=outputs.SCHEMA)


def _documents(number: int, shard: Shard, *, generated: bool) -> pa.Table:
    count = len(shard.documents)
    columns = {
        "shard": np.full(count, number),
        "doc": np.arange(count),
        "doc_id": shard.document_ids or [f"synthetic#{number}-{doc}" for doc in range(count)],
        "label": [label for label, _ in shard.documents],
        "source": shard.sources or ["synthetic"] * count,
        "parallel_id": shard.parallel_ids or [None] * count,
        "tokens": shard.lengths,
        "target_tokens": [None] * count,
        "characters": shard.character_counts,
        "truncated": np.zeros(count, bool) if shard.truncated is None else shard.truncated,
        "prompt_tokens": shard.prompts,
        "stopped": np.zeros(count, bool),
    }
    return _table(columns, tables.documents_schema(text=False, generated=generated))


def _vocabulary(entries: Sequence[tuple[str, bool]]) -> pa.Table:
    tokens, special = zip(*entries, strict=True)
    columns = {"token_id": range(len(entries)), "token": tokens, "is_special": special}
    return _table(columns, tables.VOCAB_SCHEMA)


def _table(columns: dict, schema: pa.Schema) -> pa.Table:
    arrays = {name: pa.array(columns[name]) for name in schema.names}
    return pa.table(arrays).cast(schema)
