"""Exports a run's progress as Ray metrics, through the Prometheus endpoints of the nodes.

Every series has the tag `run`, the last part of the run directory's name, percent-encoded as in a URL, because Ray
takes ASCII only. Counters count what this launch did; gauges tell how the whole run stands.
"""

from __future__ import annotations

import os
import time
from pathlib import PurePosixPath
from typing import TYPE_CHECKING
from urllib.parse import quote

from ray.util.metrics import Counter, Gauge

from collector.fleet.worklist import State

if TYPE_CHECKING:
    from collector.fleet.dispatch import Dispatcher

EVERY = 2.0
"""Seconds between two updates."""


def run_tag(root: str) -> str:
    """The value of the tag `run` for a run directory, in ASCII."""
    return quote(os.fsencode(PurePosixPath(root).name))


class _Series:
    """The series of one run, registered with the Ray that is connected."""

    def __init__(self, root: str) -> None:
        tags = {"run": run_tag(root)}
        self._tokens = Counter("collector_tokens", "Tokens committed by this launch.", ("run",))
        self._documents = Counter("collector_documents", "Rows of the data committed by this launch.", ("run",))
        self._shards = Gauge("collector_shards", "Shards of the plan by state.", ("run", "state"))
        self._replicas = Gauge("collector_replicas", "Replicas by state.", ("run", "state"))
        self._efficiency = Gauge("collector_padding_efficiency", "Real tokens / tokens through the model.", ("run",))
        self._idle = Gauge(
            "collector_replica_idle_share", "Share of the replicas' time without a forward pass.", ("run",)
        )
        for metric in (self._tokens, self._documents, self._shards, self._replicas, self._efficiency, self._idle):
            metric.set_default_tags(tags)
        self._counted = {"tokens": 0, "documents": 0}

    def update(self, dispatcher: Dispatcher) -> None:
        tally = dispatcher.view.tally
        self._count(self._tokens, "tokens", tally.launch_tokens)
        self._count(self._documents, "documents", tally.launch_rows)
        for state in State:
            self._shards.set(dispatcher.work.count(state), {"state": state.name.lower()})
        for name in ("requested", "loading", "ready"):
            self._replicas.set(dispatcher.fleet.count(name), {"state": name})
        self._efficiency.set(tally.padding_efficiency)
        self._idle.set(dispatcher.idle_share)

    def _count(self, counter: Counter, name: str, total: int) -> None:
        if total > self._counted[name]:
            counter.inc(total - self._counted[name])
            self._counted[name] = total


class Metrics:
    """Updates the series of one run; call it after every round of the dispatcher. Any error of Ray may come of it."""

    def __init__(self, root: str) -> None:
        """Registers nothing before the first call.

        Args:
            root: the run directory.
        """
        self._root = root
        self._series: _Series | None = None
        self._next = 0.0

    def __call__(self, dispatcher: Dispatcher, *, last: bool = False) -> None:
        """Updates the series every few seconds, and at the `last` call."""
        if time.monotonic() < self._next and not last:
            return
        self._next = time.monotonic() + EVERY
        self._series = self._series or _Series(self._root)
        self._series.update(dispatcher)
