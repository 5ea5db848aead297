"""Records what edits of the routing do to the model's predictions: the tables of `effects_table`.

Each batch goes through the model as it is, and once more for every arm of edits and each of its controls; the layers
before an arm's first edit run once for all. Both are compared token by token: the loss, the divergence of the next
token's distribution, whether the most probable token is another one, and whether routers behind the first edited layer
choose other experts. Batches are the same for all arms, so an arm that changes nothing differs by exactly nothing.
Another pass, without edits, sends the batch in other parts: what it changes is the noise of the arithmetic, recorded as
the arm `no edit`. Special tokens do not count.

Shapes: R real tokens, F tokens that follow another one of their document, H hidden size, V entries of the vocabulary.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections import defaultdict
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from collector.capture.effects_table import (
    NOISE,
    SCHEMA,
    SUMS,
    TABLE,
    TOKENS,
    TOKENS_SCHEMA,
    Effects,
    ShardEffects,
)
from collector.capture.recorder import Hook, LastHidden, Recorder
from collector.capture.sampling import Nothing
from collector.models.edits import parse_arm

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    import pyarrow as pa
    import torch
    from numpy.typing import NDArray

    from collector.capture.batches import TokenTable
    from collector.capture.padding import Grid
    from collector.capture.recorder import Again
    from collector.models.edited_routing import EditedRouting, Where
    from collector.models.edits import Arm, Edit
    from collector.models.routers import Reading, Router
    from collector.models.unedited_layers import UneditedLayers

_TOGETHER = 8
"""Arms whose last hidden states are held at once: the logits of the model as it is are computed once for all."""


class _Pass(NamedTuple):
    """What an arm's pass of a batch gave, without padding."""

    arm: int
    hidden_rh: torch.Tensor
    experts: dict[str, torch.Tensor]
    """[R, k] choices by router, of those behind the first edited layer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Sums:
    """What some arms did to the documents of one batch, on the device."""

    arms: list[int]
    doc_n: NDArray[np.int64]
    sums_an7: torch.Tensor
    """[arms, documents, 7] `SUMS` in double precision."""
    slots_f: torch.Tensor | None
    """[F] places of the tokens in the shard, if they are kept."""
    tokens_af3: torch.Tensor | None
    """[arms, F, 3] `PER_TOKEN`."""


class EffectsRecorder(Recorder):
    """Adds up, for each document and arm, how far predictions differ from those of the model as it is."""

    tables: ClassVar[Mapping[str, str]] = {
        TABLE: "a document in an arm of edits (control 0) or one of its controls: tokens with a prediction, the sums "
        "of their losses with the edits and without, of KL(without‖with) of the next token (nats); tokens whose most "
        "probable successor is another one; decisions of routers behind the first edited layer, and those with other "
        "experts; the arm `no edit` is the same model with the documents in other batches",
        TOKENS: "a token with a prediction in an arm, controls apart, with --store token_effects: the change of its "
        "loss and KL(without‖with) of the prediction (nats), and whether another token is the most probable one",
    }
    needs_head: ClassVar[bool] = True
    needs_whole_pass: ClassVar[bool] = True

    def __init__(self, *arguments: Any, **named: Any) -> None:
        """See `Recorder`; no shard has begun."""
        super().__init__(*arguments, **named)
        self.arms: list[Arm] = []
        """In the order in which they run: by their first edited layer."""
        self._routing: list[EditedRouting] = []
        self._layers: UneditedLayers | None = None
        self._tables: Mapping[str, TokenTable] = {}
        self._base: torch.Tensor | None = None
        self._grids: dict[str, Grid] = {}
        self._chosen: dict[str, torch.Tensor] = {}
        self._acts: dict[Any, torch.Tensor] = {}
        """(limits, stack) -> [R] whether edits act on the real tokens of the batch."""
        self._found: list[_Sums] = []

    @classmethod
    def schemas(cls, info: Mapping[str, Any]) -> dict[str, pa.Schema]:
        """See `Recorder.schemas`."""
        return {TABLE: SCHEMA} | ({TOKENS: TOKENS_SCHEMA} if TOKENS in info["config"].get("store", ()) else {})

    def hooks(self) -> list[Hook]:
        """The whole model, which returns its last hidden states, and the routers.

        Raises:
            ValueError: the model is no decoder, or an edit has no meaning in it.
        """
        from collector.models.edited_routing import EditedRouting, geometry
        from collector.models.routers import find_routers
        from collector.models.unedited_layers import UneditedLayers

        if all(router.token_stack == "encoder" for router in self.routers):
            raise ValueError(
                "--record effects: an encoder predicts no next token; record the decoder too, with --stacks"
            )
        self.arms = sorted(map(parse_arm, self.config.arms), key=_start)
        if not self.arms:
            raise ValueError("--record effects needs arms: see --arms")
        titles = [arm.title for arm in self.arms]
        if len(set(titles)) < len(titles):
            raise ValueError(f"two arms are called {max(titles, key=titles.count)!r}: give each a name of its own")
        routers = find_routers(self.model)  # those that are not recorded can be edited, too
        known = geometry(self.model, routers)
        self._routing = [
            EditedRouting(self.model, routers, arm.edits, self._where(arm), known=known) for arm in self.arms
        ]
        self._layers = UneditedLayers(self.model, routers)

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
            for router in self._decoders()
        ]  # fmt: skip
        whole = Hook(
            name="the model", module=self.model, stack="decoder",
            read=LastHidden.of, keep=self._keep,
        )  # fmt: skip
        encoders = [
            Hook(
                name=f"router {router.name}", module=router.module, stack="encoder", read=router.read,
                keep=self._keep_grid,
            )
            for router in routers
            if router.token_stack == "encoder"
        ]  # fmt: skip
        return [*encoders[:1], *choices, whole]

    def _decoders(self) -> list[Router]:
        """The recorded routers that see the tokens whose successors are predicted."""
        return [router for router in self.routers if router.token_stack == "decoder"]

    def _keep(self, hidden: LastHidden, grid: Grid) -> Nothing:
        self._base, self._grids["decoder"] = hidden.hidden_rh, grid
        return Nothing()

    def _keep_grid(self, _reading: Reading, grid: Grid) -> Nothing:
        self._grids["encoder"] = grid
        return Nothing()

    def probe(self, kept: Sequence[Nothing]) -> None:
        """Needs nothing to be known of the model."""

    def card(self) -> dict[str, Any]:
        """Adds nothing: the arms are among the settings."""
        return {}

    def begin(self, tokens: Mapping[str, TokenTable]) -> None:
        """Learns which token is of which document."""
        self._tables, self._found = tokens, []

    def around_pass(self) -> contextlib.AbstractContextManager[None]:
        """Keeps what passes need that start at the first edited layers."""
        return contextlib.nullcontext() if self._layers is None else self._layers.keeping({a.first for a in self.arms})

    def after_pass(self, again: Again) -> None:
        """Runs the batch once more for each arm, and once in other parts."""
        assert self._layers is not None, "hooks come first"
        base = self._base
        if base is not None and self._grids["decoder"].slots is not None:  # a batch of a shard
            arms = (self._edited(number, base, again) for number in range(len(self.arms)))
            passes = itertools.chain([self._in_other_parts(again)], arms)
            while together := list(itertools.islice(passes, _TOGETHER)):
                self._found.append(self._compare(together, base))
        self._base = None
        self._chosen.clear()
        self._acts.clear()
        self._layers.forget()

    def _edited(self, number: int, base_rh: torch.Tensor, again: Again) -> _Pass:
        """The pass of an arm; that of the model as it is where no edit acts on any token of the batch."""
        assert self._layers is not None, "hooks come first"
        arm, start = self.arms[number], _start(self.arms[number])
        stacks = {edit.stack.partition(".")[0] for edit in arm.edits}
        if arm.is_limited and not any(self._acting(arm, stack).any() for stack in stacks):
            behind = {router.name for router in self._decoders() if _place(router) > start}
            return _Pass(number, base_rh, {name: each for name, each in self._chosen.items() if name in behind})
        with self._routing[number], self._layers.skipping(arm.first), self._listening(start) as chosen:
            hidden = again().last_hidden_state
        return _without_padding(number, [hidden], chosen, self._grids["decoder"])

    def _where(self, arm: Arm) -> Where | None:
        """Where the edits of an arm act in the current batch."""
        if not arm.is_limited:
            return None

        def where(stack: str, positions: int) -> torch.Tensor:
            grid, acts_r = self._grids[stack], self._acting(arm, stack)
            if positions == len(acts_r):  # all are real tokens
                return acts_r
            if positions != grid.positions:
                raise RuntimeError(f"edits of arm {arm.name!r}: {positions} tokens of a batch of {grid.positions}")
            return grid.spread(acts_r)

        return where

    def _acting(self, arm: Arm, stack: str) -> torch.Tensor:
        """[R] whether the edits of an arm act on the real tokens of the batch, on the host."""
        import torch

        if (arm.limits, stack) not in self._acts:
            table, slots = self._tables[stack], self._grids[stack].slots
            label, token_class, position = arm.limits
            acts_t = np.ones(len(table.ids), bool)
            if label is not None:
                assert table.labels is not None, "the replica knows that arms are limited"
                acts_t &= np.array([label in labels for labels in table.labels], bool)[table.doc]
            if token_class is not None:
                acts_t &= table.token_class == token_class
            if position is not None:
                acts_t &= table.position == position
            self._acts[arm.limits, stack] = torch.from_numpy(acts_t[slots])
        return self._acts[arm.limits, stack]

    def _in_other_parts(self, again: Again) -> _Pass:
        """Every other document, then the rest; a single one beside itself."""
        import torch

        grid = self._grids["decoder"]
        rows = torch.arange(grid.rows)
        halves = [rows[0::2], rows[1::2]] if len(rows) > 1 else [rows.repeat(2)]
        with self._listening(_BEFORE_ALL) as chosen:
            hidden = [again(half).last_hidden_state for half in halves]
        order = torch.cat(halves).argsort(stable=True)[: len(rows)]
        return _without_padding(NOISE, hidden, chosen, grid, order)

    @contextlib.contextmanager
    def _listening(self, start: tuple[bool, int]) -> Iterator[dict[str, list[torch.Tensor]]]:
        """Collects the choices of routers behind this place."""
        chosen: dict[str, list[torch.Tensor]] = defaultdict(list)

        def listen(router: Router) -> Callable[..., None]:
            return lambda _module, _inputs, outputs: chosen[router.name].append(router.read(outputs).experts_tk)

        with contextlib.ExitStack() as handles:
            for router in self._decoders():
                if _place(router) > start:
                    handles.callback(router.module.register_forward_hook(listen(router)).remove)
            yield chosen

    def _compare(self, passes: Sequence[_Pass], base_rh: torch.Tensor) -> _Sums:
        import torch

        assert self.head is not None, "needs_head"
        grid, table, device = self._grids["decoder"], self._tables["decoder"], self.head.device
        slots = grid.slots
        assert slots is not None, "a batch of a shard"
        doc_n, document_r = np.unique(table.doc[slots], return_inverse=True)
        ordinary_r = torch.from_numpy(~table.is_special[slots]).to(device)
        of_r = torch.from_numpy(document_r).to(device)
        sums_an7 = torch.zeros((len(passes), len(doc_n), len(SUMS)), dtype=torch.float64, device=device)
        pieces: list[list[torch.Tensor]] = [[] for _ in passes]
        """By arm, [F, 3] `PER_TOKEN` of some tokens after the other, if they are kept."""
        keeps_tokens = TOKENS in self.config.store
        following_f, ids_f = (each.to(device) for each in grid.following_on(base_rh.device))
        kept = ordinary_r[following_f]
        following_f, ids_f = following_f[kept], ids_f[kept]
        for first in range(0, len(following_f), self.head.rows_at_once):
            own_f, next_f = (each[first : first + self.head.rows_at_once] for each in (following_f, ids_f))
            base_fv = self._predicted(base_rh, own_f - 1)
            base_f, first_f, p_fv = _loss(base_fv, next_f), base_fv.argmax(-1), base_fv.exp()
            for number, each in enumerate(passes):
                edited_fv = self._predicted(each.hidden_rh, own_f - 1)
                loss_f = _loss(edited_fv, next_f)
                flips_f = -_loss(edited_fv, first_f) < edited_fv.amax(-1)  # amax is ten times as fast as argmax
                divergence_f = torch.sub(base_fv, edited_fv, out=edited_fv).mul_(p_fv).sum(-1)
                columns = [torch.ones_like(base_f), loss_f, base_f, divergence_f, flips_f]
                if keeps_tokens:
                    pieces[number].append(torch.stack([loss_f - base_f, divergence_f, flips_f], 1))
                sums_an7[number, :, :5].index_add_(0, of_r[own_f], torch.stack([one.double() for one in columns], 1))
        for number, each in enumerate(passes):
            for name, experts_rk in each.experts.items():
                before_rk = self._chosen[name]
                same_r = (before_rk.sort(-1).values == experts_rk.sort(-1).values).all(-1).to(device)
                counted = torch.stack([torch.ones_like(same_r), ~same_r], 1).double()
                sums_an7[number, :, 5:].index_add_(0, of_r[ordinary_r], counted[ordinary_r])
        has_tokens = any(pieces)
        return _Sums(
            arms=[each.arm for each in passes], doc_n=doc_n, sums_an7=sums_an7,
            slots_f=torch.from_numpy(slots).to(device)[following_f] if has_tokens else None,
            tokens_af3=torch.stack([torch.cat(own) for own in pieces]) if has_tokens else None,
        )  # fmt: skip

    def _predicted(self, hidden_rh: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        """[F, V] log-probabilities of the tokens that come after these places, [F]."""
        assert self.head is not None, "needs_head"
        return self.head.logits(hidden_rh.to(self.head.device).index_select(0, at)).float().log_softmax(-1)

    def conclude(self) -> list[Effects]:
        """Brings the sums to the host."""
        found = [
            Effects(
                arms=np.array(one.arms), doc_n=one.doc_n, sums_an7=one.sums_an7.cpu().numpy(),
                slots_f=None if one.slots_f is None else one.slots_f.cpu().numpy(),
                tokens_af3=None if one.tokens_af3 is None else one.tokens_af3.cpu().numpy(),
            )
            for one in self._found
        ]  # fmt: skip
        self._found = []
        return found

    def start(self, tokens: Mapping[str, TokenTable]) -> ShardEffects:
        """See `Recorder.start`."""
        first_tok = sum(len(table.ids) for stack, table in tokens.items() if stack != "decoder")
        return ShardEffects(self.arms, tokens["decoder"], first_tok if TOKENS in self.config.store else None)


_BEFORE_ALL = (False, -1)


def _place(at: Router | Edit) -> tuple[bool, int]:
    """Where a router runs: all layers of an encoder come before those of the decoder."""
    return at.stack.partition(".")[0] == "decoder", at.layer


def _start(arm: Arm) -> tuple[bool, int]:
    """Where the first edited router of an arm runs."""
    return min(map(_place, arm.edits))


def _without_padding(
    arm: int, hidden: Sequence[torch.Tensor], chosen: Mapping[str, Sequence[torch.Tensor]], grid: Grid,
    order: torch.Tensor | None = None,
) -> _Pass:  # fmt: skip
    """The rows of real tokens, of parts of the batch whose rows stand in this order."""
    import torch

    def joined(parts: Sequence[torch.Tensor]) -> torch.Tensor:
        if order is not None:
            whole = torch.cat([part.view(-1, grid.length, part.shape[-1]) for part in parts])
            parts = [whole.index_select(0, order.to(whole.device))]
        flat_tx = parts[0].reshape(-1, parts[0].shape[-1])
        return flat_tx if grid.real is None else flat_tx.index_select(0, grid.real_on(flat_tx.device))

    return _Pass(arm, joined(hidden), {name: joined(parts) for name, parts in chosen.items()})


def _loss(predicted_fv: torch.Tensor, next_f: torch.Tensor) -> torch.Tensor:
    return -predicted_fv.gather(1, next_f[:, None])[:, 0]
