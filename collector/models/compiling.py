"""Fuses what surrounds the matrix products of a model's layers, with torch.compile, where hooks can live with it.

On a GPU two thirds of the time of an MoE model in 16 bits go into norms, rotary embeddings, activations, and the
gathering and summing around experts, which move memory and hardly compute. Compiled, each chain of them reads and
writes once. What is compiled are the forwards of attention modules, norms and experts. Hooks sit around a forward, so
they see what they always see, and routers run as they are.

All layers share the compiled code, whatever the batch's shape. Intermediate results are rounded like those of the
uncompiled model; sums may be added up in another order.

Shapes: T tokens, k experts per token, H hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.integrations import moe

from collector.models.routers import router_prefixes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedModel

IMPLEMENTATION = "grouped_by_pick"


def compile_parts(model: PreTrainedModel) -> list[str]:
    """Compiles the parts of a model's layers that hold no router, at their first call.

    Args:
        model: a loaded model on one device, without quantized weights, changed in place.

    Returns:
        The names of the compiled modules.
    """
    parts = dict(_parts(model))
    if getattr(model.config, "_experts_implementation", None) == "grouped_mm":
        model.set_experts_implementation(IMPLEMENTATION)
    for module in parts.values():
        module.forward = torch.compile(module.forward, dynamic=True, options={"emulate_precision_casts": True})
    return list(parts)


def _parts(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yields the largest modules inside the model's layers that hold no router."""
    routers = router_prefixes(model)

    def inside(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        if f"{name}." in routers:
            return
        if any(router.startswith(f"{name}.") for router in routers):
            for child, each in module.named_children():
                yield from inside(f"{name}.{child}", each)
        elif not isinstance(module, nn.ModuleList):
            yield name, module

    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and any(router.startswith(f"{name}.") for router in routers):
            for child, layer in module.named_children():
                yield from inside(f"{name}.{child}", layer)
            return


def grouped_by_pick(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Transformers' grouped experts, but each token's sum is written out pick by pick.

    Written as a reduction over gathered rows, as in transformers, the sum becomes a kernel of its own that takes longer
    than all matrix products of the layer; pick by pick it is one pass over the outputs.

    Args:
        self: an experts module with fused parameters.
        hidden_states: [T, H].
        top_k_index: [T, k].
        top_k_weights: [T, k].

    Returns:
        [T, H], in the precision of `hidden_states`.
    """
    if self.has_bias or self.has_post_expert_norm or self._is_expert_parallel:
        return moe.grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    top_k = top_k_index.shape[1]
    expert_s, order_s = torch.sort(top_k_index.reshape(-1))
    place_s = torch.empty_like(order_s)
    place_s[order_s] = torch.arange(len(order_s), device=order_s.device)
    countable = expert_s.float() if expert_s.device.type == "cpu" else expert_s.int()
    count_e = torch.histc(countable, bins=self.num_experts, min=0, max=self.num_experts - 1)
    ends_e = count_e.cumsum(0, dtype=torch.int32)
    inward = self.gate_up_proj if self.has_gate else self.up_proj
    inner = moe._grouped_linear(hidden_states[order_s // top_k], inward, ends_e, is_transposed=self.is_transposed)
    inner = self._apply_gate(inner) if self.has_gate else self.act_fn(inner)
    output_sh = moe._grouped_linear(inner, self.down_proj, ends_e, is_transposed=self.is_transposed)
    place_tk = place_s.reshape(-1, top_k)
    total_th = torch.zeros_like(hidden_states, dtype=torch.float32)
    for pick in range(top_k):
        total_th = total_th + (output_sh[place_tk[:, pick]] * top_k_weights[:, pick, None]).float()
    return total_th.to(hidden_states.dtype)


moe.ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, grouped_by_pick)
