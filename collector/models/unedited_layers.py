"""Computes the layers before an edit once, however many arms of edits follow.

    layers = UneditedLayers(model, find_routers(model))
    with layers.keeping({4, 9}):
        model(...)
    with layers.skipping(4):
        model(...)  # the same batch: layers 0 to 3 return what layer 3 returned before

The model's own code runs around the layers, so embeddings, masks and positions are its own. A model whose layers hand
anything on but their return value would go wrong: `UneditedLayers` tries it on a tiny text first, and where the results
are not exactly those of the whole pass, every pass is a whole one.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from collector.models.probing import tiny_pass

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterator, Sequence

    from transformers import PreTrainedModel

    from collector.models.routers import Router


class UneditedLayers:
    """What layers of a model returned for the current batch."""

    def __init__(self, model: PreTrainedModel, routers: Sequence[Router]) -> None:
        """Finds the layers, and tries whether they can be skipped.

        Args:
            model: a decoder in eval mode.
            routers: of the model; its layers are the blocks that contain them.
        """
        self._layers = _layers_with(model, routers)
        self._kept: dict[int, Any] = {}
        if not self._can_skip(model):
            self._layers = []

    @property
    def are_skipped(self) -> bool:
        """Whether layers before an edit are computed once in this model."""
        return bool(self._layers)

    @contextlib.contextmanager
    def keeping(self, firsts: Collection[int]) -> Iterator[None]:
        """Keeps what passes that start at these layers need, of the pass inside; forgets that of the batch before."""
        self._kept.clear()
        handles = [
            self._layers[first - 1].register_forward_hook(self._keep(first))
            for first in firsts
            if self._layers and first
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def forget(self) -> None:
        """Frees the memory of what was kept."""
        self._kept.clear()

    @contextlib.contextmanager
    def skipping(self, first: int) -> Iterator[None]:
        """Starts the pass inside at this layer, if what it needs was kept."""
        if first not in self._kept:
            yield
            return
        skipped = self._layers[:first]
        before = [layer.__dict__.get("forward") for layer in skipped]  # accelerate sets one, to move weights
        for layer in skipped:
            layer.forward = lambda *_arguments, **_options: self._kept[first]
        try:
            yield
        finally:
            for layer, own in zip(skipped, before, strict=True):
                if own is None:
                    del layer.forward
                else:
                    layer.forward = own

    def _keep(self, first: int) -> Callable[..., None]:
        def keep(_module: Any, _inputs: Any, outputs: Any) -> None:
            self._kept[first] = outputs

        return keep

    def _can_skip(self, model: PreTrainedModel) -> bool:
        """Compares whole passes with skipping ones, each twice: a layer may change what it is given."""
        if len(self._layers) < 2:
            return False
        firsts = {1, len(self._layers) // 2, len(self._layers) - 1} - {0}
        try:
            with self.keeping(firsts):
                whole = tiny_pass(model).last_hidden_state
            for first in sorted(firsts) * 2:
                with self.skipping(first):
                    if not torch.equal(tiny_pass(model).last_hidden_state, whole):
                        return False
        except Exception:  # noqa: BLE001 - whatever a family's code makes of skipped layers
            return False
        finally:
            self._kept.clear()
        return True


def _layers_with(model: PreTrainedModel, routers: Sequence[Router]) -> list[Any]:
    """The list of layers that holds all routers, by the model's own numbers; empty if there is none."""
    found: dict[str, Any] = {}
    for router in routers:
        parts = router.name.split(".")
        for count in range(1, len(parts)):
            module: Any = model.get_submodule(".".join(parts[:count]))
            if isinstance(module, nn.ModuleList):
                if int(parts[count]) != router.layer:
                    return []
                found[".".join(parts[:count])] = module
                break
    return list(*found.values()) if len(found) == 1 else []
