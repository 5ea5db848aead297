"""A replica loads the model once, then collects shards one after the other.

It is a plain class without Ray, so that tests, benchmarks and notebooks run the very same code. A shard goes through
three stages: read and tokenize, run batch by batch, write and commit. Each stage has its own thread, so that the
device computes one shard while the next is read and the one before is written. Beside a GPU a further thread puts
results in place, and two write. Nothing of a shard counts until its commit record exists, so a replica may die
anywhere. The content of a shard's parts depends on the shard alone, whatever else is in work.

torch computes in the device's thread only, loading included. OpenMP keeps a team of threads for each thread that calls
it, and two teams put each other to sleep, which on a CPU costs a small model half its speed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import time
import uuid
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from collector import token_ids
from collector.capture import batches
from collector.capture.answers import with_answers
from collector.capture.generation import Generation, require_cache
from collector.capture.hooks import Capture
from collector.capture.passes import ForwardPasses, Here
from collector.capture.recorders import need_head, recorders_for
from collector.capture.shard_text import ShardText
from collector.data import plan
from collector.models import heads, loading
from collector.models.routers import find_routers
from collector.models.stop_tokens import stop_tokens
from collector.pipeline import IN_WORK, DeviceLost, Pipeline, Stage, Stopwatch
from collector.replica.card import describe, vocabulary
from collector.replica.part_writer import PartWriter
from collector.replica.shard_reader import ShardReader
from collector.store import tables
from collector.store.run_directory import REJECTS, TABLES, VOCAB, Commit, RunDirectory

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from numpy.typing import NDArray

    from collector.capture.passes import Passes, Placing
    from collector.config import RunConfig, Spread

__all__ = ["IN_WORK", "Replica"]

WRITERS = 2
"""Shards that a replica beside a GPU writes at once, because a GPU computes faster than a core encodes."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Read:
    """A shard after the first stage."""

    shard: int
    text: ShardText
    watch: Stopwatch


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Recorded:
    """A shard after its forward passes."""

    read: _Read
    tokens: dict[str, batches.TokenTable]
    """The tokens of the documents, with those that the model wrote."""
    placing: Placing
    passes: Passes


class Replica:
    """Owns one model on one device, and the threads of its stages; `close` ends the threads and removes the hooks."""

    def __init__(
        self, root: str, config: RunConfig, plan_hash: str, *, threads: int | None = None,
        loaded: loading.LoadedModel | None = None, spread: Spread | None = None,
    ) -> None:  # fmt: skip
        """Loads tokenizer and model, and hooks the routers.

        Args:
            root: the run directory.
            config: what to record.
            plan_hash: hash of the shards' plan; every commit record holds it.
            threads: CPU threads for the model (None: torch's default).
            loaded: the result of `loading.load` for this config, if there is one already.
            spread: how the weights are spread, if one device does not hold them all.

        Raises:
            ValueError: the model cannot be loaded, has no such routers, or no room for `max_length`.
        """
        self._threads = threads
        self.run = RunDirectory(root)
        self.config = config
        self.plan_hash = plan_hash
        self._device_busy_until: float | None = None
        # On a CPU further threads would only take the cores that the model computes on.
        beside = config.device != "cpu"
        self._placer: Executor = ThreadPoolExecutor(1, thread_name_prefix="place") if beside else Here()
        self._pipeline = Pipeline(
            Stage(name="read", step=self._read),
            Stage(name="device", step=self._forward, prepare=self._use_threads),
            Stage(name="write", step=self._write, threads=WRITERS if beside else 1),
        )
        try:
            self._pipeline.call("device", self._load, loaded, spread)
        except BaseException:
            self._pipeline.close()
            raise

    def _load(self, loaded: loading.LoadedModel | None, spread: Spread | None) -> None:
        config = self.config
        self.loaded = loaded or loading.load(config.model, config.device, spread)
        two_stacks = bool(getattr(self.loaded.model.config, "is_encoder_decoder", False))
        stacks = config.capture.stacks or (("encoder",) if two_stacks else None)
        self.routers = find_routers(self.loaded.model, config.capture.layers, stacks)
        generates = config.capture.generate is not None
        self._check_generation(two_stacks=two_stacks)
        head = heads.load_head(config.model, self.loaded) if generates or need_head(config.capture) else None
        recorders = recorders_for(self.loaded.model, self.routers, config.capture, head)
        self.capture = Capture(self.loaded.model, recorders, device=self.loaded.device, to_the_end=generates)
        self._reader = ShardReader(config, self.loaded, two_stacks=two_stacks, decodes=self.capture.decodes)
        with contextlib.ExitStack() as undo:
            undo.enter_context(self.capture)
            self._generation = self._generating(head) if head is not None and generates else None
            undo.pop_all()
        self._passes = ForwardPasses(
            capture=self.capture, pad_id=self.loaded.pad_id, config=config.capture, placer=self._placer
        )
        self._writer = PartWriter(
            self.run,
            documents=tables.documents_schema(
                text="text" in config.capture.store, target=config.data.target_column is not None, generated=generates
            ),
            token_ids=config.capture.token_ids,
            hashed_ids=self._hashed_ids(),
            added_fields=[field for recorder in recorders for field in recorder.token_fields],
        )

    def _generating(self, head: heads.Head) -> Generation:
        """Prepares what writes answers."""
        config, loaded = self.config, self.loaded
        require_cache(self.capture)
        return Generation(
            capture=self.capture, head=head, pad_id=loaded.pad_id, config=config.capture, seed=config.model.seed,
            stop_ids=stop_tokens(config.model, loaded, config.capture.stop_at),
            special_ids=batches.special_ids(loaded.tokenizer), placer=self._placer,
        )  # fmt: skip

    def close(self) -> None:
        """Ends the threads once their current stages are done, and removes the hooks.

        Shards that are still in work are not committed. Closing twice does no harm.
        """
        self._pipeline.close()
        self._placer.shutdown()
        self.capture.__exit__(None, None, None)

    def _use_threads(self) -> None:
        """Sets the number of threads in the calling thread, because OpenMP counts per thread."""
        if self._threads is not None:
            torch.set_num_threads(self._threads)

    def _hashed_ids(self) -> NDArray[np.uint32] | None:
        """[vocabulary] the number that is recorded for each id; None unless ids are hashed."""
        if self.config.capture.token_ids != "hash":
            return None
        embedding: Any = self.loaded.model.get_input_embeddings()
        return token_ids.permutation(embedding.weight.shape[0], token_ids.require_key(self.config.token_key))

    def _check_generation(self, *, two_stacks: bool) -> None:
        if self.config.capture.generate is None:
            return
        if two_stacks:
            raise ValueError(
                f"--generate writes on from a text, but --model {self.config.model.model} is an encoder–decoder model: "
                "leave it out, and give the decoder its text with --stacks decoder and --target-column"
            )
        if self.config.model.compile:
            raise ValueError("--compile does not go with --generate, whose passes have ever new shapes: leave one out")

    # -- what the run says of its model ------------------------------------------------------------

    def card(self) -> dict[str, Any]:
        """Model, recorders and versions for run.json; equal for all replicas of a run."""
        return cast(
            "dict[str, Any]",
            self._pipeline.call("device", describe, self.loaded, self.config.model, self.capture.recorders),
        )

    def write_vocabulary(self) -> None:
        """Writes vocab.parquet, unless it is there or would reveal the ids that `--token-ids` hides."""
        if self.config.capture.token_ids == "keep":
            self.run.store.put_new(VOCAB, vocabulary(self.loaded.tokenizer))

    # -- shards ------------------------------------------------------------------------------------

    def collect(self, shard: plan.Shard) -> Commit:
        """Collects one shard and commits it; several threads may do so at once, and their shards overlap.

        Returns:
            The shard's commit record: this attempt's, or that of another attempt that was first.

        Raises:
            ValueError: the source changed, or a router returned impossible values.
            RuntimeError: a router did not fire exactly once, or the replica was closed.
            DeviceLost: the device failed, and every other shard will fail on it.
        """
        return cast("Commit", self._pipeline.submit(shard).result())

    def collect_all(self, shards: Iterable[plan.Shard]) -> Iterator[Commit]:
        """Collects shards, up to `IN_WORK` at once, and yields their commit records in order.

        Raises:
            Exception: an error of `collect`, in the place of that shard's record.
        """
        return self._pipeline.map(shards)

    def _read(self, shard: plan.Shard) -> _Read:
        """First stage: reads and tokenizes documents."""
        watch = Stopwatch()
        return _Read(shard=shard.shard, text=self._reader.read(shard, watch), watch=watch)

    def _forward(self, read: _Read) -> _Recorded:
        """Second stage: runs the model. `idle` is the time that the device waited for this shard."""
        watch = read.watch
        watch.seconds["idle"] = time.perf_counter() - (self._device_busy_until or watch.started)
        try:
            with watch("forward"), self._noticing_loss():
                tokens, placing, passes = self._start(read.text)
        finally:
            self._device_busy_until = time.perf_counter()
        return _Recorded(read=read, tokens=tokens, placing=placing, passes=passes)

    def _start(self, text: ShardText) -> tuple[dict[str, batches.TokenTable], Placing, Passes]:
        if self._generation is None:
            return text.tokens, *self._passes.start(text.tokens)
        # Not the file's name, which another machine may not share.
        names = [f"{document.id}\0{document.label}" for document in text.documents]
        return self._generation.start(text.tokens, names)

    @contextlib.contextmanager
    def _noticing_loss(self) -> Iterator[None]:
        try:
            yield
        except torch.AcceleratorError as error:
            raise DeviceLost(
                f"{self.loaded.device} failed, and computes nothing more in this process: {error}"
            ) from error

    def _write(self, recorded: _Recorded) -> Commit:
        """Last stage: checks, encodes, publishes and commits."""
        read, attempt = recorded.read, uuid.uuid4().hex[:12]
        text, watch = read.text, read.watch
        if self._generation is not None:
            text = with_answers(text, recorded.tokens, self.loaded.tokenizer)
        with self._noticing_loss():
            recordings = recorded.placing.finish()
        watch.seconds["place"] = recorded.placing.seconds
        files = self._writer.write(read.shard, attempt, text, recordings, watch)
        record = Commit(
            shard=read.shard,
            attempt=attempt,
            plan_hash=self.plan_hash,
            files=files,
            documents=len(text.documents),
            tokens=text.count,
            rows=sum(part.rows for table, part in files.items() if table not in (*TABLES, REJECTS)),
            characters=sum(text.characters),
            several_labels=sum(len(document.labels) > 1 for document in text.documents),
            truncated=int(text.truncated.sum()),
            skipped=text.skipped,
            **dataclasses.asdict(recorded.passes),
            seconds={stage: round(seconds, 4) for stage, seconds in watch.seconds.items()},
            node=socket.gethostname(),
        )
        return self.run.commit(record)
