"""Runs of any size without a model: random routing, written and committed as a replica writes.

    python -m benchmarks.generated runs/generated --tokens 1000000

Every language has its own taste for experts in each layer, a document keeps to a part of it, and token ids follow
Zipf's law: counts, entropies and compression are of the size that a real run has. Labels, lengths and routing are
random under a seed. What each token gets is drawn from a pool of routings per language and layer, for the draws
themselves would take longer than all queries together.
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
"""Routings per language and layer that tokens draw from."""
NEIGHBOURHOOD = 512
"""Of these a document draws from so many."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Geometry:
    """The size of a generated run."""

    tokens: int = 1_000_000
    """Tokens in all, about."""
    layers: int = 16
    """Router layers."""
    experts: int = 64
    """E, experts per layer."""
    top_k: int = 8
    """k, experts chosen per token."""
    languages: int = 20
    """Labels, in turns."""
    mean_length: int = 500
    """Tokens per document, as a mean."""
    docs_per_shard: int = 200
    """Documents per shard."""
    seed: int = 0
    """Of everything random."""

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
        """How many shards that makes."""
        return -(-self.tokens // (self.mean_length * self.docs_per_shard))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pool:
    """Routings of one layer that tokens draw from; D languages, P of each."""

    experts_dpk: NDArray[np.uint8 | np.uint16]
    weights_dpk: NDArray[np.float32]
    statistics_dp: dict[str, NDArray[np.float32]]

    @classmethod
    def draw(cls, rng: np.random.Generator, geometry: Geometry, layer: Layer) -> Pool:
        """Random routers' distributions, which depend on the language, and their k best experts."""
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
        """The routing of T tokens, from a place of the pool of each one's language."""
        return LayerRouting(
            geometry=layer,
            experts_tk=self.experts_dpk[language_t, place_t],
            weights_tk=self.weights_dpk[language_t, place_t],
            statistics={name: values[language_t, place_t] for name, values in self.statistics_dp.items()},
        )


def _as_bfloat16(values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Cut to the precision in which most models apply their weights."""
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
        "format": 1, "config": {"model": "generated", "store": [], "token_ids": "keep"}, "plan_hash": "generated",
        "plan": {"shards": geometry.shards, "documents": geometry.shards * geometry.docs_per_shard},
        "model": {"id": "generated", "model_type": "none", "weights": "random"}, "memory": {"summary": "no weights"},
        "tokenizer": {"entries": VOCABULARY},
        "layers": [dataclasses.asdict(each) | {"router": f"layers.{each.layer}"} for each in routers],
    }  # fmt: skip
    run.store.put_new(RUN, json.dumps(info).encode())
    _write_vocabulary(run)
    pools = [Pool.draw(rng, geometry, layer) for layer in routers]
    schema = routing_table.schema(routers, probabilities=False)
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
    """The run of so many tokens in a folder, made if it is not there whole."""
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
