"""One model replica: loads once, then turns shards into committed parts.

A plain class without Ray, so that tests, benchmarks and notebooks run the very same code. A shard
is read, tokenized, run batch by batch, checked, written to scratch, published and committed; until
the commit record exists nothing of it counts, so a replica may die anywhere.

While the device computes a batch, the host puts the batch before it in place. Every array starts
as "never written" and is checked for it, so a lost token is an error, never an expert 0.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import socket
import time
import uuid
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from collector import batches, models, plan, records
from collector.capture import RouterCapture
from collector.records import Layer, LayerRouting
from collector.routers import find_routers
from collector.sources import BadRow, Document
from collector.storage import VOCAB, Commit, Part, RunDirectory, Skipped

if TYPE_CHECKING:
    from collections.abc import Iterator

    from collector.capture import Decisions
    from collector.config import RunConfig

_EXAMPLES = 3


class Stopwatch:
    """Wall time by stage."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)

    @contextlib.contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        """Adds the time spent in the context to `stage`."""
        started = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += time.perf_counter() - started


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShardText:
    """The documents of a shard, tokenized, and the rows that became none."""

    documents: list[Document]
    tokens: batches.TokenTable
    skipped: dict[str, Skipped]


class Replica:
    """Owns one model on one device; `close` takes the hooks off it."""

    def __init__(
        self, root: str, config: RunConfig, plan_hash: str, *, threads: int | None = None,
        loaded: models.LoadedModel | None = None,
    ) -> None:  # fmt: skip
        """Loads tokenizer and model and hooks the routers.

        Args:
            root: the run directory.
            config: what to record.
            plan_hash: of the plan that the shards come from; every commit record names it.
            threads: CPU threads for the model (None: torch's default).
            loaded: what `models.load` gave for this config, if it is there already.

        Raises:
            ValueError: the model cannot be loaded, has no such routers, or no room for `max_length`.
        """
        if threads is not None:
            torch.set_num_threads(threads)
        self.run = RunDirectory(root)
        self.config = config
        self.plan_hash = plan_hash
        self.loaded = loaded or models.load(config.model, config.device)
        self._check_length()
        self.routers = find_routers(self.loaded.model, config.capture.layers)
        self.keep_probabilities = "probabilities" in config.capture.store
        self.keep_text = "text" in config.capture.store
        self.capture = RouterCapture(self.loaded.model, self.routers, probabilities=self.keep_probabilities)
        self.capture.__enter__()
        self.layers = [
            Layer(layer=router.layer, n_experts=n_experts, top_k=top_k)
            for router, (n_experts, top_k) in zip(self.routers, self.capture.geometry, strict=True)
        ]
        self.dtype = records.expert_dtype(self.layers)
        self.schema = records.routing_schema(self.layers, probabilities=self.keep_probabilities)

    def close(self) -> None:
        """Takes the hooks off."""
        self.capture.__exit__(None, None, None)

    def _check_length(self) -> None:
        room = getattr(self.loaded.model.config.get_text_config(), "max_position_embeddings", None)
        if room is not None and self.config.capture.max_length > room:
            raise ValueError(
                f"--max-length {self.config.capture.max_length} exceeds the model's {room} positions; "
                f"use --max-length {room} or less"
            )

    # -- what the run says of its model ------------------------------------------------------------

    def card(self) -> dict[str, Any]:
        """What run.json says of model, routers and versions; equal for all replicas of a run."""
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        return {
            "model": {
                "id": self.config.model.model,
                "revision": getattr(model.config, "_commit_hash", None) or self.config.model.revision,
                "class": type(model).__name__,
                "model_type": model.config.model_type,
                "weights": self.config.model.weights,
                "dtype": str(model.dtype).removeprefix("torch."),
                "parameters": sum(parameter.numel() for parameter in model.parameters()),
                "fingerprint": models.fingerprint(model),
            },
            "quantization": None,
            "layers": [
                dataclasses.asdict(layer) | {"router": router.name, "router_class": type(router.module).__name__}
                for layer, router in zip(self.layers, self.routers, strict=True)
            ],
            "tokenizer": {"class": type(tokenizer).__name__, "entries": len(tokenizer)},
            "versions": _versions(),
        }

    def hints(self) -> list[str]:
        """Advice for whoever started the run."""
        return models.hints(self.loaded)

    def write_vocabulary(self) -> None:
        """Writes vocab.parquet unless it is there."""
        columns = zip(*models.readable_vocabulary(self.loaded.tokenizer), strict=True)
        table = pa.table([pa.array(c) for c in columns], names=records.VOCAB_SCHEMA.names).cast(records.VOCAB_SCHEMA)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression=records.COMPRESSION)
        self.run.store.put_new(VOCAB, sink.getvalue().to_pybytes())

    # -- one shard ---------------------------------------------------------------------------------

    def collect(self, shard: plan.Shard) -> Commit:
        """Collects one shard and commits it.

        Returns:
            The commit record that counts: this attempt's, or that of another attempt that was first.

        Raises:
            ValueError: the source changed, or a router returned what none may return.
            RuntimeError: a router did not fire exactly once.
        """
        watch = Stopwatch()
        text = self._read(shard, watch)
        routing, geometry = self._forward(text.tokens, watch)
        attempt = uuid.uuid4().hex[:12]
        files = self._write(shard.shard, attempt, text, routing, watch)
        record = Commit(
            shard=shard.shard,
            attempt=attempt,
            plan_hash=self.plan_hash,
            files=files,
            documents=len(text.documents),
            tokens=len(text.tokens.ids),
            rows=files["routing"].rows,
            characters=sum(len(document.text) for document in text.documents),
            truncated=int(text.tokens.truncated.sum()),
            skipped=text.skipped,
            batches=geometry[0],
            padded_tokens=geometry[1],
            seconds={stage: round(seconds, 4) for stage, seconds in watch.seconds.items()},
            node=socket.gethostname(),
        )
        return self.run.commit(record)

    def _read(self, shard: plan.Shard, watch: Stopwatch) -> ShardText:
        with watch("read"):
            rows = list(plan.read_shard(shard, self.config.data))
        documents = [row for row in rows if isinstance(row, Document)]
        bad = [row for row in rows if isinstance(row, BadRow)]
        with watch("tokenize"):
            texts = [document.text for document in documents]
            table = batches.tokenize(self.loaded.tokenizer, texts, self.config.capture.max_length)
        reasons: dict[str, list[str]] = defaultdict(list)
        for row in bad:
            reasons[row.reason].append(row.where)
        skipped = {r: Skipped(count=len(w), examples=tuple(w[:_EXAMPLES])) for r, w in sorted(reasons.items())}
        return ShardText(documents=documents, tokens=table, skipped=skipped)

    def _forward(self, tokens: batches.TokenTable, watch: Stopwatch) -> tuple[list[LayerRouting], tuple[int, int]]:
        """Runs all batches; returns the routing by layer and (batches, padded tokens)."""
        routing = [
            LayerRouting.unwritten(layer, len(tokens.ids), self.dtype, probabilities=self.keep_probabilities)
            for layer in self.layers
        ]
        budget = self.config.capture.tokens_per_batch
        assert budget is not None, "resolved before a replica exists"
        waiting: tuple[batches.Batch, Decisions] | None = None
        count = padded = 0
        with watch("forward"):
            packed = batches.pack(tokens.lengths, budget) if len(tokens.ids) else []
            for documents in packed:
                batch = batches.pad(tokens, documents, self.loaded.pad_id)
                ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
                decisions = self.capture.run(ids, mask)
                if waiting is not None:
                    _put_in_place(routing, *waiting)
                waiting = batch, decisions
                count, padded = count + 1, padded + batch.input_ids.size
            if waiting is not None:
                _put_in_place(routing, *waiting)
        for layer in routing:
            layer.check()
        return routing, (count, padded)

    # -- writing -----------------------------------------------------------------------------------

    def _write(
        self, shard: int, attempt: str, text: ShardText, routing: list[LayerRouting], watch: Stopwatch
    ) -> dict[str, Part]:
        """Writes the three tables to scratch, re-reads their footers, publishes them."""
        tokens = len(text.tokens.ids)
        expected = {"routing": tokens * len(routing), "tokens": tokens, "documents": len(text.documents)}
        with self.run.scratch() as scratch:
            folder = Path(scratch)
            with watch("encode"):
                self._write_routing(folder / "routing", shard, text, routing)
                records.write_table(folder / "tokens", _tokens_table(shard, text.tokens))
                records.write_table(folder / "documents", _documents_table(shard, text, keep_text=self.keep_text))
            for table, rows in expected.items():
                found = pq.read_metadata(folder / table).num_rows
                if found != rows:
                    raise RuntimeError(f"{table} part of shard {shard} holds {found} rows instead of {rows}")
            with watch("publish"):
                return {
                    table: self.run.publish_part(folder / table, shard, attempt, table, rows)
                    for table, rows in expected.items()
                }

    def _write_routing(self, path: Path, shard: int, text: ShardText, routing: list[LayerRouting]) -> None:
        labels = pa.array([document.label for document in text.documents], pa.string()).dictionary_encode()
        per_token = labels.take(pa.array(text.tokens.doc))
        with records.routing_writer(path, self.schema) as writer:
            for layer in routing:
                table = records.routing_table(
                    shard, layer, self.schema, label=per_token, is_special=text.tokens.is_special
                )
                writer.write_table(table)


def _put_in_place(routing: list[LayerRouting], batch: batches.Batch, decisions: Decisions) -> None:
    """Writes a batch's decisions to the slots of its tokens."""
    for layer, decision in zip(routing, decisions.wait(), strict=True):
        layer.experts_tk[batch.slots] = decision.experts_tk.numpy()
        layer.weights_tk[batch.slots] = decision.weights_tk.float().numpy()
        for name, values in zip(records.STATISTICS, decision.statistics_3t.numpy(), strict=True):
            layer.statistics[name][batch.slots] = values
        if layer.probabilities_te is not None and decision.probabilities_te is not None:
            layer.probabilities_te[batch.slots] = decision.probabilities_te.numpy()


def _tokens_table(shard: int, tokens: batches.TokenTable) -> pa.Table:
    count = len(tokens.ids)
    columns = [np.full(count, shard), np.arange(count), tokens.doc, tokens.position, tokens.ids, tokens.is_special]
    schema = records.TOKENS_SCHEMA
    return pa.Table.from_arrays([pa.array(c).cast(f.type) for c, f in zip(columns, schema, strict=True)], schema=schema)


def _documents_table(shard: int, text: ShardText, *, keep_text: bool) -> pa.Table:
    documents = text.documents
    columns: dict[str, Any] = {
        "shard": [shard] * len(documents),
        "doc": range(len(documents)),
        "doc_id": [document.id for document in documents],
        "label": [document.label for document in documents],
        "source": [document.source for document in documents],
        "parallel_id": [document.parallel_id for document in documents],
        "tokens": text.tokens.lengths,
        "characters": [len(document.text) for document in documents],
        "truncated": text.tokens.truncated,
        "text": [document.text for document in documents],
    }
    schema = records.documents_schema(text=keep_text)
    arrays = [
        pa.array(columns[f.name], pa.string()).dictionary_encode()
        if pa.types.is_dictionary(f.type)
        else pa.array(columns[f.name], f.type)
        for f in schema
    ]
    return pa.Table.from_arrays(arrays, schema=schema)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("moe-routing-collector", "torch", "transformers", "pyarrow")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
