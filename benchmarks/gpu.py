"""Measures the collector on one GPU, part by part: what limits it, and how far it is from that limit.

    python -m benchmarks.gpu                              # all parts, about ten minutes on an H100
    python -m benchmarks.gpu --parts floor profile
    python -m benchmarks.gpu --small --device cpu         # a dry run of every part, on any machine

The model has the geometry of OLMoE-1B-7B (16 layers, hidden 2048, 64 experts of 1024, top-8, vocabulary 50,304) and
random weights, drawn on the device and kept in memory as a checkpoint, which the collector then loads as any other.
Documents are sentences of the demo's corpus, 1 to 12 joined, so their lengths differ; only real tokens count.

- `tests`: tests/test_gpu.py.
- `floor`: tokens/s and share of the matrix peak of one sentence at a time; of transformers in batches with
  `output_router_logits`; of the bare base model; of the forward pass cut after the last router; of the same with
  capture, results on the host. By padded tokens per batch, and by experts implementation. The peak and the copy
  bandwidth of the card are measured first.
- `compile`: the cut forward pass with capture, compiled and not, on the same batches, and how often they agree.
- `capture`: the collector in process, files written, beside the cut forward pass of the same batches.
- `ray`: the same run through Ray with one replica, and with two that share the GPU.
- `nf4`: memory while loading and running, speed beside bfloat16 on the same batches, agreement on the demo model.
- `profile`: kernels by time, idle time of the GPU between them, and calls that wait for it.

Every part runs in a process of its own, with a limit on its time, and its results are kept as JSON.
"""

from __future__ import annotations

import dataclasses
import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

from benchmarks.collect import WIDE

Part = Literal["tests", "floor", "compile", "capture", "ray", "nf4", "profile"]
SMALL: dict[str, Any] = WIDE | {"num_hidden_layers": 3, "hidden_size": 128, "intermediate_size": 64, "num_experts": 16,
                                "num_attention_heads": 4, "num_key_value_heads": 4}  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure the collector on one GPU."""

    parts: tuple[Part, ...] = ("floor", "compile", "capture", "profile", "nf4", "ray", "tests")
    """What to measure, in this order."""
    device: Literal["cuda", "cpu"] = "cuda"
    """Where; `cpu` is for a dry run."""
    small: bool = False
    """A tiny model and little text, for a dry run."""
    layers: int = 16
    """Layers of the model."""
    batches: tuple[int, ...] = (4096, 16384, 32768, 65536)
    """Padded tokens per batch, for `floor`."""
    tokens: int = 300_000
    """Tokens of a measurement of `floor` and `nf4`."""
    run_tokens: int = 2_500_000
    """Tokens of a whole run, in `capture` and `ray`."""
    rounds: int = 2
    """Rounds of `floor`; every variant runs once per round."""
    compile: bool = False
    """Compile the model in `capture`, `ray` and `profile`, as `--compile` does; `compile` compares."""
    limit: int = 150
    """Seconds that a part may take."""
    folder: str | None = None
    """Keep checkpoint and texts in this folder, and take those that an earlier call left there."""
    out: str = "benchmarks/results/gpu"
    """Folder for the results as JSON."""

    @property
    def geometry(self) -> dict[str, Any]:
        """The config of the model."""
        return SMALL if self.small else WIDE | {"num_hidden_layers": self.layers}


def documents(count: int) -> list[tuple[str, str]]:
    """Returns (label, text) of documents of the demo's corpus: 1 to 12 sentences of one language each, mixed."""
    from collector.data.corpus import read_sentences

    by_label: dict[str, list[str]] = {}
    for sentence in read_sentences("all"):
        by_label.setdefault(sentence.label, []).append(sentence.text)
    rng, made = random.Random(0), []
    for label, texts in by_label.items():
        first = 0
        while first < len(texts):
            end = first + rng.randint(1, 12)
            made.append((label, " ".join(texts[first:end])))
            first = end
    rng.shuffle(made)
    return [made[i % len(made)] for i in range(count)]


def write_documents(path: Path, tokens: int) -> None:
    """Writes a JSONL file of about this many tokens."""
    with path.open("w") as file:
        for label, text in documents(max(8, tokens // 300)):
            file.write(json.dumps({"text": text, "label": label}) + "\n")


def prepare(bench: Bench, folder: Path) -> None:
    """Writes checkpoint and texts."""
    from benchmarks.quantized import make_checkpoint

    started = time.perf_counter()
    size = make_checkpoint(folder / "model", bench.geometry, bench.device)
    write_documents(folder / "texts.jsonl", bench.tokens)
    write_documents(folder / "run.jsonl", bench.run_tokens)
    print(f"wrote a checkpoint of {size / 1e9:.1f} GB in {time.perf_counter() - started:.0f} s", flush=True)


def measure(bench: Bench, part: str, folder: Path) -> None:
    """Runs in a process of its own: one part, whose table goes to the output and whose numbers go to a file."""
    if part == "prepare":
        prepare(bench, folder)
        return
    from benchmarks import gpu_parts

    result = gpu_parts.PARTS[part](bench, folder)
    out = Path(bench.out)
    out.mkdir(parents=True, exist_ok=True)
    about = {"machine": gpu_parts.machine(), "bench": dataclasses.asdict(bench)}
    name = f"{part}-compiled" if bench.compile and part in ("capture", "ray", "profile") else part
    (out / f"{name}.json").write_text(json.dumps(about | {"result": result}, indent=1))


def child(bench: Bench, part: str, folder: Path) -> None:
    """Runs one part within its limit; whatever happens to it, the next one has its turn."""
    print(f"\n## {part}\n", flush=True)
    if part == "tests":
        command = [sys.executable, "-m", "pytest", "-q", "--no-header", "-m", "gpu", "tests/test_gpu.py",
                   "-p", "no:cacheprovider"]  # fmt: skip
    else:
        call = f"gpu.measure(gpu.{bench!r}, {part!r}, pathlib.Path({str(folder)!r}))"
        code = f"import pathlib; from benchmarks import gpu; {call}"
        command = [sys.executable, "-c", code]
    started = time.perf_counter()
    try:
        status = subprocess.run(command, timeout=bench.limit, check=False).returncode
        ended = "" if status == 0 else f", FAILED with status {status}"
    except subprocess.TimeoutExpired:
        ended = f", STOPPED at its limit of {bench.limit} s"
    print(f"\n{part}: {time.perf_counter() - started:.0f} s{ended}", flush=True)


def place(needed: int) -> str | None:
    """Returns a folder in memory with room for so many bytes; None for the usual place of temporary files."""
    memory = Path("/dev/shm")
    return str(memory) if memory.is_dir() and shutil.disk_usage(memory).free > needed else None


def main(bench: Bench) -> None:
    """Runs the chosen parts, one after the other."""
    print(f"python -m benchmarks.gpu {' '.join(sys.argv[1:])}", flush=True)
    with tempfile.TemporaryDirectory(dir=place(20 * 10**9)) as folder:
        place_of_all = Path(bench.folder or folder)
        if set(bench.parts) - {"tests"} and not (place_of_all / "run.jsonl").exists():
            child(bench, "prepare", place_of_all)
        for part in bench.parts:
            child(bench, part, place_of_all)


if __name__ == "__main__":
    import tyro

    main(tyro.cli(Bench))
