"""Compares experts by what they put out for the same tokens: the table `similarity`.

A sample of each shard's tokens (`sampling`) goes through all experts of every recorded layer, chosen or not. In the
order of the sample they make blocks of about 256, mixed across documents. During the passes only what the experts
receive is kept; after the last pass each block goes through all experts at once, and is reduced on the device to sums
over pairs of experts (`pair_sums`). Nothing else of the run changes.

Shapes: R real tokens, m tokens of the sample, k chosen per token, H hidden size, E experts, B tokens of a block.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from collector.capture.recorder import Hook, Recorder, Recording
from collector.capture.sampling import Nothing, SampledRows
from collector.store import tables

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from collector.capture.batches import Batch, TokenTable
    from collector.capture.experts_apart import ExpertInputs
    from collector.capture.pair_sums import PairSums
    from collector.capture.shard_text import ShardText
    from collector.models.routers import Router

TABLE = "similarity"
BLOCK = 256
"""Tokens of a block, about."""
LISTS = {
    "n": pa.uint32(), "cosine": pa.float32(), "angular": pa.float32(), "hsic": pa.float32(),
    "hsic_first": pa.float32(), "hsic_second": pa.float32(),
}  # fmt: skip
"""Lists over the pairs of experts i < j, (0, 1), (0, 2) …, in the order of `PairSums`."""
SCHEMA = pa.schema(
    [
        pa.field("shard", pa.uint32(), nullable=False),
        pa.field("stack", tables.NAME, nullable=False),
        pa.field("layer", pa.uint8(), nullable=False),
        pa.field("block", pa.uint16(), nullable=False),
        pa.field("over", tables.NAME, nullable=False),
        pa.field("tokens", pa.uint32(), nullable=False),
        pa.field("experts", pa.uint16(), nullable=False),
        *(pa.field(name, pa.list_(kind), nullable=False) for name, kind in LISTS.items()),
    ]
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _BlockSums:
    """The sums of one block at one router, on the host."""

    router: int
    block: int
    tokens: int
    experts: int
    sums: dict[str, PairSums]


class SimilarityRecorder(Recorder):
    """Keeps sums over all pairs of experts, by block of sampled tokens."""

    tables: ClassVar[Mapping[str, str]] = {
        TABLE: "a block of sampled tokens at a router (`stack`, `layer`), which went through all its experts: for each "
        "pair of experts, over these tokens or those routed to either or both of the pair (`over`), their number `n` "
        "and the sums of the cosine and the angular similarity of the two outputs, and HSIC₁ of both and of each"
    }

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """See `Recorder`; no shard has begun."""
        super().__init__(*arguments, **named)
        self._rows = SampledRows(self.config.sample_tokens)

    @classmethod
    def schemas(cls, info: Mapping[str, Any]) -> dict[str, pa.Schema]:  # noqa: ARG003
        """See `Recorder.schemas`."""
        return {TABLE: SCHEMA}

    def hooks(self) -> list[Hook]:
        """One per router, before its experts."""
        from collector.capture.experts_apart import experts_of

        def keeping(number: int, stack: str) -> Any:
            return lambda inputs, grid: self._rows.keep(number, stack, inputs, grid)

        return [
            Hook(
                name=f"the experts of router {router.name}",
                module=experts_of(router),
                stack=router.token_stack,
                read=lambda inputs: inputs,
                keep=keeping(number, router.token_stack),
                of="inputs",
            )
            for number, router in enumerate(self.routers)
        ]

    def probe(self, kept: Sequence[Nothing]) -> None:
        """Needs nothing to be known of the model."""

    def card(self) -> dict[str, Any]:
        """Adds nothing."""
        return {}

    def begin(self, tokens: Mapping[str, TokenTable]) -> None:
        """Draws the sample of each stack."""
        self._rows.begin(tokens, {router.token_stack for router in self.routers})

    def conclude(self) -> list[_BlockSums]:
        """Sends the sample through all experts, block by block."""
        found: list[_BlockSums] = []
        for number, router in enumerate(self.routers):
            if (inputs := self._rows.take(number, router.token_stack)) is not None:
                found += self._compare(number, inputs)
        return found

    def _compare(self, number: int, inputs: ExpertInputs) -> list[_BlockSums]:
        import torch

        from collector.capture.experts_apart import count_experts, every_output, experts_of
        from collector.capture.pair_sums import PairSums, pair_sums

        experts = experts_of(self.routers[number])
        blocks = max(1, round(len(inputs.hidden_rh) / BLOCK))
        found = []
        for block, (hidden_bh, experts_bk, weights_bk) in enumerate(
            zip(*(each.tensor_split(blocks) for each in inputs), strict=True)
        ):
            chosen_bk = experts_bk.clamp_min(0).long()
            tokens = len(hidden_bh)
            weights_be = weights_bk.new_zeros((tokens, max(count_experts(experts), int(chosen_bk.max()) + 1)))
            weights_be.scatter_add_(1, chosen_bk, torch.where(experts_bk >= 0, weights_bk, 0))
            sums = pair_sums(every_output(experts, hidden_bh), weights_be[:, : count_experts(experts)])
            on_host = {over: PairSums(*(each.cpu() for each in of_pairs)) for over, of_pairs in sums.items()}
            found.append(
                _BlockSums(router=number, block=block, tokens=tokens, experts=count_experts(experts), sums=on_host)
            )
        return found

    def start(self, tokens: Mapping[str, TokenTable]) -> ShardSimilarity:
        """See `Recorder.start`."""
        ordinary = {stack: int((~table.is_special).sum()) for stack, table in tokens.items()}
        size = self.config.sample_tokens
        return ShardSimilarity(self.routers, {stack: min(count, size) for stack, count in ordinary.items()})


class ShardSimilarity(Recording):
    """The sums of one shard's sample."""

    def __init__(self, routers: Sequence[Router], sampled: Mapping[str, int]) -> None:
        self._routers = routers
        self._sampled = sampled
        self._found: list[_BlockSums] = []

    def put(self, batch: Mapping[str, Batch], kept: Sequence[Nothing]) -> None:
        """See `Recording.put`: nothing leaves the device during the passes."""

    def conclude(self, result: list[_BlockSums]) -> None:
        """See `Recording.conclude`."""
        self._found = result

    def check(self) -> None:
        """See `Recording.check`."""
        for number, router in enumerate(self._routers):
            own = [one for one in self._found if one.router == number]
            where, expected = f"similarity of {router.stack} layer {router.layer}", self._sampled[router.token_stack]
            if (seen := sum(one.tokens for one in own)) != expected:
                raise ValueError(f"{where}: {seen} sampled tokens instead of {expected}")
            if not all(each.isfinite().all() for one in own for sums in one.sums.values() for each in sums):
                raise ValueError(f"{where}: an expert's output is not finite")

    def write(self, folder: Path, shard: int, text: ShardText) -> dict[str, int]:  # noqa: ARG002
        """Writes one row group per block and router."""
        rows = 0
        with pq.ParquetWriter(
            folder / TABLE, SCHEMA, compression=tables.COMPRESSION, compression_level=tables.COMPRESSION_LEVEL,
            use_dictionary=["shard", "stack", "layer", "block", "over"],
        ) as writer:  # fmt: skip
            for one in self._found:
                router = self._routers[one.router]
                count, pairs = len(one.sums), one.experts * (one.experts - 1) // 2
                constants = {
                    "shard": shard, "layer": router.layer, "block": one.block, "tokens": one.tokens,
                    "experts": one.experts,
                }  # fmt: skip
                columns: dict[str, Any] = {name: np.full(count, value) for name, value in constants.items()}
                columns |= {"stack": tables.constant(router.stack, count), "over": [*one.sums]}
                lists = {
                    name: np.concatenate([getattr(sums, f"{name}_p").numpy() for sums in one.sums.values()])
                    for name in LISTS
                }
                writer.write_table(tables.with_lists(SCHEMA, columns, lists, pairs * np.arange(count + 1)))
                rows += count
        return {TABLE: rows}
