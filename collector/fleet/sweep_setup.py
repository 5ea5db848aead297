"""Decides what a sweep consists of: its checkpoints, the shards of all its runs, and the tokenizer that they share."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from collector.data import plan as planning
from collector.data import sources
from collector.fleet import driver
from collector.models.downloads import tokenizer_fingerprint
from collector.models.revisions import NoListError, find_checkpoints, is_local, of_checkpoint
from collector.store.run_directory import PLAN
from collector.store.sweep_directory import SWEEP_PLAN

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collector.config import ModelConfig, RunConfig
    from collector.data.plan import Plan
    from collector.models.revisions import Checkpoint
    from collector.store.sweep_directory import SweepDirectory


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """Which checkpoints a sweep takes, and what becomes of their files."""

    revisions: Sequence[str] = ()
    """Names or globs (default: all names that tell a step)."""
    every: int = 1
    """Take every Nth, and the last."""
    delete_after_use: bool = False
    """Remove from the cache what was downloaded, once its run is complete."""


def require_series(model: ModelConfig, choice: Choice) -> None:
    """Rejects settings that make no sense for several checkpoints.

    Raises:
        ValueError: one revision, random weights, or files that are not the sweep's to delete.
    """
    if model.revision is not None:
        raise ValueError(f"--revision {model.revision} names one checkpoint: a sweep takes --revisions")
    if model.weights == "random":
        raise ValueError("--weights random is the same at every checkpoint: collect it once, with collector collect")
    if choice.every < 1:
        raise ValueError(f"--every must be positive, got {choice.every}")
    if choice.delete_after_use and is_local(model.model):
        raise ValueError(f"--delete-after-use deletes downloads, and --model {model.model} is a folder: leave it out")


def list_checkpoints(
    directory: SweepDirectory, model: ModelConfig, choice: Choice, say: Callable[[str], None]
) -> list[Checkpoint]:
    """Returns the checkpoints that the sweep has and those that are chosen now, in the order of training.

    A sweep goes on with those that it has where the hub cannot be asked.

    Raises:
        ValueError: there is no checkpoint, or none of a name.
    """
    known = directory.checkpoints() if directory.exists() else []
    try:
        found = find_checkpoints(model, choice.revisions, choice.every)
    except NoListError as error:
        if not known:
            raise
        say(f"going on with the {len(known)} checkpoints that the sweep has: {error}")
        found = []
    merged = {each.name: each for each in (*known, *found)}
    return sorted(merged.values(), key=lambda checkpoint: checkpoint.order)


def freeze_documents(
    directory: SweepDirectory, config: RunConfig, last: Checkpoint, say: Callable[[str], None]
) -> Plan:  # fmt: skip
    """Cuts the documents of all runs into shards, or reads the shards of a sweep to resume.

    Args:
        directory: the sweep.
        config: the settings, without a checkpoint.
        last: the checkpoint whose tokenizer is asked whether it can read the documents.
        say: called with each warning about the documents.

    Raises:
        ValueError: the sweep was begun with other settings, and names what differs; or there is a run.
    """
    stored = directory.files.read_or_none(SWEEP_PLAN)
    if stored is None:
        if directory.files.read_or_none(PLAN) is not None:
            raise ValueError(f"{directory.root} holds a run, which is no place for a sweep: choose another --out")
        plan = driver.new_plan(settings_of(config, last), say)
        plan = dataclasses.replace(plan, config=config.to_dict())
        if directory.files.store.put_new(SWEEP_PLAN, plan.to_parquet()):
            return plan
        stored = directory.files.store.read(SWEEP_PLAN)
    plan = planning.Plan.from_parquet(stored)
    if differences := planning.differences(plan.config, config.to_dict()):
        raise ValueError(
            f"{directory.root} holds a sweep with other settings:\n  " + "\n  ".join(differences)
            + "\nGo on with the old settings, or choose another --out."
        )  # fmt: skip
    return plan


def settings_of(config: RunConfig, checkpoint: Checkpoint) -> RunConfig:
    """Returns the settings of a checkpoint's run."""
    return dataclasses.replace(config, model=of_checkpoint(config.model, checkpoint))


class Tokenizers:
    """Compares the tokenizer of each checkpoint with that of the first one that has any."""

    def __init__(self, config: RunConfig, first: dict[str, str] | None) -> None:
        self._config = config
        self.first = first
        """Name of the checkpoint and fingerprint of its tokenizer; None before one was read."""

    def fingerprint(self, checkpoint: Checkpoint) -> str:
        """Reads a checkpoint's tokenizer.

        Raises:
            ValueError: it has none, or cannot be reached.
        """
        return tokenizer_fingerprint(settings_of(self._config, checkpoint).model, template=self._conversations)

    def require_same(self, checkpoint: Checkpoint, fingerprint: str) -> None:
        """Compares a fingerprint with the first one.

        Raises:
            ValueError: they differ, so that one position would not be the same token in both runs.
        """
        if self.first is None:
            self.first = {"checkpoint": checkpoint.name, "fingerprint": fingerprint}
        if fingerprint != self.first["fingerprint"]:
            raise ValueError(
                f"the tokenizers of {self.first['checkpoint']} and {checkpoint.name} differ, so their routing cannot "
                "be compared token by token: name checkpoints with one tokenizer by --revisions"
            )

    @functools.cached_property
    def _conversations(self) -> bool:
        """Whether the chat template decides, too."""
        return planning.has_conversations(sources.resolve(self._config.data), self._config.data)


def begin(directory: SweepDirectory, config: RunConfig, checkpoints: Sequence[Checkpoint]) -> Tokenizers:
    """Compares the tokenizers of checkpoints that the sweep does not have yet, and writes down what it consists of.

    A tokenizer that cannot be read is left to its checkpoint's turn.

    Raises:
        ValueError: tokenizers differ.
    """
    known = directory.read() if directory.exists() else {"checkpoints": [], "tokenizer": None}
    tokenizers, names = Tokenizers(config, known["tokenizer"]), {each["name"] for each in known["checkpoints"]}
    for checkpoint in (each for each in checkpoints if each.name not in names):
        try:
            found = tokenizers.fingerprint(checkpoint)
        except ValueError:
            continue
        tokenizers.require_same(checkpoint, found)
    directory.write(checkpoints, model=config.model.model, tokenizer=tokenizers.first)
    return tokenizers
