"""What `benchmarks.gpu` measures with: ceilings of the card, memory, busy time, CPU time by thread."""

from __future__ import annotations

import gc
import json
import platform
import re
import shutil
import statistics
import subprocess
import time
import warnings
from collections import Counter, defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

import torch

from benchmarks import collect

if TYPE_CHECKING:
    import threading
    from collections.abc import Callable, Iterable


def machine() -> str:
    """The GPU, if there is one, the CPU, and the versions that matter for speed."""
    import transformers

    card = "no GPU"
    if torch.cuda.is_available():
        about = torch.cuda.get_device_properties(0)
        card = f"{about.name}, {about.total_memory / 2**30:.0f} GiB, CUDA {torch.version.cuda}"
    return f"{card}; {collect.machine()}; transformers {transformers.__version__}, Python {platform.python_version()}"


def wait(device: str) -> None:
    """Waits for everything that was queued."""
    if device == "cuda":
        torch.cuda.synchronize()


def timed(device: str, function: Callable[[], object]) -> float:
    """Returns the seconds that a function takes, to the end of what it queued."""
    wait(device)
    started = time.perf_counter()
    function()
    wait(device)
    return time.perf_counter() - started


def ceilings(device: str) -> dict[str, float]:
    """Measures the matrix products and the copies that the device can do at most: medians of 10, random values."""
    size, length = (8192, 2**30) if device == "cuda" else (512, 2**24)
    a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(length, device=device, dtype=torch.bfloat16)
    target = torch.empty_like(source)
    for _ in range(3):
        a @ b
        target.copy_(source)
    products = statistics.median(timed(device, lambda: a @ b) for _ in range(10))
    copies = statistics.median(timed(device, lambda: target.copy_(source)) for _ in range(10))
    return {"matmul_tflops": 2 * size**3 / products / 1e12, "copy_gb_s": 2 * source.numel() * 2 / copies / 1e9}


def flops_per_token(geometry: dict[str, Any], *, cut: bool) -> float:
    """FLOPs of the matrix products of one token, without attention scores; cut ends at the last router."""
    hidden, inner, layers = geometry["hidden_size"], geometry["intermediate_size"], geometry["num_hidden_layers"]
    attention = 4 * 2 * hidden * hidden
    router = 2 * hidden * geometry["num_experts"]
    experts = geometry["num_experts_per_tok"] * 3 * 2 * hidden * inner
    return layers * (attention + router) + (layers - cut) * experts


def memory(device: str) -> tuple[float, float]:
    """Returns GB allocated now, and at most since `forget_peak`; on a CPU nothing is counted."""
    if device != "cuda":
        return 0.0, 0.0
    return torch.cuda.memory_allocated() / 1e9, torch.cuda.max_memory_allocated() / 1e9


def forget_peak(device: str) -> None:
    """Starts counting the peak of allocated memory anew."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()


def free_memory() -> None:
    """Gives back what nothing holds any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class Utilization:
    """Samples the share of time in which the GPU ran a kernel, ten times a second, as nvidia-smi reports it."""

    mean = later_half = float("nan")

    def __enter__(self) -> Self:
        self._process = None
        if torch.cuda.is_available() and shutil.which("nvidia-smi"):
            command = ["nvidia-smi", "--query-gpu=utilization.gpu", "--format=csv,noheader,nounits", "-lms", "100"]
            self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is None:
            return
        self._process.terminate()
        out, _unused = self._process.communicate()
        samples = [float(line) for line in out.split() if line.isdecimal()]
        if samples:
            self.mean = statistics.fmean(samples)
            self.later_half = statistics.fmean(samples[len(samples) // 2 :])


class ThreadTimes:
    """CPU seconds of each thread of this process, up to `stop`, which comes while the threads still live."""

    def __init__(self) -> None:
        self._before = self._read()
        self.spent: dict[str, float] = {}

    @staticmethod
    def _read() -> dict[int, tuple[str, float]]:
        found = {}
        for path in Path("/proc/self/task").glob("*/stat"):
            text = path.read_text()
            name, fields = text[text.index("(") + 1 : text.rindex(")")], text[text.rindex(")") + 2 :].split()
            found[int(path.parent.name)] = name, (int(fields[11]) + int(fields[12])) / 100
        return found

    def stop(self, threads: Iterable[threading.Thread]) -> None:
        """Takes the times now, under the names that Python's threads have."""
        names = {thread.native_id: re.sub(r"_\d+$", "", thread.name) for thread in threads}
        spent: dict[str, float] = defaultdict(float)
        for number, (name, seconds) in self._read().items():
            spent[names.get(number, name)] += seconds - self._before.get(number, ("", 0.0))[1]
        self.spent = {
            name: seconds for name, seconds in sorted(spent.items(), key=lambda item: -item[1]) if seconds >= 0.05
        }


def say_waits(device: str, function: Callable[[], object]) -> None:
    """Prints the places in the code where a function waits for the device, and how often."""
    if device != "cuda":
        return
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        function()
        torch.cuda.set_sync_debug_mode("default")
    found = Counter(f"{each.filename}:{each.lineno}" for each in noted)
    print("waits for the device: " + json.dumps(found.most_common(12)), flush=True)


def summary_of(profiler: Any) -> dict[str, Any]:
    """Kernels by time, idle time between them, and calls of the host that wait for the device."""
    spans, kernels, calls = [], Counter[str](), Counter[str]()
    waits: dict[str, list[float]] = {}
    for event in profiler.events():
        spent = event.time_range.elapsed_us() / 1000
        if event.device_type.name == "CUDA":
            spans.append((event.time_range.start, event.time_range.end))
            kernels[event.name] += spent
            calls[event.name] += 1
        elif "ynchronize" in event.name:
            waits.setdefault(event.name, []).append(spent)
    spans.sort()
    busy = gap_time = 0.0
    gaps, reached = 0, spans[0][0] if spans else 0.0
    for start, end in spans:
        if start - reached > 100:
            gaps += 1
            gap_time += (start - reached) / 1000
        busy += max(0.0, end - max(start, reached)) / 1000
        reached = max(reached, end)
    return {
        "busy_ms": busy, "span_ms": (reached - spans[0][0]) / 1000 if spans else 0.0, "gaps": gaps, "gap_ms": gap_time,
        "kernels": [(name, spent, calls[name]) for name, spent in kernels.most_common(60)],
        "waits": {name: {"calls": len(each), "ms": round(sum(each), 1)} for name, each in waits.items()},
    }  # fmt: skip
