"""Compares experts by what they put out for the same tokens: the table `similarity`.

A sample of each shard's tokens goes through all experts of every recorded layer, chosen or not. The tokens are drawn by
a hash of their document's ids and their position, special tokens apart, so the sample depends on the shard alone; in
the order of the hash they make blocks of about 256, mixed across documents. During the passes only what the experts
receive is kept; after the last pass each block goes through all experts at once, and is reduced on the device to sums
over pairs of experts (`pair_sums`). Nothing else of the run changes.

Shapes: R real tokens, m tokens of the sample, k chosen per token, H hidden size, E experts, B tokens of a block.
"""

from __future__ import annotations

import dataclasses
import hashlib
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from collector.capture.recorder import Hook, Recorder, Recording
from collector.store import tables

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from numpy.typing import NDArray

    from collector.capture.batches import Batch, TokenTable
    from collector.capture.experts_apart import ExpertInputs
    from collector.capture.padding import Grid
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


def sample(table: TokenTable, size: int) -> NDArray[np.int64]:
    """Draws tokens, special ones apart; returns their slots in the order of their hash.

    Args:
        table: the tokens of a shard.
        size: how many tokens (all, if there are fewer).
    """
    digests = [
        int.from_bytes(hashlib.blake2b(table.ids[start:end].tobytes(), digest_size=8).digest(), "little")
        for start, end in zip(table.starts[:-1], table.starts[1:], strict=True)
    ]
    document_t = np.repeat(np.array(digests, np.uint64), table.lengths)
    hash_t = _mix(document_t ^ _mix(table.position.astype(np.uint64)))
    ordinary = np.flatnonzero(~table.is_special)
    # Documents of the same text would have equal hashes: the slot decides between them.
    return ordinary[np.lexsort([ordinary, hash_t[ordinary]])[:size]]


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Steele, Lea and Flood 2014, the finalizer of SplitMix64."""
    mixed = values + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


class _Nothing(NamedTuple):
    """What leaves the device during the passes."""

    nothing: None = None


class _Held(NamedTuple):
    """The sampled tokens of a batch at one router, on the device."""

    rank_b: NDArray[np.int64]
    """Their places in the sample, on the host."""
    inputs: ExpertInputs


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
        self._rank_of: dict[str, NDArray[np.int64]] = {}
        """Stack -> [T] each token's place in the sample, -1 outside of it."""
        self._held: list[list[_Held]] = [[] for _ in self.routers]

    @classmethod
    def schemas(cls, info: Mapping[str, Any]) -> dict[str, pa.Schema]:  # noqa: ARG003
        """See `Recorder.schemas`."""
        return {TABLE: SCHEMA}

    def hooks(self) -> list[Hook]:
        """One per router, before its experts."""
        from collector.capture.experts_apart import experts_of

        def keeping(number: int, stack: str) -> Any:
            return lambda inputs, grid: self._keep(number, stack, inputs, grid)

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

    def probe(self, kept: Sequence[_Nothing]) -> None:
        """Needs nothing to be known of the model."""

    def card(self) -> dict[str, Any]:
        """Adds nothing."""
        return {}

    def begin(self, tokens: Mapping[str, TokenTable]) -> None:
        """Draws the sample of each stack."""
        self._held = [[] for _ in self.routers]
        self._rank_of = {}
        for stack in {router.token_stack for router in self.routers}:
            chosen = sample(tokens[stack], self.config.sample_tokens)
            rank_t = np.full(len(tokens[stack].ids), -1)
            rank_t[chosen] = np.arange(len(chosen))
            self._rank_of[stack] = rank_t

    def _keep(self, number: int, stack: str, inputs: ExpertInputs, grid: Grid) -> _Nothing:
        import torch

        if grid.slots is None or stack not in self._rank_of:
            return _Nothing()
        rank_r = self._rank_of[stack][grid.slots]
        chosen = np.flatnonzero(rank_r >= 0)
        if len(chosen):
            device = inputs.hidden_rh.device
            rows = torch.from_numpy(chosen)
            rows = rows.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else rows.to(device)
            taken = type(inputs)(*(each.index_select(0, rows) for each in inputs))
            self._held[number].append(_Held(rank_r[chosen], taken))
        return _Nothing()

    def conclude(self) -> list[_BlockSums]:
        """Sends the sample through all experts, block by block."""
        found = [one for number, held in enumerate(self._held) if held for one in self._compare(number, held)]
        self._held = [[] for _ in self.routers]
        return found

    def _compare(self, number: int, held: Sequence[_Held]) -> list[_BlockSums]:
        import torch

        from collector.capture.experts_apart import count_experts, every_output, experts_of
        from collector.capture.pair_sums import PairSums, pair_sums

        experts = experts_of(self.routers[number])
        # A batch that did not fit was given up in the middle, and its tokens came once more.
        rank_b, last = np.unique(np.concatenate([one.rank_b for one in held])[::-1], return_index=True)
        assert np.array_equal(rank_b, np.arange(len(rank_b))), "every token of the sample"
        inputs = [torch.cat(parts).flip(0) for parts in zip(*(one.inputs for one in held), strict=True)]
        blocks = np.array_split(last, max(1, round(len(last) / BLOCK)))
        found = []
        for block, rows in enumerate(blocks):
            hidden_bh, experts_bk, weights_bk = (each[torch.from_numpy(rows).to(each.device)] for each in inputs)
            chosen_bk = experts_bk.clamp_min(0).long()
            weights_be = weights_bk.new_zeros((len(rows), max(count_experts(experts), int(chosen_bk.max()) + 1)))
            weights_be.scatter_add_(1, chosen_bk, torch.where(experts_bk >= 0, weights_bk, 0))
            sums = pair_sums(every_output(experts, hidden_bh), weights_be[:, : count_experts(experts)])
            on_host = {over: PairSums(*(each.cpu() for each in of_pairs)) for over, of_pairs in sums.items()}
            found.append(
                _BlockSums(router=number, block=block, tokens=len(rows), experts=count_experts(experts), sums=on_host)
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

    def put(self, batch: Mapping[str, Batch], kept: Sequence[_Nothing]) -> None:
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
