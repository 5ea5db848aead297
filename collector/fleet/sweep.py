"""Collects the checkpoints of a training run, one after the other, over the same documents.

The documents are cut into shards once. Each checkpoint gets an ordinary run of these shards, and Ray stays up between
them. All state is in the sweep's folder, so the same command goes on after any interruption, skips what is complete,
and tries again what failed.

Guarantees: all runs have the same shards of the same files, and tokenizers that cut texts into the same tokens. A
checkpoint that cannot be loaded costs the others nothing.
"""

from __future__ import annotations

import socket
from typing import TYPE_CHECKING, Any

from collector.config import resolve
from collector.data import plan as planning
from collector.data.plan import PartOf
from collector.fleet import driver, sweep_setup
from collector.fleet.progress import tell
from collector.fleet.ray_cluster import pick_device
from collector.fleet.rejected import complaint
from collector.fleet.sweep_setup import Choice, require_series, settings_of
from collector.models.downloads import Downloads, cached_weights, delete_cached
from collector.models.revisions import Checkpoint, is_local
from collector.store.local_store import StoreError
from collector.store.sweep_directory import SweepDirectory
from collector.store.totals import Totals

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from collector.config import CaptureConfig, DataConfig, LaunchConfig, ModelConfig, RunConfig
    from collector.store.run_directory import RunDirectory

    Collect = Callable[[str, RunConfig, PartOf], RunDirectory]

__all__ = ["Choice", "Sweeping", "collect"]

IN_VAIN = 2
"""Checkpoints that may fail before any is collected. If more do, it is the settings that are wrong."""


def collect(
    root: str, *, choice: Choice, data: DataConfig, model: ModelConfig, capture: CaptureConfig, launch: LaunchConfig
) -> SweepDirectory:
    """Runs or resumes a sweep on one Ray.

    Args:
        root: the sweep's folder.
        choice: which checkpoints.
        data: the documents.
        model: a repository with several revisions, or a folder of checkpoints.
        capture: what to record.
        launch: where the replicas run.

    Returns:
        The sweep, whose runs tell what is complete.

    Raises:
        ValueError: settings, data or model are not usable, or belong to another sweep than `root`; tokenizers differ;
            or no checkpoint could be collected.
        KeyboardInterrupt: Ctrl-C or SIGTERM; the sweep can be resumed.
    """
    require_series(model, choice)

    def say(message: str) -> None:
        tell(message, as_json=launch.log_format == "json", event="sweep")

    checkpoints = sweep_setup.list_checkpoints(SweepDirectory(root), model, choice, say)
    with driver.connected(launch) as grows:
        config = resolve(data=data, model=model, capture=capture, device=pick_device(launch, grows=grows))

        def collect_one(at: str, settings: RunConfig, part_of: PartOf) -> RunDirectory:
            return driver.collect_connected(at, settings, launch, grows=grows, part_of=part_of)

        return Sweeping(
            root, config, checkpoints, collect_one, say, delete_after_use=choice.delete_after_use,
            max_rejected=launch.max_rejected,
        ).run()  # fmt: skip


class Sweeping:
    """One launch of a sweep."""

    def __init__(
        self, root: str, config: RunConfig, checkpoints: Sequence[Checkpoint], collect_one: Collect,
        say: Callable[[str], None], *, delete_after_use: bool = False, max_rejected: float = 1.0,
    ) -> None:  # fmt: skip
        """Starts nothing yet.

        Args:
            root: the sweep's folder.
            config: the settings, without a checkpoint.
            checkpoints: in the order of training, see `sweep_setup.list_checkpoints`.
            collect_one: collects one run of these documents.
            say: called with what people should know.
            delete_after_use: whether to delete what was downloaded once its run is complete.
            max_rejected: see `LaunchConfig`.
        """
        self.directory, self.config, self.checkpoints = SweepDirectory(root), config, checkpoints
        self.collect_one, self.say = collect_one, say
        self.delete_after_use, self.max_rejected = delete_after_use, max_rejected
        self.failed: list[str] = []
        """What failed in this launch, a line each."""

    def run(self) -> SweepDirectory:
        """Collects what is left to do; see `collect`."""
        count = len(self.checkpoints)
        self.plan = sweep_setup.freeze_documents(self.directory, self.config, self.checkpoints[-1], self.say)
        self.say(f"{self.directory.root}: {count} checkpoints, {self.plan.documents:,} documents each")
        self.tokenizers = sweep_setup.begin(self.directory, self.config, self.checkpoints)
        todo = [each for each in self.checkpoints if not self._is_done(each)]
        if len(todo) < count:
            self.say(f"{count - len(todo)} of them are complete")
        if todo:
            self._require_unchanged_sources()
            self._work_off(todo)
        return self.directory

    def _require_unchanged_sources(self) -> None:
        if changed := planning.check_sources(self.plan, self.config):
            raise ValueError(
                f"the documents of {self.directory.root} are no longer those that it began with: {'; '.join(changed)}. "
                "Restore them, or begin another sweep"
            )

    def _work_off(self, todo: Sequence[Checkpoint]) -> None:
        downloads = None
        if not is_local(self.config.model.model):
            by_name = {each.name: each for each in todo}
            configs = [settings_of(self.config, each).model for each in todo]
            downloads = Downloads(configs, lambda config: self._note_download(by_name[config.revision or ""]))
        for checkpoint in todo:
            number = self.checkpoints.index(checkpoint) + 1
            self.say(f"checkpoint {number} of {len(self.checkpoints)}: {checkpoint.name}")
            if error := self._failure(checkpoint, downloads):
                self.failed.append(f"{checkpoint.name}: {error}")
                self.directory.note("failures", checkpoint, {"error": error})
                self.say(f"not collected: {self.failed[-1]}")
                self._stop_if_in_vain(len(todo))
            else:
                self.directory.forget("failures", checkpoint)

    def _failure(self, checkpoint: Checkpoint, downloads: Downloads | None) -> str | None:
        """Collects a checkpoint; returns why this failed, None if its run is complete."""
        try:
            if downloads is not None:
                downloads.wait()
            fingerprint = self.tokenizers.fingerprint(checkpoint)
        except ValueError as error:
            return str(error)
        self.tokenizers.require_same(checkpoint, fingerprint)
        try:
            part_of = PartOf(plan=self.plan)
            run = self.collect_one(self.directory.run(checkpoint).root, settings_of(self.config, checkpoint), part_of)
        except StoreError:
            raise
        except (ValueError, RuntimeError) as error:
            return str(error)
        if self._is_done(checkpoint):
            return None
        left = len(self.plan.shards) - len(run.committed_shards())
        return f"{left} of {len(self.plan.shards)} shards are missing; collector status {run.root} says why"

    def _stop_if_in_vain(self, todo: int) -> None:
        """Raises if checkpoints failed and none has been collected, now or before."""
        if len(self.failed) >= min(IN_VAIN, todo) and not any(
            self.directory.run(each).committed_shards() for each in self.checkpoints
        ):
            raise ValueError(f"no checkpoint could be collected: {'; '.join(self.failed)}")

    def _is_done(self, checkpoint: Checkpoint) -> bool:
        """Whether a run is complete; its downloads are deleted then, if that is wanted.

        Raises:
            ValueError: too many of its rows became no document, and so it would be with every checkpoint.
        """
        if not self.directory.is_complete(checkpoint):
            return False
        skipped = Totals.of(self.directory.run(checkpoint)).skipped
        if said := complaint(skipped, self.plan.documents, self.max_rejected):
            raise ValueError(said)
        if self.delete_after_use:
            self._delete_download(checkpoint)
        return True

    # ---- downloads ----

    def _note_download(self, checkpoint: Checkpoint) -> None:
        """Notes that what follows is this sweep's own download, unless the cache has the weights already."""
        model, commit = self.config.model.model, checkpoint.commit
        if commit and cached_weights(model, commit=commit) is None:
            self.directory.note("downloads", checkpoint, _place(commit))

    def _delete_download(self, checkpoint: Checkpoint) -> None:
        """Deletes what this sweep downloaded to this machine's cache, and nothing else."""
        commit = checkpoint.commit or ""
        if self.directory.noted("downloads", checkpoint) != _place(commit):
            return
        freed = delete_cached(self.config.model.model, checkpoint.name, commit)
        self.directory.forget("downloads", checkpoint)
        self.say(f"{checkpoint.name}: {freed / 1e6:,.1f} MB deleted from the cache")


def _place(commit: str) -> dict[str, Any]:
    from huggingface_hub import constants

    return {"node": socket.gethostname(), "cache": constants.HF_HUB_CACHE, "commit": commit}
