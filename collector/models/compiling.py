"""Fuses the elementwise operations of a model on a GPU, with torch.compile, where hooks can live with it.

Half of the time of an MoE model in 16 bits goes into norms, rotary embeddings, activations and sums, which move memory
and hardly compute. Compiled, each chain of them reads and writes once. What is compiled are the forwards of attention
modules, norms and experts. Hooks sit around a forward, so they see what they always see, and routers run as they are.

All layers share the compiled code, whatever the batch's shape. Intermediate results are rounded like those of the
uncompiled model; sums may be added up in another order.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from collector.models.four_bit_reading import is_quantized
from collector.models.routers import router_prefixes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import nn
    from transformers import PreTrainedModel


def compile_parts(model: PreTrainedModel) -> list[str]:
    """Compiles the parts of a model's layers that hold no router, at their first call.

    Args:
        model: a loaded model on one device, changed in place.

    Returns:
        The names of the compiled modules.
    """
    names = []
    for name, module in _parts(model):
        module.forward = torch.compile(  # type: ignore[method-assign]
            module.forward, dynamic=True, options={"emulate_precision_casts": True}
        )
        names.append(name)
    return names


def _parts(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Yields the largest modules inside the model's layers that hold no router and no quantized weights."""
    routers = router_prefixes(model)

    def inside(name: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
        holds_router = any(router.startswith(f"{name}.") for router in routers)
        if f"{name}." in routers:
            return
        if not holds_router and hasattr(module, "forward") and type(module) is not torch.nn.ModuleList:
            yield name, module
            return
        for child, each in module.named_children():
            yield from inside(f"{name}.{child}", each)

    for name, module in model.named_modules():
        if type(module) is torch.nn.ModuleList and any(router.startswith(f"{name}.") for router in routers):
            for child, layer in module.named_children():
                yield from inside(f"{name}.{child}", layer)
            return
