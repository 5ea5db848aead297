"""Finds the routers of a model, and reads the values that they return.

Routers are found through transformers' own declaration, `_can_record_outputs["router_logits"]` of
the model class. A family that transformers declares needs no entry here if its router returns
`(logits [T, E], weights [T, k], experts [T, k])`, as most do. Routers that return something else
have their own reader in `_READERS`.

Guarantees:

- ids and weights are the router's own wherever it returns them. They are recomputed only where it
  does not, with the operations of the module on the values that the module used;
- only routed experts count: shared experts are never chosen, so they have no id;
- a return value of another form raises an error that names the router. Nothing is guessed: with a
  routing bias or grouped routing, the top-k of the raw logits is not what the model used.

Routers are read in forward passes in eval mode; `capture` moves the values off the device.

Shapes: B rows, S positions, T = B x S positions in row-major order, padding included, E experts,
k chosen per token.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from torch import nn
    from transformers import PreTrainedModel


class Reading(NamedTuple):
    """The decisions of a router for T tokens."""

    logits_te: torch.Tensor
    """[T, E] before any softmax. p = softmax(logits), also if the family scores by sigmoid, adds a bias
    or limits groups before it chooses; there p is the router's preference and not its weights."""
    weights_tk: torch.Tensor
    """[T, k] factors with which the model multiplies each expert's output (or, in Llama 4, its input)."""
    experts_tk: torch.Tensor
    """[T, k] expert ids in the order of the weights."""
    dropped_tk: torch.Tensor | None = None
    """[T, k] True where a capacity limit kept the token from its expert; None without capacity limits."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router:
    """One router module."""

    name: str
    """Dotted path in the model."""
    layer: int
    """Number of the layer in the model."""
    module: nn.Module
    stack: str = "decoder"
    """'encoder' or 'decoder'; if several routers share a layer, a dot and a distinguishing suffix follow."""
    owner: nn.Module | None = None
    """The block that contains the router."""

    @property
    def token_stack(self) -> str:
        """`encoder` or `decoder`: the stack whose tokens it sees."""
        return self.stack.partition(".")[0]

    def read(self, outputs: Any) -> Reading:
        """Extracts the decisions from a router's return value.

        Args:
            outputs: return value of the module's forward, in eval mode.

        Raises:
            ValueError: the return value does not have the form known for this module's class.
        """
        reading = _READERS.get(type(self.module).__name__, _triple)(self, outputs)
        logits_te, weights_tk, experts_tk, dropped_tk = (
            None if part is None else part.reshape(-1, part.shape[-1]) for part in reading
        )
        assert logits_te is not None
        if weights_tk is None or experts_tk is None or len(weights_tk) != len(logits_te):
            raise self.refused()
        return Reading(logits_te, weights_tk, experts_tk, dropped_tk)

    def refused(self) -> ValueError:
        """Returns the error for a return value that no reader understands."""
        return ValueError(
            f"router {self.name} ({type(self.module).__name__}) does not return (logits, weights, experts): "
            "this model family is not supported yet; collector models lists those that are"
        )


def _triple(router: Router, outputs: Any) -> Reading:
    """Returned."""
    if isinstance(outputs, tuple) and len(outputs) == 3 and all(isinstance(part, torch.Tensor) for part in outputs):
        reading = Reading(*outputs)
        if (
            reading.weights_tk.shape == reading.experts_tk.shape
            and reading.weights_tk.is_floating_point()
            and reading.experts_tk.dtype in (torch.int32, torch.int64)
        ):
            return reading
    raise router.refused()


def _inkling(router: Router, outputs: Any) -> Reading:
    """Returned."""
    # The fourth value scales the shared experts, which are not routed; the logits are without them already.
    return _triple(router, outputs[:3])


def _gemma4(router: Router, outputs: Any) -> Reading:
    """Returned."""
    # The first value is the softmax; the log gives logits with the same softmax.
    probabilities, weights, experts = _triple(router, outputs)[:3]
    return Reading(probabilities.log(), weights, experts)


def _zaya(router: Router, outputs: Any) -> Reading:
    """Returned; the skip expert is the last id."""
    # The last of the E classes skips the layer. The router reports that pick as expert 0 with weight 0, which no real
    # pick has, because a chosen expert's weight is its probability.
    logits, weights, experts = _triple(router, outputs[:3])[:3]
    skipped = (experts == 0) & (weights == 0)
    return Reading(logits, weights, experts.masked_fill(skipped, logits.shape[-1] - 1))


def _dbrx(router: Router, outputs: Any) -> Reading:
    """Recomputed: by the block's own function of the logits."""
    weights, experts = router.owner.route_tokens_to_experts(outputs)  # type: ignore[union-attr,operator]
    return Reading(outputs, weights, experts)


def _llama4(router: Router, outputs: Any) -> Reading:
    """Recomputed: top-k of the logits."""
    # The scores are 0 except for the chosen experts, but the score of a chosen expert may be 0 too.
    scores, logits = outputs
    experts = logits.topk(router.module.top_k, dim=-1).indices
    return Reading(logits, scores.gather(-1, experts), experts)


def _jetmoe(_router: Router, outputs: Any) -> Reading:
    """Returned sorted by expert; the sort is undone."""
    order, _tokens, sorted_weights, tokens_per_expert, logits = outputs
    sizes = torch.tensor(tokens_per_expert, device=order.device)
    sorted_experts = torch.arange(len(sizes), device=order.device).repeat_interleave(sizes, output_size=len(order))
    weights = torch.empty_like(sorted_weights).scatter_(0, order, sorted_weights)
    experts = torch.empty_like(sorted_experts).scatter_(0, order, sorted_experts)
    return Reading(logits, weights.view(len(logits), -1), experts.view(len(logits), -1))


def _doge(router: Router, outputs: Any) -> Reading:
    """Recomputed: product-key top-k of the logits."""
    # Expert (x, y) has the sum of two logits, one of each half of the keys. Both halves are sorted first, as the
    # module does, so that ties fall the same way.
    module, (logits_x, logits_y) = router.module, outputs[1]
    keys = module.num_keys
    sorted_x, sorted_y = logits_x.topk(keys), logits_y.topk(keys)
    sums = (sorted_x.values.unsqueeze(-1) + sorted_y.values.unsqueeze(-2)).flatten(-2)
    ids = (sorted_x.indices.unsqueeze(-1) * keys + sorted_y.indices.unsqueeze(-2)).flatten(-2)
    best = sums.topk(module.top_k)
    weights = best.values.softmax(-1)
    if module.norm_topk_prob:
        weights = weights / weights.sum(-1, keepdim=True)
    logits = (logits_x.unsqueeze(-1) + logits_y.unsqueeze(-2)).flatten(-2)
    return Reading(logits, weights, ids.gather(-1, best.indices))


def _switch(router: Router, outputs: Any) -> Reading:
    """Recomputed: argmax of the probabilities in the input's dtype; drops from the dispatch mask."""
    # A token beyond the capacity has an empty row in the mask, so its choice must be recomputed. Rounding to the
    # input's dtype can create ties, so the dtypes must be the same.
    dispatched, probability, logits = outputs
    probabilities = logits.softmax(-1, dtype=router.module.dtype).to(router.module.input_dtype)
    experts = probabilities.argmax(-1, keepdim=True)
    return Reading(logits, probability, experts, dispatched.sum(-1, keepdim=True) == 0)


def _nllb(router: Router, outputs: Any) -> Reading:
    """Recomputed: argmax, and argmax of the rest; weights and drops from the combining weights."""
    module, (dispatched, combining, logits) = router.module, outputs
    if module.second_expert_policy != "all":
        raise ValueError(
            f"router {router.name} draws its second expert at random (second_expert_policy = "
            f"{module.second_expert_policy!r}): such routing does not repeat; set it to 'all' in the model's config"
        )
    probabilities = logits.softmax(-1, dtype=module.dtype).to(module.input_dtype)
    first = probabilities.argmax(-1, keepdim=True)
    second = logits.scatter(-1, first, float("-inf")).argmax(-1, keepdim=True)
    experts = torch.cat([first, second], -1)
    weights = combining.gather(-1, experts)
    # The mask covers the first pick only. The second is dropped if its weight is 0 but its probability is not.
    dropped_first = dispatched.gather(-1, first) == 0
    dropped_second = (weights[..., 1:] == 0) & (probabilities.gather(-1, second) > 0)
    return Reading(logits, weights, experts, torch.cat([dropped_first, dropped_second], -1))


_READERS: dict[str, Callable[[Router, Any], Reading]] = {
    "DbrxRouter": _dbrx,
    "DiffusionGemmaTextRouter": _gemma4,
    "DogeCDMoE": _doge,
    "Gemma4TextRouter": _gemma4,
    "InklingTopkRouter": _inkling,
    "JetMoeTopKGating": _jetmoe,
    "Llama4Router": _llama4,
    "NllbMoeTop2Router": _nllb,
    "SwitchTransformersTop1Router": _switch,
    "ZayaRouter": _zaya,
}
"""Readers of the router classes that do not return (logits, weights, experts)."""

_INSIDE: dict[str, str] = {
    "Ernie4_5_VLMoeMoeBlock": "text_moe.gate",  # its sibling routes images, which do not occur in text
    "JetMoeAttention": "experts.router",
}
"""Path of the router inside declared blocks whose return value does not contain the choice."""

_UNDECLARED: dict[str, str] = {
    "DeepseekV4TopKRouter": "DeepseekV4HashRouter",  # chooses by token id in the first layers; same return value
}
"""Undeclared router classes that replace a declared one in some layers, by the declared one."""


def how_ids_are_obtained(router_class: str) -> str:
    """Describes in one line, from the reader's docstring, how the ids of a router class are returned or recomputed."""
    said = _READERS.get(router_class, _triple).__doc__
    assert said is not None
    return said[0].lower() + said[1:].rstrip(".")


def find_routers(
    model: PreTrainedModel, layers: Sequence[int] | None = None, stacks: Sequence[str] | None = None
) -> list[Router]:
    """Returns the routers of a model in module order, all of them or those of some layers and stacks.

    Args:
        model: any model of transformers.
        layers: layer numbers as in the model; None means all.
        stacks: 'encoder', 'decoder' or both; None means all.

    Raises:
        ValueError: the model declares no router, has none, or has none in a requested layer or stack.
    """
    routers = _named_stacks(list(_declared_routers(model)))
    name = type(model).__name__
    if not routers:
        declared = sorted({_declared_name(recorder) for _, sub in _submodels(model) for recorder in _recorders(sub)})
        if declared:
            raise ValueError(
                f"{name} has no router: its class declares {', '.join(declared)}, but this config builds none of them. "
                "Look for the config's field that turns experts on."
            )
        raise ValueError(
            f"{name} has no router: none of its modules is declared as "
            "_can_record_outputs['router_logits']. --model takes a Mixture-of-Experts model."
        )
    if stacks is not None:
        available = sorted({_side(router) for router in routers})
        absent = sorted(set(stacks) - set(available))
        if absent:
            raise ValueError(f"--stacks {absent}: no router there; {name} has routers in stacks {available}")
        routers = [router for router in routers if _side(router) in stacks]
    if layers is not None:
        there = sorted({router.layer for router in routers})
        missing = sorted(set(layers) - set(there))
        if missing:
            raise ValueError(f"--layers {missing}: no router there; {name} has routers in layers {there}")
        routers = [router for router in routers if router.layer in layers]
    return routers


def router_prefixes(model: PreTrainedModel) -> tuple[str, ...]:
    """Returns the routers' dotted paths with a trailing dot, so that `startswith` finds everything inside a router."""
    return tuple(f"{router.name}." for router in find_routers(model))


def _side(router: Router) -> str:
    return router.stack.partition(".")[0]


def _submodels(model: PreTrainedModel) -> Iterator[tuple[str, PreTrainedModel]]:
    from transformers import PreTrainedModel

    for prefix, submodel in model.named_modules():
        if isinstance(submodel, PreTrainedModel):
            yield prefix, submodel


def _recorders(model: PreTrainedModel) -> list[Any]:
    declared = (getattr(model, "_can_record_outputs", None) or {}).get("router_logits", [])
    return declared if isinstance(declared, list) else [declared]


def _declared_name(recorder: Any) -> str:
    return getattr(getattr(recorder, "target_class", recorder), "__name__", str(recorder))


def _declared_routers(model: PreTrainedModel) -> Iterator[Router]:
    two_stacks = bool(getattr(model.config, "is_encoder_decoder", False))
    found: set[str] = set()
    for prefix, submodel in _submodels(model):
        recorders = _recorders(submodel)
        for declared_path, declared in submodel.named_modules(prefix=prefix):
            if not any(_matches(recorder, declared_path, declared) for recorder in recorders):
                continue
            inside = _INSIDE.get(type(declared).__name__)
            path = f"{declared_path}.{inside}" if inside else declared_path
            if path in found:
                continue
            found.add(path)
            yield Router(
                name=path,
                layer=_layer_number(path),
                module=model.get_submodule(path),
                stack="encoder" if two_stacks and "encoder" in path.split(".") else "decoder",
                owner=model.get_submodule(path.rpartition(".")[0]),
            )


def _matches(recorder: Any, path: str, module: nn.Module) -> bool:
    """Whether a declaration (a module class, or an OutputRecorder with its filters) matches this module."""
    target = getattr(recorder, "target_class", recorder)
    if not isinstance(target, type):
        return False
    if not isinstance(module, target) and _UNDECLARED.get(target.__name__) != type(module).__name__:
        return False
    part = getattr(recorder, "layer_name", None)
    return part is None or f".{part.strip('.')}." in f".{path}."


def _layer_number(path: str) -> int:
    number = re.search(r"\.(\d+)\.", f".{path}.")
    if number is None:
        raise ValueError(f"router {path} is not in a numbered layer")
    return int(number.group(1))


def _named_stacks(routers: list[Router]) -> list[Router]:
    """Distinguishes routers of one layer by the first differing parts of their paths after the layer's number."""
    groups: dict[tuple[str, int], list[Router]] = defaultdict(list)
    for router in routers:
        groups[router.stack, router.layer].append(router)
    suffix = {}
    for group in groups.values():
        if len(group) == 1:
            continue
        tails = [re.split(r"(?:^|\.)\d+\.", router.name, maxsplit=1)[1].split(".") for router in group]
        same = next(i for i, parts in enumerate(zip(*tails, strict=False)) if len(set(parts)) > 1)
        length = next(n for n in range(1, 99) if len({tuple(tail[same:][:n]) for tail in tails}) == len(tails))
        suffix.update({router.name: ".".join(tail[same:][:length]) for router, tail in zip(group, tails, strict=True)})
    return [
        dataclasses.replace(router, stack=f"{router.stack}.{suffix[router.name]}") if router.name in suffix else router
        for router in routers
    ]
