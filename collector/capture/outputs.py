"""Records what the chosen experts put out: the table `outputs`.

f is an expert's output for a token before its routing weight g, y = sum of g f over the token's picks, shared experts
apart. Of each pick the device keeps the norm of f, its largest entry, and its contribution <g f, y> / |y|^2, which
sums to 1 over a token's picks. The host adds them up by document and expert, so that every measure of an expert is a
ratio of sums, and the sums of shards and of runs add up.

Sources: the sums are those of REAP (arXiv 2510.13999: mean of g |f|, expert activation norm) and of super experts
(arXiv 2507.23279: largest entry); the contribution is ours.

Shapes: R real tokens, k chosen per token, H hidden size, E experts, G groups: the ordinary or the special tokens of a
document.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from collector.capture.recorder import Hook, Recorder, Recording
from collector.store import tables

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from collector.capture.batches import Batch, TokenTable
    from collector.capture.experts_apart import ExpertCall
    from collector.capture.shard_text import ShardText
    from collector.models.routers import Router

TABLE = "outputs"
SUMS = ("weight_sums", "norms", "squared_norms", "weighted_norms", "squared_weighted_norms", "contributions")
"""Lists of sums over an expert's picks: g, |f|, |f|^2, g |f|, g^2 |f|^2, <g f, y> / |y|^2."""
_SUMS_TYPE = pa.list_(pa.float32())
SCHEMA = pa.schema(
    [
        pa.field("shard", pa.uint32(), nullable=False),
        pa.field("stack", tables.NAME, nullable=False),
        pa.field("layer", pa.uint8(), nullable=False),
        pa.field("doc", pa.uint32(), nullable=False),
        pa.field("is_special", pa.bool_(), nullable=False),
        pa.field("experts", pa.list_(pa.uint16()), nullable=False),
        pa.field("picks", pa.list_(pa.uint32()), nullable=False),
        *(pa.field(name, _SUMS_TYPE, nullable=False) for name in SUMS),
        pa.field("largest", _SUMS_TYPE, nullable=False),
    ]
)
_CHUNK = 1 << 24
"""Numbers that are held in float32 at once."""


class PickEffects(NamedTuple):
    """What the picks of R tokens put out."""

    experts_rk: torch.Tensor
    """[R, k] ids; -1 for a pick that was dropped."""
    weights_rk: torch.Tensor
    """[R, k] g."""
    norms_rk: torch.Tensor
    """[R, k] |f|, float32."""
    largest_rk: torch.Tensor
    """[R, k] the largest absolute entry of f, float32."""
    contributions_rk: torch.Tensor
    """[R, k] <g f, y> / |y|^2, float32; 0 where y is 0."""


def effects(call: ExpertCall) -> PickEffects:
    """Reduces the outputs of R tokens on the device, some rows at a time."""
    import torch

    rows, k, hidden = call.outputs_rkh.shape
    step = max(1, _CHUNK // (k * hidden))
    norms, largest, contributions = [], [], []
    for first in range(0, rows, step):
        f_rkh = call.outputs_rkh[first : first + step].float()
        g_rk = call.weights_rk[first : first + step].float()
        y_rh1 = torch.bmm(f_rkh.transpose(1, 2), g_rk[..., None])
        along_rk = torch.bmm(f_rkh, y_rh1).squeeze(2)
        norms.append(torch.linalg.vector_norm(f_rkh, dim=2))
        largest.append(torch.linalg.vector_norm(f_rkh, ord=float("inf"), dim=2))
        contributions.append(torch.nan_to_num(g_rk * along_rk / y_rh1.square().sum(1), nan=0.0))
    return PickEffects(
        experts_rk=call.experts_rk.to(torch.int16),
        weights_rk=call.weights_rk.float(),
        norms_rk=torch.cat(norms),
        largest_rk=torch.cat(largest),
        contributions_rk=torch.cat(contributions),
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Place:
    """A router, as rows name it."""

    stack: str
    layer: int

    @property
    def token_stack(self) -> str:
        return self.stack.partition(".")[0]


class OutputsRecorder(Recorder):
    """Keeps sums over each expert's outputs, by document."""

    tables: ClassVar[Mapping[str, str]] = {
        TABLE: "a document at a router (`stack`, `layer`): the experts that its tokens chose and, in their order, sums "
        "over these picks of g, |f|, |f|², g |f|, g² |f|² and of the contribution ⟨g f, y⟩ / |y|², and the largest "
        "entry of f; f is the expert's output, g its weight, y the sum of g f"
    }

    @classmethod
    def schemas(cls, info: Mapping[str, Any]) -> dict[str, pa.Schema]:  # noqa: ARG003
        """See `Recorder.schemas`."""
        return {TABLE: SCHEMA}

    def hooks(self) -> list[Hook]:
        """One per router, at its experts."""
        from collector.capture.experts_apart import experts_of

        return [
            Hook(
                name=f"the experts of router {router.name}",
                module=experts_of(router),
                stack=router.token_stack,
                read=lambda call: call,
                keep=lambda call, _grid: effects(call),
                of="experts",
            )
            for router in self.routers
        ]

    def probe(self, kept: Sequence[PickEffects]) -> None:
        """Needs nothing to be known of the model."""

    def card(self) -> dict[str, Any]:
        """Adds nothing."""
        return {}

    def start(self, tokens: Mapping[str, TokenTable]) -> ShardOutputs:
        """See `Recorder.start`."""
        return ShardOutputs(self.routers, tokens)


class ShardOutputs(Recording):
    """The outputs of one shard's experts, summed pass by pass."""

    def __init__(self, routers: Sequence[Router], tokens: Mapping[str, TokenTable]) -> None:
        self._places = [_Place(stack=router.stack, layer=router.layer) for router in routers]
        self._group_t = {stack: 2 * table.doc + table.is_special for stack, table in tokens.items()}
        self._seen = [0] * len(self._places)
        self._summed: list[list[_Summed]] = [[] for _ in self._places]

    def put(self, batch: Mapping[str, Batch], kept: Sequence[PickEffects]) -> None:
        """See `Recording.put`."""
        for number, (place, each) in enumerate(zip(self._places, kept, strict=True)):
            slots = batch[place.token_stack].slots
            self._seen[number] += len(slots)
            self._summed[number].append(_sum(self._group_t[place.token_stack][slots], each))

    def check(self) -> None:
        """See `Recording.check`."""
        for place, seen, summed in zip(self._places, self._seen, self._summed, strict=True):
            where, expected = f"outputs of {place.stack} layer {place.layer}", len(self._group_t[place.token_stack])
            if seen != expected:
                raise ValueError(f"{where}: {seen} tokens instead of {expected}")
            if not all(np.isfinite(values).all() for one in summed for values in one.sums_n.values()):
                raise ValueError(f"{where}: an expert's output is not finite")

    def write(self, folder: Path, shard: int, text: ShardText) -> dict[str, int]:  # noqa: ARG002
        """Writes one row group per router."""
        rows = 0
        with pq.ParquetWriter(
            folder / TABLE, SCHEMA, compression=tables.COMPRESSION, compression_level=tables.COMPRESSION_LEVEL,
            use_dictionary=["shard", "stack", "layer"], use_byte_stream_split=False,
        ) as writer:  # fmt: skip
            for place, summed in zip(self._places, self._summed, strict=True):
                table = _table(shard, place, summed)
                writer.write_table(table)
                rows += len(table)
        return {TABLE: rows}


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Summed:
    """Sums of a pass at one router, over the N pairs of a group and an expert that it chose."""

    group_n: NDArray[np.int64]
    """2 x document, + 1 for its special tokens."""
    expert_n: NDArray[np.int64]
    """Ascending within a group."""
    sums_n: dict[str, NDArray[Any]]
    """By column: picks, `SUMS` and the largest entry."""


def _sum(group_r: NDArray[np.int64], effects: PickEffects) -> _Summed:
    """Adds up the picks of R tokens by group and expert."""
    experts_rk = effects.experts_rk.numpy().astype(np.int64)
    kept = experts_rk.ravel() >= 0
    groups, local_r = np.unique(group_r, return_inverse=True)
    width = int(experts_rk.max(initial=0)) + 1
    cell = (local_r[:, None] * width + experts_rk).ravel()[kept]
    g, norm, largest, contribution = (
        part.numpy().ravel()[kept].astype(np.float64)
        for part in (effects.weights_rk, effects.norms_rk, effects.largest_rk, effects.contributions_rk)
    )
    picks = np.bincount(cell, minlength=len(groups) * width)
    chosen = np.flatnonzero(picks)
    values = dict(zip(SUMS, (g, norm, norm**2, g * norm, (g * norm) ** 2, contribution), strict=True))
    sums = {name: np.bincount(cell, value, minlength=len(picks))[chosen] for name, value in values.items()}
    most = np.zeros(len(picks))
    np.maximum.at(most, cell, largest)
    return _Summed(
        group_n=groups[chosen // width], expert_n=chosen % width,
        sums_n={"picks": picks[chosen], **sums, "largest": most[chosen]},
    )  # fmt: skip


def _merged(summed: Sequence[_Summed]) -> _Summed:
    """Adds up what passes have of the same group and expert, and sorts by both."""
    group_n, expert_n = (
        np.concatenate([np.zeros(0, np.int64), *parts])
        for parts in ((one.group_n for one in summed), (one.expert_n for one in summed))
    )
    width = int(expert_n.max(initial=0)) + 1
    cells, cell_n = np.unique(group_n * width + expert_n, return_inverse=True)
    sums = {}
    for name in ("picks", *SUMS):
        values = np.concatenate([np.zeros(0), *(one.sums_n[name] for one in summed)])
        sums[name] = np.bincount(cell_n, values, minlength=len(cells))
    largest = np.zeros(len(cells))
    np.maximum.at(largest, cell_n, np.concatenate([np.zeros(0), *(one.sums_n["largest"] for one in summed)]))
    return _Summed(group_n=cells // width, expert_n=cells % width, sums_n={**sums, "largest": largest})


def _table(shard: int, place: _Place, summed: Sequence[_Summed]) -> pa.Table:
    """The rows of one router, by document."""
    merged = _merged(summed)
    groups, starts = np.unique(merged.group_n, return_index=True)
    lists = {"experts": merged.expert_n} | {name: merged.sums_n[name] for name in ("picks", *SUMS, "largest")}
    columns = {
        "shard": np.full(len(groups), shard), "stack": tables.constant(place.stack, len(groups)),
        "layer": np.full(len(groups), place.layer), "doc": groups // 2, "is_special": groups % 2 == 1,
    }  # fmt: skip
    return tables.with_lists(SCHEMA, columns, lists, np.append(starts, len(merged.group_n)))
