"""Which modules of a model are its routers, and how to read what they return.

Routers are found through transformers' own declaration, `_can_record_outputs["router_logits"]` of
the model class, so a family that transformers declares needs no entry here. What a router returns
must be `(logits [T, E], weights [T, k], experts [T, k])`, as most families do; one that returns
something else is refused by name, never guessed at: with a routing bias or grouped routing the
top-k of raw logits is not what the model used.
"""

from __future__ import annotations

import dataclasses
import re
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    import torch
    from torch import nn
    from transformers import PreTrainedModel


class Reading(NamedTuple):
    """What a router decided about T tokens."""

    logits_te: torch.Tensor
    """[T, E] before any softmax."""
    weights_tk: torch.Tensor
    """[T, k] as the model applies them."""
    experts_tk: torch.Tensor
    """[T, k] expert ids in the order of the weights."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router:
    """One router module."""

    name: str
    """Dotted path in the model."""
    layer: int
    """The model's own number of the layer."""
    module: nn.Module

    def read(self, outputs: Any) -> Reading:
        """Takes a router's return value apart.

        Raises:
            ValueError: it is not `(logits, weights, experts)`.
        """
        if isinstance(outputs, tuple) and len(outputs) == 3:
            reading = Reading(*outputs)
            if reading.weights_tk.shape == reading.experts_tk.shape and not reading.experts_tk.is_floating_point():
                return reading
        raise ValueError(
            f"router {self.name} ({type(self.module).__name__}) does not return (logits, weights, experts): "
            "this model family is not supported yet"
        )


def find_routers(model: PreTrainedModel, layers: Sequence[int] | None = None) -> list[Router]:
    """The routers of a model in module order, all of them or those of some layers.

    Raises:
        ValueError: the model declares no router, has none, or has none in a layer asked for.
    """
    routers = list(_declared_routers(model))
    if not routers:
        raise ValueError(
            f"{type(model).__name__} has no router: none of its modules is declared as "
            "_can_record_outputs['router_logits']. --model takes a Mixture-of-Experts model."
        )
    if layers is None:
        return routers
    available = [router.layer for router in routers]
    missing = sorted(set(layers) - set(available))
    if missing:
        raise ValueError(
            f"--layers {missing}: no router there; {type(model).__name__} has routers in layers {available}"
        )
    return [router for router in routers if router.layer in layers]


def _declared_routers(model: PreTrainedModel) -> Iterator[Router]:
    from transformers import PreTrainedModel

    found: set[str] = set()
    for prefix, submodel in model.named_modules():
        if not isinstance(submodel, PreTrainedModel):
            continue
        declared = (getattr(submodel, "_can_record_outputs", None) or {}).get("router_logits", [])
        recorders = declared if isinstance(declared, list) else [declared]
        for path, module in submodel.named_modules(prefix=prefix):
            if path not in found and any(_matches(recorder, path, module) for recorder in recorders):
                found.add(path)
                yield Router(name=path, layer=_layer_number(path), module=module)


def _matches(recorder: Any, path: str, module: nn.Module) -> bool:
    """Whether a declaration (a module class, or an OutputRecorder with its filters) means this module."""
    target = getattr(recorder, "target_class", recorder)
    if not (isinstance(target, type) and isinstance(module, target)):
        return False
    part = getattr(recorder, "layer_name", None)
    return part is None or f".{part.strip('.')}." in f".{path}."


def _layer_number(path: str) -> int:
    number = re.search(r"\.(\d+)\.", f".{path}.")
    if number is None:
        raise ValueError(f"router {path} stands in no numbered layer")
    return int(number.group(1))
