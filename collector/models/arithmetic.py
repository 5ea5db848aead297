"""Chooses the precision and the order of matrix multiplications, without changing the stored weights.

Two things make a forward pass needlessly slow. Both are fixed here through extension points of
transformers and torch, without touching a model's code:

- A CPU without 16-bit arithmetic emulates it, several times slower than float32. There each matrix
  is widened to float32, multiplied, and the result rounded back. This takes the memory of 16 bits at
  the speed of 32, and the sums are no less exact.
- A fused experts parameter in 4 bits would be dequantized as a whole, even if few experts are used.
  The experts implementation "per_expert" processes the chosen experts one after the other, so that
  each stays in the CPU's cache until it is multiplied.

Everywhere else transformers' own implementation runs (grouped matrix multiplication). Routers are
not touched, because their results are what the collector records.

Shapes: T tokens, k experts per token, H hidden size, I an expert's inner size.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from collector.models.four_bit_reading import dequantized, is_quantized, slices
from collector.models.routers import router_prefixes

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import PreTrainedModel

    from collector.config import Dtype

IMPLEMENTATION = "per_expert"


def native(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether a device supports this precision in hardware, rather than emulating it."""
    if device.type != "cpu" or dtype == torch.float32:
        return True
    has: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    if has.get("architecture") != "x86_64":
        return True
    wanted = ("avx512_bf16", "amx_bf16") if dtype == torch.bfloat16 else ("avx512_fp16", "amx_fp16")
    return any(has.get(feature) for feature in wanted)


def resolve(compute: Dtype, stored: torch.dtype, device: torch.device) -> torch.dtype:
    """Returns the precision for multiplications: the requested one, else the stored one if the device supports it."""
    if compute != "auto":
        return getattr(torch, compute)
    return stored if native(stored, device) else torch.float32


def apply(model: PreTrainedModel, stored: torch.dtype, compute: torch.dtype, device: torch.device) -> None:
    """Makes a model multiply in `compute`, and run its experts one at a time where that is faster.

    Args:
        model: a loaded model, changed in place.
        stored: precision of its activations and of its unquantized weights.
        compute: precision of its matrix products.
        device: where it runs.
    """
    if compute != stored:
        routers = router_prefixes(model)
        for path, module in model.named_modules():
            if _is_plain_linear(module) and not f"{path}.".startswith(routers):
                # accelerate wraps the forward of modules that it moves between devices
                name = "_old_forward" if hasattr(module, "_hf_hook") else "forward"
                setattr(module, name, functools.partial(_linear, module, compute))
    experts = [module for module in model.modules() if _matrices(module)]
    quantized = any(is_quantized(module, name) for module in experts for name in _matrices(module))
    if experts and (compute != stored or (quantized and device.type == "cpu")):
        for module in experts:
            module._compute_dtype = compute  # type: ignore[assignment]
        model.set_experts_implementation(IMPLEMENTATION)


def _is_plain_linear(module: nn.Module) -> bool:
    """Whether a layer holds floats or our 4-bit values; bitsandbytes' int8 layers have their own multiplication."""
    if not isinstance(module, nn.Linear):
        return False
    return is_quantized(module, "weight") or module.weight.is_floating_point()


def _linear(module: nn.Linear, dtype: torch.dtype, inputs: torch.Tensor) -> torch.Tensor:
    """Computes `nn.Linear` in `dtype` and rounds the result to the precision of its input."""
    bias = None if module.bias is None else module.bias.to(dtype)
    return functional.linear(inputs.to(dtype), dequantized(module, "weight", dtype), bias).to(inputs.dtype)


def _matrices(module: nn.Module) -> list[str]:
    """Returns the names of the fused parameters, if the experts module has replaceable implementations."""
    if not hasattr(module, "_apply_gate"):
        return []
    return [name for name in ("gate_up_proj", "up_proj", "down_proj") if hasattr(module, name)]


def per_expert(
    self: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Runs an experts module, one chosen expert after the other.

    Args:
        self: an experts module with fused parameters.
        hidden_states: [T, H].
        top_k_index: [T, k]; an index beyond the experts is skipped.
        top_k_weights: [T, k].

    Returns:
        [T, H], in the precision of `hidden_states`.
    """
    dtype = getattr(self, "_compute_dtype", hidden_states.dtype)
    top_k = top_k_index.shape[1]
    picks = top_k_index.flatten()
    order = picks.argsort(stable=True)
    tokens, weights = order // top_k, top_k_weights.flatten()[order].to(dtype)
    ends = torch.bincount(picks, minlength=self.num_experts).cumsum(0).tolist()
    wide = hidden_states.to(dtype)
    inner_name = "gate_up_proj" if self.has_gate else "up_proj"
    inward, outward = _projection(self, inner_name, dtype), _projection(self, "down_proj", dtype)
    out = torch.zeros_like(wide)
    begin = 0
    for expert, end in enumerate(ends[: self.num_experts]):
        if begin < end:
            chosen = tokens[begin:end]
            inner = inward(expert, wide[chosen])
            result = outward(expert, self._apply_gate(inner) if self.has_gate else self.act_fn(inner))
            if self.has_post_expert_norm:
                result = self.post_expert_norm(result)
            out.index_add_(0, chosen, result * weights[begin:end, None])
        begin = end
    return out.to(hidden_states.dtype)


def _projection(module: Any, name: str, dtype: torch.dtype) -> Callable[[int, torch.Tensor], torch.Tensor]:
    """Returns a function (expert, [n, inputs]) -> [n, outputs] that applies one of an expert's two matrices."""
    matrices = slices(module, name, dtype)
    biases = getattr(module, f"{name}_bias").to(dtype) if module.has_bias else None

    def project(expert: int, inputs: torch.Tensor) -> torch.Tensor:
        matrix = matrices(expert)
        bias = None if biases is None else biases[expert]
        return functional.linear(inputs, matrix.T if module.is_transposed else matrix, bias)

    return project


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, per_expert)
