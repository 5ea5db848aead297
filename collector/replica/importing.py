"""Makes a run of routing that another program dumped: `collector import`.

The run has a frozen plan, parts and commit records like any other, so an interrupted import goes on where it stopped,
and `verify` can tell whether it is whole. One shard is read while the one before is written. What the dump does not
have is null in the tables, and run.json names it (`imported.lacks`), so that queries that need it refuse.
"""

from __future__ import annotations

import contextlib
import dataclasses
import socket
import uuid
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from collector.capture import routing_table
from collector.capture.batches import TokenTable, special_ids
from collector.capture.routing import ShardRouting
from collector.capture.routing_table import LayerRouting
from collector.capture.shard_text import ShardText
from collector.data.dumps import NO_PROMPTS, Cut, Dump, Dumped, open_dump
from collector.data.plan import Plan, Shard, differences
from collector.data.sources import BadRow, Document
from collector.pipeline import Pipeline, Stage, Stopwatch
from collector.replica.card import versions, vocabulary
from collector.replica.completing import finish, record_card
from collector.replica.part_writer import PartWriter
from collector.store import tables
from collector.store.run_directory import PLAN, REJECTS, TABLES, VOCAB, Commit, RunDirectory
from collector.store.tables import Layer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from collector.config import DumpKind, ImportConfig

STACK = "decoder"
_IN_WORK = 2
"""Shards in memory: one is read while the other is written."""


def import_dump(
    dump: str, out: str, kind: DumpKind, config: ImportConfig,
    progress: Callable[[int, int], None] = lambda _done, _all: None,
) -> tuple[RunDirectory, list[str]]:  # fmt: skip
    """Imports a dump, or resumes an import.

    Args:
        dump: file, folder or glob.
        out: the run directory.
        kind: what wrote the dump.
        config: what is known of it.
        progress: called after each shard with the number of shards done and the total.

    Returns:
        The complete run, and lines that its user should read.

    Raises:
        ValueError: the dump or a setting is unusable, or `out` holds another run.
    """
    run, opened = RunDirectory(out), open_dump(dump, kind, config)
    tokenizer = _tokenizer(config)
    plan = _freeze(run, opened, {"from": kind, "dump": dump, **config.to_dict()})
    opened.learn(plan.config["geometry"])
    record_card(run, plan, _card(opened, kind, config, tokenizer))
    if tokenizer is not None:
        run.store.put_new(VOCAB, vocabulary(tokenizer))
    done = run.committed_shards()
    left = [shard for shard in plan.shards if shard.shard not in done]
    importer = Importer(run, plan, opened, special_ids=() if tokenizer is None else special_ids(tokenizer).tolist())
    with contextlib.closing(importer):
        for number, _ in enumerate(importer.collect_all(left), len(plan.shards) - len(left) + 1):
            progress(number, len(plan.shards))
    finish(run, plan)
    lost = [f"{opened.lost:,} tokens without routing were left out"] if opened.lost else []
    return run, [*opened.notes(), *lost]


def _freeze(run: RunDirectory, dump: Dump, settings: Mapping[str, Any]) -> Plan:
    """Writes the plan of a new run, or reads that of one to resume."""
    stored = run.read_or_none(PLAN)
    if stored is None:
        plan = _new_plan(dump, settings)
        if run.store.put_new(PLAN, plan.to_parquet()):
            return plan
        stored = run.store.read(PLAN)
    plan = Plan.from_parquet(stored)
    planned = {key: value for key, value in plan.config.items() if key not in _ADDED}
    found = differences(planned, settings) or _changed(plan, dump)
    if found:
        raise ValueError(
            f"{run.root} holds a run with another plan:\n  " + "\n  ".join(found)
            + "\nGo on with the old settings, or choose another folder."
            + ("" if run.committed_shards() else " Nothing was imported there yet: you may delete it.")
        )  # fmt: skip
    return plan


_ADDED = ("geometry", "token_ids", "record", "store")
"""Of a plan's settings those that no user gave."""


def _new_plan(dump: Dump, settings: Mapping[str, Any]) -> Plan:
    fingerprints = dump.fingerprints()
    cuts = list(dump.cut())
    # A shard of FLAME is of all files of the folder; each of them is in the plan's sources.
    shards = tuple(_shard(number, cut, fingerprints.get(cut.source, "")) for number, cut in enumerate(cuts))
    added = {"geometry": dump.geometry(), "token_ids": "keep", "record": ["routing"], "store": []}
    return Plan(shards=shards, config={**settings, **added}, sources=fingerprints)


def _shard(number: int, cut: Cut, fingerprint: str) -> Shard:
    return Shard(
        shard=number, source=cut.source, name=cut.name, kind="dump", first_row=cut.first_row, rows=cut.rows,
        offset=cut.offset, keep=None, fingerprint=fingerprint,
    )  # fmt: skip


def _changed(plan: Plan, dump: Dump) -> list[str]:
    now = dump.fingerprints()
    return [
        *(f"{location} is gone" for location in plan.sources if location not in now),
        *(f"{location} has been added" for location in now if location not in plan.sources),
        *(f"{location} has changed" for location in now if now[location] != plan.sources.get(location, now[location])),
    ]


def _tokenizer(config: ImportConfig) -> Any:
    if config.tokenizer is None:
        return None
    from collector.config import ModelConfig
    from collector.models.loading import load_tokenizer

    return load_tokenizer(ModelConfig(model=config.tokenizer))


def _layers(dump: Dump) -> list[Layer]:
    return [Layer(stack=STACK, **dataclasses.asdict(router)) for router in dump.routers]


def _card(dump: Dump, kind: DumpKind, config: ImportConfig, tokenizer: Any) -> dict[str, Any]:
    """What run.json says of the dump, in place of a replica's model."""
    card = {
        "model": {"id": config.model},
        "imported": {"from": kind, "lacks": list(dump.lacks)},
        "stacks": [STACK],
        "layers": [
            dataclasses.asdict(layer) | {"router": f"layer {layer.layer}", "router_class": kind}
            for layer in _layers(dump)
        ],
        "versions": versions(),
    }
    if tokenizer is not None:
        card["tokenizer"] = {"class": type(tokenizer).__name__, "entries": len(tokenizer)}
    return card


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Read:
    """A shard of the dump, read."""

    shard: int
    text: ShardText
    routing: ShardRouting
    watch: Stopwatch


class Importer:
    """Turns shards of a dump into committed parts; `close` ends its threads."""

    def __init__(self, run: RunDirectory, plan: Plan, dump: Dump, special_ids: Sequence[int] = ()) -> None:
        """Touches nothing yet.

        Args:
            run: the run directory.
            plan: of the run.
            dump: knows its routers.
            special_ids: token ids that count as special.
        """
        self.run, self.plan_hash, self.dump = run, plan.hash, dump
        self.layers = _layers(dump)
        self._special_ids = np.array(sorted(special_ids), np.int64)
        self._schema = routing_table.schema(self.layers, lacks=dump.lacks)
        answered = NO_PROMPTS not in dump.lacks
        documents = tables.documents_schema(text=False, generated=answered, lacks=dump.lacks)
        self._writer = PartWriter(run, documents=documents, token_ids="keep")
        self._pipeline = Pipeline(
            Stage(name="read", step=self._read), Stage(name="write", step=self._write), room=_IN_WORK
        )

    def close(self) -> None:
        """Ends the threads once their current stages are done."""
        self._pipeline.close()

    def collect_all(self, shards: Sequence[Shard]) -> Iterator[Commit]:
        """Yields the commit records of shards in order.

        Raises:
            ValueError: the dump cannot be read here, in the place of that shard's record.
        """
        return cast("Iterator[Commit]", self._pipeline.map(shards))

    def _read(self, shard: Shard) -> _Read:
        watch = Stopwatch()
        with watch("read"):
            rows = list(self.dump.read(shard))
            if len(rows) != shard.rows:
                raise ValueError(
                    f"{shard.source} has {len(rows):,} of the {shard.rows:,} documents of shard {shard.shard}: it "
                    "changed since the run was planned; restore it, or import it to another folder"
                )
            found = [row for row in rows if isinstance(row, Dumped)]
            bad = [row for row in rows if isinstance(row, BadRow)]
            tokens = self._tokens(found)
            documents = [
                Document(
                    text="", label=one.label, id=one.id, parallel_id=one.parallel_id, source=one.source, row=one.row
                )
                for one in found
            ]
            text = ShardText(documents=documents, tokens={STACK: tokens}, bad=bad)
            routing = ShardRouting([*self._routing(found)], self._schema)
        return _Read(shard=shard.shard, text=text, routing=routing, watch=watch)

    def _tokens(self, found: Sequence[Dumped]) -> TokenTable:
        ids = _joined([document.token_ids for document in found], np.zeros(0, np.int64))
        starts = np.cumsum([0, *(len(document.token_ids) for document in found)])
        return TokenTable(
            ids=ids, is_special=np.isin(ids, self._special_ids), starts=starts, truncated=np.zeros(len(found), bool),
            places=_joined([document.positions for document in found], np.zeros(0, np.int64)),
            prompt_lengths=np.array([document.prompt_tokens for document in found], np.int64),
        )  # fmt: skip

    def _routing(self, found: Sequence[Dumped]) -> Iterator[LayerRouting]:
        dtype = routing_table.expert_dtype(self.layers)
        for number, layer in enumerate(self.layers):
            none = np.zeros((0, layer.top_k))
            experts_tk = _joined([each.experts[:, number, : layer.top_k] for each in found], none).astype(dtype)
            scored = [each.probabilities[:, number, : layer.top_k] for each in found if each.probabilities is not None]
            scores_tk = _joined(scored, none).astype(np.float32) if "weights" not in self.dump.lacks else None
            mass = {} if scores_tk is None else {"topk_mass": scores_tk.sum(axis=1)}
            yield LayerRouting(geometry=layer, experts_tk=experts_tk, weights_tk=scores_tk, statistics=mass)

    def _write(self, read: _Read) -> Commit:
        attempt, text = uuid.uuid4().hex[:12], read.text
        files = self._writer.write(read.shard, attempt, text, [read.routing], read.watch)
        record = Commit(
            shard=read.shard, attempt=attempt, plan_hash=self.plan_hash, files=files, documents=len(text.documents),
            tokens=text.count, rows=sum(part.rows for table, part in files.items() if table not in (*TABLES, REJECTS)),
            characters=0, truncated=0, skipped=text.skipped, batches=0, padded_tokens=0,
            several_labels=sum(len(document.labels) > 1 for document in text.documents),
            seconds={stage: round(seconds, 4) for stage, seconds in read.watch.seconds.items()},
            node=socket.gethostname(),
        )  # fmt: skip
        return self.run.commit(record)


def _joined(arrays: Sequence[NDArray], empty: NDArray) -> NDArray:
    return np.concatenate(arrays) if arrays else empty
