"""The recorders that there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collector.capture.routing import RoutingRecorder
from collector.store.run_directory import REJECTS, TABLES

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


def recorded_schemas(info: Mapping[str, Any]) -> dict[str, pa.Schema]:
    """Table -> columns of all tables that recorders wrote, by the content of run.json."""
    return {table: schema for each in RECORDERS.values() for table, schema in each.schemas(info).items()}


def table_names(info: Mapping[str, Any]) -> tuple[str, ...]:
    """All tables that shards of a run may have, those of the recorders first."""
    return (*recorded_schemas(info), *TABLES, REJECTS)
