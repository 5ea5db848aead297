"""One model replica: loads once, then turns shards into committed parts.

A plain class without Ray, so that tests, benchmarks and notebooks run the very same code. A shard
is read, tokenized, run batch by batch, checked, written to scratch, published and committed; until
the commit record exists nothing of it counts, so a replica may die anywhere.

While the device computes a batch, the host puts the batch before it in place. Every array starts
as "never written" and is checked for it, so a lost token is an error, never an expert 0. A batch that
does not fit into the GPU's memory is halved until it does; padding is always on the right.
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

from collector import batches, footprint, models, plan, records
from collector.capture import RouterCapture
from collector.records import Layer, LayerRouting
from collector.routers import find_routers
from collector.sources import BadRow, Document
from collector.storage import VOCAB, Commit, Part, RunDirectory, Skipped

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

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
    tokens: dict[str, batches.TokenTable]
    """Stack -> the tokens that it is given, in the order of the tokens table."""
    skipped: dict[str, Skipped]

    @property
    def count(self) -> int:
        """Tokens in all."""
        return sum(len(table.ids) for table in self.tokens.values())

    def first_tok(self, stack: str) -> int:
        """Where a stack's tokens begin in the tokens table."""
        before = list(self.tokens)[: list(self.tokens).index(stack)]
        return sum(len(self.tokens[each].ids) for each in before)

    @property
    def truncated(self) -> NDArray[np.bool_]:
        """[D] whether a text of the document was cut."""
        return np.logical_or.reduce([table.truncated for table in self.tokens.values()])


@dataclasses.dataclass(kw_only=True)
class Passes:
    """The forward passes of a shard."""

    batches: int = 0
    padded_tokens: int = 0
    halved: int = 0


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
        two_stacks = bool(getattr(self.loaded.model.config, "is_encoder_decoder", False))
        stacks = config.capture.stacks or (("encoder",) if two_stacks else None)
        self.routers = find_routers(self.loaded.model, config.capture.layers, stacks)
        self.keep_probabilities = "probabilities" in config.capture.store
        self.keep_text = "text" in config.capture.store
        self.capture = RouterCapture(
            self.loaded.model, self.routers, probabilities=self.keep_probabilities, device=self.loaded.device
        )
        self._check_target()
        self.capture.__enter__()
        self.layers = [
            Layer(stack=router.stack, layer=router.layer, **geometry._asdict())
            for router, geometry in zip(self.routers, self.capture.geometry, strict=True)
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

    def _check_target(self) -> None:
        column = self.config.data.target_column
        if column is not None and not self.capture.decodes:
            raise ValueError(
                f"--target-column {column}: nothing reads it; it is the text of the decoder of an encoder–decoder "
                "model, recorded with --stacks decoder"
            )
        if self.capture.decodes and self.loaded.model.config.decoder_start_token_id is None:
            raise ValueError(
                "--stacks decoder: the model's config has no decoder_start_token_id, which every text of the decoder "
                "begins with; set it in the checkpoint's config.json"
            )

    # -- what the run says of its model ------------------------------------------------------------

    def card(self) -> dict[str, Any]:
        """What run.json says of model, routers and versions; equal for all replicas of a run."""
        model, tokenizer = self.loaded.model, self.loaded.tokenizer
        memory = footprint.describe(model, self.loaded.compute_dtype)
        return {
            "model": {
                "id": self.config.model.model,
                "revision": getattr(model.config, "_commit_hash", None) or self.config.model.revision,
                "class": type(model).__name__,
                "model_type": model.config.model_type,
                "weights": self.config.model.weights,
                "dtype": str(model.dtype).removeprefix("torch."),
                "parameters": sum(part["parameters"] for part in memory["treatments"].values()),
                "fingerprint": models.fingerprint(model),
            },
            "memory": memory,
            "stacks": list(dict.fromkeys(layer.token_stack for layer in self.layers)),
            "layers": [
                dataclasses.asdict(layer) | {"router": router.name, "router_class": type(router.module).__name__}
                for layer, router in zip(self.layers, self.routers, strict=True)
            ],
            "tokenizer": {"class": type(tokenizer).__name__, "entries": len(tokenizer)},
            "versions": _versions(),
        }

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
        routing, passes = self._forward(text.tokens, watch)
        attempt = uuid.uuid4().hex[:12]
        files = self._write(shard.shard, attempt, text, routing, watch)
        record = Commit(
            shard=shard.shard,
            attempt=attempt,
            plan_hash=self.plan_hash,
            files=files,
            documents=len(text.documents),
            tokens=text.count,
            rows=files["routing"].rows,
            characters=sum(len(document.text) for document in text.documents),
            truncated=int(text.truncated.sum()),
            skipped=text.skipped,
            **dataclasses.asdict(passes),
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
            tokens = self._tokenize(documents)
        reasons: dict[str, list[str]] = defaultdict(list)
        for row in bad:
            reasons[row.reason].append(row.where)
        skipped = {r: Skipped(count=len(w), examples=tuple(w[:_EXAMPLES])) for r, w in sorted(reasons.items())}
        return ShardText(documents=documents, tokens=tokens, skipped=skipped)

    def _tokenize(self, documents: list[Document]) -> dict[str, batches.TokenTable]:
        """What each stack that runs is given."""
        tokenizer, longest = self.loaded.tokenizer, self.config.capture.max_length
        text = batches.tokenize(tokenizer, [document.text for document in documents], longest)
        if not self.capture.two_stacks:
            return {"decoder": text}
        tokens = {"encoder": text}
        if self.capture.decodes:
            targets = [document.text if document.target is None else document.target for document in documents]
            target = batches.tokenize(tokenizer, targets, longest, as_target=True)
            tokens["decoder"] = batches.shift_right(target, int(self.loaded.model.config.decoder_start_token_id))
        return tokens

    def _forward(self, tokens: dict[str, batches.TokenTable], watch: Stopwatch) -> tuple[list[LayerRouting], Passes]:
        """Runs all batches; returns the routing by router, and what it took."""
        routing = [
            LayerRouting.unwritten(
                layer, len(tokens[layer.token_stack].ids), self.dtype, probabilities=self.keep_probabilities
            )
            for layer in self.layers
        ]
        budget = self.config.capture.tokens_per_batch
        assert budget is not None, "resolved before a replica exists"
        passes = Passes()
        waiting: tuple[dict[str, batches.Batch], Decisions] | None = None
        with watch("forward"):
            lengths = np.stack([table.lengths for table in tokens.values()], axis=1)
            todo = batches.pack(lengths, budget)[::-1] if lengths.any() else []
            while todo:
                documents = todo.pop()
                batch = {stack: batches.pad(table, documents, self.loaded.pad_id) for stack, table in tokens.items()}
                decisions = self._run(batch)
                if decisions is None:
                    middle = (len(documents) + 1) // 2
                    todo += [documents[middle:], documents[:middle]]
                    passes.halved += 1
                    continue
                if waiting is not None:
                    _put_in_place(routing, *waiting)
                waiting = batch, decisions
                passes.batches += 1
                passes.padded_tokens += sum(grid.input_ids.size for grid in batch.values())
            if waiting is not None:
                _put_in_place(routing, *waiting)
        for layer in routing:
            layer.check()
        return routing, passes

    def _run(self, batch: dict[str, batches.Batch]) -> Decisions | None:
        """One forward pass; None if it does not fit into the GPU's memory, but a part of it may.

        Raises:
            torch.OutOfMemoryError: it is a single document that does not fit.
        """
        grids = [torch.from_numpy(part) for grid in batch.values() for part in (grid.input_ids, grid.attention_mask)]
        try:
            return self.capture.run(*grids)
        except torch.OutOfMemoryError as error:
            if len(grids[0]) == 1:
                tokens = " + ".join(str(grid.input_ids.size) for grid in batch.values())
                raise torch.OutOfMemoryError(
                    f"a single document of {tokens} tokens does not fit into the device's memory: cut documents with "
                    f"a lower --max-length (now {self.config.capture.max_length}); a lower --tokens-per-batch makes "
                    f"batches smaller, but none is smaller than a document. {error}"
                ) from error
        # Only here is the failed pass gone, with the tensors that its traceback held.
        torch.cuda.empty_cache()
        return None

    # -- writing -----------------------------------------------------------------------------------

    def _write(
        self, shard: int, attempt: str, text: ShardText, routing: list[LayerRouting], watch: Stopwatch
    ) -> dict[str, Part]:
        """Writes the three tables to scratch, re-reads their footers, publishes them."""
        rows = sum(len(layer.experts_tk) for layer in routing)
        expected = {"routing": rows, "tokens": text.count, "documents": len(text.documents)}
        with self.run.scratch() as scratch:
            folder = Path(scratch)
            with watch("encode"):
                self._write_routing(folder / "routing", shard, text, routing)
                records.write_table(folder / "tokens", _tokens_table(shard, text))
                records.write_table(folder / "documents", self._documents_table(shard, text))
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
        per_token = {stack: labels.take(pa.array(table.doc)) for stack, table in text.tokens.items()}
        with records.routing_writer(path, self.schema) as writer:
            for layer in routing:
                stack = layer.geometry.token_stack
                table = records.routing_table(
                    shard, layer, self.schema, label=per_token[stack], is_special=text.tokens[stack].is_special,
                    first_tok=text.first_tok(stack),
                )  # fmt: skip
                writer.write_table(table)

    def _documents_table(self, shard: int, text: ShardText) -> pa.Table:
        documents = text.documents
        first = next(iter(text.tokens.values()))
        columns: dict[str, Any] = {
            "shard": [shard] * len(documents),
            "doc": range(len(documents)),
            "doc_id": [document.id for document in documents],
            "label": [document.label for document in documents],
            "source": [document.source for document in documents],
            "parallel_id": [document.parallel_id for document in documents],
            "tokens": first.lengths,
            "target_tokens": text.tokens["decoder"].lengths if self.capture.decodes else [None] * len(documents),
            "characters": [len(document.text) for document in documents],
            "truncated": text.truncated,
            "text": [document.text for document in documents],
            "target": [document.target for document in documents],
        }
        schema = records.documents_schema(text=self.keep_text, target=self.config.data.target_column is not None)
        arrays = [
            pa.array(columns[f.name], pa.string()).dictionary_encode()
            if pa.types.is_dictionary(f.type)
            else pa.array(columns[f.name], f.type)
            for f in schema
        ]
        return pa.Table.from_arrays(arrays, schema=schema)


def _put_in_place(routing: list[LayerRouting], batch: dict[str, batches.Batch], decisions: Decisions) -> None:
    """Writes a batch's decisions to the slots of its tokens."""
    for layer, decision in zip(routing, decisions.wait(), strict=True):
        slots = batch[layer.geometry.token_stack].slots
        layer.experts_tk[slots] = decision.experts_tk.numpy()
        layer.weights_tk[slots] = decision.weights_tk.float().numpy()
        for name, values in zip(records.STATISTICS, decision.statistics_3t.numpy(), strict=True):
            layer.statistics[name][slots] = values
        if layer.dropped_tk is not None and decision.dropped_tk is not None:
            layer.dropped_tk[slots] = decision.dropped_tk.numpy()
        if layer.probabilities_te is not None and decision.probabilities_te is not None:
            layer.probabilities_te[slots] = decision.probabilities_te.numpy()


def _tokens_table(shard: int, text: ShardText) -> pa.Table:
    schema = records.TOKENS_SCHEMA
    parts = []
    for stack, tokens in text.tokens.items():
        count, first = len(tokens.ids), text.first_tok(stack)
        columns: dict[str, Any] = {
            "shard": np.full(count, shard),
            "stack": records.constant(stack, count),
            "tok": np.arange(first, first + count),
            "doc": tokens.doc,
            "position": tokens.position,
            "token_id": tokens.ids,
            "is_special": tokens.is_special,
        }
        parts.append(pa.Table.from_arrays([pa.array(columns[f.name]).cast(f.type) for f in schema], schema=schema))
    return pa.concat_tables(parts)


def _versions() -> dict[str, str]:
    from importlib.metadata import version

    names = ("moe-routing-collector", "torch", "transformers", "pyarrow")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}
