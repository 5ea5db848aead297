"""Dumps as engines write them, of documents with known routing: byte by byte in the formats that `data.dumps` reads."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from collector.query.warehouse import Run


@dataclasses.dataclass(frozen=True, kw_only=True)
class Routed:
    """A document: T tokens, all of them routed."""

    id: str
    label: str
    token_ids: np.ndarray
    """[T]"""
    experts: np.ndarray
    """[T, L, k]"""


def documents_of(run: Run) -> list[Routed]:
    """The documents of an opened run, in its order."""
    routers = len(run.info["layers"])
    rows = run.sql(
        "select doc_id, documents.label, list(token_id order by position) as ids, "
        "list(experts order by position, routing.layer) as experts "
        "from documents inner join tokens using (shard, doc) "
        "inner join decisions as routing using (shard, tok) group by shard, doc, doc_id, documents.label "
        "order by shard, doc"
    ).fetchall()
    return [
        Routed(
            id=name, label=label, token_ids=np.array(ids[::routers]),
            experts=np.array(experts).reshape(-1, routers, len(experts[0])),
        )
        for name, label, ids, experts in rows
    ]  # fmt: skip


def npy(array: np.ndarray) -> str:
    """Base64 of an .npy file."""
    file = io.BytesIO()
    np.save(file, array.astype(np.int16))
    return base64.b64encode(file.getvalue()).decode()


def vllm(document: Routed, prompt: int, *, how: str = "lists") -> dict[str, Any]:
    """A RequestOutput of vLLM; the last token has no routing.

    Args:
        document: prompt and answer.
        prompt: tokens of the prompt.
        how: `lists`, `split` (prompt and answer apart) or `npy`.
    """
    rows = document.experts[:-1].astype(np.int16)
    ids = document.token_ids.tolist()
    record: dict[str, Any] = {"id": document.id, "label": document.label, "prompt_token_ids": ids[:prompt]}
    if how == "split":
        record["prompt_routed_experts"] = rows[:prompt].tolist()
    answer = rows[prompt:].tolist() if how == "split" else npy(rows) if how == "npy" else rows.tolist()
    return record | {"outputs": [{"token_ids": ids[prompt:], "routed_experts": answer}]}


def sglang(document: Routed, prompt: int, first: int = 0) -> dict[str, Any]:
    """A response of SGLang with its request's ids; routing from position `first` on."""
    ids = document.token_ids.tolist()
    flat = base64.b64encode(document.experts[first:-1].astype("<i4").tobytes()).decode()
    return {
        "id": document.id, "label": document.label, "input_ids": ids[:prompt], "output_ids": ids[prompt:],
        "meta_info": {"id": "r-1", "routed_experts": flat, "routed_experts_start_len": first},
    }  # fmt: skip


def write_lines(path: Path, records: Sequence[Any]) -> Path:
    """JSON lines; a record that is a text stays as it is."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((one if isinstance(one, str) else json.dumps(one)) + "\n" for one in records))
    return path


def recorded_pass(
    documents: Sequence[Routed], layers: int, routed: Sequence[int], to_physical: np.ndarray, *, first: int = 0,
    decode: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """A forward pass of SGLang's recorder in the mode per_token.

    Args:
        documents: what it extends.
        layers: of the model.
        routed: those with a router, in the order of the documents'.
        to_physical: [layers, E] a physical expert for each logical one.
        first: position of the first token of each.
        decode: whether it decodes.
    """
    tokens = sum(len(one.token_ids) for one in documents)
    ids = np.full((layers, tokens, 8), -1, np.int32)
    logical = np.concatenate([one.experts for one in documents])
    for place, layer in enumerate(routed):
        ids[layer, :, : logical.shape[2]] = to_physical[layer][logical[:, place]]
    return {
        "forward_pass_id": 7, "rank": 0, "gatherer_key": "primary",
        "global_physical_count": torch.zeros(to_physical.shape, dtype=torch.int32),
        "input_ids": np.concatenate([one.token_ids for one in documents]).tolist(),
        "positions": [first + place for one in documents for place in range(len(one.token_ids))],
        "extend_seq_lens": None if decode else [len(one.token_ids) for one in documents],
        "forward_mode": 2 if decode else 1,
        "topk_ids_of_layer": torch.from_numpy(ids),
    }  # fmt: skip


def write_recorder(folder: Path, rank: int, passes: Sequence[dict[str, Any]], to_logical: np.ndarray) -> Path:
    """A file of the recorder."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"expert_distribution_recorder_1764000000.0_{rank}.pt"
    torch.save({"records": list(passes), "last_physical_to_logical_map": torch.from_numpy(to_logical)}, path)
    return path


def write_flame(
    model: Path, token_ids: np.ndarray, experts: np.ndarray, scores: np.ndarray, *, files: int = 2, group: int = 4
) -> Path:
    """A checkpoint of FLAME-MoE-Traces.

    Args:
        model: the folder of the model.
        token_ids: [T]
        experts: [T, L, k]
        scores: [T, L, k]
        files: of samples.
        group: rows of a row group.

    Returns:
        The checkpoint's folder.
    """
    checkpoint = model / "actives" / "iter_0540"
    for folder in (model / "samples", checkpoint):
        folder.mkdir(parents=True)
    for number, part in enumerate(np.array_split(token_ids.astype(np.int32), files)):
        pq.write_table(pa.table({"token_id": part}), model / "samples" / f"{number:03}.parquet")
    for layer in range(experts.shape[1]):
        columns = {
            "scores": pa.array(list(scores[:, layer].astype(np.float16)), pa.list_(pa.float16())),
            "indices": pa.array(list(experts[:, layer].astype(np.int16)), pa.list_(pa.int16())),
        }
        pq.write_table(pa.table(columns), checkpoint / f"layer_{layer + 2:02}.parquet", row_group_size=group)
    return checkpoint
