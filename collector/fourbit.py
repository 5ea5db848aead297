"""4-bit tensors: quantized piece by piece, read as a whole or one slice at a time.

A quantized parameter is held in bitsandbytes' own way (its parametrization): any code that reads it
gets the dequantized tensor, and a state dict has the keys that bitsandbytes writes. The values are
those of `bitsandbytes.functional.quantize_4bit` on the whole tensor, but made in pieces, so that the
scratch memory stays small, and of any shape, fused experts included. Which parameters deserve it is
for `quantization` to say.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

import bitsandbytes.functional as bnb
import torch
from bitsandbytes.nn.parametrize import Bnb4bitParametrization, replace_parameter_4bit_prequantized
from torch import nn
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

BLOCK = 64
"""Values that share one scale."""
_PIECE = 2**20
"""Values quantized at a time. bitsandbytes' CPU kernel takes some 20 bytes of scratch for each, best in cache."""
FourBit = Literal["nf4", "fp4"]


def quantize(values: torch.Tensor, kind: FourBit, *, double: bool) -> tuple[torch.Tensor, bnb.QuantState]:
    """Quantizes a tensor piece by piece to what bitsandbytes makes of it at once.

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
    """bitsandbytes' parametrization, reading through `_unpack`."""

    def forward(self, quantized_param: torch.Tensor) -> torch.Tensor:
        """The parameter in its own shape and dtype."""
        state = self.quant_state
        return _unpack(quantized_param, _scales(state), state, state.shape, state.dtype)


def replace(module: nn.Module, name: str, packed: torch.Tensor, state: dict[str, Any]) -> None:
    """Puts packed values in the place of a parameter; reading the parameter dequantizes it.

    Args:
        module: the parameter's module.
        name: the parameter's name in it.
        packed: what `quantize` returned.
        state: `QuantState.as_dict(packed=True)`.
    """
    setattr(module, name, nn.Parameter(packed, requires_grad=False))
    replace_parameter_4bit_prequantized(module, name, state, packed.device)
    parametrizations: Any = module.parametrizations
    parametrizations[name][0] = Unpacking(parametrizations[name][0].quant_state)
    # transformers gives random values to every module that it does not know to be loaded
    module._is_hf_initialized = True  # type: ignore[assignment]


def quantize_parameter(module: nn.Module, name: str, values: torch.Tensor, kind: FourBit, *, double: bool) -> None:
    """Quantizes `values` into the place of a parameter."""
    packed, state = quantize(values, kind, double=double)
    replace(module, name, packed, state.as_dict(packed=True))


def is_quantized(module: nn.Module, name: str) -> bool:
    """Whether a parameter is held in 4 bits."""
    return parametrize.is_parametrized(module, name)


def dequantized(module: nn.Module, name: str, dtype: torch.dtype) -> torch.Tensor:
    """A parameter in `dtype`, quantized or not."""
    if not is_quantized(module, name):
        return getattr(module, name).to(dtype)
    packed, state = stored(module, name)
    return _unpack(packed, _scales(state), state, state.shape, dtype)


def slices(module: nn.Module, name: str, dtype: torch.dtype) -> Callable[[int], torch.Tensor]:
    """Reads a parameter of three dimensions matrix by matrix, in `dtype`, quantized or not.

    One expert dequantized at a time stays in the CPU's cache until it is multiplied.
    """
    if not is_quantized(module, name):
        values = getattr(module, name)
        return lambda index: values[index].to(dtype)
    packed, state = stored(module, name)
    shape = state.shape[1:]
    size = math.prod(shape)
    if size % state.blocksize:  # blocks reach over the border between two slices
        return dequantized(module, name, dtype).__getitem__
    bytes_, blocks, scales = size // 2, size // state.blocksize, _scales(state)

    def one(index: int) -> torch.Tensor:
        part = packed[index * bytes_ : (index + 1) * bytes_]
        return _unpack(part, scales[index * blocks : (index + 1) * blocks], state, shape, dtype)

    return one


def stored(module: nn.Module, name: str) -> tuple[torch.Tensor, bnb.QuantState]:
    """Packed values and quantization state of a quantized parameter."""
    parametrization: Any = module.parametrizations[name]  # type: ignore[index]
    return parametrization.original, parametrization[0].quant_state


def _scales(state: bnb.QuantState) -> torch.Tensor:
    """[blocks] float32 scales of a tensor, dequantized where they are quantized themselves."""
    if not state.nested:
        return state.absmax
    return bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset


def _unpack(
    packed: torch.Tensor, scales: torch.Tensor, state: bnb.QuantState, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    # bitsandbytes' AVX-512 kernel takes wrong scales where a row is 16, 32 or 48 values longer than whole blocks:
    # it is given rows of one block.
    kernel, values = torch.ops.bitsandbytes.dequantize_4bit.default, math.prod(shape)
    rows = (values // state.blocksize, state.blocksize) if values % state.blocksize == 0 else (1, values)
    return kernel(packed, scales, state.blocksize, state.quant_type, rows, dtype).reshape(shape)
