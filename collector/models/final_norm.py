"""Finds the norm that ends a model, and applies it to parts of the residual stream.

What a module adds to the residual stream reaches the output embedding through the final norm, whose divisor is that of
the whole stream. With the divisor held fixed the norm is linear, so the parts of the stream add up to the whole: direct
logit attribution (Elhage et al. 2021, "A Mathematical Framework for Transformer Circuits").

Shapes: R tokens, H hidden size.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from collector.models.probing import tiny_pass

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclasses.dataclass(frozen=True, kw_only=True)
class FinalNorm:
    """An RMS norm, or a layer norm, whose output is the model's last hidden state."""

    module: torch.nn.Module
    scale_h: torch.Tensor
    """[H] the gain, float32."""
    is_centered: bool
    """Whether the norm subtracts the mean over H, as a layer norm does."""

    def apply_to_part(self, part_rh: torch.Tensor, stream_rh: torch.Tensor) -> torch.Tensor:
        """Returns what a part of the stream becomes in the norm of the whole, [R, H] in float32, without any bias.

        Args:
            part_rh: [R, H] what was added to the stream.
            stream_rh: [R, H] the stream that the norm receives, or anything that broadcasts to it.
        """
        part_rh, stream_rh = part_rh.float(), stream_rh.float()
        if self.is_centered:
            part_rh = part_rh - part_rh.mean(-1, keepdim=True)
            stream_rh = stream_rh - stream_rh.mean(-1, keepdim=True)
        scale_h = self.scale_h.to(part_rh.device)
        return part_rh * scale_h * stream_rh.square().mean(-1, keepdim=True).clamp_min(1e-12).rsqrt()


@torch.inference_mode()
def find_final_norm(model: PreTrainedModel) -> FinalNorm:
    """Finds the final norm of a base model by a tiny forward pass.

    Raises:
        ValueError: the last hidden state comes from no module of the form of a norm.
    """
    calls: list[tuple[torch.nn.Module, torch.Tensor, torch.Tensor]] = []

    def listen(module: torch.nn.Module, inputs: Any, output: Any) -> None:
        if inputs and isinstance(output, torch.Tensor) and getattr(inputs[0], "shape", None) == output.shape:
            calls.append((module, inputs[0], output))

    leaves = [module for module in model.modules() if next(module.children(), None) is None]
    handles = [leaf.register_forward_hook(listen) for leaf in leaves]
    try:
        last = tiny_pass(model).last_hidden_state
    finally:
        for handle in handles:
            handle.remove()
    for module, received, returned in reversed(calls):
        is_last = returned.shape == last.shape and torch.equal(returned.to(last.device), last)
        if is_last and not torch.equal(received, returned):  # else it is a dropout
            for norm in _readings_of(module, received):
                bias = getattr(module, "bias", None)
                again = norm.apply_to_part(received, received) + (0 if bias is None else bias)
                # As near as the precision of the model allows.
                if torch.allclose(again, returned.float(), rtol=0.02, atol=0.02 * float(returned.float().std())):
                    return norm
    raise ValueError(
        f"--record vocabulary: {type(model).__name__} does not end in a norm, so what its experts put out cannot be "
        "read as tokens"
    )


def _readings_of(module: torch.nn.Module, like: torch.Tensor) -> list[FinalNorm]:
    """A module as an RMS norm, and as a layer norm with its parameters."""
    ones = module(torch.ones_like(like[:1, :1]))[0, 0].float()  # an RMS norm leaves the ones, times the gain
    weight = getattr(module, "weight", None)
    centered = None if weight is None else FinalNorm(module=module, scale_h=weight.float(), is_centered=True)
    return [FinalNorm(module=module, scale_h=ones, is_centered=False), *([centered] if centered else [])]
