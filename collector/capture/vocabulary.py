"""Reads what experts put out as tokens of the vocabulary: the table `promotions`.

What the chosen experts of a sample of tokens (`sampling`) add to the residual stream goes through the final norm and
the output embedding (the logit lens of nostalgebraist 2020), as a part of the stream that the norm of this token
receives. Of each pick are kept the three tokens whose logits it raises most, and its direct attribution: how much more
it raises the logit of the token that came next than those of the vocabulary on average.

During the passes only what the experts and the final norm receive is kept; the outputs are computed after the last one.

Shapes: m tokens of the sample, k chosen per token, P picks that computed, H hidden size, V entries of the vocabulary.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

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
    from collector.capture.shard_text import ShardText
    from collector.models.final_norm import FinalNorm
    from collector.models.routers import Router

TABLE = "promotions"
PROMOTED = ("first", "second", "third")
SCHEMA = pa.schema(
    [
        pa.field("shard", pa.uint32(), nullable=False),
        pa.field("stack", tables.NAME, nullable=False),
        pa.field("layer", pa.uint8(), nullable=False),
        pa.field("tok", pa.uint32(), nullable=False),
        pa.field("expert", pa.uint16(), nullable=False),
        *(pa.field(name, pa.uint32(), nullable=False) for name in PROMOTED),
        pa.field("attribution", pa.float32()),
    ]
)
_STREAM = "stream"


class _Stream(NamedTuple):
    """The residual stream that the final norm receives."""

    stream_rh: torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Promotions:
    """What the picks of one router promote, on the host."""

    slot_p: NDArray[np.int64]
    """[P] the tokens' places in the shard's token table."""
    expert_p: NDArray[np.int64]
    promoted_p3: NDArray[np.int64]
    """[P, 3] ids, the most promoted first."""
    attribution_p: NDArray[np.float32]
    """[P] logits; NaN for the last token of a document."""


class VocabularyRecorder(Recorder):
    """Keeps what the picks of sampled tokens write, as tokens."""

    tables: ClassVar[Mapping[str, str]] = {
        TABLE: "a pick of a sampled token: router (`stack`, `layer`), token (`tok`) and expert; the three tokens whose "
        "logits the expert's output raises most, through the final norm and the output embedding, and its direct "
        "attribution to the token that came next"
    }
    needs_head: ClassVar[bool] = True

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """See `Recorder`; no shard has begun.

        Raises:
            ValueError: no router of the decoder is recorded.
        """
        super().__init__(*arguments, **named)
        self.routers = [router for router in self.routers if router.token_stack == "decoder"]
        if not self.routers:
            raise ValueError("--record vocabulary: an encoder writes no tokens; record the decoder too, with --stacks")
        self._rows = SampledRows(self.config.sample_tokens)
        self._table: TokenTable | None = None

    @classmethod
    def schemas(cls, info: Mapping[str, Any]) -> dict[str, pa.Schema]:  # noqa: ARG003
        """See `Recorder.schemas`."""
        return {TABLE: SCHEMA}

    @functools.cached_property
    def _norm(self) -> FinalNorm:
        from collector.models.final_norm import find_final_norm

        return find_final_norm(self.model)

    def hooks(self) -> list[Hook]:
        """One per router, before its experts, and one before the final norm.

        Raises:
            ValueError: the experts of a router cannot be read one by one, or the model does not end in a norm.
        """
        from collector.capture.experts_apart import experts_of

        hooks = [
            Hook(
                name=f"the experts of router {router.name}",
                module=experts_of(router),
                stack="decoder",
                read=lambda inputs: inputs,
                keep=functools.partial(self._rows.keep, router.name, "decoder"),
                of="inputs",
            )
            for router in self.routers
        ]
        last = Hook(
            name="the final norm",
            module=self._norm.module,
            stack="decoder",
            read=lambda arguments: _Stream(arguments[0].flatten(0, -2)),
            keep=functools.partial(self._rows.keep, _STREAM, "decoder"),
            of="arguments",
        )
        return [*hooks, last]

    def probe(self, kept: Sequence[Nothing]) -> None:
        """Needs nothing to be known of the model."""

    def card(self) -> dict[str, Any]:
        """Adds nothing."""
        return {}

    def begin(self, tokens: Mapping[str, TokenTable]) -> None:
        """Draws the sample."""
        self._table = tokens["decoder"]
        self._rows.begin(tokens, ["decoder"])

    def conclude(self) -> list[_Promotions]:
        """Reads the outputs of the sample's picks, router by router."""
        assert self._table is not None, "begin"
        slot_m = self._rows.slots("decoder")
        stream = self._rows.take(_STREAM, "decoder")
        if stream is None:
            return [_nothing_promoted() for _ in self.routers]
        next_m = _next_tokens(self._table)[slot_m]
        return [
            self._read(router, self._rows.take(router.name, "decoder"), stream.stream_rh, slot_m, next_m)
            for router in self.routers
        ]

    def _read(
        self, router: Router, inputs: ExpertInputs, stream_mh: torch.Tensor, slot_m: NDArray[np.int64],
        next_m: NDArray[np.int64],
    ) -> _Promotions:  # fmt: skip
        import torch

        from collector.capture.experts_apart import count_experts, experts_of, outputs_of

        assert self.head is not None, "needs_head"
        experts = experts_of(router)
        computes_mk = (inputs.experts_rk >= 0) & (inputs.experts_rk < count_experts(experts))
        outputs_mkh = outputs_of(experts, inputs.hidden_rh, torch.where(computes_mk, inputs.experts_rk, 0))
        place_p, pick_p = computes_mk.nonzero(as_tuple=True)
        weight_p = inputs.weights_rk[place_p, pick_p].float()
        device, stream_mh = self.head.device, stream_mh.to(self.head.device)
        next_p = torch.from_numpy(next_m)[place_p.cpu()].to(device)
        place_p, pick_p, weight_p, outputs_mkh = (each.to(device) for each in (place_p, pick_p, weight_p, outputs_mkh))
        nothing_v = self.head.logits(torch.zeros_like(stream_mh[:1]))[0].float()
        promoted, attributed = [], []
        for own_p in torch.arange(len(place_p), device=device).split(self.head.rows_at_once):
            of_p = place_p[own_p]
            part_ph = self._norm.apply_to_part(outputs_mkh[of_p, pick_p[own_p]], stream_mh[of_p])
            raised_pv = self.head.logits(part_ph).float() - nothing_v
            promoted.append(raised_pv.topk(len(PROMOTED)).indices)
            of_next_p = raised_pv.gather(1, next_p[own_p, None].clamp_min(0))[:, 0]
            attributed.append(weight_p[own_p] * (of_next_p - raised_pv.mean(1)))
        attribution_p = torch.cat(attributed).masked_fill(next_p < 0, float("nan"))
        return _Promotions(
            slot_p=slot_m[place_p.cpu().numpy()],
            expert_p=inputs.experts_rk[computes_mk].cpu().numpy(),
            promoted_p3=torch.cat(promoted).cpu().numpy(),
            attribution_p=attribution_p.cpu().numpy(),
        )

    def start(self, tokens: Mapping[str, TokenTable]) -> ShardVocabulary:
        """See `Recorder.start`."""
        return ShardVocabulary(self.routers, tokens, self.config.sample_tokens)


def _next_tokens(table: TokenTable) -> NDArray[np.int64]:
    """[T] the id of the token that follows in the document, -1 for its last."""
    doc_t, next_t = table.doc, np.full(len(table.ids), -1)
    next_t[:-1] = np.where(doc_t[1:] == doc_t[:-1], table.ids[1:], -1)
    return next_t


def _nothing_promoted() -> _Promotions:
    none = np.zeros(0, int)
    return _Promotions(
        slot_p=none, expert_p=none, promoted_p3=np.zeros((0, len(PROMOTED)), int), attribution_p=np.zeros(0, np.float32)
    )


class ShardVocabulary(Recording):
    """What the picks of one shard's sample promote, by router."""

    def __init__(self, routers: Sequence[Router], tokens: Mapping[str, TokenTable], size: int) -> None:
        table = tokens["decoder"]
        self._routers = routers
        self._has_next_t = _next_tokens(table) >= 0
        self._sampled = min(size, int((~table.is_special).sum()))
        self._found: list[_Promotions] = []

    def put(self, batch: Mapping[str, Batch], kept: Sequence[Nothing]) -> None:
        """See `Recording.put`: nothing leaves the device during the passes."""

    def conclude(self, result: list[_Promotions]) -> None:
        """See `Recording.conclude`."""
        self._found = result

    def check(self) -> None:
        """See `Recording.check`."""
        for router, found in zip(self._routers, self._found, strict=True):
            where = f"vocabulary of {router.stack} layer {router.layer}"
            if (seen := len(np.unique(found.slot_p))) > self._sampled:
                raise ValueError(f"{where}: {seen} sampled tokens instead of {self._sampled}")
            if (np.isfinite(found.attribution_p) != self._has_next_t[found.slot_p]).any():
                raise ValueError(f"{where}: an attribution is not finite (NaN model?)")

    def write(self, folder: Path, shard: int, text: ShardText) -> dict[str, int]:
        """Writes one row group per router."""
        rows = 0
        with pq.ParquetWriter(
            folder / TABLE, SCHEMA, compression=tables.COMPRESSION, compression_level=tables.COMPRESSION_LEVEL,
            use_dictionary=["shard", "stack", "layer", "expert", *PROMOTED], use_byte_stream_split=["attribution"],
            column_encoding={"tok": "DELTA_BINARY_PACKED"},
        ) as writer:  # fmt: skip
            for router, found in zip(self._routers, self._found, strict=True):
                order = np.lexsort([found.expert_p, found.slot_p])
                count = len(order)
                attribution_p = found.attribution_p[order]
                columns: dict[str, Any] = {
                    "shard": np.full(count, shard), "stack": tables.constant(router.stack, count),
                    "layer": np.full(count, router.layer), "tok": text.first_tok("decoder") + found.slot_p[order],
                    "expert": found.expert_p[order],
                    "attribution": pa.array(attribution_p, mask=np.isnan(attribution_p)),
                }  # fmt: skip
                columns |= dict(zip(PROMOTED, found.promoted_p3[order].T, strict=True))
                writer.write_table(tables.table_of(SCHEMA, columns))
                rows += count
        return {TABLE: rows}
