"""Describes the model of a run: its card in run.json, and the vocabulary."""

from __future__ import annotations

import dataclasses
import logging
import platform
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from collector.models import compute, footprint, loading, locations
from collector.store import tables

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collector.capture.recorder import Recorder
    from collector.config import ModelConfig
    from collector.models.loading import LoadedModel


_log = logging.getLogger(__name__)


def describe(loaded: LoadedModel, config: ModelConfig, recorders: Sequence[Recorder]) -> dict[str, Any]:
    """The card of a replica, equal for all replicas of a run.

    Args:
        loaded: the model.
        config: the settings that loaded it.
        recorders: each adds its own part.
    """
    model, tokenizer = loaded.model, loaded.tokenizer
    memory = footprint.describe(model, loaded.compute_dtype)
    card = {
        "model": {
            "id": config.model,
            "revision": locations.cached_commit(config) or config.revision,
            "class": type(model).__name__,
            "model_type": model.config.model_type,
            "weights": config.weights,
            "dtype": str(model.dtype).removeprefix("torch."),
            "parameters": sum(part["parameters"] for part in memory["treatments"].values()),
            "fingerprint": loading.fingerprint(model),
        },
        "memory": memory,
        "compute": _compute(model),
    }
    for recorder in recorders:
        card |= recorder.card()
    return card | {
        "tokenizer": {"class": type(tokenizer).__name__, "entries": len(tokenizer)},
        "versions": versions(),
    }


def _compute(model: Any) -> list[dict[str, Any]] | None:
    """What a token costs by component; None for a model that cannot be built empty, which collects all the same."""
    try:
        return [dataclasses.asdict(one) for one in compute.components(model)]
    except Exception as error:  # noqa: BLE001 - a count that is missing ends no run
        _log.warning("the operations of %s cannot be counted: %s", type(model).__name__, error)
        return None


def vocabulary_table(tokenizer: Any) -> pa.Table:
    """Token ids as readable text."""
    columns = zip(*loading.readable_vocabulary(tokenizer), strict=True)
    return pa.table([pa.array(c) for c in columns], names=tables.VOCAB_SCHEMA.names).cast(tables.VOCAB_SCHEMA)


def vocabulary(tokenizer: Any) -> bytes:
    """The content of vocab.parquet."""
    sink = pa.BufferOutputStream()
    pq.write_table(vocabulary_table(tokenizer), sink, compression=tables.COMPRESSION)
    return sink.getvalue().to_pybytes()


def versions() -> dict[str, str]:
    """Returns versions of the installed packages that decide the numbers."""
    found = {"python": platform.python_version()}
    for name in ("moe-routing-collector", "torch", "transformers", "tokenizers", "bitsandbytes", "pyarrow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:  # bitsandbytes, where it has no build
            continue
    return found
