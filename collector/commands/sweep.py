"""`collector sweep` collects the checkpoints of a training run, to see when specialization appears.

Exits with 0 if every checkpoint's run is complete, 1 if one is not, 2 if the input is of no use.
"""

from __future__ import annotations

import contextlib
import dataclasses

import tyro

from collector.config import CaptureConfig, DataConfig, LaunchConfig, ModelConfig


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sweep:
    """Collect checkpoints of a training run over the same documents: when does specialization appear?

    Each checkpoint gets a run of its own, OUT/CHECKPOINT, one after the other. `collector query OUT NAME` then answers
    with the rows of all checkpoints, and `collector report OUT` draws curves over training. --model is a repository of
    the hub whose branches or tags are checkpoints, or a folder with a folder for each. While one is collected, the next
    is downloaded. To resume, and to try again what failed, repeat the same command; more --revisions add
    checkpoints.
    """

    out: str
    """The folder or URL of the sweep."""
    revisions: tuple[str, ...] = ()
    """Names of checkpoints, or patterns: 'step*' or step5000-tokens20B step10000-tokens41B.
    Default: all whose names tell a step, as step5000-tokens20B, checkpoint-500 and iter_0540 do. Names without a step
    come last, by name."""
    every: int = 1
    """Take every Nth checkpoint, from the first on, and the last."""
    delete_after_use: bool = False
    """Delete from this machine's cache of the hub what the sweep downloaded, as soon as its run is complete."""
    data: tyro.conf.OmitArgPrefixes[DataConfig] = dataclasses.field(default_factory=DataConfig)
    model: tyro.conf.OmitArgPrefixes[ModelConfig] = dataclasses.field(default_factory=ModelConfig)
    capture: tyro.conf.OmitArgPrefixes[CaptureConfig] = dataclasses.field(default_factory=CaptureConfig)
    launch: tyro.conf.OmitArgPrefixes[LaunchConfig] = dataclasses.field(default_factory=LaunchConfig)

    def run(self) -> int:
        """Collects the checkpoints and prints a table of them.

        Raises:
            ValueError: settings, data or model are not usable, or no checkpoint could be collected.
        """
        from collector.fleet import sweep
        from collector.look import terminal_sweep

        choice = sweep.Choice(revisions=self.revisions, every=self.every, delete_after_use=self.delete_after_use)
        done = sweep.collect(
            self.out, choice=choice, data=self.data, model=self.model, capture=self.capture, launch=self.launch
        )
        complete = all(map(done.is_complete, done.checkpoints()))
        with contextlib.suppress(BrokenPipeError):  # nobody reads on, but the runs are what they are
            terminal_sweep.status(done)
        return 0 if complete else 1
