"""Reads parameters that may be quantized to 4 bits: as a whole, or one slice at a time.

The same functions read parameters that are not quantized, without importing bitsandbytes; `four_bit` imports it to
quantize.
"""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.utils import parametrize

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from bitsandbytes.functional import QuantState
    from torch import nn

# On some CPUs, importing it warns that an unused kernel cannot be fetched from the hub.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def is_quantized(module: nn.Module, name: str) -> bool:
    """Whether a parameter is quantized to 4 bits."""
    return parametrize.is_parametrized(module, name)


def dequantized(module: nn.Module, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Returns a parameter in `dtype`, quantized or not."""
    if not is_quantized(module, name):
        return getattr(module, name).to(dtype)
    return unpack(*stored(module, name), dtype)


def slices(module: nn.Module, name: str, dtype: torch.dtype) -> Callable[[int], torch.Tensor]:
    """Returns a function that reads a three-dimensional parameter matrix by matrix, in `dtype`, quantized or not.

    An expert that is dequantized on its own stays in the CPU's cache until it is multiplied.
    """
    if not is_quantized(module, name):
        values = getattr(module, name)
        return lambda index: values[index].to(dtype)
    packed, state = stored(module, name)
    shape = state.shape[1:]
    size = math.prod(shape)
    if size % state.blocksize:  # blocks cross the boundaries of slices
        return dequantized(module, name, dtype).__getitem__
    bytes_, blocks, scales = size // 2, size // state.blocksize, _scales(state)

    def one(index: int) -> torch.Tensor:
        part = packed[index * bytes_ : (index + 1) * bytes_]
        return _unpack(part, scales[index * blocks : (index + 1) * blocks], state, shape, dtype)

    return one


def stored(module: nn.Module, name: str) -> tuple[torch.Tensor, QuantState]:
    """Returns the packed values and the quantization state of a quantized parameter."""
    parametrization: Any = module.parametrizations[name]  # type: ignore[index]
    return parametrization.original, parametrization[0].quant_state


def unpack(packed: torch.Tensor, state: QuantState, dtype: torch.dtype) -> torch.Tensor:
    """Dequantizes a whole tensor from packed values and their quantization state."""
    return _unpack(packed, _scales(state), state, state.shape, dtype)


def _scales(state: QuantState) -> torch.Tensor:
    """Returns the [blocks] float32 scales of a tensor, dequantized if they are quantized themselves."""
    if not state.nested:
        return state.absmax
    import bitsandbytes.functional as bnb

    return bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset


def _unpack(
    packed: torch.Tensor, scales: torch.Tensor, state: QuantState, shape: Sequence[int], dtype: torch.dtype
) -> torch.Tensor:
    # bitsandbytes' AVX-512 kernel uses wrong scales if a row is 16, 32 or 48 values longer than whole blocks, so it
    # gets rows of one block.
    kernel, values = torch.ops.bitsandbytes.dequantize_4bit.default, math.prod(shape)
    rows = (values // state.blocksize, state.blocksize) if values % state.blocksize == 0 else (1, values)
    return kernel(packed, scales, state.blocksize, state.quant_type, rows, dtype).reshape(shape)
