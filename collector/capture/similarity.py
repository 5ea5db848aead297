"""Compares experts by what they put out for the same tokens: the tables `similarity` and `projections`.

A sample of each shard's tokens (`sampling`) goes through all experts of every recorded layer, chosen or not. In the
order of the sample they make blocks of about 256, mixed across documents. During the passes only what the experts
receive is kept; after the last pass each block goes through all experts at once, and is reduced on the device to sums
over pairs of experts (`pair_sums`). Nothing else of the run changes.

For maps, the outputs of the first tokens' chosen experts are kept as well, in at most 256 dimensions: the products with
256 random directions, the same in every run, which keep distances to within some percent (Johnson and Lindenstrauss
1984).

Shapes: m tokens of the sample, k chosen per token, H hidden size, E experts, B tokens of a block, P picks, D dimensions
kept.
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

    import torch
    from numpy.typing import NDArray

    from collector.capture.batches import Batch, TokenTable
    from collector.capture.experts_apart import ExpertInputs
    from collector.capture.pair_sums import PairSums
    from collector.capture.shard_text import ShardText
    from collector.models.routers import Router

TABLE = "similarity"
BLOCK = 256
"""Tokens of a block, about."""
PROJECTIONS = "projections"
DIMENSIONS = 256
"""Most dimensions of an output that are kept."""
_PROJECTED = 8
"""One of so many sampled tokens has its outputs kept."""
_LARGEST = 65504.0
"""Of float16."""
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
PROJECTIONS_SCHEMA = pa.schema(
    [
        pa.field("shard", pa.uint32(), nullable=False),
        pa.field("stack", tables.NAME, nullable=False),
        pa.field("layer", pa.uint8(), nullable=False),
        pa.field("tok", pa.uint32(), nullable=False),
        pa.field("expert", pa.uint16(), nullable=False),
        pa.field("output", pa.list_(pa.float16()), nullable=False),
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Projected:
    """Outputs of chosen experts at one router, on the host."""

    slot_p: NDArray[np.int64]
    """[P] the tokens' places in the shard's token table."""
    expert_p: NDArray[np.int64]
    output_pd: NDArray[np.float16]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Compared:
    """What one router's sample gave."""

    sums: list[_BlockSums]
    projected: _Projected


def directions(size: int) -> torch.Tensor | None:
    """[H, D] random directions for outputs of a size, always the same; None if all dimensions are kept."""
    import torch

    if size <= DIMENSIONS:
        return None
    return torch.randn((size, DIMENSIONS), generator=torch.Generator().manual_seed(0)) / DIMENSIONS**0.5


class SimilarityRecorder(Recorder):
    """Keeps sums over all pairs of experts, by block of sampled tokens."""

    tables: ClassVar[Mapping[str, str]] = {
        TABLE: "a block of sampled tokens at a router (`stack`, `layer`), which went through all its experts: for each "
        "pair of experts, over these tokens or those routed to either or both of the pair (`over`), their number `n` "
        "and the sums of the cosine and the angular similarity of the two outputs, and HSIC₁ of both and of each",
        PROJECTIONS: "a pick of one of the sampled tokens: router (`stack`, `layer`), token (`tok`) and expert, and "
        "what the expert put out, in at most 256 random dimensions",
    }

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """See `Recorder`; no shard has begun."""
        super().__init__(*arguments, **named)
        self._rows = SampledRows(self.config.sample_tokens)

    @classmethod
    def schemas(cls, info: Mapping[str, Any]) -> dict[str, pa.Schema]:  # noqa: ARG003
        """See `Recorder.schemas`."""
        return {TABLE: SCHEMA, PROJECTIONS: PROJECTIONS_SCHEMA}

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

    def conclude(self) -> list[_Compared | None]:
        """Sends the sample through all experts, block by block; None for a router without a sampled token."""
        found = []
        for number, router in enumerate(self.routers):
            inputs = self._rows.take(number, router.token_stack)
            slot_m = self._rows.slots(router.token_stack)
            found.append(None if inputs is None else self._compare(number, inputs, slot_m))
        return found

    def _compare(self, number: int, inputs: ExpertInputs, slot_m: NDArray[np.int64]) -> _Compared:
        import torch

        from collector.capture.experts_apart import count_experts, every_output, experts_of
        from collector.capture.pair_sums import PairSums, pair_sums

        experts = experts_of(self.routers[number])
        count, kept = count_experts(experts), -(-len(slot_m) // _PROJECTED)
        blocks = max(1, round(len(slot_m) / BLOCK))
        sums, projected, first = [], [], 0
        for block, (hidden_bh, experts_bk, weights_bk) in enumerate(
            zip(*(each.tensor_split(blocks) for each in inputs), strict=True)
        ):
            chosen_bk = experts_bk.clamp_min(0).long()
            tokens = len(hidden_bh)
            weights_be = weights_bk.new_zeros((tokens, max(count, int(chosen_bk.max()) + 1)))
            weights_be.scatter_add_(1, chosen_bk, torch.where(experts_bk >= 0, weights_bk, 0))
            outputs_beh = every_output(experts, hidden_bh)
            own = min(tokens, max(0, kept - first))
            projected.append(_project(outputs_beh[:own], experts_bk[:own], slot_m[first : first + own]))
            of_pairs = pair_sums(outputs_beh, weights_be[:, :count])
            on_host = {over: PairSums(*(each.cpu() for each in pairs)) for over, pairs in of_pairs.items()}
            sums.append(_BlockSums(router=number, block=block, tokens=tokens, experts=count, sums=on_host))
            first += tokens
        return _Compared(sums=sums, projected=_joined(projected))

    def start(self, tokens: Mapping[str, TokenTable]) -> ShardSimilarity:
        """See `Recorder.start`."""
        ordinary = {stack: int((~table.is_special).sum()) for stack, table in tokens.items()}
        size = self.config.sample_tokens
        return ShardSimilarity(self.routers, {stack: min(count, size) for stack, count in ordinary.items()})


def _project(outputs_beh: torch.Tensor, experts_bk: torch.Tensor, slot_b: NDArray[np.int64]) -> _Projected:
    """Takes the outputs of the picks that computed, in few dimensions."""
    computes_bk = (experts_bk >= 0) & (experts_bk < outputs_beh.shape[1])
    place_p, _ = computes_bk.nonzero(as_tuple=True)
    expert_p = experts_bk[computes_bk].long()
    output_pd = outputs_beh[place_p, expert_p].float()
    if (random_hd := directions(output_pd.shape[1])) is not None:
        output_pd = output_pd @ random_hd.to(output_pd.device)
    return _Projected(
        slot_p=slot_b[place_p.cpu().numpy()], expert_p=expert_p.cpu().numpy(),
        output_pd=output_pd.clamp(-_LARGEST, _LARGEST).cpu().numpy().astype(np.float16),
    )  # fmt: skip


def _joined(parts: Sequence[_Projected]) -> _Projected:
    fields = [field.name for field in dataclasses.fields(_Projected)]
    return _Projected(**{name: np.concatenate([getattr(part, name) for part in parts]) for name in fields})


class ShardSimilarity(Recording):
    """The sums of one shard's sample."""

    def __init__(self, routers: Sequence[Router], sampled: Mapping[str, int]) -> None:
        self._routers = routers
        self._sampled = sampled
        self._found: list[_Compared | None] = []

    def put(self, batch: Mapping[str, Batch], kept: Sequence[Nothing]) -> None:
        """See `Recording.put`: nothing leaves the device during the passes."""

    def conclude(self, result: list[_Compared | None]) -> None:
        """See `Recording.conclude`."""
        self._found = result

    def check(self) -> None:
        """See `Recording.check`."""
        for router, found in zip(self._routers, self._found, strict=True):
            where, expected = f"similarity of {router.stack} layer {router.layer}", self._sampled[router.token_stack]
            if (seen := sum(one.tokens for one in found.sums) if found else 0) != expected:
                raise ValueError(f"{where}: {seen} sampled tokens instead of {expected}")
            if found is None:
                continue
            sums = (each for one in found.sums for sums in one.sums.values() for each in sums)
            if not (all(each.isfinite().all() for each in sums) and np.isfinite(found.projected.output_pd).all()):
                raise ValueError(f"{where}: an expert's output is not finite")

    def write(self, folder: Path, shard: int, text: ShardText) -> dict[str, int]:
        """Writes one row group per router, and of `similarity` one per block and router."""
        found = [(router, found) for router, found in zip(self._routers, self._found, strict=True) if found is not None]
        with _writer(folder / TABLE, SCHEMA, names=["block", "over"]) as writer:
            blocks = [_block_rows(shard, router, one) for router, each in found for one in each.sums]
            for rows in blocks:
                writer.write_table(rows)
        with _writer(folder / PROJECTIONS, PROJECTIONS_SCHEMA, names=["expert"]) as writer:
            picks = [
                _projected_rows(shard, router, each.projected, text.first_tok(router.token_stack))
                for router, each in found
            ]
            for rows in picks:
                writer.write_table(rows)
        return {TABLE: sum(map(len, blocks)), PROJECTIONS: sum(map(len, picks))}


def _writer(path: Path, schema: pa.Schema, *, names: Sequence[str]) -> pq.ParquetWriter:
    return pq.ParquetWriter(
        path, schema, compression=tables.COMPRESSION, compression_level=tables.COMPRESSION_LEVEL,
        use_dictionary=["shard", "stack", "layer", *names],
    )  # fmt: skip


def _block_rows(shard: int, router: Router, one: _BlockSums) -> pa.Table:
    """A row for each `over` of a block."""
    count, pairs = len(one.sums), one.experts * (one.experts - 1) // 2
    constants = {
        "shard": shard, "layer": router.layer, "block": one.block, "tokens": one.tokens, "experts": one.experts,
    }  # fmt: skip
    columns: dict[str, Any] = {name: np.full(count, value) for name, value in constants.items()}
    columns |= {"stack": tables.constant(router.stack, count), "over": [*one.sums]}
    lists = {name: np.concatenate([getattr(sums, f"{name}_p").numpy() for sums in one.sums.values()]) for name in LISTS}
    return tables.with_lists(SCHEMA, columns, lists, pairs * np.arange(count + 1))


def _projected_rows(shard: int, router: Router, one: _Projected, before: int) -> pa.Table:
    """A row for each pick; `before` tokens of the shard are of another stack."""
    count, size = one.output_pd.shape
    order = np.lexsort([one.expert_p, one.slot_p])
    columns: dict[str, Any] = {
        "shard": np.full(count, shard), "layer": np.full(count, router.layer),
        "stack": tables.constant(router.stack, count), "tok": before + one.slot_p[order],
        "expert": one.expert_p[order],
    }  # fmt: skip
    lists = {"output": one.output_pd[order].ravel()}
    return tables.with_lists(PROJECTIONS_SCHEMA, columns, lists, size * np.arange(count + 1))
