"""Generates runs of any size without a model: random routing, written and committed like a replica's.

    python -m benchmarks.generated runs/generated --tokens 1000000

Every language prefers certain experts in each layer, every document uses a part of these preferences, and token ids
follow Zipf's law, so that counts, entropies and compression resemble those of a real run. Labels, lengths and routing
are random under a seed. Each token's routing is drawn from a pool per language and layer, because drawing from the
distributions themselves would take longer than all queries together.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import tyro

from collector.capture import routing_table
from collector.capture.batches import TokenTable
from collector.capture.routing import ShardRouting
from collector.capture.routing_table import LayerRouting
from collector.capture.shard_text import ShardText
from collector.data.sources import Document
from collector.pipeline import Stopwatch
from collector.replica.part_writer import PartWriter
from collector.store import tables
from collector.store.run_directory import RUN, SUCCESS, VOCAB, Commit, RunDirectory
from collector.store.tables import Layer

if TYPE_CHECKING:
    from numpy.typing import NDArray

VOCABULARY = 50_000
POOL = 4096
"""Routings per language and layer from which tokens draw."""
NEIGHBOURHOOD = 512
"""Routings of the pool from which a single document draws."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """The size of a generated run."""

    tokens: int = 1_000_000
    """Approximate total number of tokens."""
    layers: int = 16
    """Router layers."""
    experts: int = 64
    """Experts per layer, E."""
    top_k: int = 8
    """Experts chosen per token, k."""
    languages: int = 20
    """Number of labels, which documents take in turns."""
    mean_length: int = 500
    """Mean number of tokens per document."""
    docs_per_shard: int = 200
    """Documents per shard."""
    seed: int = 0
    """Seed of all random draws."""

    @property
    def routers(self) -> list[Layer]:
        """The routers of the run."""
        return [Layer(layer=layer, n_experts=self.experts, top_k=self.top_k) for layer in range(self.layers)]

    @property
    def labels(self) -> list[str]:
        """The languages."""
        return [f"lang_{number:02d}" for number in range(self.languages)]

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-self.tokens // (self.mean_length * self.docs_per_shard))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """Routings of one layer from which tokens draw: P for each of D languages."""

    experts_dpk: NDArray[np.uint8 | np.uint16]
    weights_dpk: NDArray[np.float32]
    statistics_dp: dict[str, NDArray[np.float32]]

    @classmethod
    def draw(cls, rng: np.random.Generator, geometry: Geometry, layer: Layer) -> Pool:
        """Draws random router distributions, which depend on the language, and takes their top-k experts."""
        taste_de = rng.standard_gamma(0.5, (geometry.languages, layer.n_experts)) + 0.02
        p_dpe = rng.standard_gamma(taste_de[:, None, :], (geometry.languages, POOL, layer.n_experts)) + 1e-6
        p_dpe /= p_dpe.sum(-1, keepdims=True)
        order_dpe = np.argsort(-p_dpe, axis=-1)
        sorted_dpe = np.take_along_axis(p_dpe, order_dpe, axis=-1)
        k = layer.top_k
        statistics = {
            "entropy": -(p_dpe * np.log(p_dpe)).sum(-1),
            "topk_mass": sorted_dpe[..., :k].sum(-1),
            "margin": sorted_dpe[..., k - 1] - (sorted_dpe[..., k] if k < layer.n_experts else 0),
        }
        return cls(
            experts_dpk=order_dpe[..., :k].astype(routing_table.expert_dtype([layer])),
            weights_dpk=_as_bfloat16(sorted_dpe[..., :k].astype(np.float32)),
            statistics_dp={name: values.astype(np.float32) for name, values in statistics.items()},
        )

    def routing(self, layer: Layer, language_t: NDArray[np.int64], place_t: NDArray[np.int64]) -> LayerRouting:
        """Returns the routing of T tokens, each from a position in the pool of its language."""
        return LayerRouting(
            geometry=layer,
            experts_tk=self.experts_dpk[language_t, place_t],
            weights_tk=self.weights_dpk[language_t, place_t],
            statistics={name: values[language_t, place_t] for name, values in self.statistics_dp.items()},
        )


def _as_bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Truncates to bfloat16, the precision in which most models apply their weights."""
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


def generate(root: str, geometry: Geometry) -> RunDirectory:
    """Writes a complete run.

    Args:
        root: the run directory, new.
        geometry: its size.
    """
    rng = np.random.default_rng(geometry.seed)
    run, routers = RunDirectory(root), geometry.routers
    info = {
        "format": 2, "config": {"model": "generated", "store": [], "token_ids": "keep"}, "plan_hash": "generated",
        "plan": {"shards": geometry.shards, "documents": geometry.shards * geometry.docs_per_shard},
        "model": {"id": "generated", "model_type": "none", "weights": "random"}, "memory": {"summary": "no weights"},
        "tokenizer": {"entries": VOCABULARY},
        "layers": [dataclasses.asdict(each) | {"router": f"layers.{each.layer}"} for each in routers],
    }  # fmt: skip
    run.store.put_new(RUN, json.dumps(info).encode())
    _write_vocabulary(run)
    pools = [Pool.draw(rng, geometry, layer) for layer in routers]
    schema = routing_table.schema(routers)
    writer = PartWriter(run, documents=tables.documents_schema(text=False), token_ids="keep")
    for number in range(geometry.shards):
        text = _text(rng, geometry, number)
        tokens = text.tokens["decoder"]
        language_t = np.array([geometry.labels.index(document.label) for document in text.documents])[tokens.doc]
        routing = []
        for layer, pool in zip(routers, pools, strict=True):
            corner_d = rng.integers(0, POOL - NEIGHBOURHOOD, len(text.documents))
            place_t = corner_d[tokens.doc] + rng.integers(0, NEIGHBOURHOOD, text.count)
            routing.append(pool.routing(layer, language_t, place_t))
        _commit(
            run, number, text, writer.write(number, "generated", text, [ShardRouting(routing, schema)], Stopwatch())
        )
    run.finish("generated", geometry.shards)
    return run


def generated(folder: Path, tokens: int) -> str:
    """Returns the run of this many tokens in a folder; generates it unless it is complete."""
    root = folder / str(tokens)
    if not (root / SUCCESS).exists():
        generate(str(root), Geometry(tokens=tokens))
    return str(root)


def _text(rng: np.random.Generator, geometry: Geometry, number: int) -> ShardText:
    count = geometry.docs_per_shard
    lengths = rng.integers(geometry.mean_length // 2, geometry.mean_length * 3 // 2 + 1, count)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    ids = rng.zipf(1.2, int(starts[-1])) % VOCABULARY
    is_special = np.zeros(len(ids), bool)
    is_special[starts[:-1]] = True
    documents = []
    for doc, length in enumerate(lengths):
        sentence, language = divmod(number * count + doc, geometry.languages)
        documents.append(
            Document(
                text="x" * int(4 * length), label=geometry.labels[language], id=f"generated#{number * count + doc}",
                parallel_id=f"sentence {sentence}", source="generated",
            )
        )  # fmt: skip
    table = TokenTable(ids=ids, is_special=is_special, starts=starts, truncated=np.zeros(count, bool))
    return ShardText(documents=documents, tokens={"decoder": table}, bad=[])


def _write_vocabulary(run: RunDirectory) -> None:
    columns = {
        "token_id": np.arange(VOCABULARY), "token": [f"token {i}" for i in range(VOCABULARY)],
        "is_special": np.zeros(VOCABULARY, bool),
    }  # fmt: skip
    with run.scratch() as scratch:
        table = pa.table([pa.array(columns[name]) for name in columns], names=list(columns))
        tables.write_table(Path(scratch, VOCAB), table.cast(tables.VOCAB_SCHEMA))
        run.store.publish(Path(scratch, VOCAB), VOCAB)


def _commit(run: RunDirectory, number: int, text: ShardText, files: dict) -> None:
    run.commit(
        Commit(
            shard=number, attempt="generated", plan_hash="generated", files=files, documents=len(text.documents),
            tokens=text.count, rows=files["routing"].rows, characters=4 * text.count, truncated=0, skipped={},
            batches=1, padded_tokens=text.count, seconds={}, node="generated",
        )
    )  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Command:
    """Write a run of random routing."""

    root: tyro.conf.Positional[str]
    """The run directory, new."""
    geometry: tyro.conf.OmitArgPrefixes[Geometry] = dataclasses.field(default_factory=Geometry)


if __name__ == "__main__":
    command = tyro.cli(Command)
    generate(command.root, command.geometry)
