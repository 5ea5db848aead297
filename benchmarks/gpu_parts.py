"""The parts of `benchmarks.gpu`: each takes its settings and the folder with model and texts, and prints a table."""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import tempfile
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import gpu_meters as meters
from benchmarks.collect import (
    Collected,
    CutAfterLastRouter,
    forward_all,
    notebook_loop,
    prepare,
    transformers_batches,
)
from benchmarks.quantized import router_capture
from collector.config import CaptureConfig, DataConfig, LaunchConfig, ModelConfig, RunConfig, resolve
from collector.data import plan
from collector.data.sources import Document
from collector.fleet.progress import shares
from collector.models import compiling, footprint, loading
from collector.replica.replica import Replica

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from benchmarks.gpu import Bench
    from collector.capture.batches import Batch

machine = meters.machine


def settings(bench: Bench, folder: Path, *, texts: str, batch: int | None = None, **model: Any) -> RunConfig:
    """The settings of a run over one of the files of texts."""
    return resolve(
        data=DataConfig(data=(str(folder / texts),)),
        model=ModelConfig(model=str(folder / "model"), **model),
        capture=CaptureConfig(tokens_per_batch=batch),
        device=bench.device,
    )


def load(bench: Bench, config: RunConfig) -> loading.LoadedModel:
    """Loads a model as a replica does, and says how long that took."""
    started = time.perf_counter()
    loaded = loading.load(config.model, bench.device)
    meters.wait(bench.device)
    print(f"loaded in {time.perf_counter() - started:.1f} s", flush=True)
    return loaded


def as_language_model(loaded: loading.LoadedModel) -> Any:
    """The class that users load, around the same weights, with a random head."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        lm = AutoModelForCausalLM.from_config(loaded.model.config)
    lm.model = loaded.model
    head = torch.nn.Linear(lm.lm_head.in_features, lm.lm_head.out_features, bias=False, device=loaded.device,
                           dtype=loaded.model.dtype)  # fmt: skip
    lm.lm_head = head
    return lm.eval()


@contextlib.contextmanager
def experts_by(model: Any, implementation: str) -> Iterator[None]:
    """Context in which the experts run in one of transformers' ways."""
    before = model.config._experts_implementation
    model.set_experts_implementation(implementation)
    try:
        yield
    finally:
        model.set_experts_implementation(before)


def all_texts(config: RunConfig, made: plan.Plan) -> list[str]:
    """The texts of all documents of a plan."""
    rows = (row for shard in made.shards for row in plan.read_shard(shard, config.data))
    return [row.text for row in rows if isinstance(row, Document)]


def batches_of(
    bench: Bench, folder: Path, loaded: loading.LoadedModel, made: plan.Plan, budget: int | None = None
) -> list[Batch]:
    """The batches that a replica would make of a plan."""
    return prepare(loaded, settings(bench, folder, texts="texts.jsonl", batch=budget), made)


def sizes(prepared: list[Batch]) -> tuple[int, int]:
    """Returns (real tokens, padded tokens)."""
    real = sum(int(batch.attention_mask.sum()) for batch in prepared)
    return real, sum(batch.input_ids.size for batch in prepared)


# -- floor -------------------------------------------------------------------------------------------


class Table:
    """The rows of `floor`, printed as they are measured."""

    def __init__(self, bench: Bench, ceiling: dict[str, float]) -> None:
        self.rows: list[dict[str, Any]] = []
        self._bench, self._peak = bench, ceiling["matmul_tflops"] * 1e12
        print("| variant | padded tokens | tokens/s | of the peak |\n|---|---|---|---|", flush=True)

    def add(self, name: str, budget: int, tokens: int, run: Callable[[], object], *, rounds: int, cut: bool) -> None:
        """Times a variant after a first, untimed run; one that does not fit into the memory has its row too."""
        try:
            run()
            seconds = [meters.timed(self._bench.device, run) for _ in range(rounds)]
        except torch.OutOfMemoryError:
            print(f"| {name} | {budget:,} | out of memory | |", flush=True)
        else:
            rate = tokens / statistics.median(seconds)
            share = rate * meters.flops_per_token(self._bench.geometry, cut=cut) / self._peak
            self.rows.append({"variant": name, "batch": budget, "tokens": tokens, "seconds": seconds,
                              "tokens_per_second": rate, "share_of_peak": share})  # fmt: skip
            print(f"| {name} | {budget:,} | {rate:,.0f} | {100 * share:.1f} % |", flush=True)
        meters.free_memory()


def floor(bench: Bench, folder: Path) -> dict[str, Any]:
    """Tokens per second of the loops that users have, of bare forward passes, and of the capture."""
    ceiling = meters.ceilings(bench.device)
    print(f"matrix peak {ceiling['matmul_tflops']:.0f} TFLOP/s in bfloat16, copies {ceiling['copy_gb_s']:,.0f} GB/s")
    config = settings(bench, folder, texts="texts.jsonl", batch=bench.batches[0])
    loaded, made = load(bench, config), plan.make_plan(config)
    lm, tokenizer, texts = as_language_model(loaded), loaded.tokenizer, all_texts(config, made)
    table = Table(bench, ceiling)
    few = [text for text in texts if len(text) < 400][:100]
    tokens = sum(len(ids) for ids in tokenizer(few, truncation=True, max_length=512)["input_ids"])
    one_by_one = functools.partial(notebook_loop, lm, tokenizer, few, 512)
    table.add("one text at a time, hook, argmax", 1, tokens, one_by_one, rounds=1, cut=False)
    for budget in bench.batches:
        prepared = batches_of(bench, folder, loaded, made, budget)
        tokens, padded = sizes(prepared)
        variants: dict[str, Callable[[], object]] = {
            "transformers, batched, arrival order": functools.partial(
                transformers_batches, lm, tokenizer, texts, 512, budget
            ),
            "bare base model": functools.partial(forward_all, loaded.model, prepared),
            "cut after the last router": functools.partial(cut, loaded, prepared),
            "cut, experts without padding, captured": functools.partial(captured, loaded, prepared),
        }
        for name, variant in variants.items():
            table.add(name, budget, tokens, variant, rounds=bench.rounds, cut=name.startswith("cut"))
        print(f"| padding efficiency {tokens / padded:.3f}, {len(prepared)} batches | {budget:,} | | |")
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        for budget in bench.batches[:1] + bench.batches[-2:-1]:
            prepared = batches_of(bench, folder, loaded, made, budget)[:4]
            with experts_by(loaded.model, implementation):
                run = functools.partial(cut, loaded, prepared)
                table.add(f"cut, experts {implementation}", budget, sizes(prepared)[0], run, rounds=1, cut=True)
    return {"ceilings": ceiling, "rows": table.rows}


def cut(loaded: loading.LoadedModel, prepared: list[Batch]) -> None:
    """The forward pass up to the last router, its results discarded."""
    with CutAfterLastRouter(loaded.model):
        forward_all(loaded.model, prepared)


def captured(loaded: loading.LoadedModel, prepared: list[Batch]) -> None:
    """The same with capture: the results of each batch are waited for while the next one computes."""
    before = None
    with router_capture(loaded.model) as capture:
        for batch in prepared:
            now = capture.run(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask))
            if before is not None:
                before.wait()
            before = now
        if before is not None:
            before.wait()


# -- compiled ----------------------------------------------------------------------------------------


def compiled(bench: Bench, folder: Path) -> dict[str, Any]:
    """The cut forward pass with capture, compiled and not, on the same batches."""
    config = settings(bench, folder, texts="texts.jsonl")
    loaded, made = load(bench, config), plan.make_plan(config)
    prepared = batches_of(bench, folder, loaded, made)
    tokens, _ = sizes(prepared)
    run = functools.partial(captured, loaded, prepared)
    seconds: dict[str, list[float]] = {}
    chosen = []
    for name in ("plain", "compiled"):
        if name == "compiled":
            print(f"{len(compiling.compile_parts(loaded.model))} modules compile")
        print(f"first run {meters.timed(bench.device, run):.1f} s", flush=True)
        seconds[name] = [meters.timed(bench.device, run) for _ in range(bench.rounds + 1)]
        chosen.append(picks(loaded, prepared[0]))
    agree = same(*chosen)
    print("| | tokens/s |\n|---|---|")
    for name, each in seconds.items():
        print(f"| {name} | {tokens / statistics.median(each):,.0f} |")
    print(f"{100 * agree:.2f} % of the experts are the same", flush=True)
    return {"tokens": tokens, "seconds": seconds, "same_experts": agree}


def picks(loaded: loading.LoadedModel, batch: Batch) -> torch.Tensor:
    """[routers, T, k] the experts chosen for the tokens of a batch."""
    with router_capture(loaded.model) as capture:
        kept = capture.run(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)).wait()[0]
    return torch.stack([decision.experts_tk for decision in kept])


def same(one: torch.Tensor, other: torch.Tensor) -> float:
    """Share of the picks in `one` that `other` has too."""
    return (one[..., :, None] == other[..., None, :]).any(-1).float().mean().item()


# -- whole runs --------------------------------------------------------------------------------------


def capture(bench: Bench, folder: Path) -> dict[str, Any]:
    """The collector in process, beside the cut forward pass of the same batches."""
    config = settings(bench, folder, texts="run.jsonl", compile=bench.compile)
    loaded, made = load(bench, config), plan.make_plan(config)
    prepared = prepare(loaded, config, made)
    tokens, padded = sizes(prepared)
    cut(loaded, prepared)  # memory for all shapes, and kernels compiled
    captured(loaded, prepared[:3])
    bare = meters.timed(bench.device, lambda: cut(loaded, prepared))
    without_files = meters.timed(bench.device, lambda: captured(loaded, prepared))
    with contextlib.ExitStack() as stack:
        root = stack.enter_context(tempfile.TemporaryDirectory(dir=folder))
        replica = stack.enter_context(contextlib.closing(Replica(root, config, made.hash, loaded=loaded)))
        used, threads = stack.enter_context(meters.Utilization()), meters.ThreadTimes()
        started = time.perf_counter()
        commits = list(replica.collect_all(made.shards))
        seconds = time.perf_counter() - started
        threads.stop(threading.enumerate())
        size = sum(part.bytes for commit in commits for part in commit.files.values())
    stages = Collected.of(seconds, commits).stages
    result = {
        "tokens": tokens, "shards": len(made.shards), "tokens_per_batch": config.capture.tokens_per_batch,
        "padding_efficiency": tokens / padded, "bytes_per_token": size / tokens,
        "cut_seconds": bare, "captured_seconds": without_files, "collected_seconds": seconds,
        "tokens_per_second": tokens / seconds, "captured/cut": bare / without_files, "collected/cut": bare / seconds,
        "gpu_busy_percent": used.mean, "stages": dict(stages), "cpu_seconds_by_thread": threads.spent,
    }  # fmt: skip
    print(f"{tokens:,} tokens in {len(made.shards)} shards, {len(prepared)} batches, padding efficiency "
          f"{tokens / padded:.3f}, {size / tokens:.0f} bytes per token")  # fmt: skip
    print("| | tokens/s | of the cut forward pass |\n|---|---|---|")
    ways = {"cut forward pass": bare, "with capture": without_files, "collector, files written": seconds}
    for name, took in ways.items():
        print(f"| {name} | {tokens / took:,.0f} | {bare / took:.3f} |")
    print(f"GPU busy {used.mean:.0f} % of the samples; {shares(stages)}")
    print("seconds of CPU by thread: " + ", ".join(f"{name} {spent:.1f}" for name, spent in threads.spent.items()))
    print(f"of {seconds:.1f} s", flush=True)
    return result


def ray(bench: Bench, folder: Path) -> dict[str, Any]:
    """The same run through Ray, by one replica and by two that share the GPU."""
    from collector.fleet import driver
    from collector.fleet.dispatch import Job
    from collector.fleet.placement import Need
    from collector.fleet.progress import ProgressView, Tally
    from collector.fleet.ray_cluster import cluster
    from collector.store.run_directory import RunDirectory

    config = settings(bench, folder, texts="run.jsonl", compile=bench.compile)
    made = plan.make_plan(config)
    results: dict[str, Any] = {}
    print("| replicas | tokens/s, whole run | tokens/s, later half of the shards | GPU busy |\n|---|---|---|---|")
    for replicas in (1, 2):
        launch = LaunchConfig(device=bench.device, replicas=replicas, gpus_per_replica=1 / replicas, max_attempts=1,
                              cpus_per_replica=1)  # fmt: skip
        with tempfile.TemporaryDirectory(dir=folder) as root, cluster(launch), meters.Utilization() as used:
            run, tally = RunDirectory(root), Tally(shards=len(made.shards), documents=made.documents)
            with ProgressView(tally) as view:
                driver.work_off(
                    Job(run=run, plan=made, launch=launch), config, view, need=Need.of(launch, bench.device)
                )
                seconds = time.monotonic() - tally.started
            commits = {commit.shard: commit for commit in run.commits()}
            written = sorted((path.stat().st_mtime, int(path.stem)) for path in Path(root, "commits").rglob("*.json"))
        tokens = sum(commit.tokens for commit in commits.values())
        later = written[len(written) // 2 :]
        steady = sum(commits[shard].tokens for _, shard in later[1:]) / max(later[-1][0] - later[0][0], 1e-9)
        results[str(replicas)] = {"tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds,
                                  "later_half": steady, "gpu_busy_percent": used.later_half}  # fmt: skip
        print(f"| {replicas} | {tokens / seconds:,.0f} | {steady:,.0f} | {used.later_half:.0f} % |", flush=True)
    return results


# -- 4 bits ------------------------------------------------------------------------------------------


def nf4(bench: Bench, folder: Path) -> dict[str, Any]:
    """Memory and speed in 4 bits beside bfloat16, and how often the same experts are chosen on the demo model."""
    results: dict[str, Any] = {}
    print("| | loaded | peak while loading | peak in a pass | tokens/s by padded tokens |\n|---|---|---|---|---|")
    for how in ("none", "nf4"):
        config = settings(bench, folder, texts="texts.jsonl", quantization=how)
        meters.forget_peak(bench.device)
        loaded, made = load(bench, config), plan.make_plan(config)
        held, loading_peak = meters.memory(bench.device)
        rates: dict[int, float] = {}
        meters.forget_peak(bench.device)
        for budget in bench.batches[1:3]:
            prepared = batches_of(bench, folder, loaded, made, budget)
            run = functools.partial(captured, loaded, prepared)
            run()
            rates[budget] = sizes(prepared)[0] / meters.timed(bench.device, run)
        running = meters.memory(bench.device)[1]
        results[how] = {"held_gb": held, "loading_peak_gb": loading_peak, "running_peak_gb": running,
                        "tokens_per_second": rates,
                        "parts": footprint.describe(loaded.model, loaded.compute_dtype)}  # fmt: skip
        speeds = ", ".join(f"{budget:,}: {rate:,.0f}" for budget, rate in rates.items())
        print(f"| {how} | {held:.2f} GB | {loading_peak:.2f} GB | {running:.2f} GB | {speeds} |", flush=True)
        del loaded, prepared, run
        meters.free_memory()
    agree = results["same_experts_on_demo"] = agreement(bench)
    print(f"demo model: {100 * agree:.1f} % of the experts chosen in float32 are chosen in nf4")
    return results


def agreement(bench: Bench) -> float:
    """Share of the picks of the demo model that its nf4 copy makes too."""
    chosen = []
    for how in ("none", "nf4"):
        model = ModelConfig(dtype="float32", quantization=how)
        config = resolve(data=DataConfig(per_label=4), model=model, capture=CaptureConfig(), device=bench.device)
        loaded = loading.load(model, bench.device)
        (first, *_) = prepare(loaded, config, plan.make_plan(config))
        chosen.append(picks(loaded, first))
    return same(*chosen)


# -- profile -----------------------------------------------------------------------------------------


def profile(bench: Bench, folder: Path) -> dict[str, Any]:
    """Kernels by time, the GPU's idle time, and calls that wait, at the default batch size."""
    config = settings(bench, folder, texts="texts.jsonl", compile=bench.compile)
    loaded, made = load(bench, config), plan.make_plan(config)
    prepared = prepare(loaded, config, made)
    captured(loaded, prepared)
    meters.say_waits(bench.device, lambda: captured(loaded, prepared[:2]))
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        captured(loaded, prepared)
        meters.wait(bench.device)
    found = meters.summary_of(profiler)
    print(f"{len(prepared)} batches: GPU busy {found['busy_ms']:.0f} of {found['span_ms']:.0f} ms; "
          f"{found['gaps']} gaps of more than 0.1 ms, {found['gap_ms']:.0f} ms in all")  # fmt: skip
    print("| kernel | ms | of the busy time | calls |\n|---|---|---|---|")
    for name, spent, calls in found["kernels"][:25]:
        print(f"| {name[:110]} | {spent:.1f} | {100 * spent / max(found['busy_ms'], 1e-9):.1f} % | {calls} |")
    print("waits: " + json.dumps(found["waits"]), flush=True)
    return found


PARTS: dict[str, Callable[[Bench, Path], dict[str, Any]]] = {
    "floor": floor, "compile": compiled, "capture": capture, "ray": ray, "nf4": nf4, "profile": profile,
}  # fmt: skip
