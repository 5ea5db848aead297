"""Changes what routers hand to their experts, while the model runs: interventions on (stack, layer, expert).

    with EditedRouting(model, find_routers(model), [Edit(layer=4, expert=31, operation="drop")]):
        model(...)

The router's own code runs. `bias` is added to the logits where the router computes them; `replace` and `force` change
what its top-k, or its argmax, chooses from, and never the values that it returns: so softmax, normalization, groups and
weights stay the family's own. `drop` and `scale` change the weights that the router returns. A hook that reads the
router afterwards, as the routing recorder does, sees what the experts receive.

Shapes: T positions of a batch, padding included, E experts, k chosen per token.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Self

import torch
from torch.overrides import TorchFunctionMode

from collector.models.edits import OPERATIONS, check
from collector.models.probing import tiny_pass

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import TracebackType

    from transformers import PreTrainedModel

    from collector.models.edits import Edit
    from collector.models.routers import Router

Where = Callable[[str, int], torch.Tensor]
"""(encoder or decoder, T) -> [T] bool, the positions of that stack's tokens at which edits act."""
_REFUSED: dict[str, tuple[set[str], str]] = {
    "DogeCDMoE": ({*OPERATIONS}, "chooses pairs of keys, not experts"),
    "InklingTopkRouter": ({"bias"}, "computes its logits together with those of shared experts"),
    "JetMoeTopKGating": ({"drop_renorm"}, "returns its picks sorted by expert"),
    "ZayaRouter": ({"drop", "drop_renorm", "scale"}, "tells the skipped layer by expert 0 with weight 0"),
}
"""Router class -> operations without a meaning there, and why."""


class EditedRouting:
    """Context manager that holds edits on the routers of a model."""

    def __init__(
        self, model: PreTrainedModel, routers: Sequence[Router], edits: Sequence[Edit], where: Where | None = None,
        *, known: Mapping[str, tuple[int, int]] | None = None,
    ) -> None:  # fmt: skip
        """Prepares the edits; they act inside the context only, which must be entered before hooks that read routers.

        Args:
            model: in eval mode.
            routers: of the model.
            edits: any number of each router.
            where: the positions of a forward pass at which the edits act (default: all).
            known: `geometry` of the routers, if it was asked for already.

        Raises:
            ValueError: a router or an expert does not exist, or the operation has no meaning for the family.
        """
        there = {(router.stack, router.layer): router for router in routers}
        of: dict[tuple[str, int], list[Edit]] = {}
        for edit in edits:
            of.setdefault((edit.stack, edit.layer), []).append(edit)
        for stack, layer in of.keys() - there.keys():
            names = ", ".join(f"{each} {number}" for each, number in there)
            raise ValueError(f"no router in {stack} layer {layer}; the model has {names}")
        sizes = geometry(model, [there[at] for at in of]) if known is None else known
        self._edited = [_Edited(there[at], own, *sizes[there[at].name]) for at, own in of.items()]
        self._where = where
        self._handles: list[Any] = []
        self._wrapped: list[Any] = []

    def __enter__(self) -> Self:
        for edited in self._edited:
            block, module = edited.router.owner, edited.router.module
            interception = _Interception(edited, self._where)
            if block is not None:  # readers of some families choose again, before it ends
                self._handles += [
                    block.register_forward_pre_hook(interception.begin),
                    block.register_forward_hook(interception.end, always_call=True),
                ]
            self._handles += [
                module.register_forward_pre_hook(interception.begin_alone),
                module.register_forward_hook(interception.rewrite),
            ]
            if hasattr(block, "route_tokens_to_experts"):
                self._wrap(block, interception)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for handle in self._handles:
            handle.remove()
        for block in self._wrapped:
            del block.route_tokens_to_experts
        self._handles.clear()
        self._wrapped.clear()

    def _wrap(self, block: Any, interception: _Interception) -> None:
        """DBRX's block turns logits into weights itself, and its reader asks it again."""
        original = block.route_tokens_to_experts

        def routed(*arguments: Any, **options: Any) -> Any:
            weights, experts = original(*arguments, **options)
            return interception.reweighted(weights, experts), experts

        block.route_tokens_to_experts = routed
        self._wrapped.append(block)


def geometry(model: PreTrainedModel, routers: Sequence[Router]) -> dict[str, tuple[int, int]]:
    """Finds E and k of routers, by name, in a tiny forward pass; before hooks that expect a batch."""
    found: dict[str, tuple[int, int]] = {}

    def listen(router: Router) -> Callable[..., None]:
        def read(_module: torch.nn.Module, _inputs: Any, outputs: Any) -> None:
            reading = router.read(outputs)
            found[router.name] = reading.logits_te.shape[1], reading.experts_tk.shape[1]

        return read

    handles = [router.module.register_forward_hook(listen(router)) for router in routers]
    try:
        tiny_pass(model)
    finally:
        for handle in handles:
            handle.remove()
    return found


class _Edited:
    """The edits of one router, as functions of what it computes."""

    def __init__(self, router: Router, edits: Sequence[Edit], experts: int, top_k: int) -> None:
        self.router, self.experts, self.top_k = router, experts, top_k
        name = type(router.module).__name__
        refused, why = _REFUSED.get(name, (set(), ""))
        where = f"{router.stack} layer {router.layer}"
        check(edits, where, experts, top_k)
        for edit in edits:
            if edit.operation in refused:
                raise ValueError(f"operation {edit.operation} has no meaning in {where}: {name} {why}")
        of = {kind: [edit for edit in edits if edit.operation == kind] for kind in OPERATIONS}
        self._blocked = [edit.expert for edit in of["replace"]]
        self._forced = [edit.expert for edit in of["force"]]
        self._bias_e = torch.zeros(experts)
        self._factor_e = torch.ones(experts)
        for edit in of["bias"]:
            self._bias_e[edit.expert] += edit.value or 0.0
        for edit in of["scale"]:
            self._factor_e[edit.expert] *= 1.0 if edit.value is None else edit.value
        for edit in [*of["drop"], *of["drop_renorm"]]:
            self._factor_e[edit.expert] = 0.0
        self._renormed = torch.zeros(experts, dtype=torch.bool)
        self._renormed[[edit.expert for edit in of["drop_renorm"]]] = True
        self._choices = 0
        self._has_logits = False

    @property
    def has_choices(self) -> bool:
        """Whether an edit changes which experts are chosen."""
        return bool(self._blocked or self._forced)

    @property
    def takes_logits(self) -> bool:
        """Whether a bias waits for the router's logits."""
        return bool(self._bias_e.any()) and not self._has_logits

    @property
    def changes_weights(self) -> bool:
        """Whether an edit multiplies weights."""
        return bool((self._factor_e != 1).any())

    def start(self) -> None:
        """Begins a forward pass of the block."""
        self._choices, self._has_logits = 0, False

    def biased(self, logits: torch.Tensor, acts: torch.Tensor | None) -> torch.Tensor:
        """Adds to the logits, [.., E], where the router computes them; later products are something else."""
        self._has_logits = True
        added = logits.float().std(-1, correction=0, keepdim=True) * self._bias_e.to(logits.device)
        if acts is not None:
            added = added * acts.view(*logits.shape[:-1], 1)
        return (logits.float() + added).to(logits.dtype)

    def offered(self, scores: torch.Tensor, acts: torch.Tensor | None) -> torch.Tensor:
        """What the router chooses from, [.., E]: without experts that are replaced, led by those that are forced."""
        offered = scores.clone()
        everywhere = torch.ones(scores.shape[:-1], dtype=torch.bool, device=scores.device)
        acts = everywhere if acts is None else acts.view(scores.shape[:-1])
        for experts, extreme in ((self._blocked, -math.inf), (self._forced, math.inf)):
            for expert in experts:
                offered[..., expert] = offered[..., expert].masked_fill(acts, extreme)
        return offered

    def next_choice(self, scores: torch.Tensor, acts: torch.Tensor | None) -> torch.Tensor:
        """[..] what a router takes that chooses one expert after another: the last of the k is the forced one.

        It masks what it chose before with minus infinity.
        """
        offered = self.offered(scores, acts)
        self._choices += 1
        if self._choices % self.top_k:
            for expert in self._forced:  # not yet
                offered[..., expert] = scores[..., expert]
        return offered.masked_fill(scores == -math.inf, -math.inf).argmax(-1)

    def reweighted(self, weights: torch.Tensor, experts: torch.Tensor, acts: torch.Tensor | None) -> torch.Tensor:
        """Multiplies weights [.., k] of picks [.., k]."""
        factors = self._factor_e.to(weights.device)[experts.long()]
        renormed = self._renormed.to(weights.device)[experts.long()].any(-1, keepdim=True)
        if acts is not None:
            acts = acts.view(*weights.shape[:-1], 1)
            factors, renormed = torch.where(acts, factors, 1.0), renormed & acts
        edited = weights.float() * factors
        before, after = weights.float().sum(-1, keepdim=True), edited.sum(-1, keepdim=True)
        return torch.where(renormed & (after != 0), edited * before / after, edited).to(weights.dtype)


class _Interception(TorchFunctionMode):
    """Changes the operations of one block: the product that gives logits, and the choice.

    It is on while the block runs, in the thread that runs it.
    """

    def __init__(self, edited: _Edited, where: Where | None) -> None:
        super().__init__()
        self._edited, self._where = edited, where
        self._is_on = False
        self._in_router = False
        self._is_alone = False
        """Whether only the router was called, and not the block around it, as in JetMoE's attention."""

    # -- hooks ---------------------------------------------------------------------------------------

    def begin(self, *_arguments: Any) -> None:
        """Before the block."""
        self._edited.start()
        self._is_on, self._in_router = True, False
        self.__enter__()

    def begin_alone(self, *_arguments: Any) -> None:
        """Before the router."""
        self._is_alone = not self._is_on
        if self._is_alone:
            self.begin()
        self._in_router = True

    def end(self, *_arguments: Any) -> None:
        """After the block, or after an error in it."""
        if self._is_on:
            self._is_on = False
            self.__exit__(None, None, None)

    def rewrite(self, _module: torch.nn.Module, _inputs: Any, outputs: Any) -> Any:
        """After the router: puts edited weights into what it returns."""
        self._in_router = False
        if self._is_alone:
            self.end()
        if not self._edited.changes_weights:
            return outputs
        router = self._edited.router
        return _REWRITERS.get(type(router.module).__name__, _rewrite_triple)(router, outputs, self.reweighted)

    def reweighted(self, weights: torch.Tensor, experts: torch.Tensor, at: torch.Tensor | None = None) -> torch.Tensor:
        """Edits weights [.., k] of picks [.., k]; `at` are the positions of picks that are not in their order."""
        if not self._edited.changes_weights:
            return weights
        acts = self._acts(weights[..., 0].numel() if at is None else int(at.max()) + 1, weights.device)
        return self._edited.reweighted(weights, experts, acts if acts is None or at is None else acts[at])

    def _acts(self, positions: int, device: torch.device) -> torch.Tensor | None:
        """[T] where the edits act, None for everywhere."""
        if self._where is None:
            return None
        return self._where(self._edited.router.token_stack, positions).flatten().to(device)

    # -- operations ----------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = kwargs or {}
        edited, name = self._edited, getattr(func, "__name__", "")
        scores = args[0] if args and isinstance(args[0], torch.Tensor) else None
        if name == "linear" and self._in_router and edited.takes_logits:
            logits = func(*args, **options)
            if logits.shape[-1] != edited.experts:
                return logits
            return edited.biased(logits, self._acts(logits[..., 0].numel(), logits.device))
        if scores is None or not edited.has_choices or name not in ("topk", "argmax", "max"):
            return func(*args, **options)
        if scores.shape[-1] != edited.experts or scores.ndim < 2 or not scores.is_floating_point():
            return func(*args, **options)
        acts = self._acts(scores[..., 0].numel(), scores.device)
        if name == "topk":
            indices = func(edited.offered(scores, acts), *args[1:], **options).indices
            return torch.return_types.topk((scores.gather(-1, indices), indices))
        dim = options.get("dim", args[1] if len(args) > 1 else None)
        if dim not in (-1, scores.ndim - 1):
            return func(*args, **options)
        indices = edited.next_choice(scores, acts)[..., None]
        values = scores.gather(-1, indices)
        if not options.get("keepdim", args[2] if len(args) > 2 else False):
            indices, values = indices[..., 0], values[..., 0]
        return indices if name == "argmax" else torch.return_types.max((values, indices))


def _rewrite_triple(_router: Router, outputs: Any, reweighted: Callable[..., torch.Tensor]) -> Any:
    logits, weights, experts, *rest = outputs
    return (logits, reweighted(weights, experts), experts, *rest)


def _rewrite_nothing(_router: Router, outputs: Any, _reweighted: Callable[..., torch.Tensor]) -> Any:
    return outputs


def _rewrite_switch(router: Router, outputs: Any, reweighted: Callable[..., torch.Tensor]) -> Any:
    reading = router.read(outputs)
    dispatched, probability, logits = outputs
    return dispatched, reweighted(reading.weights_tk, reading.experts_tk).view(probability.shape), logits


def _rewrite_dense(at: int) -> Callable[..., Any]:
    """For routers that return weights as [.., E], zero for experts that were not chosen."""

    def rewrite(router: Router, outputs: Any, reweighted: Callable[..., torch.Tensor]) -> Any:
        reading, dense = router.read(outputs), outputs[at]
        weights = reweighted(reading.weights_tk, reading.experts_tk).to(dense.dtype)
        changed = dense.reshape(-1, dense.shape[-1]).scatter(1, reading.experts_tk.long(), weights)
        return (*outputs[:at], changed.view(dense.shape), *outputs[at + 1 :])

    return rewrite


def _rewrite_jetmoe(_router: Router, outputs: Any, reweighted: Callable[..., torch.Tensor]) -> Any:
    order, tokens, weights, tokens_per_expert, logits = outputs
    sizes = torch.tensor(tokens_per_expert, device=order.device)
    experts = torch.arange(len(sizes), device=order.device).repeat_interleave(sizes, output_size=len(order))
    return order, tokens, reweighted(weights[:, None], experts[:, None], tokens)[:, 0], tokens_per_expert, logits


_REWRITERS: dict[str, Callable[..., Any]] = {
    "DbrxRouter": _rewrite_nothing,  # its block returns the weights
    "JetMoeTopKGating": _rewrite_jetmoe,
    "Llama4Router": _rewrite_dense(0),
    "NllbMoeTop2Router": _rewrite_dense(1),
    "SwitchTransformersTop1Router": _rewrite_switch,
}
"""How weights are put back into what routers return that do not return (logits, weights, experts)."""
