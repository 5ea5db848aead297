"""Exports a run's progress as Ray metrics, through the Prometheus endpoints of the nodes.

Every series has the tag `run`, the last part of the run directory's name. Counters count what this
launch did; gauges tell how the whole run stands.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from ray.util.metrics import Counter, Gauge

from collector.fleet.worklist import State

if TYPE_CHECKING:
    from collector.fleet.dispatch import Dispatcher

EVERY = 2.0
"""Seconds between two updates."""


class Metrics:
    """The series of one run; call it after every round of the dispatcher."""

    def __init__(self, run: str) -> None:
        """Registers the series with the Ray that is connected.

        Args:
            run: value of the tag `run`.
        """
        tags = {"run": run}
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
        self._next = 0.0

    def __call__(self, dispatcher: Dispatcher, *, last: bool = False) -> None:
        """Updates the metrics every few seconds, and at the `last` call."""
        if time.monotonic() < self._next and not last:
            return
        self._next = time.monotonic() + EVERY
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
