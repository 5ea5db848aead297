"""The folder of a sweep: the runs of several checkpoints of one training over the same documents.

    SWEEP/sweep.json            the checkpoints in the order of training, and what their tokenizers have in common
    SWEEP/sweep_plan.parquet    the shards of every run; its metadata holds the settings without the checkpoint
    SWEEP/<checkpoint>/         a run directory for each checkpoint
    SWEEP/failures/<…>.json     why a checkpoint could not be collected
    SWEEP/downloads/<…>.json    what the sweep downloaded, and to which machine and cache

Each run is a run like any other; what is here only says which belong together. Nothing here is deleted but failures.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from collector.models.revisions import Checkpoint
from collector.store.run_directory import SUCCESS, RunDirectory

if TYPE_CHECKING:
    import os
    from collections.abc import Mapping, Sequence

SWEEP, SWEEP_PLAN = "sweep.json", "sweep_plan.parquet"
FORMAT = 1


class SweepDirectory:
    """The files of a sweep, on a local folder or an object store."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.files = RunDirectory(root)
        """Reads and writes the files of the sweep itself."""
        self.root = self.files.root

    def exists(self) -> bool:
        """Whether there is a sweep."""
        return self.files.read_or_none(SWEEP) is not None

    def read(self) -> dict[str, Any]:
        """Returns the content of sweep.json.

        Raises:
            FileNotFoundError: there is no sweep.
            ValueError: the file is damaged.
        """
        try:
            found = self.files.read_json(SWEEP)
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"no sweep at {self.root}: there is no {SWEEP}; name the folder that `collector sweep` wrote"
            ) from error
        except ValueError as error:
            raise ValueError(f"{self.root}/{SWEEP} is damaged: {error}") from error
        if not isinstance(found, dict) or not {"checkpoints", "tokenizer"} <= found.keys():
            raise ValueError(f"{self.root}/{SWEEP} is damaged: it does not tell the checkpoints and their tokenizer")
        return found

    def checkpoints(self) -> list[Checkpoint]:
        """Returns the checkpoints in the order of training.

        Raises:
            FileNotFoundError: there is no sweep.
        """
        return [Checkpoint(name=each["name"], commit=each["commit"]) for each in self.read()["checkpoints"]]

    def write(self, checkpoints: Sequence[Checkpoint], **facts: object) -> None:
        """Writes sweep.json."""
        listed = [
            {"name": each.name, "run": each.folder, "step": each.step, "tokens_seen": each.tokens_seen,
             "commit": each.commit}
            for each in checkpoints
        ]  # fmt: skip
        content = {"format": FORMAT, **facts, "checkpoints": listed}
        self.files.store.put(SWEEP, json.dumps(content, indent=1, ensure_ascii=False).encode() + b"\n")

    def run(self, checkpoint: Checkpoint) -> RunDirectory:
        """Returns the run of a checkpoint, begun or not."""
        return RunDirectory(f"{self.root.rstrip('/')}/{checkpoint.folder}")

    def is_complete(self, checkpoint: Checkpoint) -> bool:
        """Whether every shard of a checkpoint is committed."""
        return self.run(checkpoint).read_or_none(SUCCESS) is not None

    # ---- notes ----

    def note(self, kind: str, checkpoint: Checkpoint, content: Mapping[str, Any]) -> None:
        """Keeps a note about a checkpoint, in place of an earlier one of its kind: `failures` or `downloads`."""
        self.files.store.put(_note(kind, checkpoint), json.dumps(content).encode() + b"\n")

    def noted(self, kind: str, checkpoint: Checkpoint) -> dict[str, Any] | None:
        """Returns a note, None if there is none."""
        data = self.files.read_or_none(_note(kind, checkpoint))
        return None if data is None else json.loads(data)

    def forget(self, kind: str, checkpoint: Checkpoint) -> None:
        """Removes a note if there is one."""
        self.files.store.delete(_note(kind, checkpoint))


def _note(kind: str, checkpoint: Checkpoint) -> str:
    return f"{kind}/{checkpoint.folder}.json"


def hint(root: str | os.PathLike[str]) -> str:
    """Returns what to do where a run is expected and a sweep is; empty if there is no sweep either."""
    directory = SweepDirectory(root)
    if not directory.exists():
        return ""
    runs = [directory.run(each).root for each in directory.checkpoints()]
    return (
        f"it is a sweep of {len(runs)} checkpoints, which query, sql, report and status take; name one of its runs, "
        f"for example {runs[-1]}"
    )
