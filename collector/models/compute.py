"""Says how many floating-point operations a token costs, component by component.

A multiply-add counts as 2, and only products of matrices count, as in FlopCounterMode of torch, with which the numbers
agree. Every matrix of the model multiplies each token once, so a component's operations per token are twice its matrix
entries; of the experts, twice those of one expert for each pick. Attention adds its two products with the positions
that a token sees. What no matrix does is not counted: norms, activations, scans of state-space layers. The base model
alone is counted, without the unembedding.

The shapes are those of an empty model of the same class, so that quantized weights count like any others.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any

import torch

from collector.models.routers import find_routers

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

    from collector.models.routers import Router

ATTENTION = re.compile(r"attn|attention|mixer|mamba|ssm|conv|linear_attention", re.IGNORECASE)
"""Names of modules that mix positions."""
_CROSS = re.compile(r"(EncDecAttention\.[kv]|encoder_attn\.[kv]_proj)\.")
"""Projections of a decoder that see the encoder's tokens."""
_COMPUTING = ("num_routed_experts", "num_experts")
"""Attributes of experts modules: how many of the ids that a router may choose compute anything."""


@dataclasses.dataclass(kw_only=True)
class Component:
    """The part of a layer that one kind of module has."""

    stack: str
    """As `layers` names it, of experts; otherwise `encoder` or `decoder`."""
    layer: int | None
    """None outside of all layers."""
    component: str
    """`attention`, `router`, `experts`, `shared`, `dense` or `embedding`."""
    parameters: int = 0
    flops: int = 0
    """Per token; of experts per pick."""
    context_flops: int = 0
    """Of attention, per token and position that it sees."""
    window: int | None = None
    """Positions that attention sees at most; None for all."""
    experts: int | None = None
    """Of experts, how many compute: ids from here on choose an expert that does nothing."""


def components(model: PreTrainedModel) -> list[Component]:
    """Counts parameters and operations of a base model.

    Args:
        model: of any precision; only its class and config are used.
    """
    with torch.device("meta"):
        empty = type(model)._from_config(model.config)
    found: dict[tuple[str, int | None, str], Component] = {}
    routers = find_routers(empty)
    embeddings = {path for path, module in empty.named_modules() if isinstance(module, torch.nn.Embedding)}
    two_stacks = bool(getattr(model.config, "is_encoder_decoder", False))
    for path, parameter in empty.named_parameters():
        stack, layer = _place(path, two_stacks=two_stacks)
        kind, router = _kind(path, routers, embeddings, empty)
        key = (router.stack if kind == "experts" and router else stack, layer, kind)
        own = found.setdefault(key, Component(stack=key[0], layer=layer, component=kind))
        own.parameters += parameter.numel()
        is_matrix = parameter.ndim > 1 and "bias" not in path.rpartition(".")[2] and kind != "embedding"
        if not is_matrix:
            continue
        if kind == "experts" and router:
            own.experts = _computing(router)
            own.flops += 2 * parameter.numel() // own.experts
        else:
            own.flops += 2 * parameter.numel()
    for path, module in empty.named_modules():
        if (width := _attention_width(module, model.config)) is not None:
            own = found[(*_place(path, two_stacks=two_stacks), "attention")]
            own.context_flops += 2 * width
            own.window = getattr(module, "sliding_window", None) or own.window
    return list(found.values())


def _place(path: str, *, two_stacks: bool) -> tuple[str, int | None]:
    """The stack whose tokens a module or parameter sees, and the number of its layer."""
    number = re.search(r"\.(\d+)\.", f".{path}")
    of_encoder = two_stacks and ("encoder" in path.split(".") or _CROSS.search(path))
    return "encoder" if of_encoder else "decoder", int(number.group(1)) if number else None


def _kind(path: str, routers: list[Router], embeddings: set[str], model: nn.Module) -> tuple[str, Router | None]:
    """The component that a parameter belongs to, and the router of its block."""
    if path.rpartition(".")[0] in embeddings:
        return "embedding", None
    for router in routers:
        if path.startswith(f"{router.name}."):
            return "router", router
        block = router.name.rpartition(".")[0]
        if hasattr(router.owner, "experts") and path.startswith(f"{block}.experts."):
            return "experts", router
    if any(ATTENTION.search(part) for part in path.split(".")[:-1]):
        return "attention", None
    for router in routers:
        block = router.name.rpartition(".")[0]
        inside = path.removeprefix(f"{block}.") if path.startswith(f"{block}.") else None
        if inside is None:
            continue
        beside = [name for name, _ in model.get_submodule(block).named_children()]
        if "shared" in inside or not any(map(ATTENTION.search, beside)):
            return "shared", router
    return "dense", None


def _computing(router: Router) -> int:
    experts: Any = router.owner.experts  # type: ignore[union-attr]
    counts = (getattr(experts, name, None) for name in _COMPUTING)
    return next((count for count in counts if isinstance(count, int)), None) or len(experts)


def _attention_width(module: nn.Module, config: Any) -> int | None:
    """Entries of queries and values of all heads, if a module is attention by softmax."""
    name = type(module).__name__
    if not name.endswith("Attention") or re.search(r"Linear|Delta|Mamba|Layer", name):
        return None
    if any(type(child).__name__.endswith("Attention") for child in module.children()):
        return None  # a wrapper
    text = config.get_text_config()
    heads = next(value for value in (getattr(text, key, None) for key in ("num_attention_heads", "num_heads")) if value)
    hidden = text.hidden_size
    width = getattr(module, "head_dim", None) or getattr(text, "head_dim", None) or getattr(text, "d_kv", None)
    width = width or hidden // heads
    queries = getattr(module, "qk_head_dim", None) or width
    values = getattr(module, "v_head_dim", None) or width
    return int(heads * (queries + values))
