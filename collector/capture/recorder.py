"""The base class of what a run records of its forward passes.

A `Recorder` names the modules whose output it needs. The capture runs the model, hands each hook the rows of the real
tokens, and copies what the hook keeps to the host. A `Recording` puts that in place, token by token, and writes the
shard's tables.

Passes, part writer, views and `verify` work with any recorder. `recorders.RECORDERS` lists those that there are.
torch is imported only where a model runs, because queries ask recorders for their schemas.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

    import pyarrow as pa
    import torch
    from torch import nn
    from transformers import PreTrainedModel

    from collector.capture.batches import Batch, TokenTable
    from collector.capture.padding import Grid
    from collector.capture.shard_text import ShardText
    from collector.config import CaptureConfig
    from collector.models.heads import Head
    from collector.models.routers import Router


@dataclasses.dataclass(frozen=True, kw_only=True)
class Hook:
    """Reads the output of one module, or what it receives (see `of`), exactly once in a forward pass."""

    name: str
    """The module in messages."""
    module: nn.Module
    stack: str
    """`encoder` or `decoder`: the stack whose tokens the module sees."""
    read: Callable[[Any], Any]
    """What is read, see `of` -> a NamedTuple of tensors with one row per position of the batch, padding included.
    Parts may be None, but for the first."""
    keep: Callable[[Any, Grid], Any]
    """The same NamedTuple without padding, and the batch -> a NamedTuple of what the recorder keeps, reduced on the
    device."""
    of: Literal["module", "arguments", "experts", "inputs"] = "module"
    """What is read: what the module returns, or the positional arguments that it is given; of an experts module what
    single experts put out (`ExpertCall`) or what they receive (`ExpertInputs`)."""


class LastHidden(NamedTuple):
    """The last hidden states of a base model."""

    hidden_rh: torch.Tensor

    @classmethod
    def of(cls, outputs: Any) -> LastHidden:
        """Reads what the model returns; padding included."""
        return cls(outputs.last_hidden_state.flatten(0, 1))


class Again(Protocol):
    """Runs a batch once more, unheard by recorders."""

    def __call__(self, rows: torch.Tensor | None = None) -> Any:
        """Returns what the model returns for these rows of the batch (default: all), which may repeat."""


class Recording(abc.ABC):
    """What one recorder has of one shard."""

    def conclude(self, result: Any) -> None:  # noqa: B027 - most have nothing to conclude
        """Takes what `Recorder.conclude` returned for this shard, after all batches; by default nothing."""

    @abc.abstractmethod
    def put(self, batch: Mapping[str, Batch], kept: Sequence[Any]) -> None:
        """Writes the results of a batch to the slots of its tokens.

        Args:
            batch: stack -> its padded batch.
            kept: what each hook kept, in the order of `Recorder.hooks`, on the host.
        """

    @abc.abstractmethod
    def check(self) -> None:
        """Makes sure that every slot was written.

        Raises:
            ValueError: a slot was left out, or holds a value that no model returns.
        """

    def write(self, folder: Path, shard: int, text: ShardText) -> dict[str, int]:  # noqa: ARG002
        """Writes a Parquet file per table, named like the table.

        Returns:
            Table -> the rows that its file must hold.
        """
        return {}

    def token_columns(self) -> dict[str, pa.Array]:
        """Returns the columns that it adds to the tokens table, in the order of that table."""
        return {}


class Recorder(abc.ABC):
    """Decides what is kept of the forward passes of one model, and the tables that it becomes."""

    tables: ClassVar[Mapping[str, str]]
    """Table -> what a row of it is, in words."""
    token_fields: ClassVar[Sequence[pa.Field]] = ()
    """Columns that it adds to the tokens table."""
    needs_head: ClassVar[bool] = False
    """Whether it needs the model's language-model head."""
    needs_whole_pass: ClassVar[bool] = False
    """Whether the pass must run to its end; otherwise it ends at the last hook of all recorders."""

    def __init__(
        self, model: PreTrainedModel, routers: Sequence[Router], config: CaptureConfig, head: Head | None = None
    ) -> None:
        """Prepares nothing on the model.

        Args:
            model: a base model in eval mode.
            routers: the routers that the run records.
            config: what to record.
            head: the model's language-model head, if one of the recorders needs it.
        """
        self.head = head
        self.model = model
        self.routers = list(routers)
        self.config = config

    @classmethod
    @abc.abstractmethod
    def schemas(cls, info: Mapping[str, Any]) -> dict[str, pa.Schema]:
        """Those of `tables` that a run with this run.json has, with their columns.

        Views find each table as a relation of its name.
        """

    @abc.abstractmethod
    def hooks(self) -> list[Hook]:
        """The modules that it reads."""

    @abc.abstractmethod
    def probe(self, kept: Sequence[Any]) -> None:
        """Learns the shapes of the model's outputs from a first, tiny forward pass; `kept` is as in `Recording.put`."""

    @abc.abstractmethod
    def card(self) -> dict[str, Any]:
        """Its part of run.json, known after `probe`."""

    def begin(self, tokens: Mapping[str, TokenTable]) -> None:  # noqa: B027 - most need not know
        """Learns the tokens of the next shard, before its first pass and in the thread of the passes."""

    def around_pass(self) -> contextlib.AbstractContextManager[None]:
        """Is entered for each pass, in the same thread, to keep more of it than hooks do; by default nothing."""
        return contextlib.nullcontext()

    def after_pass(self, again: Again) -> None:  # noqa: B027 - most run nothing again
        """Follows each pass of a batch, in the same thread.

        Args:
            again: runs the batch once more, with the hooks of all recorders silent; returns what the model returns.
        """

    def conclude(self) -> Any:
        """Computes what is left of a shard on the device, after its last pass and in the same thread.

        Returns:
            What `Recording.conclude` takes, on the host; by default nothing.
        """
        return None

    @abc.abstractmethod
    def start(self, tokens: Mapping[str, TokenTable]) -> Recording:
        """Makes room for a shard; `tokens` maps each stack to the tokens that it is given."""
