"""Measures the throughput of the collector against the loops it replaces and against the bare forward pass.

    python -m benchmarks.collect                 # both models, then memory
    python -m benchmarks.collect --parts wide    # an OLMoE cut to 4 layers at full width, random weights
    python -m benchmarks.collect --parts demo    # the demo model
    python -m benchmarks.collect --parts memory  # peak memory and bytes per token at 1x and 10x the data

All variants process the same texts with the same weights in one process (e in an actor of its own),
taking turns; medians over the rounds are compared. Only real tokens count, not padding. a, b and c
run the model as loaded by transformers; f, d and e as loaded by the collector, which multiplies in
float32 on a CPU that only emulates bfloat16.

(a) notebook: one sentence at a time, `AutoModelForCausalLM`, a hook that keeps the logits, argmax
(b) transformers: arrival order, same padded-token budget, `output_router_logits=True`, then top-k
(c) bare: the whole base model on the collector's own batches, without hooks
(f) floor: the collector's forward pass, stopped at the last router, without hooks, output or padding removal
(d) collector, in process, files written and committed
(e) collector through Ray, one replica; measured from when the replica is ready

For d and e it also prints the share of time in each stage, including how long the model waited for a shard.

Each computation runs in its own short-lived thread: OpenMP keeps a team of threads for every thread that ever
computed, and all of them slow down once there are more threads than cores.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from collector.capture import batches
from collector.config import CaptureConfig, DataConfig, LaunchConfig, ModelConfig, RunConfig, resolve
from collector.data import plan
from collector.data.sources import Document
from collector.fleet.progress import shares
from collector.models import loading
from collector.models.loading import DEMO_MODEL
from collector.replica.replica import Replica

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from collector.store.run_directory import Commit

Part = Literal["wide", "demo", "memory"]
WIDE: dict[str, Any] = {"vocab_size": 50304, "hidden_size": 2048, "intermediate_size": 1024, "num_hidden_layers": 4,
        "num_attention_heads": 16, "num_key_value_heads": 16, "num_experts": 64, "num_experts_per_tok": 8,
        "max_position_embeddings": 4096, "bos_token_id": 2, "eos_token_id": 1, "pad_token_id": 0}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure the collector against the loops it replaces and against its floor."""

    parts: tuple[Part, ...] = ("wide", "demo", "memory")
    """What to measure."""
    wide_documents: int = 60
    """Documents for the wide model, spread over all languages; some CPUs process only 50 of its tokens per second."""
    wide_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Precision of the wide model; float32 is the fair choice on a CPU without bfloat16 arithmetic."""
    demo_documents: int = 1800
    """Documents for the demo model."""
    variants: tuple[Literal["a", "b", "c", "f", "d", "e"], ...] = ("a", "b", "c", "f", "d", "e")
    """Variants to run; a ratio is printed only if both of its variants run."""
    rounds: int = 3
    """Rounds; every variant runs once per round, except a and b on the wide model, which run only in the first."""
    memory_documents: int = 3000
    """Documents at 1x; ten times as many at 10x."""


# -- the variants ------------------------------------------------------------------------------------


def notebook_loop(lm: Any, tokenizer: Any, texts: list[str], max_length: int) -> None:
    """(a): the usual notebook loop, one sentence at a time."""
    kept: dict[str, torch.Tensor] = {}
    counts: list[tuple[int, int, int]] = []

    def hook_for(name: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, outputs: Any) -> None:
            kept[name] = outputs[0].detach().float().cpu()

        return hook

    gates = [(name, module) for name, module in lm.named_modules() if name.endswith("mlp.gate")]
    handles = [module.register_forward_hook(hook_for(name)) for name, module in gates]
    with torch.no_grad():
        for index, text in enumerate(texts):
            kept.clear()
            lm(**tokenizer(text, return_tensors="pt", truncation=True, max_length=max_length).to(lm.device))
            experts = kept[gates[-1][0]].argmax(-1).tolist()
            counts.extend((index, position, expert) for position, expert in enumerate(experts))
    for handle in handles:
        handle.remove()


def transformers_batches(lm: Any, tokenizer: Any, texts: list[str], max_length: int, budget: int) -> None:
    """(b): padded batches in arrival order, router logits as the model's output, top-k kept."""
    cut = {"truncation": True, "max_length": max_length}
    k = lm.config.num_experts_per_tok
    lengths = [len(ids) for ids in tokenizer(texts, **cut)["input_ids"]]
    first = 0
    while first < len(texts):
        end = first + 1
        while end < len(texts) and max(lengths[first : end + 1]) * (end + 1 - first) <= budget:
            end += 1
        inputs = tokenizer(texts[first:end], return_tensors="pt", padding=True, **cut).to(lm.device)
        with torch.no_grad():
            outputs = lm(**inputs, output_router_logits=True)
        real = inputs["attention_mask"].flatten().bool()
        for logits in outputs.router_logits:
            torch.topk(logits[real].float().softmax(-1), k)
        first = end


class GateOnly(torch.nn.Module):
    """A sparse block that stops after its router."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.gate = block.gate

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Routes and returns its input."""
        self.gate(hidden_states.view(-1, hidden_states.shape[-1]))
        return hidden_states


@torch.inference_mode()
def forward_all(model: Any, prepared: list[batches.Batch]) -> None:
    """(c) and (f): forward passes whose results are discarded."""
    for batch in prepared:
        model(input_ids=torch.from_numpy(batch.input_ids).to(model.device),
              attention_mask=torch.from_numpy(batch.attention_mask).to(model.device), use_cache=False)  # fmt: skip


class CutAfterLastRouter:
    """Context in which a model's forward ends at its last router."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __enter__(self) -> None:
        self.block, self.norm = self.model.layers[-1].mlp, self.model.norm
        self.model.layers[-1].mlp, self.model.norm = GateOnly(self.block), torch.nn.Identity()

    def __exit__(self, *_: object) -> None:
        self.model.layers[-1].mlp, self.model.norm = self.block, self.norm


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collected:
    """Time that a collector took, by its own clock."""

    seconds: float
    stages: Counter[str]
    """Seconds by stage, summed over all shards."""

    @classmethod
    def of(cls, seconds: float, commits: Iterable[Commit]) -> Collected:
        """Sums the stages of the commit records."""
        stages: Counter[str] = Counter()
        for commit in commits:
            stages.update(commit.seconds)
        return cls(seconds=seconds, stages=stages)


def collect_in_process(loaded: loading.LoadedModel, config: RunConfig, made: plan.Plan) -> Collected:
    """(d): read, tokenize, forward, capture, write, commit."""
    with tempfile.TemporaryDirectory() as root:
        started = time.perf_counter()
        with contextlib.closing(Replica(root, config, made.hash, loaded=loaded)) as replica:
            commits = list(replica.collect_all(made.shards))
        return Collected.of(time.perf_counter() - started, commits)


def collect_through_ray(config: RunConfig, made: plan.Plan) -> Collected:
    """(e): measured from when the replica is ready to the last commit."""
    from collector.fleet import driver
    from collector.fleet.dispatch import Job
    from collector.fleet.placement import Need
    from collector.fleet.progress import ProgressView, Tally
    from collector.fleet.ray_cluster import cluster
    from collector.store.run_directory import RunDirectory

    launch = LaunchConfig(replicas=1, cpus_per_replica=torch.get_num_threads(), max_attempts=1)
    with tempfile.TemporaryDirectory() as root, cluster(launch):
        run, tally = RunDirectory(root), Tally(shards=len(made.shards), documents=made.documents)
        with ProgressView(tally) as view:
            driver.work_off(Job(run=run, plan=made, launch=launch), config, view, need=Need.of(launch, "cpu"))
            seconds = time.monotonic() - tally.started
        if tally.shards_done != len(made.shards):
            raise RuntimeError("the benchmark's run is incomplete")
        return Collected.of(seconds, run.commits())


def apart(function: Callable[[], Any]) -> Any:
    """Runs a function in its own thread and returns its result."""
    with ThreadPoolExecutor(max_workers=1) as thread:
        return thread.submit(function).result()


# -- one model ---------------------------------------------------------------------------------------


def prepare(loaded: loading.LoadedModel, config: RunConfig, made: plan.Plan) -> list[batches.Batch]:
    """Returns the batches that a replica would make of the same shards."""
    prepared = []
    for shard in made.shards:
        texts = [row.text for row in plan.read_shard(shard, config.data) if isinstance(row, Document)]
        table = batches.tokenize(loaded.tokenizer, texts, config.capture.max_length)
        packed = batches.pack(table.lengths, config.capture.tokens_per_batch or 0)
        prepared += [batches.pad(table, documents, loaded.pad_id) for documents in packed]
    return prepared


def compare(
    title: str, lm: Any, model_config: ModelConfig, *, documents: int, rounds: int, chosen: tuple[str, ...],
    once: tuple[str, ...] = (),
) -> None:  # fmt: skip
    """Times all variants in turns and prints the table; variants in `once` run in the first round only."""
    tokenizer = loading.load_tokenizer(model_config)
    data = DataConfig(per_label=max(1, documents // 60))
    config = resolve(data=data, model=model_config, capture=CaptureConfig(), device="cpu")
    made = plan.make_plan(config)
    loaded = apart(lambda: loading.load(model_config, "cpu"))
    texts = [row.text for s in made.shards for row in plan.read_shard(s, data) if isinstance(row, Document)]
    shuffled = [texts[i] for i in np.random.default_rng(0).permutation(len(texts))]
    prepared = prepare(loaded, config, made)
    tokens = sum(int(batch.attention_mask.sum()) for batch in prepared)
    budget, max_length = config.capture.tokens_per_batch or 0, config.capture.max_length

    def floor() -> None:
        with CutAfterLastRouter(loaded.model):
            forward_all(loaded.model, prepared)

    variants: dict[str, Callable[[], Collected | None]] = {
        "a": lambda: notebook_loop(lm, tokenizer, shuffled, max_length),
        "b": lambda: transformers_batches(lm, tokenizer, shuffled, max_length, budget),
        "c": lambda: forward_all(lm.model, prepared),
        "f": floor,
        "d": lambda: collect_in_process(loaded, config, made),
        "e": lambda: collect_through_ray(config, made),
    }
    variants = {name: variant for name, variant in variants.items() if name in chosen}
    apart(lambda: forward_all(loaded.model, prepared[:1]))
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    stages: dict[str, Counter[str]] = {name: Counter() for name in variants}
    for number in range(rounds):
        for name, variant in variants.items():
            if number and name in once:
                continue
            started = time.perf_counter()
            own = apart(variant)
            seconds[name].append(time.perf_counter() - started if own is None else own.seconds)
            if own is not None:
                stages[name].update(own.stages)
    padded = sum(batch.input_ids.size for batch in prepared)
    print_table(title, f"{len(texts)} documents, {tokens:,} tokens, {len(made.shards)} shards, "
                f"padding efficiency {tokens / padded:.2f}", tokens, seconds, stages)  # fmt: skip


def print_table(
    title: str, subtitle: str, tokens: int, seconds: dict[str, list[float]], stages: dict[str, Counter[str]]
) -> None:
    """Prints tokens per second of each variant, their main ratios, paired by round, and the collector's time by stage.

    Args:
        title: of the model.
        subtitle: description of the input.
        tokens: number of tokens of the input.
        seconds: time of each round, by variant.
        stages: seconds in all rounds, by variant and stage.
    """
    names = {"a": "one sentence at a time, hook, argmax", "b": "transformers, batched, arrival order",
             "c": "bare base model, our batches", "f": "floor: cut after the last router",
             "d": "collector, in process", "e": "collector through Ray, 1 replica"}  # fmt: skip
    print(f"\n### {title}\n\n{subtitle}\n\n| | variant | tokens/s (median) | min – max |\n|---|---|---|---|")
    for name, times in seconds.items():
        rates = sorted(tokens / t for t in times)
        print(f"| {name} | {names[name]} | {statistics.median(rates):,.0f} | {rates[0]:,.0f} – {rates[-1]:,.0f} |")
    ratios = []
    for over, under in (("d", "f"), ("d", "c"), ("e", "d"), ("d", "a"), ("d", "b")):
        if not {over, under} <= seconds.keys():
            continue
        paired = [u / o for o, u in zip(seconds[over], seconds[under], strict=False)]
        ratios.append(f"{over}/{under} {statistics.median(paired):.2f}")
    print("\nratios of tokens/s (median over rounds): " + ", ".join(ratios), flush=True)
    for name, spent in stages.items():
        if spent:
            print(f"\n{name}: {shares(spent)}", flush=True)


def wide_model(
    dtype: Literal["bfloat16", "float32"], layers: int = 4
) -> tuple[Any, ModelConfig, tempfile.TemporaryDirectory[str]]:
    """Builds a model of OLMoE-1B-7B's width with random weights; saves only config and tokenizer."""
    from transformers import AutoTokenizer, OlmoeConfig, OlmoeForCausalLM

    folder = tempfile.TemporaryDirectory()
    config = OlmoeConfig(**(WIDE | {"num_hidden_layers": layers}), dtype=dtype, architectures=["OlmoeForCausalLM"])
    config.save_pretrained(folder.name)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder.name)
    torch.manual_seed(0)
    lm = OlmoeForCausalLM._from_config(config, dtype=getattr(torch, dtype)).eval()
    return lm, ModelConfig(model=folder.name, weights="random", dtype=dtype), folder


# -- memory and size ---------------------------------------------------------------------------------


def measure_memory(documents: int) -> None:
    """Runs in a child process: collects, and prints peak memory and bytes by group of columns."""
    import pyarrow.parquet as pq

    data = DataConfig(data=("demo:all",), per_label=max(1, documents // 60))
    config = resolve(data=data, model=ModelConfig(), capture=CaptureConfig(), device="cpu")
    made = plan.make_plan(config)
    with tempfile.TemporaryDirectory() as root:
        replica = Replica(root, config, made.hash)
        loaded = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        commits = list(replica.collect_all(made.shards))
        replica.close()
        tokens = sum(commit.tokens for commit in commits)
        sizes: dict[str, int] = {}
        for commit in commits:
            for table, part in commit.files.items():
                metadata = pq.read_metadata(Path(root) / part.path)
                for group in range(metadata.num_row_groups):
                    for index in range(metadata.num_columns):
                        column = metadata.row_group(group).column(index)
                        name = column_group(table, column.path_in_schema)
                        sizes[name] = sizes.get(name, 0) + column.total_compressed_size
        sizes["all files"] = sum(part.bytes for commit in commits for part in commit.files.values())
        entropy = order0_entropy(Path(root), [commit.files["routing"].path for commit in commits])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps({"documents": len(made.shards) and made.documents, "tokens": tokens, "loaded_mb": loaded / 1024,
                      "peak_mb": peak / 1024, "bytes_per_token": {k: v / tokens for k, v in sizes.items()},
                      "entropy_bytes_per_token": entropy}))  # fmt: skip


def column_group(table: str, column: str) -> str:
    """Returns the group of a column, by its content."""
    if table != "routing":
        return table
    if column[0] in "ew" and column[1:].isdigit():
        return {"e": "expert ids", "w": "weights"}[column[0]]
    return "statistics" if column in ("entropy", "topk_mass", "margin") else "keys"


def order0_entropy(root: Path, parts: list[str]) -> float:
    """Returns the minimum bytes per token for the expert ids, if coded by the frequencies in their column."""
    import pyarrow.parquet as pq

    metadata = pq.read_metadata(root / parts[0])
    layers = metadata.num_row_groups
    counts: dict[tuple[int, str], np.ndarray] = {}
    for part in parts:
        file = pq.ParquetFile(root / part)
        columns = [name for name in file.schema_arrow.names if name[0] == "e" and name[1:].isdigit()]
        for group in range(layers):
            table = file.read_row_group(group, columns=columns)
            for name in columns:
                found = np.bincount(table[name].to_numpy(), minlength=256)
                counts[group, name] = counts.get((group, name), np.zeros(256, np.int64)) + found
    bits = 0.0
    for count in counts.values():
        p = count[count > 0] / count.sum()
        bits += float(-(p * np.log2(p)).sum())
    return bits / 8


def memory(documents: int) -> None:
    """Prints peak memory and bytes per token at 1x and 10x the data, each measured in its own process."""
    print("\n### Memory and size (demo model, in process)\n")
    print(
        "| documents | tokens | after loading | peak | bytes/token | of these: ids (entropy) / weights / statistics |"
    )
    print("|---|---|---|---|---|---|")
    for count in (documents, documents * 10):
        output = subprocess.run([sys.executable, "-m", "benchmarks.collect", "--child-documents", str(count)],
                                check=True, capture_output=True, text=True).stdout  # fmt: skip
        got = json.loads(output.splitlines()[-1])
        size = got["bytes_per_token"]
        print(f"| {got['documents']:,} | {got['tokens']:,} | {got['loaded_mb']:,.0f} MB | {got['peak_mb']:,.0f} MB | "
              f"{size['all files']:.0f} | {size['expert ids']:.1f} ({got['entropy_bytes_per_token']:.1f}) / "
              f"{size['weights']:.1f} / {size['statistics']:.1f} |", flush=True)  # fmt: skip


def machine() -> str:
    """Describes the hardware and software relevant for speed."""
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        name = next(
            (line.split(":")[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line), name
        )
    return f"{name}, {os.cpu_count()} cores, torch {torch.__version__}, {torch.get_num_threads()} threads"


def main(bench: Bench) -> None:
    """Runs the chosen parts."""
    from transformers import AutoModelForCausalLM

    print(f"python -m benchmarks.collect {' '.join(sys.argv[1:])}\n{machine()}", flush=True)
    if "wide" in bench.parts:
        lm, model_config, folder = apart(lambda: wide_model(bench.wide_dtype))
        with folder:
            title = f"OLMoE at full width, 4 layers, {bench.wide_dtype}, random weights"
            compare(title, lm, model_config, documents=bench.wide_documents, rounds=bench.rounds, chosen=bench.variants,
                    once=("a", "b"))  # fmt: skip
        del lm
    if "demo" in bench.parts:
        lm = apart(lambda: AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="auto").eval())
        compare("Demo model", lm, ModelConfig(), documents=bench.demo_documents, rounds=bench.rounds,
                chosen=bench.variants)  # fmt: skip
    if "memory" in bench.parts:
        memory(bench.memory_documents)


if __name__ == "__main__":
    import tyro

    if sys.argv[1:2] == ["--child-documents"]:
        measure_memory(int(sys.argv[2]))
    else:
        main(tyro.cli(Bench))
