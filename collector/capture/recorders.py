"""The recorders that there are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from collector.capture.effects import EffectsRecorder
from collector.capture.loss import LossRecorder
from collector.capture.outputs import OutputsRecorder
from collector.capture.routing import RoutingRecorder
from collector.capture.similarity import SimilarityRecorder
from collector.capture.vocabulary import VocabularyRecorder
from collector.store import tables
from collector.store.run_directory import REJECTS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import pyarrow as pa
    from transformers import PreTrainedModel

    from collector.capture.recorder import Recorder
    from collector.config import CaptureConfig
    from collector.models.heads import Head
    from collector.models.routers import Router

RECORDERS: dict[str, type[Recorder]] = {
    "routing": RoutingRecorder,
    "outputs": OutputsRecorder,
    "loss": LossRecorder,
    "similarity": SimilarityRecorder,
    "vocabulary": VocabularyRecorder,
    "effects": EffectsRecorder,
}
"""By the name that `--record` takes."""


def recorders_for(
    model: PreTrainedModel, routers: Sequence[Router], config: CaptureConfig, head: Head | None = None
) -> list[Recorder]:
    """The recorders of a run, for a model that is loaded."""
    return [recorder(model, routers, config, head) for recorder in _chosen(config.record)]


def need_head(config: CaptureConfig) -> bool:
    """Whether a recorder of this run needs the model's language-model head."""
    return any(recorder.needs_head for recorder in _chosen(config.record))


def _chosen(record: Sequence[str]) -> list[type[Recorder]]:
    """The recorders of these names; the routing is always recorded."""
    return [recorder for name, recorder in RECORDERS.items() if name == "routing" or name in record]


def recorder_of(recorded: str) -> str:
    """The name of the recorder that writes a table, or a column of the tokens table, as `tokens.COLUMN`."""
    return next(
        name
        for name, recorder in RECORDERS.items()
        if recorded in recorder.tables or recorded in {f"tokens.{field.name}" for field in recorder.token_fields}
    )


def table_schemas(info: Mapping[str, Any]) -> dict[str, pa.Schema]:
    """Table -> columns of all tables that shards of a run with this run.json may have, those of the recorders first."""
    config = info["config"]
    recorders = _chosen(config.get("record") or ())
    recorded = {table: schema for each in recorders for table, schema in each.schemas(info).items()}
    added = [field for each in recorders for field in each.token_fields]
    return recorded | {
        "tokens": tables.tokens_schema(info["format"], added),
        "documents": tables.documents_schema(
            text="text" in (config.get("store") or ()),
            target=bool(config.get("target_column")),
            generated=tables.has_answers(info),
            lacks=tables.lacking(info),
        ),
        REJECTS: tables.REJECTS_SCHEMA,
    }


def table_names(info: Mapping[str, Any]) -> tuple[str, ...]:
    """The names of these tables."""
    return tuple(table_schemas(info))
