"""The parts of `benchmarks.gpu`: each takes its settings and the folder with model and texts, and prints a table."""

from __future__ import annotations

import contextlib
import gc
import json
import statistics
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks import gpu_meters as meters
from benchmarks.collect import CutAfterLastRouter, forward_all, notebook_loop, prepare, transformers_batches
from collector.capture.hooks import Capture
from collector.capture.passes import ForwardPasses
from collector.capture.recorders import recorders_for
from collector.config import CaptureConfig, DataConfig, LaunchConfig, ModelConfig, RunConfig, resolve
from collector.data import plan
from collector.data.sources import Document
from collector.fleet.progress import shares
from collector.models import compiling, footprint, loading
from collector.models.routers import find_routers
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


def router_capture(loaded: loading.LoadedModel) -> Capture:
    """A capture of all routers, as a replica sets it up."""
    recorders = recorders_for(loaded.model, find_routers(loaded.model), CaptureConfig())
    return Capture(loaded.model, recorders, device=loaded.device)


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


# -- floor -------------------------------------------------------------------------------------------


def floor(bench: Bench, folder: Path) -> dict[str, Any]:
    """Tokens per second of the loops that users have, of bare forward passes, and of the capture."""
    ceiling = meters.ceilings(bench.device)
    print(f"matrix peak {ceiling['matmul_tflops']:.0f} TFLOP/s in bfloat16, copies {ceiling['copy_gb_s']:,.0f} GB/s")
    config = settings(bench, folder, texts="texts.jsonl", batch=bench.batches[0])
    loaded, made = load(bench, config), plan.make_plan(config)
    lm = as_language_model(loaded)
    texts = [row.text for s in made.shards for row in plan.read_shard(s, config.data) if isinstance(row, Document)]
    rows: list[dict[str, Any]] = []

    def say(name: str, batch: int, tokens: int, seconds: list[float], cut: bool = True) -> None:
        rate = tokens / statistics.median(seconds)
        flops = meters.flops_per_token(bench.geometry, cut=cut)
        rows.append({"variant": name, "batch": batch, "tokens": tokens, "seconds": seconds, "tokens_per_second": rate,
                     "share_of_peak": rate * flops / ceiling["matmul_tflops"] / 1e12})  # fmt: skip
        print(f"| {name} | {batch:,} | {rate:,.0f} | {100 * rows[-1]['share_of_peak']:.1f} % |", flush=True)

    print("| variant | padded tokens | tokens/s | of the peak |\n|---|---|---|---|", flush=True)
    few = [text for text in texts if len(text) < 400][:100]
    notebook_loop(lm, loaded.tokenizer, few[:3], 512)
    tokens = sum(len(ids) for ids in loaded.tokenizer(few, truncation=True, max_length=512)["input_ids"])
    say("one text at a time, hook, argmax", 1, tokens, [meters.timed(bench.device, lambda: notebook_loop(lm, loaded.tokenizer, few, 512))], cut=False)  # fmt: skip
    for budget in bench.batches:
        prepared = prepare(loaded, settings(bench, folder, texts="texts.jsonl", batch=budget), made)
        tokens = sum(int(batch.attention_mask.sum()) for batch in prepared)
        variants = {
            "transformers, batched, arrival order": lambda: transformers_batches(lm, loaded.tokenizer, texts, 512, budget),
            "bare base model": lambda: forward_all(loaded.model, prepared),
            "cut after the last router": lambda: cut(loaded, prepared),
            "cut, experts without padding, captured": lambda: captured(loaded, prepared),
        }
        for name, variant in variants.items():
            with fitting(name, budget):
                variant()
                seconds = [meters.timed(bench.device, variant) for _ in range(bench.rounds)]
                say(name, budget, tokens, seconds, cut=name.startswith("cut"))
        padded = sum(batch.input_ids.size for batch in prepared)
        print(f"| padding efficiency {tokens / padded:.3f}, {len(prepared)} batches | {budget:,} | | |")
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        for budget in bench.batches[:1] + bench.batches[-2:-1]:
            prepared = prepare(loaded, settings(bench, folder, texts="texts.jsonl", batch=budget), made)[:4]
            tokens = sum(int(batch.attention_mask.sum()) for batch in prepared)
            with fitting(implementation, budget), experts_by(loaded.model, implementation):
                cut(loaded, prepared[:1])
                say(f"cut, experts {implementation}", budget, tokens, [meters.timed(bench.device, lambda: cut(loaded, prepared))])  # fmt: skip
    return {"ceilings": ceiling, "rows": rows}


@contextlib.contextmanager
def fitting(name: str, budget: int) -> Iterator[None]:
    """Says that a variant does not fit into the memory, instead of failing."""
    try:
        yield
    except torch.OutOfMemoryError:
        print(f"| {name} | {budget:,} | out of memory | |", flush=True)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def cut(loaded: loading.LoadedModel, prepared: list[Batch]) -> None:
    """The forward pass up to the last router, its results discarded."""
    with CutAfterLastRouter(loaded.model):
        forward_all(loaded.model, prepared)


def captured(loaded: loading.LoadedModel, prepared: list[Batch]) -> None:
    """The same with capture: the results of each batch are waited for while the next one computes."""
    before = None
    with router_capture(loaded) as capture:
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
    prepared = prepare(loaded, config, made)
    tokens = sum(int(batch.attention_mask.sum()) for batch in prepared)
    seconds: dict[str, list[float]] = {}
    chosen = []
    for name in ("plain", "compiled"):
        if name == "compiled":
            parts = compiling.compile_parts(loaded.model)
            print(f"{len(parts)} modules compile; first pass {meters.timed(bench.device, lambda: captured(loaded, prepared[:1])):.1f} s")  # fmt: skip
        print(f"all shapes once: {meters.timed(bench.device, lambda: captured(loaded, prepared)):.1f} s", flush=True)
        seconds[name] = [meters.timed(bench.device, lambda: captured(loaded, prepared)) for _ in range(bench.rounds + 1)]
        chosen.append(picks(loaded, prepared[0]))
    agree = same(*chosen)
    print("| | tokens/s |\n|---|---|")
    for name, each in seconds.items():
        print(f"| {name} | {tokens / statistics.median(each):,.0f} |")
    print(f"{100 * agree:.2f} % of the experts are the same", flush=True)
    return {"tokens": tokens, "seconds": seconds, "same_experts": agree}


def picks(loaded: loading.LoadedModel, batch: Batch) -> torch.Tensor:
    """[routers, T, k] the experts chosen for the tokens of a batch."""
    with router_capture(loaded) as capture:
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
    tokens = sum(int(batch.attention_mask.sum()) for batch in prepared)
    padded = sum(batch.input_ids.size for batch in prepared)
    cut(loaded, prepared)  # memory for all shapes, and kernels compiled
    captured(loaded, prepared[:3])
    bare = meters.timed(bench.device, lambda: cut(loaded, prepared))
    without_files = meters.timed(bench.device, lambda: captured(loaded, prepared))
    with tempfile.TemporaryDirectory(dir=folder) as root, contextlib.closing(Replica(root, config, made.hash, loaded=loaded)) as replica:  # fmt: skip
        with meters.Utilization() as used, meters.ThreadTimes() as threads:
            started = time.perf_counter()
            commits = list(replica.collect_all(made.shards))
            seconds = time.perf_counter() - started
            threads.stop(threading.enumerate())
        size = sum(part.bytes for commit in commits for part in commit.files.values())
    stages: Counter[str] = Counter()
    for commit in commits:
        stages.update(commit.seconds)
    result = {
        "tokens": tokens, "shards": len(made.shards), "tokens_per_batch": config.capture.tokens_per_batch,
        "padding_efficiency": tokens / padded, "bytes_per_token": size / tokens,
        "cut_seconds": bare, "captured_seconds": without_files, "collected_seconds": seconds,
        "tokens_per_second": tokens / seconds, "captured/cut": bare / without_files, "collected/cut": bare / seconds,
        "gpu_busy_percent": used.mean, "stages": dict(stages), "cpu_seconds_by_thread": threads.spent,
    }  # fmt: skip
    print(f"{tokens:,} tokens in {len(made.shards)} shards, {len(prepared)} batches of {config.capture.tokens_per_batch:,},"
          f" padding efficiency {tokens / padded:.3f}, {size / tokens:.0f} bytes per token")  # fmt: skip
    print("| | tokens/s | of the cut forward pass |\n|---|---|---|")
    for name, took in (("cut forward pass", bare), ("with capture", without_files), ("collector, files written", seconds)):
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
                driver.work_off(Job(run=run, plan=made, launch=launch), config, view, need=Need.of(launch, bench.device))
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
            prepared = prepare(loaded, settings(bench, folder, texts="texts.jsonl", batch=budget), made)
            tokens = sum(int(batch.attention_mask.sum()) for batch in prepared)
            captured(loaded, prepared)
            rates[budget] = tokens / meters.timed(bench.device, lambda: captured(loaded, prepared))
        running = meters.memory(bench.device)[1]
        results[how] = {"held_gb": held, "loading_peak_gb": loading_peak, "running_peak_gb": running,
                        "tokens_per_second": rates, "parts": footprint.describe(loaded.model, loaded.compute_dtype)}  # fmt: skip
        speeds = ", ".join(f"{budget:,}: {rate:,.0f}" for budget, rate in rates.items())
        print(f"| {how} | {held:.2f} GB | {loading_peak:.2f} GB | {running:.2f} GB | {speeds} |", flush=True)
        del loaded
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    results["same_experts_on_demo"] = agreement(bench, folder)
    print(f"demo model: {100 * results['same_experts_on_demo']:.1f} % of the experts chosen in float32 are chosen in nf4")
    return results


def agreement(bench: Bench, folder: Path) -> float:
    """Share of the picks of the demo model that its nf4 copy makes too."""
    chosen = []
    for how in ("none", "nf4"):
        model = ModelConfig(dtype="float32", quantization=how)
        config = resolve(data=DataConfig(per_label=4), model=model, capture=CaptureConfig(), device=bench.device)
        loaded, made = loading.load(model, bench.device), plan.make_plan(config)
        with router_capture(loaded) as capture:
            passes = ForwardPasses(capture=capture, pad_id=loaded.pad_id, config=config.capture)
            from collector.capture.batches import tokenize

            texts = [row.text for s in made.shards for row in plan.read_shard(s, config.data) if isinstance(row, Document)]
            (recording,), _ = passes.run({"decoder": tokenize(loaded.tokenizer, texts, 512)})
        chosen.append(torch.cat([torch.from_numpy(layer.experts_tk) for layer in recording.layers]))  # type: ignore[attr-defined]
    return same(*chosen)


# -- profile -----------------------------------------------------------------------------------------


def profile(bench: Bench, folder: Path) -> dict[str, Any]:
    """Kernels by time, the GPU's idle time, and calls that wait, in the passes of one shard at the default batch size."""
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
    print(f"{len(prepared)} batches of {config.capture.tokens_per_batch:,}: GPU busy {found['busy_ms']:.0f} ms of "
          f"{found['span_ms']:.0f} ms; {found['gaps']} gaps of more than 0.1 ms, {found['gap_ms']:.0f} ms in all")  # fmt: skip
    print("| kernel | ms | of the busy time | calls |\n|---|---|---|---|")
    for name, spent, calls in found["kernels"][:25]:
        print(f"| {name[:110]} | {spent:.1f} | {100 * spent / max(found['busy_ms'], 1e-9):.1f} % | {calls} |")
    print("waits: " + json.dumps(found["waits"]), flush=True)
    return found


PARTS: dict[str, Callable[[Bench, Path], dict[str, Any]]] = {
    "floor": floor, "compile": compiled, "capture": capture, "ray": ray, "nf4": nf4, "profile": profile,
}  # fmt: skip
