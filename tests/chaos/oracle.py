"""What a run of the toy model must hold, worked out from the source file by numpy, and the comparison.

Independent of the collector: tokens are bytes, the forward pass is RMSNorm, one matrix, softmax and a sort (Olmoe:
`post_attention_layernorm`, then `mlp.gate`), in float64. Only two things are taken from the run: which files its
commit records name, and what is in them.

    violations = oracle.Oracle(model_folder, source, docs_per_shard).check(root)

Demands: every expected key (document, position, layer) is there, none twice, nothing else; token ids and experts
exactly, weights within 1e-5, statistics within the rounding that `records` tells; documents and rejected rows too.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from collector.store.run_directory import RunDirectory
from tests.chaos import toy
from tests.chaos.verdict import Verdict, compare
from tests.helpers.runs import content

EPSILON = 1e-5
"""Of Olmoe's RMSNorm; read from the config where there is one."""


def logits_of(weights: dict[str, np.ndarray], layer: int, epsilon: float = EPSILON) -> np.ndarray:
    """[V, E] what the router of a layer answers to each token id."""
    hidden = weights["embed_tokens.weight"].astype(np.float64)
    hidden = hidden / np.sqrt((hidden**2).mean(-1, keepdims=True) + epsilon)
    hidden = hidden * weights[f"layers.{layer}.post_attention_layernorm.weight"].astype(np.float64)
    return hidden @ weights[f"layers.{layer}.mlp.gate.weight"].astype(np.float64).T


@dataclasses.dataclass(frozen=True, kw_only=True)
class Answers:
    """What one layer's router answers to each of V token ids."""

    experts_vk: np.ndarray
    weights_vk: np.ndarray
    statistics_v3: np.ndarray
    """Entropy in nats, top-k mass, margin."""


def answers(folder: Path) -> list[Answers]:
    """Of every layer of a toy checkpoint."""
    from safetensors.numpy import load_file

    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors")
    return [_answers(logits_of(weights, layer, config["rms_norm_eps"]), config) for layer in range(toy.LAYERS)]


def _answers(logits: np.ndarray, config: dict[str, Any]) -> Answers:
    k = config["num_experts_per_tok"]
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    order = np.argsort(-p, axis=-1)
    ranked = np.take_along_axis(p, order, -1)
    chosen = ranked[:, :k]
    mass = chosen.sum(-1)
    weights = chosen / mass[:, None] if config["norm_topk_prob"] else chosen
    statistics = np.stack([-(p * np.log(p)).sum(-1), mass, ranked[:, k - 1] - ranked[:, k]], axis=-1)
    return Answers(experts_vk=order[:, :k], weights_vk=weights, statistics_v3=statistics)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """A row of the source that is a document."""

    row: int
    id: str
    label: str
    text: str

    @property
    def ids(self) -> list[int]:
        """Its tokens, cut."""
        return [toy.BOS, *(toy.FIRST_BYTE + byte for byte in self.text.encode())][: toy.MAX_LENGTH]

    @property
    def truncated(self) -> bool:
        return len(self.text.encode()) + 1 > toy.MAX_LENGTH


def read_source(path: Path) -> tuple[list[Row], list[int]]:
    """The documents, and the numbers of the rows that are none."""
    rows, bad = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        try:
            fields = json.loads(line)
        except json.JSONDecodeError:
            fields = {}
        if fields.get("text", "").strip() and fields.get("label"):
            rows.append(Row(row=number, id=fields["id"], label=fields["label"], text=fields["text"]))
        else:
            bad.append(number)
    return rows, bad


class Oracle:
    """Knows the content of a run of the toy model."""

    def __init__(self, model: Path, source: Path, docs_per_shard: int, without: int | None = None) -> None:
        """Reads checkpoint and source; `without` is a shard that must not be there."""
        self.per_shard = docs_per_shard
        rows, bad = read_source(source)
        self.documents = [row for row in rows if row.row // docs_per_shard != without]
        self.bad = [row for row in bad if row // docs_per_shard != without]
        self.answers = answers(model)
        self.shards = {number // docs_per_shard for number in [*(row.row for row in self.documents), *self.bad]}
        places = [(row.row // docs_per_shard, row) for row in self.documents]
        in_shard = {shard: [row for of, row in places if of == shard] for shard in sorted(self.shards)}
        self.tables = {
            "tokens": _table(_token_rows(shard, rows) for shard, rows in in_shard.items()),
            "documents": _table(_document_rows(shard, rows) for shard, rows in in_shard.items()),
        }
        self.tables["routing"] = self._routing(self.tables["tokens"])

    def _routing(self, tokens: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        ids = tokens["token_id"]
        columns: dict[str, list[np.ndarray]] = {}
        for layer, answer in enumerate(self.answers):
            of_layer = {"shard": tokens["shard"], "layer": np.full(len(ids), layer), "tok": tokens["tok"]}
            of_layer |= {f"e{i}": answer.experts_vk[ids, i] for i in range(toy.TOP_K)}
            of_layer |= {f"w{i}": answer.weights_vk[ids, i] for i in range(toy.TOP_K)}
            names = ("entropy", "topk_mass", "margin")
            of_layer |= {name: answer.statistics_v3[ids, i] for i, name in enumerate(names)}
            for name, values in of_layer.items():
                columns.setdefault(name, []).append(values)
        return {name: np.concatenate(parts) for name, parts in columns.items()}

    def check(self, root: Path) -> Verdict:
        """Compares everything that a complete run committed with what it must hold."""
        verdict = Verdict()
        records = [json.loads(path.read_bytes()) for path in sorted((root / "commits").glob("*.json"))]
        verdict.shards = len(records)
        numbers = [record["shard"] for record in records]
        if not verdict.demand(sorted(numbers) == sorted(self.shards), f"committed shards {numbers}"):
            return verdict
        for name, keys in KEYS.items():
            found = pa.concat_tables([pq.read_table(root / record["files"][name]["path"]) for record in records])
            compare(verdict, name, keys, found, self.tables[name])
        verdict.rows = len(self.tables["routing"]["tok"])
        skipped = sum(of_reason["count"] for record in records for of_reason in record["skipped"].values())
        verdict.demand(skipped == len(self.bad), f"{skipped} rows skipped instead of {len(self.bad)}")
        self._check_rejects(verdict, root, records)
        return verdict

    def _check_rejects(self, verdict: Verdict, root: Path, records: list[dict[str, Any]]) -> None:
        """Which rows were rejected, where the run records them one by one."""
        parts = [record["files"]["rejects"]["path"] for record in records if "rejects" in record["files"]]
        if parts:
            rows = pa.concat_tables([pq.read_table(root / part) for part in parts])["row"].to_pylist()
            verdict.demand(sorted(rows) == self.bad, f"rejected rows {sorted(rows)} instead of {self.bad}")


class QuietRun:
    """Stands in for the oracle where numpy does not know the answers: the same run, undisturbed."""

    def __init__(self, quiet: RunDirectory, docs_per_shard: int) -> None:
        self.quiet, self.per_shard = content(quiet), docs_per_shard

    def check(self, root: Path) -> Verdict:
        """Compares every table of two runs, which fails on a key that is there twice."""
        verdict, run = Verdict(), RunDirectory(root)
        found = content(run)
        verdict.shards, verdict.rows = len(run.committed_shards()), found["routing"].num_rows
        for name, table in self.quiet.items():
            same = table.to_pydict() == found[name].to_pydict()
            verdict.demand(same, f"{name} is not that of an undisturbed run")
        return verdict


KEYS = {"routing": ["shard", "layer", "tok"], "tokens": ["shard", "tok"], "documents": ["shard", "doc"]}


def _token_rows(shard: int, rows: list[Row]) -> dict[str, Any]:
    ids = [row.ids for row in rows]
    flat = [token for document in ids for token in document]
    return {
        "shard": [shard] * len(flat),
        "tok": range(len(flat)),
        "doc": [doc for doc, document in enumerate(ids) for _ in document],
        "position": [position for document in ids for position in range(len(document))],
        "token_id": flat,
        "is_special": [token == toy.BOS for token in flat],
    }


def _document_rows(shard: int, rows: list[Row]) -> dict[str, Any]:
    return {
        "shard": [shard] * len(rows),
        "doc": range(len(rows)),
        "doc_id": [row.id for row in rows],
        "label": [row.label for row in rows],
        "tokens": [len(row.ids) for row in rows],
        "characters": [len(row.text) for row in rows],
        "truncated": [row.truncated for row in rows],
    }


def _table(shards: Any) -> dict[str, np.ndarray]:
    parts = list(shards)
    filled = [part for part in parts if part["shard"]]
    return {name: np.concatenate([np.asarray(list(part[name])) for part in filled]) for name in parts[0]}
