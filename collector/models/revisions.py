"""Finds the checkpoints that a training run left: branches and tags of a repository on the hub, or folders in a folder.

Nothing is loaded here and little is imported, because queries import this module.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
from pathlib import Path
from typing import TYPE_CHECKING

from collector.config import DEMO

if TYPE_CHECKING:
    from collections.abc import Sequence

    from collector.config import ModelConfig

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}
_STEP = re.compile(
    r"(?<![a-z])(?:global[-_]?)?(?:steps?|checkpoint|ckpt|iter(?:ation)?)[-_]?(\d+)([kmb]?)(?![a-z\d])", re.IGNORECASE
)
_TOKENS = re.compile(r"(?<![a-z])tokens?[-_]?(\d+(?:\.\d+)?)([kmbt]?)(?![a-z\d])", re.IGNORECASE)
_STAGE = re.compile(r"(?<![a-z])stage[-_]?(\d+)", re.IGNORECASE)
_NAMED = 8


class NoListError(ValueError):
    """The hub does not say which branches there are."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """One checkpoint of a training run."""

    name: str
    """Its branch or tag, or its folder."""
    commit: str | None = None
    """The commit that the branch or tag named when it was listed; None for a folder."""

    @property
    def step(self) -> int | None:
        """Optimizer steps, as `step5000-tokens21B`, `checkpoint-500` and `iter_0540` say; None if the name doesn't."""
        found = _STEP.search(self.name)
        if found is None:
            return int(self.name) if self.name.isdecimal() else None
        return int(found[1]) * _UNITS[found[2].lower()]

    @property
    def tokens_seen(self) -> int | None:
        """Tokens seen in training, as the name says, rounded as it rounds; None if it doesn't."""
        found = _TOKENS.search(self.name)
        return None if found is None else round(float(found[1]) * _UNITS[found[2].lower()])

    @property
    def folder(self) -> str:
        """The name without slashes, which branches may have."""
        return self.name.replace("/", "--")

    @property
    def order(self) -> tuple[object, ...]:
        """The key of the order of training: by stage and step; names without a step come last, by name."""
        stage = _STAGE.search(self.name)
        parts = [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", self.name)]
        return self.step is None, int(stage[1]) if stage else 0, self.step or 0, parts


def is_local(model: str) -> bool:
    """Whether a model is a folder."""
    return Path(model).expanduser().is_dir()


def of_checkpoint(config: ModelConfig, checkpoint: Checkpoint) -> ModelConfig:
    """Returns the settings of one checkpoint of a model."""
    if is_local(config.model):
        return dataclasses.replace(config, model=str(Path(config.model).expanduser() / checkpoint.name))
    return dataclasses.replace(config, revision=checkpoint.name)


def find_checkpoints(config: ModelConfig, wanted: Sequence[str] = (), every: int = 1) -> list[Checkpoint]:
    """Lists checkpoints in the order of training.

    Args:
        config: the model: a repository on the hub, or a folder of folders with a config.json each.
        wanted: names or globs of the checkpoints to take (default: all whose names have a step).
        every: take every Nth, from the first on, and the last.

    Raises:
        NoListError: the hub cannot be reached, or has no such repository.
        ValueError: the model is no such thing, there is no checkpoint of a name, or none at all.
    """
    if config.model == DEMO:
        raise ValueError(
            "the demo model is a single checkpoint: python -m collector.demo.train --save-at … writes several, and "
            "make sweep-demo does all of it"
        )
    found = _select(_in_folder(config) if is_local(config.model) else _on_hub(config), wanted, config.model)
    found.sort(key=lambda checkpoint: checkpoint.order)
    return found[::every] + (found[-1:] if (len(found) - 1) % every else [])


def _in_folder(config: ModelConfig) -> list[Checkpoint]:
    folder = Path(config.model).expanduser()
    return [Checkpoint(name=path.name) for path in sorted(folder.iterdir()) if (path / "config.json").is_file()]


def _on_hub(config: ModelConfig) -> list[Checkpoint]:
    from huggingface_hub import HfApi

    from collector.models.locations import telling_remedy

    try:
        with telling_remedy(config, "the list of branches"):
            refs = HfApi().list_repo_refs(config.model)
    except ValueError as error:
        raise NoListError(str(error)) from error
    except Exception as error:  # of the HTTP library, and which that is depends on the version of huggingface_hub
        raise NoListError(f"cannot list branches of --model {config.model!r}: {error}; check the network") from error
    commits = {ref.name: ref.target_commit for ref in (*refs.tags, *refs.branches)}
    return [Checkpoint(name=name, commit=commit) for name, commit in commits.items()]


def _select(found: list[Checkpoint], wanted: Sequence[str], model: str) -> list[Checkpoint]:
    names = [checkpoint.name for checkpoint in sorted(found, key=lambda checkpoint: checkpoint.order)]
    taken = set() if wanted else {checkpoint.name for checkpoint in found if checkpoint.step is not None}
    for pattern in wanted:
        matching = [name for name in names if name == pattern or fnmatch.fnmatchcase(name, pattern)]
        if not matching:
            raise ValueError(f"--model {model} has no checkpoint {pattern!r}; {_there_are(names, pattern)}")
        taken.update(matching)
    if not taken:
        raise ValueError(
            f"--model {model} has no checkpoint whose name tells a step; name some with --revisions: "
            f"{_there_are(names)}"
        )
    return [checkpoint for checkpoint in found if checkpoint.name in taken]


def _there_are(names: Sequence[str], wanted: str = "") -> str:
    if close := difflib.get_close_matches(wanted, names, n=1):
        return f"did you mean {close[0]}?"
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return f"it has {', '.join(names[:_NAMED]) + more or 'none'}"
