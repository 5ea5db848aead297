"""Runs forward passes and hands what recorders keep of them to the host.

    recorders = [RoutingRecorder(model, routers, CaptureConfig())]
    with Capture(model, recorders) as capture:
        kept = capture.run(input_ids, attention_mask).wait()

Of an encoder–decoder model only the encoder runs, unless a hook sees the decoder's tokens.

Guarantees:

- padding is dropped on the device, before anything is reduced or copied, and reaches no expert of the
  usual kind (see `padding`);
- every hook fires exactly once per forward, or the batch fails;
- unless a recorder needs the whole pass, nothing after the last hook is computed: it ends the forward pass, so not
  even the experts of that layer run;
- hooks are gone when the context ends, whatever happened in it.

Results arrive without blocking the device, and nothing here waits for it while a forward pass is
being queued; `Captured.wait` must be called before they are read.
Not for models under CUDA graphs or torch.compile, whose replay calls no hooks.

Shapes: B rows, S positions, T real tokens.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from typing import TYPE_CHECKING, Any, Self

import torch

from collector.capture.experts_apart import ExpertsApart, listen_to_inputs
from collector.capture.landing import PinnedPool
from collector.capture.padding import ExpertsWithoutPadding, Grid, encoder_of
from collector.capture.positions import looks_back_only, one_text_per_row

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

    import numpy as np
    from numpy.typing import NDArray
    from transformers import PreTrainedModel

    from collector.capture.batches import TokenTable
    from collector.capture.landing import Landing
    from collector.capture.recorder import Again, Hook, Recorder


class _LastHookReached(Exception):  # noqa: N818 - control flow, not an error
    """Ends a forward pass after its last hook."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Captured:
    """What the recorders kept of one forward pass."""

    kept: list[list[Any]]
    """By recorder, what each of its hooks kept."""
    events: list[torch.cuda.Event]
    """One per GPU that held a hooked module."""
    landing: Landing
    """Where the results are on the host."""

    def wait(self) -> list[list[Any]]:
        """Blocks until the copies to the host are done."""
        for event in self.events:
            event.synchronize()
        return self.kept

    def release(self) -> None:
        """Lets the next batches overwrite the results."""
        self.landing.release()

    def kept_for_good(self) -> list[list[Any]]:
        """Waits for the results, and copies what the next batches would overwrite."""
        kept = [[type(each)(*map(_copy, each)) for each in one] for one in self.wait()] if self.events else self.kept
        self.release()
        return kept


class Capture:
    """Context manager that holds the hooks of some recorders on a model."""

    def __init__(
        self, model: PreTrainedModel, recorders: Sequence[Recorder], *, device: torch.device | None = None,
        to_the_end: bool = False,
    ) -> None:  # fmt: skip
        """Prepares the hooks; they are in place inside the context only.

        Args:
            model: a base model in eval mode.
            recorders: what to keep of its forward passes.
            device: where inputs go (default: the model's own).
            to_the_end: whether passes go on after the last hook, because something follows from them (`step`).
        """
        self.model = model
        self.recorders = list(recorders)
        self.device = device or model.device
        encoder = encoder_of(model)
        self.two_stacks = encoder is not None
        """Whether the model has an encoder and a decoder."""
        hooks = [recorder.hooks() for recorder in recorders]
        self._hooks: list[Hook] = [hook for each in hooks for hook in each]
        self._hooks_of = [len(each) for each in hooks]
        self.decodes = self.two_stacks and any(hook.stack == "decoder" for hook in self._hooks)
        """Whether `run` needs decoder inputs too."""
        self._entry: Any = encoder if self.two_stacks and not self.decodes else model
        self._needs_mask = not looks_back_only(model)
        self._to_the_end = to_the_end or any(recorder.needs_whole_pass for recorder in self.recorders)
        self._last: int | None = None
        self._silent = False
        self._handles: list[Any] = []
        self._devices: set[torch.device] = set()
        self._kept: dict[int, Any] = {}
        self._grids: dict[str, Grid] = {}
        self._pool = PinnedPool()
        self._landing = self._pool.take()
        self._narrowing = ExpertsWithoutPadding(model, self._grids)
        self._apart = contextlib.ExitStack()

    def __enter__(self) -> Self:
        try:
            self._narrowing.__enter__()
            for index in self._which("inputs"):  # before `ExpertsApart` changes them
                self._handles.append(listen_to_inputs(self._hooks[index].module, self._hook(index)))
            for index in self._which("experts"):
                self._apart.enter_context(ExpertsApart(self._hooks[index].module, self._hook(index)))
            for index in self._which("arguments"):
                hook = self._hooks[index]
                self._handles.append(hook.module.register_forward_pre_hook(self._argument_hook(index)))
            for index in self._which("module"):
                hook = self._hooks[index]
                self._handles.append(hook.module.register_forward_hook(self._output_hook(index)))
            self._probe()
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _remove(self) -> None:
        self._apart.close()
        self._narrowing.__exit__(None, None, None)
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _which(self, of: str) -> list[int]:
        """The numbers of the hooks that read this."""
        return [index for index, hook in enumerate(self._hooks) if hook.of == of]

    def _to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.device.type == "cpu":
            return tensor
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def _probe(self) -> None:
        """Shows the recorders one tiny, complete forward pass, and learns from it which hook fires last."""
        ids = torch.zeros((1, 2), dtype=torch.long)
        inputs = (ids, torch.ones_like(ids)) * (2 if self.decodes else 1)
        for recorder, kept in zip(self.recorders, self.run(*inputs).wait(), strict=True):
            recorder.probe(kept)
        if not self._to_the_end:
            self._last = list(self._kept)[-1]

    def _output_hook(self, index: int) -> Callable[[torch.nn.Module, Any, Any], None]:
        listen = self._hook(index)
        return lambda _module, _inputs, outputs: listen(outputs)

    def _argument_hook(self, index: int) -> Callable[[torch.nn.Module, Any], None]:
        listen = self._hook(index)
        return lambda _module, arguments: listen(arguments)

    def _hook(self, index: int) -> Callable[[Any], None]:
        hook = self._hooks[index]

        def record(outputs: Any) -> None:
            if self._silent:
                return
            if index in self._kept:
                raise RuntimeError(f"{hook.name} fired twice in one forward pass")
            self._kept[index] = self._reduce(hook, hook.read(outputs))
            if index == self._last:
                raise _LastHookReached

        return record

    def _reduce(self, hook: Hook, reading: Any) -> Any:
        grid, positions, device = self._grids[hook.stack], len(reading[0]), reading[0].device
        # Experts as a rule see real tokens only.
        has_padding = grid.real is not None and not (hook.of in ("experts", "inputs") and positions == len(grid.real))
        if positions != grid.positions and (has_padding or grid.real is None):
            raise RuntimeError(f"{hook.name} saw {positions} tokens of a batch of {grid.positions}")
        if has_padding:
            real = grid.real_on(device)
            reading = type(reading)(*(None if part is None else part.index_select(0, real) for part in reading))
        self._devices.add(device)
        kept = hook.keep(reading, grid)
        return type(kept)(*map(self._landing.copy, kept))

    def _again(self, inputs: Mapping[str, torch.Tensor], options: Mapping[str, Any]) -> Again:
        """Returns what runs the same batch, or rows of it, once more."""

        def again(rows: torch.Tensor | None = None) -> Any:
            given = inputs if rows is None else {name: each[rows.to(each.device)] for name, each in inputs.items()}
            self._silent = True
            try:
                with one_text_per_row():
                    return self._entry(**given, **options)
            finally:
                self._silent = False

        return again

    def begin(self, tokens: Mapping[str, TokenTable]) -> None:
        """Tells the recorders the tokens of the next shard."""
        for recorder in self.recorders:
            recorder.begin(tokens)

    @torch.inference_mode()
    def conclude(self) -> list[Any]:
        """Lets each recorder compute what is left of the shard, and returns the results by recorder."""
        return [recorder.conclude() for recorder in self.recorders]

    @torch.inference_mode()
    def run(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        *,
        slots: Mapping[str, NDArray[np.int64]] | None = None,
    ) -> Captured:
        """One forward pass.

        Args:
            input_ids: [B, S] on the host.
            attention_mask: [B, S] on the host, 1 for real tokens; padding may be on either side, of an
                encoder–decoder model on the right only: a capacity counts from the left.
            decoder_input_ids: [B, S'] on the host, where `decodes`; what the decoder is given.
            decoder_attention_mask: [B, S'] on the host.
            slots: stack -> [T] the places of its real tokens in the shard's token table, for recorders that ask.

        Raises:
            RuntimeError: a hook did not fire, fired twice, or saw other than B x S tokens.
        """
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
        slots, stack = slots or {}, "encoder" if self.two_stacks else "decoder"
        grids = {stack: Grid.of(attention_mask, self._to_device, input_ids, slots.get(stack))}
        options: dict[str, Any] = {} if self.two_stacks and not self.decodes else {"use_cache": False}
        if self.decodes:
            assert decoder_input_ids is not None, "a hook sees the decoder's tokens"
            assert decoder_attention_mask is not None, "a hook sees the decoder's tokens"
            inputs |= {"decoder_input_ids": decoder_input_ids, "decoder_attention_mask": decoder_attention_mask}
            grids["decoder"] = Grid.of(decoder_attention_mask, self._to_device, decoder_input_ids, slots.get("decoder"))
        elif not self.two_stacks and (attention_mask[:, 0] == 0).any():
            # A causal model numbers positions from the left edge of the batch unless told otherwise.
            inputs["position_ids"] = _positions(attention_mask)
        elif not self._needs_mask:
            # Padding on the right is after every token that could see it. Without a mask, kernels for causal attention
            # run, and nobody waits for the device to learn whether the mask masks anything.
            del inputs["attention_mask"]
        return self._pass(inputs, options, grids)[0]

    @torch.inference_mode()
    def step(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, cache: Any = None
    ) -> tuple[Captured, torch.Tensor, Any]:
        """One forward pass of texts that are being written: of their prompts, or of the next token of each.

        Args:
            input_ids: [B, S] on the host; prompts are padded on the left, so that all texts end in the last column.
            attention_mask: [B, P + S] on the host, 1 for real tokens; P positions are in the cache.
            cache: what the step before returned; None for prompts.

        Returns:
            What the recorders kept of the S columns, the last hidden states [B, H] of the last column, and the cache.

        Raises:
            RuntimeError: a hook did not fire, fired twice, or saw other than B x S tokens.
        """
        width = input_ids.shape[1]
        inputs = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "position_ids": _positions(attention_mask)[:, -width:],
        }
        if not self._needs_mask and bool(attention_mask.all()):
            del inputs["attention_mask"]
        grids = {"decoder": Grid.of(attention_mask[:, -width:], self._to_device, input_ids)}
        captured, outputs = self._pass(inputs, {"use_cache": True, "past_key_values": cache}, grids)
        return captured, outputs.last_hidden_state[:, -1], outputs.past_key_values

    def _pass(
        self, inputs: Mapping[str, torch.Tensor], options: Mapping[str, Any], grids: Mapping[str, Grid]
    ) -> tuple[Captured, Any]:
        """Runs the model; returns what the recorders kept, and what the model did unless the last hook ended it."""
        self._kept = {}
        self._landing = self._pool.take()
        self._grids.clear()
        self._grids.update(grids)
        on_device, outputs = {name: self._to_device(tensor) for name, tensor in inputs.items()}, None
        with contextlib.ExitStack() as around:
            for recorder in self.recorders:
                around.enter_context(recorder.around_pass())
            with contextlib.suppress(_LastHookReached), one_text_per_row():
                outputs = self._entry(**on_device, **options)
        silent = [hook.name for index, hook in enumerate(self._hooks) if index not in self._kept]
        if silent:
            raise RuntimeError(f"{', '.join(silent)} did not fire")
        for recorder in self.recorders:
            recorder.after_pass(self._again(on_device, options))
        # A thread that waits for these sleeps; by default it would keep a core busy.
        events = [
            torch.cuda.current_stream(device).record_event(torch.cuda.Event(blocking=True))
            for device in self._devices
            if device.type == "cuda"
        ]
        kept = iter(self._kept[index] for index in range(len(self._hooks)))
        by_recorder = [list(itertools.islice(kept, count)) for count in self._hooks_of]
        return Captured(kept=by_recorder, events=events, landing=self._landing), outputs


def _copy(part: Any) -> Any:
    return part.clone() if isinstance(part, torch.Tensor) else part


def _positions(attention_mask: torch.Tensor) -> torch.Tensor:
    """[B, S] the place of each token in its text, wherever the padding is."""
    return (attention_mask.cumsum(-1) - 1).clamp_min(0)
