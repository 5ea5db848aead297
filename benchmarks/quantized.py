"""Measures a quantized replica of a real model's size: memory while loading and afterwards, and speed.

    python -m benchmarks.quantized                      # everything; 30 GB of disk, 20 GB of memory, half an hour
    python -m benchmarks.quantized --parts load         # memory and time of loading in 4 bits
    python -m benchmarks.quantized --parts speed        # 4 bits against 16, tokens per second
    python -m benchmarks.quantized --parts loop         # the collector against one sentence at a time, in 16 bits

The checkpoint has the dimensions of OLMoE-1B-7B (16 layers, hidden 2048, 64 experts of 1024, top-8,
vocabulary 50,304) in bfloat16 with random values, in the layout of the hub: one matrix per expert,
in several safetensors files. It is written to a temporary folder first and deleted at the end.
Every measurement runs in its own process.
"""

from __future__ import annotations

import dataclasses
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from benchmarks.collect import WIDE, machine, notebook_loop
from collector.capture import batches
from collector.capture.hooks import Capture
from collector.capture.recorders import recorders_for
from collector.config import CaptureConfig, DataConfig, ModelConfig, resolve
from collector.data import plan
from collector.data.sources import Document
from collector.models import footprint, loading, weight_files
from collector.models.loading import DEMO_MODEL
from collector.models.routers import find_routers
from collector.replica.replica import Replica

Part = Literal["load", "speed", "loop"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure a model of OLMoE-1B-7B's size in 4 bits and in 16."""

    parts: tuple[Part, ...] = ("load", "speed", "loop")
    """What to measure."""
    folder: str | None = None
    """Folder of a checkpoint kept by an earlier run (default: write a temporary one)."""
    keep: str | None = None
    """Write the checkpoint to this folder and keep it."""
    layers: int = 16
    """Layers of the checkpoint; fewer for a quick look."""
    tokens: tuple[int, ...] = (2048, 8192)
    """Batch sizes for `speed`, in tokens; sequences have 256 tokens."""
    rounds: int = 2
    """Rounds of `speed`; the models take turns."""
    sentences: int = 24
    """Sentences for `loop`, spread over languages."""
    compute: Literal["auto", "float32", "bfloat16"] = "auto"
    """Precision of the matrix products of both models in `speed`."""


# -- the checkpoint ----------------------------------------------------------------------------------


def make_checkpoint(folder: Path, geometry: dict[str, Any], device: str = "cpu") -> int:
    """Writes the checkpoint, one file per layer, its values drawn on the device; returns its size in bytes."""
    from safetensors.torch import save_file
    from transformers import AutoTokenizer, OlmoeConfig

    folder.mkdir(parents=True, exist_ok=True)
    layers = geometry["num_hidden_layers"]
    hidden, inner, vocabulary = geometry["hidden_size"], geometry["intermediate_size"], geometry["vocab_size"]
    generator = torch.Generator(device).manual_seed(0)

    def matrix(rows: int, columns: int) -> torch.Tensor:
        drawn = torch.randn(rows, columns, generator=generator, dtype=torch.bfloat16, device=device)
        return drawn.mul_(0.02).cpu()

    where: dict[str, str] = {}
    total = 0

    def write(name: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        save_file(tensors, folder / name, metadata={"format": "pt"})
        where.update(dict.fromkeys(tensors, name))
        total += sum(tensor.numel() * tensor.itemsize for tensor in tensors.values())

    for layer in range(layers):
        at = f"model.layers.{layer}."
        tensors = {f"{at}self_attn.{name}_proj.weight": matrix(hidden, hidden) for name in "qkvo"}
        norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
        tensors |= {f"{at}{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in norms}
        tensors[f"{at}mlp.gate.weight"] = matrix(geometry["num_experts"], hidden)
        for expert in range(geometry["num_experts"]):
            one = f"{at}mlp.experts.{expert}."
            tensors[f"{one}gate_proj.weight"] = matrix(inner, hidden)
            tensors[f"{one}up_proj.weight"] = matrix(inner, hidden)
            tensors[f"{one}down_proj.weight"] = matrix(hidden, inner)
        write(f"model-{layer + 1:05d}-of-{layers + 1:05d}.safetensors", tensors)
    ends = {"model.embed_tokens.weight": matrix(vocabulary, hidden), "lm_head.weight": matrix(vocabulary, hidden),
            "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16)}  # fmt: skip
    write(f"model-{layers + 1:05d}-of-{layers + 1:05d}.safetensors", ends)
    (folder / weight_files.INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": where}))
    config = OlmoeConfig(**geometry, dtype="bfloat16", architectures=["OlmoeForCausalLM"])
    config.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    return total


# -- measurements, each in a process of its own -------------------------------------------------------


def memory() -> dict[str, float]:
    """Returns the peak and the current memory of this process, in GB."""
    held = psutil.Process().memory_info().rss
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"peak_gb": round(peak / 1e9, 2), "resident_gb": round(held / 1e9, 2)}


def router_capture(model: Any) -> Capture:
    """A capture of all routers, as a replica sets it up."""
    return Capture(model, recorders_for(model, find_routers(model), CaptureConfig()))


def load(folder: str) -> dict[str, Any]:
    """Loads the model in nf4 and returns time and memory."""
    before = memory()
    started = time.perf_counter()
    loaded = loading.load(ModelConfig(model=folder, quantization="nf4"), "cpu")
    seconds = time.perf_counter() - started
    held = memory()
    capture = router_capture(loaded.model)
    with capture:
        ids = torch.randint(3, 8000, (8, 256))
        capture.run(ids, torch.ones_like(ids)).wait()
    description = footprint.describe(loaded.model, loaded.compute_dtype)
    return {
        "seconds": round(seconds, 1),
        "resident_before_gb": before["resident_gb"],
        **held,
        "peak_with_one_batch_gb": memory()["peak_gb"],
        **description,
    }


def speed(folder: str, tokens: list[int], rounds: int, compute: Any) -> dict[str, Any]:
    """Measures tokens per second of nf4 and bfloat16, in turns, through the capture."""
    held = {
        how: loading.load(ModelConfig(model=folder, quantization=how, compute_dtype=compute), "cpu")
        for how in ("nf4", "none")
    }
    rates: dict[int, dict[str, list[float]]] = {}
    for count in tokens:
        ids = torch.randint(3, 8000, (count // 256, 256), generator=torch.Generator().manual_seed(1))
        rates[count] = {how: [] for how in held}
        for _ in range(rounds):
            for how, loaded in held.items():
                with router_capture(loaded.model) as capture:
                    started = time.perf_counter()
                    capture.run(ids, torch.ones_like(ids)).wait()
                    rates[count][how].append(count / (time.perf_counter() - started))
        print({how: [round(rate, 1) for rate in each] for how, each in rates[count].items()}, flush=True)
    medians = {count: {how: statistics.median(each) for how, each in by.items()} for count, by in rates.items()}
    computed = {how: str(loaded.compute_dtype).removeprefix("torch.") for how, loaded in held.items()}
    return {"tokens_per_second": medians, "nf4/bf16": {c: round(m["nf4"] / m["none"], 3) for c, m in medians.items()},
            "compute": computed}  # fmt: skip


def sentences(count: int) -> DataConfig:
    """Selects a few sentences of the demo's corpus."""
    return DataConfig(limit=count, per_label=1, docs_per_shard=count)


def loop(folder: str, count: int) -> dict[str, Any]:
    """Measures the loop over single sentences through transformers, with hook and argmax, in bfloat16."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    data = sentences(count)
    made = plan.make_plan(resolve(data=data, model=ModelConfig(model=folder), capture=CaptureConfig(), device="cpu"))
    texts = [row.text for s in made.shards for row in plan.read_shard(s, data) if isinstance(row, Document)]
    tokens = int(batches.tokenize(tokenizer, texts, 512).lengths.sum())
    notebook_loop(lm, tokenizer, texts[:1], 512)
    started = time.perf_counter()
    notebook_loop(lm, tokenizer, texts, 512)
    seconds = time.perf_counter() - started
    return {"tokens": tokens, "seconds": round(seconds, 1), "tokens_per_second": round(tokens / seconds, 2)}


def collector(folder: str, count: int, how: Any) -> dict[str, Any]:
    """Measures the same sentences through a replica that writes files."""
    config = resolve(data=sentences(count), model=ModelConfig(model=folder, quantization=how),
                     capture=CaptureConfig(), device="cpu")  # fmt: skip
    made = plan.make_plan(config)
    with tempfile.TemporaryDirectory() as root:
        replica = Replica(root, config, made.hash)
        started = time.perf_counter()
        tokens = sum(replica.collect(shard).tokens for shard in made.shards)
        seconds = time.perf_counter() - started
    computed = str(replica.loaded.compute_dtype).removeprefix("torch.")
    return {"tokens": tokens, "seconds": round(seconds, 1), "tokens_per_second": round(tokens / seconds, 2),
            "compute": computed}  # fmt: skip


def child(step: str, folder: str, **arguments: Any) -> dict[str, Any]:
    """Runs one measurement in its own process."""
    call = f"quantized.{step}({folder!r}, **{arguments!r})"
    code = f"import json; from benchmarks import quantized; print('RESULT' + json.dumps({call}))"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.rpartition("RESULT")[2])


def main(bench: Bench) -> None:
    """Makes the checkpoint, measures, prints JSON lines."""
    print(machine())
    with tempfile.TemporaryDirectory() as temporary:
        folder = bench.folder or bench.keep or f"{temporary}/olmoe"
        geometry = WIDE | {"num_hidden_layers": bench.layers}
        if bench.folder is None:
            print(f"writing {make_checkpoint(Path(folder), geometry) / 1e9:.1f} GB to {folder} …", flush=True)
        if "load" in bench.parts:
            print("load", json.dumps(child("load", folder), indent=1), flush=True)
        if "speed" in bench.parts:
            result = child("speed", folder, tokens=list(bench.tokens), rounds=bench.rounds, compute=bench.compute)
            print("speed", json.dumps(result, indent=1), flush=True)
        if "loop" in bench.parts:
            one = child("loop", folder, count=bench.sentences)
            ours = {how: child("collector", folder, count=bench.sentences, how=how) for how in ("none", "nf4")}
            ratio = {how: round(each["tokens_per_second"] / one["tokens_per_second"], 2) for how, each in ours.items()}
            print("loop", json.dumps({"loop": one, "collector": ours, "collector/loop": ratio}, indent=1), flush=True)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Bench))
