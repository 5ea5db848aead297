"""Hooks on the routers of a model: what each of them decided about the real tokens of a batch.

    with RouterCapture(model, routers) as capture:
        decisions = capture.run(input_ids, attention_mask)

Of an encoder–decoder model only the encoder runs, unless a router of the decoder is asked for.

Guarantees:

- ids and weights are the router's own return values, never recomputed;
- padding is dropped on the device, before anything is reduced or copied, and reaches no expert of the
  usual kind (see `padding`);
- every router fires exactly once per forward, or the batch fails;
- nothing after the last captured router is computed: its hook ends the forward pass, so not even
  that layer's experts run;
- hooks are gone when the context ends, whatever happened in it.

Results arrive without blocking the device, and nothing here waits for it while a forward pass is
being queued; `Decisions.wait` must be called before they are read.
Not for models under CUDA graphs or torch.compile, whose replay calls no hooks.

Shapes: B rows, S positions, T real tokens, E experts, k chosen per token.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch

from collector.capture.padding import ExpertsWithoutPadding, Grid, encoder_of

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from transformers import PreTrainedModel

    from collector.models.routers import Reading, Router


class _LastRouterReached(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass after its last captured router."""


class Geometry(NamedTuple):
    """What a router chooses from."""

    n_experts: int
    """E."""
    top_k: int
    """k."""
    has_capacity: bool
    """Whether a limit can keep a pick from its expert."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerDecision:
    """One router's decision about T tokens, on the host once waited for."""

    experts_tk: torch.Tensor
    """[T, k] expert ids, int16 or int32."""
    weights_tk: torch.Tensor
    """[T, k] in the model's dtype."""
    statistics_3t: torch.Tensor
    """[3, T] float32: router entropy (nats), top-k mass, margin."""
    probabilities_te: torch.Tensor | None
    """[T, E] float32, when asked for."""
    n_experts: int
    """E."""
    dropped_tk: torch.Tensor | None = None
    """[T, k] bool, whether a capacity limit kept the pick from its expert; None without one."""

    @property
    def geometry(self) -> Geometry:
        """Of the router that decided."""
        return Geometry(self.n_experts, self.experts_tk.shape[1], self.dropped_tk is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decisions:
    """All captured routers of one forward pass, in the order of `routers`."""

    layers: list[LayerDecision]
    events: list[torch.cuda.Event]
    """One per GPU that held a router."""

    def wait(self) -> list[LayerDecision]:
        """Blocks until the copies to the host are done."""
        for event in self.events:
            event.synchronize()
        return self.layers


def statistics(reading: Reading) -> tuple[torch.Tensor, torch.Tensor]:
    """Router entropy H(p) in nats, top-k mass and margin per token, with p the softmax of the logits.

    The margin is p of the least probable chosen expert minus p of the most probable one left out
    (0 counts as left out where all experts are chosen).

    Returns:
        ([3, T] statistics, [T, E] probabilities), float32.
    """
    probabilities_te = reading.logits_te.float().softmax(-1)
    entropy_t = torch.special.entr(probabilities_te).sum(-1)
    experts_tk = reading.experts_tk.long()
    chosen_tk = probabilities_te.gather(1, experts_tk)
    left_out_t = probabilities_te.scatter(1, experts_tk, 0.0).amax(-1)
    return torch.stack([entropy_t, chosen_tk.sum(-1), chosen_tk.amin(-1) - left_out_t]), probabilities_te


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Starts a copy into pinned memory; on a CPU there is nothing to copy."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


class RouterCapture:
    """Context manager that records the decisions of some routers of a model."""

    def __init__(
        self, model: PreTrainedModel, routers: Sequence[Router], *, probabilities: bool = False,
        device: torch.device | None = None,
    ) -> None:  # fmt: skip
        """Prepares the hooks; they are in place inside the context only.

        Args:
            model: a base model in eval mode.
            routers: the routers to record.
            probabilities: also keep the full distribution of every token.
            device: where inputs go (default: the model's own).
        """
        self.model = model
        self.routers = list(routers)
        self.probabilities = probabilities
        self.device = device or model.device
        encoder = encoder_of(model)
        self.two_stacks = encoder is not None
        """Whether the model has an encoder and a decoder."""
        self.decodes = self.two_stacks and any(_tokens_of(router) == "decoder" for router in routers)
        """Whether `run` needs decoder inputs too."""
        self.geometry: list[Geometry] = []
        """Per router, known inside the context."""
        self._entry: Any = encoder if self.two_stacks and not self.decodes else model
        self._last: int | None = None
        self._handles: list[Any] = []
        self._devices: set[torch.device] = set()
        self._decisions: dict[int, LayerDecision] = {}
        self._grids: dict[str, Grid] = {}
        self._narrowing = ExpertsWithoutPadding(model, self._grids)

    def __enter__(self) -> Self:
        try:
            self._narrowing.__enter__()
            for index, router in enumerate(self.routers):
                self._handles.append(router.module.register_forward_hook(self._hook(index)))
            self._find_last()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        self._narrowing.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _find_last(self) -> None:
        """Learns from one tiny, complete forward pass each router's geometry, and which one fires last."""
        ids = torch.zeros((1, 2), dtype=torch.long)
        inputs = (ids, torch.ones_like(ids)) * (2 if self.decodes else 1)
        self.geometry = [layer.geometry for layer in self.run(*inputs).wait()]
        self._last = list(self._decisions)[-1]

    def _hook(self, index: int) -> Any:
        router = self.routers[index]

        def record(_module: torch.nn.Module, _inputs: Any, outputs: Any) -> None:
            if index in self._decisions:
                raise RuntimeError(f"router {router.name} fired twice in one forward pass")
            self._decisions[index] = self._reduce(router, router.read(outputs))
            if index == self._last:
                raise _LastRouterReached

        return record

    def _reduce(self, router: Router, reading: Reading) -> LayerDecision:
        grid = self._grids[_tokens_of(router)]
        if len(reading.logits_te) != grid.positions:
            raise RuntimeError(
                f"router {router.name} saw {len(reading.logits_te)} tokens of a batch of {grid.positions}"
            )
        if grid.real is not None:
            real = grid.real_on(reading.logits_te.device)
            parts = (None if part is None else part.index_select(0, real) for part in reading)
            reading = type(reading)(*parts)  # type: ignore[arg-type]  # only the drops may be None
        self._devices.add(reading.logits_te.device)
        statistics_3t, probabilities_te = statistics(reading)
        narrow = torch.int16 if reading.logits_te.shape[1] < 2**15 else torch.int32
        return LayerDecision(
            experts_tk=_to_host(reading.experts_tk.to(narrow)),
            weights_tk=_to_host(reading.weights_tk),
            statistics_3t=_to_host(statistics_3t),
            probabilities_te=_to_host(probabilities_te) if self.probabilities else None,
            n_experts=reading.logits_te.shape[1],
            dropped_tk=None if reading.dropped_tk is None else _to_host(reading.dropped_tk),
        )

    @torch.inference_mode()
    def run(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
    ) -> Decisions:
        """One forward pass.

        Args:
            input_ids: [B, S] on the host.
            attention_mask: [B, S] on the host, 1 for real tokens; padding may be on either side, of an
                encoder–decoder model on the right only: a capacity counts from the left.
            decoder_input_ids: [B, S'] on the host, where `decodes`; what the decoder is given.
            decoder_attention_mask: [B, S'] on the host.

        Raises:
            RuntimeError: a router did not fire, fired twice, or saw other than B x S tokens.
        """
        self._decisions = {}
        self._grids.clear()
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        self._grids["encoder" if self.two_stacks else "decoder"] = Grid.of(attention_mask, self._to_device)
        options: dict[str, Any] = {} if self.two_stacks and not self.decodes else {"use_cache": False}
        if self.decodes:
            assert decoder_input_ids is not None, "a router of the decoder is captured"
            assert decoder_attention_mask is not None, "a router of the decoder is captured"
            inputs |= {"decoder_input_ids": decoder_input_ids, "decoder_attention_mask": decoder_attention_mask}
            self._grids["decoder"] = Grid.of(decoder_attention_mask, self._to_device)
        elif not self.two_stacks and (attention_mask[:, 0] == 0).any():
            # A causal model numbers positions from the left edge of the batch unless told otherwise.
            inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp_min(0)
        with contextlib.suppress(_LastRouterReached):
            self._entry(**{name: self._to_device(tensor) for name, tensor in inputs.items()}, **options)
        silent = [router.name for index, router in enumerate(self.routers) if index not in self._decisions]
        if silent:
            raise RuntimeError(f"routers that did not fire: {silent}")
        events = [torch.cuda.current_stream(device).record_event() for device in self._devices if device.type == "cuda"]
        return Decisions(layers=[self._decisions[index] for index in range(len(self.routers))], events=events)


def _tokens_of(router: Router) -> str:
    """The stack whose tokens a router sees."""
    return router.stack.partition(".")[0]
