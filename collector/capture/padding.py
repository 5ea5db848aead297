"""Keeps padding out of the experts, so that a padded position costs attention and routing only.

    grids = {"decoder": Grid.of(attention_mask, to_device)}
    with ExpertsWithoutPadding(model, grids):
        model(...)

Every module whose forward takes `hidden_states [T, H]`, `top_k_index [T, k]` and `top_k_weights [T, k]`,
as nearly all experts of transformers do (`_TAKEN` has the other names), gets the rows of real
tokens only. Its output goes back to their places, with zeros for padding, which no real token ever reads.
A batch without padding is left alone, and so is a module that is called with other shapes or with only
some of the positions. Routers still see every position, so that a capacity counts as it does in the plain model.

No step waits for the device. The hooks are gone when the context ends.

Shapes: T positions of a batch in row-major order, R of them real, H hidden size, k chosen per token.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import TYPE_CHECKING, Any, Self

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

_TAKEN = (
    ("hidden_states", "top_k_index", "top_k_weights"),
    ("hidden_states", "router_indices", "routing_weights"),  # GPT-OSS
    ("hidden_states", "selected_experts", "routing_weights"),  # Switch: a mask [T, 1, E]
    ("hidden_states", "router_mask", "router_probs"),  # NLLB-MoE: [T, E] both
)
"""The arguments of an experts module's forward; each has T rows."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """The positions of one padded batch."""

    positions: int
    """T, padding included."""
    real: torch.Tensor | None
    """[R] indices of the real tokens, on the device of the inputs; None if all are."""
    _copies: dict[torch.device, torch.Tensor] = dataclasses.field(default_factory=dict)
    _host: tuple[torch.Tensor, torch.Tensor] | None = None
    """Mask and token ids, [B, S] each, on the host."""
    slots: NDArray[np.int64] | None = None
    """[R] each real token's place in the shard's token table, see `batches`."""

    @property
    def rows(self) -> int:
        """B."""
        assert self._host is not None, "made with token ids"
        return len(self._host[0])

    @property
    def length(self) -> int:
        """S."""
        return self.positions // self.rows

    def real_on(self, device: torch.device) -> torch.Tensor:
        """`real` on another device of a model that spans several; copied once for each."""
        assert self.real is not None
        if device == self.real.device:
            return self.real
        if device not in self._copies:
            self._copies[device] = self.real.to(device, non_blocking=True)
        return self._copies[device]

    def following_on(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the real tokens that follow another one of their row.

        Both are found on the host, because asking the device for them would wait for it.

        Returns:
            [F] their places among the real tokens, and [F] their ids.
        """
        assert self._host is not None, "made with token ids"
        mask, ids = self._host
        real = mask.flatten().nonzero().squeeze(1)
        row = real // mask.shape[1]
        following = (row[1:] == row[:-1]).nonzero().squeeze(1) + 1
        found = following, ids.flatten()[real[following]]
        if device.type == "cuda":
            found = found[0].pin_memory(), found[1].pin_memory()
        return found[0].to(device, non_blocking=True), found[1].to(device, non_blocking=True)

    def spread(self, values_r: torch.Tensor) -> torch.Tensor:
        """Puts values of the real tokens, [R] on the host, in their places, [T]; padding gets zeros."""
        assert self._host is not None, "made with token ids"
        spread_t = torch.zeros(self.positions, dtype=values_r.dtype)
        spread_t[self._host[0].flatten().bool()] = values_r
        return spread_t

    @classmethod
    def of(
        cls, attention_mask: torch.Tensor, to_device: Callable[[torch.Tensor], torch.Tensor],
        input_ids: torch.Tensor | None = None, slots: NDArray[np.int64] | None = None,
    ) -> Grid:  # fmt: skip
        """Reads a mask [B, S], token ids of the same shape, and the real tokens' slots, on the host."""
        real = attention_mask.flatten().nonzero().squeeze(1)
        positions = attention_mask.numel()
        whole = len(real) == positions
        host = None if input_ids is None else (attention_mask, input_ids)
        return cls(positions=positions, real=None if whole else to_device(real), _host=host, slots=slots)


def encoder_of(model: PreTrainedModel) -> Any:
    """The encoder of an encoder–decoder model; None for any other model."""
    return model.get_encoder() if getattr(model.config, "is_encoder_decoder", False) else None


def argument_names(module: torch.nn.Module) -> tuple[str, ...] | None:
    """The names under which an experts module's forward takes hidden states, choice and weights; None of any other."""
    parameters = inspect.signature(module.forward).parameters.keys()
    return next((names for names in _TAKEN if set(names) <= parameters), None)


def _experts(model: PreTrainedModel) -> Iterator[tuple[torch.nn.Module, tuple[str, ...]]]:
    """Yields each experts module with the names of its forward's arguments."""
    for module in model.modules():
        if (names := argument_names(module)) is not None:
            yield module, names


class ExpertsWithoutPadding:
    """Context manager that gives the experts of a model real tokens only."""

    def __init__(self, model: PreTrainedModel, grids: Mapping[str, Grid]) -> None:
        """Prepares the hooks; they are in place inside the context only.

        Args:
            model: any model of transformers.
            grids: the current batch of each stack; read at every call.
        """
        self.model = model
        self.grids = grids
        self._handles: list[Any] = []

    def __enter__(self) -> Self:
        encoder = encoder_of(self.model)
        inside = set() if encoder is None else set(encoder.modules())
        for module, names in _experts(self.model):
            self._hook(module, names, "encoder" if module in inside else "decoder")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, module: torch.nn.Module, names: tuple[str, ...], stack: str) -> None:
        signature = inspect.signature(module.forward)
        narrowed: list[Grid] = []

        def narrow(_module: torch.nn.Module, args: Any, kwargs: Any) -> Any:
            narrowed.clear()  # an error in the last call has left its batch here
            grid = self.grids.get(stack)
            if grid is None or grid.real is None or len(grid.real) == 0:
                return None
            bound = signature.bind(*args, **kwargs)
            given: list[torch.Tensor] = [bound.arguments[name] for name in names]
            if any(each.shape[0] != grid.positions for each in given):
                return None
            narrowed.append(grid)
            for name, each in zip(names, given, strict=True):
                bound.arguments[name] = each.index_select(0, grid.real_on(each.device))
            return bound.args, bound.kwargs

        def widen(_module: torch.nn.Module, _args: Any, output: torch.Tensor) -> torch.Tensor | None:
            if not narrowed:
                return None
            grid = narrowed.pop()
            whole = output.new_zeros((grid.positions, *output.shape[1:]))
            return whole.index_copy_(0, grid.real_on(output.device), output)

        self._handles.append(module.register_forward_pre_hook(narrow, with_kwargs=True))
        self._handles.append(module.register_forward_hook(widen))
