"""Quantizes tensors to 4 bits, piece by piece; `four_bit_reading` reads them.

A quantized parameter uses bitsandbytes' own parametrization: any code that reads it gets the
dequantized tensor, and a state dict has the keys that bitsandbytes writes. The values are those of
`bitsandbytes.functional.quantize_4bit` on the whole tensor, but computed in pieces, so that the
scratch memory stays small. Any shape works, fused experts included. `quantization` selects the
parameters.

Importing bitsandbytes takes more than a second, so import this module only to quantize.
"""

from __future__ import annotations

from typing import Any, Literal

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn.parametrize import Bnb4bitParametrization, replace_parameter_4bit_prequantized
from torch import nn

from collector.models.four_bit_reading import unpack

BLOCK = 64
"""Values that share one scale."""
_PIECE = 2**20
"""Values quantized at a time. bitsandbytes' CPU kernel takes some 20 scratch bytes each, which should fit in cache."""
FourBit = Literal["nf4", "fp4"]


def quantize(values: torch.Tensor, kind: FourBit, *, double: bool) -> tuple[torch.Tensor, bnb.QuantState]:
    """Quantizes a tensor piece by piece, with the same result as bitsandbytes on the whole tensor.

    Args:
        values: any shape, float32, bfloat16 or float16.
        kind: `nf4` or `fp4`.
        double: also quantize the scales, to 8 bits.

    Returns:
        (packed values [n / 2, 1] uint8, quantization state).
    """
    flat = values.detach().reshape(-1)
    packed, scales = [], []
    for piece in flat.split(_PIECE):  # a multiple of BLOCK, so no block is cut
        data, scale = torch.ops.bitsandbytes.quantize_4bit.default(piece.contiguous(), BLOCK, kind, torch.uint8)
        packed.append(data)
        scales.append(scale)
    absmax = torch.cat(scales)
    offset = state2 = None
    if double:
        offset = absmax.mean()
        absmax, state2 = bnb.quantize_blockwise(absmax - offset, blocksize=256)
    state = bnb.QuantState(
        absmax=absmax, shape=values.shape, dtype=values.dtype, blocksize=BLOCK,
        code=bnb.get_4bit_type(kind, device=values.device), quant_type=kind, offset=offset, state2=state2,
    )  # fmt: skip
    return torch.cat(packed), state


class Unpacking(Bnb4bitParametrization):
    """bitsandbytes' parametrization, but dequantizing with `unpack`."""

    def forward(self, quantized_param: torch.Tensor) -> torch.Tensor:
        """Returns the parameter in its original shape and dtype."""
        return unpack(quantized_param, self.quant_state, self.quant_state.dtype)


def replace(module: nn.Module, name: str, packed: torch.Tensor, state: dict[str, Any]) -> None:
    """Replaces a parameter by packed values; reading the parameter dequantizes it.

    Args:
        module: the parameter's module.
        name: the parameter's name in it.
        packed: values from `quantize`.
        state: `QuantState.as_dict(packed=True)`.
    """
    setattr(module, name, nn.Parameter(packed, requires_grad=False))
    replace_parameter_4bit_prequantized(module, name, state, packed.device)
    parametrizations: Any = module.parametrizations
    parametrizations[name][0] = Unpacking(parametrizations[name][0].quant_state)
    # transformers would reinitialize every module that is not marked as loaded
    module._is_hf_initialized = True  # type: ignore[assignment]


def quantize_parameter(module: nn.Module, name: str, values: torch.Tensor, kind: FourBit, *, double: bool) -> None:
    """Replaces a parameter by quantized `values`."""
    packed, state = quantize(values, kind, double=double)
    replace(module, name, packed, state.as_dict(packed=True))
