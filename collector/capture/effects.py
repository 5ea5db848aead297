"""Records what edits of the routing do to the model's predictions: the table `effects`.

Each batch goes through the model as it is, and once more for every arm, a set of edits with a name. Both are compared
token by token: the loss, the divergence of the next token's distribution, whether the most probable token is another
one, and whether routers behind the first edited layer choose other experts. Batches are the same for all arms, so an
arm that changes nothing differs by exactly nothing. Special tokens do not count.

Shapes: R real tokens, F tokens that follow another one of their document, H hidden size, V entries of the vocabulary.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np
import pyarrow as pa

from collector.capture.recorder import Hook, Recorder, Recording
from collector.capture.sampling import Nothing
from collector.store import tables

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import torch
    from numpy.typing import NDArray

    from collector.capture.batches import Batch, TokenTable
    from collector.capture.padding import Grid
    from collector.capture.shard_text import ShardText
    from collector.models.edited_routing import EditedRouting
    from collector.models.routers import Reading

TABLE = "effects"
SUMS = ("tokens", "loss", "base_loss", "divergence", "flips", "decisions", "rerouted")
"""What is added up for each document, in this order."""
SCHEMA = pa.schema(
    [
        pa.field("shard", pa.uint32(), nullable=False),
        pa.field("doc", pa.uint32(), nullable=False),
        pa.field("arm", tables.NAME, nullable=False),
        pa.field("tokens", pa.uint32(), nullable=False),
        *(pa.field(name, pa.float64(), nullable=False) for name in ("loss", "base_loss", "divergence")),
        *(pa.field(name, pa.uint32(), nullable=False) for name in ("flips", "decisions", "rerouted")),
    ]
)


class _Hidden(NamedTuple):
    """The model's last hidden states."""

    hidden_rh: torch.Tensor


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """A set of edits with a name."""

    name: str
    routing: EditedRouting
    first: int
    """The first edited layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sums:
    """What one arm did to the documents of one batch, on the device."""

    arm: int
    doc_n: NDArray[np.int64]
    sums_n7: torch.Tensor
    """[documents, 7] `SUMS` in double precision."""


class EffectsRecorder(Recorder):
    """Adds up, for each document and arm, how far predictions differ from those of the model as it is."""

    tables: ClassVar[Mapping[str, str]] = {
        TABLE: "a document in an arm of edits: tokens with a prediction, the sums of their losses with the edits and "
        "without, of KL(without‖with) of the next token (nats); tokens whose most probable successor is another one; "
        "decisions of routers behind the first edited layer, and those with other experts"
    }
    needs_head: ClassVar[bool] = True
    needs_whole_pass: ClassVar[bool] = True

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """See `Recorder`; no shard has begun."""
        super().__init__(*arguments, **named)
        self.arms: list[Arm] = []
        self._table: TokenTable | None = None
        self._base: torch.Tensor | None = None
        self._grid: Grid | None = None
        self._chosen: dict[str, torch.Tensor] = {}
        self._found: list[_Sums] = []

    @classmethod
    def schemas(cls, info: Mapping[str, Any]) -> dict[str, pa.Schema]:  # noqa: ARG003
        """See `Recorder.schemas`."""
        return {TABLE: SCHEMA}

    def hooks(self) -> list[Hook]:
        """The whole model, which returns its last hidden states, and the routers.

        Raises:
            ValueError: the model is no decoder, or an edit has no meaning in it.
        """
        from collector.models.edited_routing import EditedRouting, geometry
        from collector.models.edits import parse_arm
        from collector.models.routers import find_routers

        if self.model.config.is_encoder_decoder:
            raise ValueError("--record effects compares predictions of decoders; this model has an encoder")
        arms = [parse_arm(text) for text in self.config.arms]
        if not arms:
            raise ValueError("--record effects needs arms: see --arms")
        names = [name for name, _ in arms]
        if len(set(names)) < len(names):
            raise ValueError(f"two arms are called {max(names, key=names.count)!r}: give each a name of its own")
        routers = find_routers(self.model)  # those that are not recorded can be edited, too
        known = geometry(self.model, routers)
        self.arms = [
            Arm(
                name=name, routing=EditedRouting(self.model, routers, edits, known=known),
                first=min(edit.layer for edit in edits),
            )
            for name, edits in arms
        ]  # fmt: skip

        def choosing(name: str) -> Callable[[Reading, Grid], Nothing]:
            def keep(reading: Reading, _grid: Grid) -> Nothing:
                self._chosen[name] = reading.experts_tk
                return Nothing()

            return keep

        choices = [
            Hook(
                name=f"router {router.name}", module=router.module, stack="decoder", read=router.read,
                keep=choosing(router.name),
            )
            for router in self.routers
        ]  # fmt: skip
        whole = Hook(
            name="the model", module=self.model, stack="decoder",
            read=lambda outputs: _Hidden(outputs.last_hidden_state.flatten(0, 1)), keep=self._keep,
        )  # fmt: skip
        return [*choices, whole]

    def _keep(self, hidden: _Hidden, grid: Grid) -> Nothing:
        self._base, self._grid = hidden.hidden_rh, grid
        return Nothing()

    def probe(self, kept: Sequence[Nothing]) -> None:
        """Needs nothing to be known of the model."""

    def card(self) -> dict[str, Any]:
        """Adds nothing: the arms are among the settings."""
        return {}

    def begin(self, tokens: Mapping[str, TokenTable]) -> None:
        """Learns which token is of which document."""
        self._table, self._found = tokens["decoder"], []

    def after_pass(self, again: Callable[[], Any]) -> None:
        """Runs the batch once more for each arm."""
        base, grid, table = self._base, self._grid, self._table
        self._base = self._grid = None
        if base is None or grid is None or grid.slots is None or table is None:
            return
        for number, arm in enumerate(self.arms):
            chosen: dict[str, torch.Tensor] = {}
            with arm.routing:
                handles = [
                    router.module.register_forward_hook(self._listen(router, chosen))
                    for router in self.routers
                    if router.layer > arm.first
                ]
                try:
                    hidden = again().last_hidden_state.flatten(0, 1)
                finally:
                    for handle in handles:
                        handle.remove()
            if grid.real is not None:
                real = grid.real_on(hidden.device)
                hidden = hidden.index_select(0, real)
                chosen = {name: each.index_select(0, grid.real_on(each.device)) for name, each in chosen.items()}
            self._found.append(self._compare(number, base, hidden, grid, table, chosen))
        self._chosen.clear()

    @staticmethod
    def _listen(router: Any, chosen: dict[str, torch.Tensor]) -> Callable[..., None]:
        def listen(_module: Any, _inputs: Any, outputs: Any) -> None:
            chosen[router.name] = router.read(outputs).experts_tk

        return listen

    def _compare(
        self, arm: int, base_rh: torch.Tensor, hidden_rh: torch.Tensor, grid: Grid, table: TokenTable,
        chosen: Mapping[str, torch.Tensor],
    ) -> _Sums:  # fmt: skip
        import torch

        assert self.head is not None, "needs_head"
        assert grid.slots is not None, "a batch of a shard"
        device = self.head.device
        slots = grid.slots
        doc_n, document_r = np.unique(table.doc[slots], return_inverse=True)
        ordinary_r = torch.from_numpy(~table.is_special[slots]).to(device)
        of_r = torch.from_numpy(document_r).to(device)
        sums_n7 = torch.zeros((len(doc_n), len(SUMS)), dtype=torch.float64, device=device)
        following_f, ids_f = (each.to(device) for each in grid.following_on(base_rh.device))
        kept = ordinary_r[following_f]
        following_f, ids_f = following_f[kept], ids_f[kept]
        base_rh, hidden_rh = base_rh.to(device), hidden_rh.to(device)
        for first in range(0, len(following_f), self.head.rows_at_once):
            own_f, next_f = (each[first : first + self.head.rows_at_once] for each in (following_f, ids_f))
            base_fv, edited_fv = (
                self.head.logits(each.index_select(0, own_f - 1)).float().log_softmax(-1)
                for each in (base_rh, hidden_rh)
            )
            losses = [-each.gather(1, next_f[:, None])[:, 0] for each in (edited_fv, base_fv)]
            divergence_f = (base_fv.exp() * (base_fv - edited_fv)).sum(-1)
            flips_f = base_fv.argmax(-1) != edited_fv.argmax(-1)
            columns = [torch.ones_like(divergence_f), *losses, divergence_f, flips_f]
            sums_n7[:, :5].index_add_(0, of_r[own_f], torch.stack([each.double() for each in columns], 1))
        for name, experts_rk in chosen.items():
            before_rk = self._chosen[name]
            same_r = (before_rk.sort(-1).values == experts_rk.sort(-1).values).all(-1).to(device)
            counted = torch.stack([torch.ones_like(same_r), ~same_r], 1).double()
            sums_n7[:, 5:].index_add_(0, of_r[ordinary_r], counted[ordinary_r])
        return _Sums(arm=arm, doc_n=doc_n, sums_n7=sums_n7)

    def conclude(self) -> list[tuple[int, NDArray[np.int64], NDArray[np.float64]]]:
        """Brings the sums to the host: arm, documents, and [documents, 7] `SUMS`."""
        found = [(one.arm, one.doc_n, one.sums_n7.cpu().numpy()) for one in self._found]
        self._found = []
        return found

    def start(self, tokens: Mapping[str, TokenTable]) -> ShardEffects:
        """See `Recorder.start`."""
        return ShardEffects([arm.name for arm in self.arms], tokens["decoder"])


class ShardEffects(Recording):
    """The effects of all arms on one shard's documents."""

    def __init__(self, arms: Sequence[str], table: TokenTable) -> None:
        self._arms = list(arms)
        self._sums_an7 = np.full((len(arms), len(table.lengths), len(SUMS)), np.nan)

    def put(self, batch: Mapping[str, Batch], kept: Sequence[Nothing]) -> None:
        """See `Recording.put`: nothing leaves the device during the passes."""

    def conclude(self, result: list[tuple[int, NDArray[np.int64], NDArray[np.float64]]]) -> None:
        """See `Recording.conclude`; a batch that did not fit came once more, and its later sums count."""
        for arm, doc_n, sums_n7 in result:
            self._sums_an7[arm, doc_n] = sums_n7

    def check(self) -> None:
        """See `Recording.check`."""
        for name, sums_n7 in zip(self._arms, self._sums_an7, strict=True):
            if wrong := int((~np.isfinite(sums_n7)).any(-1).sum()):
                raise ValueError(f"effects of arm {name!r}: not finite, or missing, for {wrong} documents (NaN model?)")

    def write(self, folder: Path, shard: int, text: ShardText) -> dict[str, int]:  # noqa: ARG002
        """Writes one row per document and arm, arm by arm."""
        arms, documents, _ = self._sums_an7.shape
        columns: dict[str, Any] = {
            "shard": np.full(arms * documents, shard), "doc": np.tile(np.arange(documents), arms),
            "arm": pa.array(np.repeat(self._arms, documents), pa.string()).dictionary_encode(),
        }  # fmt: skip
        for number, name in enumerate(SUMS):
            columns[name] = self._sums_an7[..., number].ravel()
        tables.write_table(folder / TABLE, tables.table_of(SCHEMA, columns))
        return {TABLE: arms * documents}
