"""Hooks on the routers of a model: what each of them decided about the real tokens of a batch.

    with RouterCapture(model, routers) as capture:
        decisions = capture.run(input_ids, attention_mask)

Guarantees:

- ids and weights are the router's own return values, never recomputed;
- padding is dropped on the device, before anything is reduced or copied;
- every router fires exactly once per forward, or the batch fails;
- nothing after the last captured router is computed: its hook ends the forward pass, so not even
  that layer's experts run;
- hooks are gone when the context ends, whatever happened in it.

Results arrive without blocking the device; `Decisions.wait` must be called before they are read.
Not for models under CUDA graphs or torch.compile, whose replay calls no hooks.

Shapes: B rows, S positions, T real tokens, E experts, k chosen per token.
"""

from __future__ import annotations

import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any, Self

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import TracebackType

    from transformers import PreTrainedModel

    from collector.routers import Reading, Router


class _LastRouterReached(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass after its last captured router."""


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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decisions:
    """All captured routers of one forward pass, in the order of `routers`."""

    layers: list[LayerDecision]
    event: torch.cuda.Event | None

    def wait(self) -> list[LayerDecision]:
        """Blocks until the copies to the host are done."""
        if self.event is not None:
            self.event.synchronize()
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
    chosen_tk = probabilities_te.gather(1, reading.experts_tk)
    left_out_t = probabilities_te.scatter(1, reading.experts_tk, 0.0).amax(-1)
    return torch.stack([entropy_t, chosen_tk.sum(-1), chosen_tk.amin(-1) - left_out_t]), probabilities_te


def _to_host(tensor: torch.Tensor) -> torch.Tensor:
    """Starts a copy into pinned memory; on a CPU there is nothing to copy."""
    if tensor.device.type == "cpu":
        return tensor
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


class RouterCapture:
    """Context manager that records the decisions of some routers of a model."""

    def __init__(self, model: PreTrainedModel, routers: Sequence[Router], *, probabilities: bool = False) -> None:
        """Prepares the hooks; they are in place inside the context only.

        Args:
            model: a base model in eval mode.
            routers: the routers to record.
            probabilities: also keep the full distribution of every token.
        """
        self.model = model
        self.routers = list(routers)
        self.probabilities = probabilities
        self.geometry: list[tuple[int, int]] = []
        """(E, k) per router, known inside the context."""
        self._last: int | None = None
        self._handles: list[Any] = []
        self._decisions: dict[int, LayerDecision] = {}
        self._keep: torch.Tensor | None = None
        self._positions = 0

    def __enter__(self) -> Self:
        try:
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
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.model.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.model.device, non_blocking=True)

    def _find_last(self) -> None:
        """Learns from one tiny, complete forward pass each router's geometry, and which one fires last."""
        ids = torch.zeros((1, 2), dtype=torch.long)
        decisions = self.run(ids, torch.ones_like(ids)).wait()
        self.geometry = [(layer.n_experts, layer.experts_tk.shape[1]) for layer in decisions]
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
        keep, positions = self._keep, self._positions
        if len(reading.logits_te) != positions:
            raise RuntimeError(f"router {router.name} saw {len(reading.logits_te)} tokens of a batch of {positions}")
        if keep is not None:
            reading = type(reading)(*(part.index_select(0, keep) for part in reading))
        statistics_3t, probabilities_te = statistics(reading)
        narrow = torch.int16 if reading.logits_te.shape[1] < 2**15 else torch.int32
        return LayerDecision(
            experts_tk=_to_host(reading.experts_tk.to(narrow)),
            weights_tk=_to_host(reading.weights_tk),
            statistics_3t=_to_host(statistics_3t),
            probabilities_te=_to_host(probabilities_te) if self.probabilities else None,
            n_experts=reading.logits_te.shape[1],
        )

    @torch.inference_mode()
    def run(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Decisions:
        """One forward pass.

        Args:
            input_ids: [B, S] on the host.
            attention_mask: [B, S] on the host, 1 for real tokens; padding may be on either side.

        Raises:
            RuntimeError: a router did not fire, fired twice, or saw other than B x S tokens.
        """
        self._decisions = {}
        self._positions = attention_mask.numel()
        # Indices are made on the host: asking the device for them would wait for it.
        real = attention_mask.flatten().nonzero().squeeze(1)
        self._keep = None if len(real) == self._positions else self._to_device(real)
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        if (attention_mask[:, 0] == 0).any():
            # A causal model numbers positions from the left edge of the batch unless told otherwise.
            inputs["position_ids"] = (attention_mask.cumsum(-1) - 1).clamp_min(0)
        with contextlib.suppress(_LastRouterReached):
            self.model(**{name: self._to_device(tensor) for name, tensor in inputs.items()}, use_cache=False)
        silent = [router.name for index, router in enumerate(self.routers) if index not in self._decisions]
        if silent:
            raise RuntimeError(f"routers that did not fire: {silent}")
        event = None
        if self.model.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
        return Decisions(layers=[self._decisions[index] for index in range(len(self.routers))], event=event)
