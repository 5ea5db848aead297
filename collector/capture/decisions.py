"""What is kept of a router's output: ids, weights, three statistics, and all probabilities or logits if asked for.

Shapes: T real tokens, E experts, k chosen per token.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collector.models.routers import Reading


class Geometry(NamedTuple):
    """How many experts a router has, and how many it chooses."""

    n_experts: int
    """E."""
    top_k: int
    """k."""
    has_capacity: bool
    """Whether a limit can keep a pick from its expert."""


class LayerDecision(NamedTuple):
    """One router's decision about T tokens."""

    experts_tk: torch.Tensor
    """[T, k] expert ids, int16 or int32."""
    weights_tk: torch.Tensor
    """[T, k] float32: the model's own, whose precision may be lower."""
    statistics_3t: torch.Tensor
    """[3, T] float32: router entropy (nats), top-k mass, margin."""
    probabilities_te: torch.Tensor | None
    """[T, E] float32, when asked for."""
    n_experts: int
    """E."""
    logits_te: torch.Tensor | None = None
    """[T, E] float32, when asked for."""
    dropped_tk: torch.Tensor | None = None
    """[T, k] bool, whether a capacity limit kept the pick from its expert; None without one."""

    @property
    def geometry(self) -> Geometry:
        """The geometry of the router that decided."""
        return Geometry(self.n_experts, self.experts_tk.shape[1], self.dropped_tk is not None)


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


def decision(reading: Reading, stored: Sequence[str] = ()) -> LayerDecision:
    """Reduces a router's output about T real tokens on the device.

    Args:
        reading: the router's output, without padding.
        stored: which of `probabilities` and `logits` to keep of all experts.
    """
    statistics_3t, probabilities_te = statistics(reading)
    n_experts = reading.logits_te.shape[1]
    return LayerDecision(
        experts_tk=reading.experts_tk.to(torch.int16 if n_experts < 2**15 else torch.int32),
        weights_tk=reading.weights_tk.float(),
        statistics_3t=statistics_3t,
        probabilities_te=probabilities_te if "probabilities" in stored else None,
        n_experts=n_experts,
        logits_te=reading.logits_te.float() if "logits" in stored else None,
        dropped_tk=reading.dropped_tk,
    )
