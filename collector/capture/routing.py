"""Records what each router chose for each token: the table `routing`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import pyarrow as pa

from collector.capture import routing_table
from collector.capture.recorder import Hook, Recorder, Recording
from collector.capture.routing_table import LayerRouting
from collector.store.tables import Layer, lacking, recorded_layers

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from collector.capture.batches import Batch, TokenTable
    from collector.capture.decisions import LayerDecision
    from collector.capture.padding import Grid
    from collector.capture.shard_text import ShardText
    from collector.models.routers import Reading

TABLE = "routing"


class RoutingRecorder(Recorder):
    """Keeps ids and weights as the routers return them, never recomputed, and statistics of their probabilities."""

    tables: ClassVar[Mapping[str, str]] = {
        TABLE: "a token at a router (`stack`, `layer`): chosen experts `e0` …, the weights `w0` … that the model "
        "applied, `d0` … for picks that a capacity limit dropped; the router's entropy (nats), top-k mass and margin"
    }
    layers: list[Layer]
    """The routers' geometry, known after `probe`."""

    @classmethod
    def schemas(cls, info: Mapping[str, Any]) -> dict[str, pa.Schema]:
        """See `Recorder.schemas`."""
        stored = info["config"].get("store") or ()
        return {TABLE: routing_table.schema(recorded_layers(info), stored, lacking(info))}

    def hooks(self) -> list[Hook]:
        """One per router."""
        from collector.capture.decisions import decision

        def keep(reading: Reading, _grid: Grid) -> LayerDecision:
            return decision(reading, self.config.store)

        return [
            Hook(
                name=f"router {router.name}",
                module=router.module,
                stack=router.token_stack,
                read=router.read,
                keep=keep,
            )
            for router in self.routers
        ]

    def probe(self, kept: Sequence[LayerDecision]) -> None:
        """Learns each router's number of experts, k, and whether a capacity limits it."""
        self.layers = [
            Layer(stack=router.stack, layer=router.layer, **decision.geometry._asdict())
            for router, decision in zip(self.routers, kept, strict=True)
        ]

    def card(self) -> dict[str, Any]:
        """The stacks whose tokens are recorded, and the routers."""
        return {
            "stacks": list(dict.fromkeys(layer.token_stack for layer in self.layers)),
            "layers": [
                dataclasses.asdict(layer) | {"router": router.name, "router_class": type(router.module).__name__}
                for layer, router in zip(self.layers, self.routers, strict=True)
            ],
        }

    def start(self, tokens: Mapping[str, TokenTable]) -> ShardRouting:
        """See `Recorder.start`."""
        dtype = routing_table.expert_dtype(self.layers)
        return ShardRouting(
            [
                LayerRouting.unwritten(layer, len(tokens[layer.token_stack].ids), dtype, self.config.store)
                for layer in self.layers
            ],
            routing_table.schema(self.layers, self.config.store),
        )


class ShardRouting(Recording):
    """The routing of one shard, by router."""

    def __init__(self, layers: Sequence[LayerRouting], schema: pa.Schema) -> None:
        self.layers = list(layers)
        self.schema = schema

    def put(self, batch: Mapping[str, Batch], kept: Sequence[LayerDecision]) -> None:
        """See `Recording.put`."""
        for layer, decision in zip(self.layers, kept, strict=True):
            slots = batch[layer.geometry.token_stack].slots
            layer.experts_tk[slots] = decision.experts_tk.numpy()
            assert layer.weights_tk is not None, "a model's routers have weights"
            layer.weights_tk[slots] = decision.weights_tk.numpy()
            for name, values in zip(routing_table.STATISTICS, decision.statistics_3t.numpy(), strict=True):
                layer.statistics[name][slots] = values
            if layer.dropped_tk is not None and decision.dropped_tk is not None:
                layer.dropped_tk[slots] = decision.dropped_tk.numpy()
            for name, values_te in layer.per_expert_te.items():
                values_te[slots] = getattr(decision, f"{name}_te").numpy()

    def check(self) -> None:
        """See `Recording.check`."""
        for layer in self.layers:
            layer.check()

    def write(self, folder: Path, shard: int, text: ShardText) -> dict[str, int]:
        """Writes one row group per router."""
        labels = pa.array([document.label for document in text.documents], pa.string()).dictionary_encode()
        per_token = {stack: labels.take(pa.array(table.doc)) for stack, table in text.tokens.items()}
        with routing_table.writer(folder / TABLE, self.schema) as writer:
            for layer in self.layers:
                stack = layer.geometry.token_stack
                rows = routing_table.rows(
                    shard, layer, self.schema, label=per_token[stack], is_special=text.tokens[stack].is_special,
                    first_tok=text.first_tok(stack),
                )  # fmt: skip
                writer.write_table(rows)
        return {TABLE: sum(len(layer.experts_tk) for layer in self.layers)}
