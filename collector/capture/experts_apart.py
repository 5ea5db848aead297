"""Reads what single experts put out, before the routing weights merge it.

    with ExpertsApart(experts_of(router), listen):
        model(...)

The experts module of nearly all families takes `hidden_states [R, H]`, `top_k_index [R, k]` and `top_k_weights [R, k]`.
Here it is given each pick as a row of its own, `[R k, H]` with a single expert of weight 1, so that it returns every
f_e(x), whatever its implementation or precision; the weighted sum over a token's picks is then taken outside of it. In
a pass the experts do the same work as before. The sum is that of transformers' grouped and batched implementations, to
the bit; the plain loop over experts adds in another order. Switch's experts take a mask of a single pick instead of
ids, and are given it with weight 1. Outside of a pass, `outputs_of` gives tokens to any experts, `every_output` to all.

Shapes: R rows (real tokens only, where padding is kept out), k chosen per token, H hidden size.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import torch

from collector.capture.padding import argument_names

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

    from collector.models.routers import Router

_MASK = "selected_experts"
_ROWS = 1 << 15
"""Picks that go through the experts at once where every token goes through all."""
_SQUEEZE_SINGLE_PICKS = {"LongcatFlashExperts"}
"""Classes that misread a single pick per row; they are given a second one of weight 0."""


class ExpertCall(NamedTuple):
    """What the experts of one layer did for R tokens."""

    outputs_rkh: torch.Tensor
    """[R, k, H] f_e(x) of each pick, before its weight."""
    experts_rk: torch.Tensor
    """[R, k] ids, as the experts received them; -1 for a pick that a capacity limit dropped."""
    weights_rk: torch.Tensor
    """[R, k] g, the weights that the model applied."""
    total_rh: torch.Tensor
    """[R, H] y, the sum of g f_e(x) over the picks; shared experts are not in it."""


def experts_of(router: Router) -> torch.nn.Module:
    """Returns the experts module that a router's block hands its choice to.

    Raises:
        ValueError: the block has none, or one that takes other arguments than ids and weights.
    """
    experts = getattr(router.owner, "experts", None)
    names = None if experts is None else argument_names(experts)
    if experts is None or names is None or names[1] not in ("top_k_index", "router_indices", _MASK):
        what = type(router.owner).__name__ if experts is None else type(experts).__name__
        raise ValueError(
            f"--record: router {router.name} hands its choice to {what}, whose experts cannot be "
            "read one by one: record the routing alone"
        )
    return experts


class ExpertInputs(NamedTuple):
    """What the experts of one layer receive for R tokens."""

    hidden_rh: torch.Tensor
    """[R, H] x."""
    experts_rk: torch.Tensor
    """[R, k] ids, as the experts receive them; -1 for a pick that a capacity limit dropped."""
    weights_rk: torch.Tensor
    """[R, k] g, the weights that the model applies."""


def listen_to_inputs(experts: torch.nn.Module, listen: Callable[[ExpertInputs], None]) -> Any:
    """Hands what an experts module receives to a listener, at every call.

    Args:
        experts: what `experts_of` returns.
        listen: called before the experts run.

    Returns:
        The handle of the hook; it must be registered before `ExpertsApart` enters its context.
    """
    names, signature = argument_names(experts) or (), inspect.signature(experts.forward)

    def read(_module: torch.nn.Module, args: Any, kwargs: Any) -> None:
        listen(_inputs(names, signature.bind(*args, **kwargs)))

    return experts.register_forward_pre_hook(read, with_kwargs=True)


def _inputs(names: tuple[str, ...], bound: inspect.BoundArguments) -> ExpertInputs:
    hidden, experts, weights = (bound.arguments[name] for name in names)
    rows = hidden.reshape(-1, hidden.shape[-1])
    if names[1] == _MASK:
        picked_r = torch.where(experts.bool().any(-1), experts.argmax(-1), -1)
        return ExpertInputs(rows, picked_r.reshape(-1, 1), weights.reshape(-1, 1))
    return ExpertInputs(rows, experts.reshape(len(rows), -1), weights.reshape(len(rows), -1))


def count_experts(experts: torch.nn.Module) -> int:
    """Returns how many experts a module computes, E; a router may know more, which compute nothing."""
    for name in ("total_experts", "num_experts"):
        if isinstance(count := getattr(experts, name, None), int):
            return count
    return len(experts)  # type: ignore[arg-type]


def every_output(experts: torch.nn.Module, hidden_rh: torch.Tensor) -> torch.Tensor:
    """Computes f_e(x) of all experts, [R, E, H], as `outputs_of` does."""
    ids = torch.arange(count_experts(experts), device=hidden_rh.device)
    return outputs_of(experts, hidden_rh, ids.expand(len(hidden_rh), -1))


def outputs_of(experts: torch.nn.Module, hidden_rh: torch.Tensor, experts_rk: torch.Tensor) -> torch.Tensor:
    """Computes f_e(x) of these experts, [R, k, H], past the module's hooks, some tokens at a time.

    Args:
        experts: what `experts_of` returns.
        hidden_rh: [R, H] tokens as the module receives them.
        experts_rk: [R, k] ids of experts for each of them.
    """
    step = max(1, _ROWS // experts_rk.shape[1])
    parts = zip(hidden_rh.split(step), experts_rk.split(step), strict=True)
    return torch.cat([_outputs_of(experts, *part) for part in parts])


def _outputs_of(experts: torch.nn.Module, hidden_rh: torch.Tensor, experts_rk: torch.Tensor) -> torch.Tensor:
    names = argument_names(experts) or ()
    rows = hidden_rh.repeat_interleave(experts_rk.shape[1], dim=0)
    ids = experts_rk.reshape(-1, 1)
    ones = torch.ones(ids.shape, dtype=hidden_rh.dtype, device=hidden_rh.device)
    if names[1] == _MASK:
        ids = torch.nn.functional.one_hot(ids, count_experts(experts))
    return experts.forward(rows, *_doubled(experts, ids, ones)).reshape(*experts_rk.shape, -1)


def _doubled(experts: torch.nn.Module, ids: torch.Tensor, ones: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Adds a second pick of weight 0 to each row for those that misread a single one."""
    if type(experts).__name__ not in _SQUEEZE_SINGLE_PICKS:
        return ids, ones
    return ids.expand(-1, 2), torch.cat([ones, torch.zeros_like(ones)], dim=1)


class ExpertsApart:
    """Context manager that has one experts module work pick by pick, and hands what it did to a listener."""

    def __init__(self, experts: torch.nn.Module, listen: Callable[[ExpertCall], None]) -> None:
        """Prepares the hooks; they are in place inside the context only.

        Args:
            experts: what `experts_of` returns.
            listen: called once per forward pass, before the sum goes on.
        """
        self._experts = experts
        self._listen = listen
        self._names = argument_names(experts) or ()
        self._signature = inspect.signature(experts.forward)
        self._given: tuple[torch.Size, torch.Tensor, torch.Tensor] | None = None
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        # The last hook before the module sees its inputs, and the first one to see its output.
        self._handles = [
            self._experts.register_forward_pre_hook(self._expand, with_kwargs=True),
            self._experts.register_forward_hook(self._merge, prepend=True),
        ]
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _expand(self, _module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
        bound = self._signature.bind(*args, **kwargs)
        given = _inputs(self._names, bound)
        self._given = bound.arguments[self._names[0]].shape, given.experts_rk, given.weights_rk
        if self._names[1] == _MASK:
            bound.arguments[self._names[2]] = torch.ones_like(bound.arguments[self._names[2]])
            return bound.args, bound.kwargs
        ids, ones = given.experts_rk.reshape(-1, 1), torch.ones_like(given.weights_rk).reshape(-1, 1)
        rows = given.hidden_rh.repeat_interleave(given.experts_rk.shape[1], dim=0)
        bound.arguments.update(zip(self._names, (rows, *_doubled(self._experts, ids, ones)), strict=True))
        return bound.args, bound.kwargs

    def _merge(self, _module: torch.nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor:
        assert self._given is not None, "the pre-hook ran"
        shape, experts_rk, weights_rk = self._given
        self._given = None
        outputs_rkh = output.reshape(*experts_rk.shape, output.shape[-1])
        total_rh = (outputs_rkh * weights_rk[..., None]).sum(dim=1).to(output.dtype)
        self._listen(ExpertCall(outputs_rkh, experts_rk, weights_rk, total_rh))
        return total_rh.reshape(shape)
