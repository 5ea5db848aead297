"""The recorders that there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collector.capture.routing import RoutingRecorder
from collector.store import tables
from collector.store.run_directory import REJECTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pyarrow as pa
    from transformers import PreTrainedModel

    from collector.capture.recorder import Recorder
    from collector.config import CaptureConfig
    from collector.models.routers import Router

RECORDERS: dict[str, type[Recorder]] = {"routing": RoutingRecorder}


def recorders_for(model: PreTrainedModel, routers: Sequence[Router], config: CaptureConfig) -> list[Recorder]:
    """The recorders of a run, for a model that is loaded."""
    return [recorder(model, routers, config) for recorder in RECORDERS.values()]


def table_schemas(info: Mapping[str, Any]) -> dict[str, pa.Schema]:
    """Table -> columns of all tables that shards of a run with this run.json may have, those of the recorders first."""
    config = info["config"]
    recorded = {table: schema for each in RECORDERS.values() for table, schema in each.schemas(info).items()}
    return recorded | {
        "tokens": tables.tokens_schema(info["format"]),
        "documents": tables.documents_schema(
            text="text" in (config.get("store") or ()), target=bool(config.get("target_column"))
        ),
        REJECTS: tables.REJECTS_SCHEMA,
    }


def table_names(info: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of these tables."""
    return tuple(table_schemas(info))
