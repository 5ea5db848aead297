"""Measures the host's side of a replica: everything but the device, which answers at once with random decisions.

    python -m benchmarks.host                       # as fast as the host goes, then at the pace of a GPU
    python -m benchmarks.host --cores 1             # on fewer cores than there are

Documents are read, tokenized, padded, put in place, encoded, published and committed as in any run. In place of the
model stands a device with the geometry of OLMoE-1B-7B (16 layers, 64 experts, top-8): experts and weights are random,
so they compress as badly as can be. A pass makes as many small calls of torch as launching a real one does, because
each of them lets go of the interpreter and has to get it back. How long the device's thread waits for it, or for a
core, is measured by its CPU time. At a pace, a pass takes as long as on a GPU of so many tokens per second.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import statistics
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.collect import Collected, machine
from benchmarks.gpu import write_documents
from collector.capture.decisions import LayerDecision
from collector.capture.routing import RoutingRecorder
from collector.config import CaptureConfig, DataConfig, ModelConfig, resolve
from collector.data import plan
from collector.fleet.progress import shares
from collector.replica.replica import Replica
from collector.store.tables import Layer


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure what the host sustains."""

    tokens: int = 600_000
    """Tokens of a run, about."""
    pace: int = 180_000
    """Tokens per second of the device in the second measurement."""
    launches: int = 900
    """Small calls of torch per pass."""
    layers: int = 16
    """Router layers."""
    rounds: int = 3
    """Rounds; medians are printed."""
    cores: int | None = None
    """Cores to use (default: all)."""
    batch: int = 32768
    """Padded tokens per pass."""


class Device:
    """Stands in for a capture: answers every pass with random decisions, at once or at a pace."""

    two_stacks = decodes = False

    def __init__(self, bench: Bench, pace: float | None) -> None:
        rng = np.random.default_rng(0)
        size = bench.batch + 512
        order = rng.random((size, 64)).argsort(1)[:, :8]
        weights = torch.from_numpy(rng.random((size, 8), np.float32)).bfloat16().float()
        self._layers = []
        for layer in range(bench.layers):
            experts, statistics = np.roll(order, 17 * layer, 0).astype(np.int16), rng.random((3, size), np.float32)
            parts = torch.from_numpy(experts), weights.roll(13 * layer, 0), torch.from_numpy(statistics)
            self._layers.append(parts)
        recorder = RoutingRecorder(None, [], CaptureConfig())  # type: ignore[arg-type]
        recorder.layers = [Layer(layer=layer, n_experts=64, top_k=8) for layer in range(bench.layers)]
        self.recorders = [recorder]
        self._bench, self._pace, self._done = bench, pace, 0.0
        self._operand = torch.zeros(8)
        self.launching = self.computing = 0.0
        """Seconds of launching, and of CPU time of these."""

    def run(self, _input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Pass:
        """Launches a pass; its results are there at once, and `wait` waits for the device's pace."""
        started, used = time.perf_counter(), time.thread_time()
        for _ in range(self._bench.launches):
            self._operand.add_(1)
        count = int(attention_mask.sum())
        kept = [LayerDecision(e[:count], w[:count], s[:, :count], None, 64) for e, w, s in self._layers]
        now = time.perf_counter()
        self.launching += now - started
        self.computing += time.thread_time() - used
        if self._pace is not None:
            self._done = max(self._done, now) + count / self._pace
        return Pass([kept], self._done)

    def __exit__(self, *_: object) -> None:
        pass


@dataclasses.dataclass(frozen=True)
class Pass:
    """What a pass left."""

    kept: list[list[Any]]
    done: float

    def wait(self) -> list[list[Any]]:
        """Waits until the device would be done."""
        time.sleep(max(0.0, self.done - time.perf_counter()))
        return self.kept

    def release(self) -> None:
        """Nothing is held."""


def measure(bench: Bench, source: Path, pace: float | None) -> dict[str, Any]:
    """One run; returns tokens per second, the share that launching waited, and seconds by stage."""
    config = resolve(data=DataConfig(data=(str(source),)), model=ModelConfig(), device="cpu",
                     capture=CaptureConfig(tokens_per_batch=bench.batch))  # fmt: skip
    made = plan.make_plan(config)
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(tempfile.TemporaryDirectory())
        replica = stack.enter_context(contextlib.closing(Replica(root, config, made.hash, threads=1)))
        device = Device(bench, pace)
        # As beside a GPU; the other stages are those of this machine.
        placer = ThreadPoolExecutor(1, thread_name_prefix="place")
        replica._passes = dataclasses.replace(replica._passes, capture=device, placer=placer)  # type: ignore[arg-type]
        started, used = time.perf_counter(), time.process_time()
        commits = list(replica.collect_all(made.shards))
        seconds, cpu = time.perf_counter() - started, time.process_time() - used
    tokens = sum(commit.tokens for commit in commits)
    return {
        "tokens": tokens,
        "shards": len(commits),
        "tokens_per_second": tokens / seconds,
        "cpu_per_token_us": cpu / tokens * 1e6,
        "waiting": 1 - device.computing / device.launching, "launching_of_run": device.launching / seconds,
        "bytes_per_token": sum(part.bytes for commit in commits for part in commit.files.values()) / tokens,
        "stages": Collected.of(seconds, commits).stages,
    }  # fmt: skip


def main(bench: Bench) -> None:
    """Measures at full speed and at the pace."""
    if bench.cores is not None:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: bench.cores])  # before any thread starts
    print(f"python -m benchmarks.host {' '.join(sys.argv[1:])}\n{machine()}, {len(os.sched_getaffinity(0))} used\n")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "texts.jsonl")
        write_documents(source, bench.tokens)
        print("| device | tokens/s | CPU per token | launching | of it waiting |\n|---|---|---|---|---|")
        notes = []
        for name, pace in (("at once", None), (f"{bench.pace:,} tokens/s", float(bench.pace))):
            found = [measure(bench, source, pace) for _ in range(bench.rounds)]
            middle = {key: statistics.median(each[key] for each in found) for key in found[0] if key != "stages"}
            launching, waiting = 100 * middle["launching_of_run"], 100 * middle["waiting"]
            print(
                f"| {name} | {middle['tokens_per_second']:,.0f} | {middle['cpu_per_token_us']:.1f} µs | "
                f"{launching:.1f} % of the run | {waiting:.1f} % |"
            )
            notes.append(f"{name}: {shares(found[0]['stages'])}")
        print("\n".join(["", *notes]))
        print(
            f"{middle['tokens']:,.0f} tokens in {middle['shards']:.0f} shards, "
            f"{middle['bytes_per_token']:.0f} bytes per token",
            flush=True,
        )


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Bench))
