"""Measures how fast answers are written and recorded, beside transformers' own loop, one prompt at a time.

    python -m benchmarks.generation                                  # the demo model
    python -m benchmarks.generation --model wide --layers 2 --dtype bfloat16

Three ways take turns in one process, round by round: the collector with a batch of prompts; the same batch without
anything recorded, the floor; and `generate` of transformers with a hook on each router, prompt by prompt, greedy and
with as many tokens each. Prints generated tokens per second, prompts counted in the time, and the ratios. Then it reads
the finished texts as a whole, and prints the share of decisions with other experts: the noise of the arithmetic.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from typing import Any, Literal

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.collect import machine, wide_model
from collector.capture.batches import TokenTable, tokenize
from collector.capture.generation import Generation
from collector.capture.hooks import Capture
from collector.capture.passes import ForwardPasses
from collector.capture.routing import RoutingRecorder
from collector.config import CaptureConfig
from collector.data.corpus import read_sentences
from collector.models import heads
from collector.models.loading import DEMO_MODEL
from collector.models.routers import find_routers


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure how fast answers are written."""

    model: Literal["wide", "demo"] = "demo"
    """A wide model with random weights, or the demo model."""
    layers: int = 2
    """Layers of the wide model."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Precision."""
    prompts: int = 64
    """Prompts in the batch."""
    prompt_tokens: int = 64
    """Longest prompt."""
    generate: int = 64
    """Tokens of each answer."""
    alone: int = 4
    """Prompts that transformers answers in a round, one at a time."""
    rounds: int = 3
    """Rounds; each way runs once per round."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device."""


def causal_lm(bench: Bench) -> Any:
    """Returns the model with its head."""
    if bench.model == "demo":
        return AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=bench.dtype).eval().to(bench.device)
    lm, _, folder = wide_model(bench.dtype, layers=bench.layers)
    folder.cleanup()
    return lm.to(bench.device)


def one_by_one(lm: Any, table: TokenTable, bench: Bench) -> int:
    """Writes the first answers as a notebook does, and keeps what the routers return; returns the tokens written."""
    kept: list[Any] = []
    hooks = [
        router.module.register_forward_hook(lambda _m, _i, outputs: kept.append([part.cpu() for part in outputs]))
        for router in find_routers(lm.model)
    ]
    for start, end in list(zip(table.starts[:-1], table.starts[1:], strict=True))[: bench.alone]:
        ids = torch.from_numpy(table.ids[start:end])[None].to(bench.device)
        lm.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=bench.generate,
            min_new_tokens=bench.generate, pad_token_id=0,
        )  # fmt: skip
    for hook in hooks:
        hook.remove()
    return bench.alone * bench.generate


def main(bench: Bench) -> None:
    """Runs the rounds."""
    lm = causal_lm(bench)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    texts = [sentence.text for sentence in read_sentences("heldout")]
    texts = texts[:: max(1, len(texts) // bench.prompts)][: bench.prompts]
    table = tokenize(tokenizer, texts, bench.prompt_tokens)
    names = [str(number) for number in range(len(texts))]
    room = len(texts) * (bench.prompt_tokens + bench.generate)
    config = CaptureConfig(generate=bench.generate, tokens_per_batch=room)
    base: Any = lm.model
    head = heads.build_head(base, dict(lm.state_dict()), bench.model, dtype=getattr(torch, bench.dtype))
    seconds: dict[str, list[float]] = {"collector": [], "floor": [], "one by one": []}
    counts = {"collector": len(texts) * bench.generate, "floor": len(texts) * bench.generate}
    found = {}
    for _ in range(bench.rounds + 1):
        for name in ("collector", "floor"):
            recorders = [RoutingRecorder(base, find_routers(base), config)] if name == "collector" else []
            with Capture(base, recorders, to_the_end=True) as capture:
                started = time.perf_counter()
                generation = Generation(
                    capture=capture, head=head, pad_id=0, stop_ids=np.zeros(0, np.int64), config=config, seed=0,
                    special_ids=np.zeros(0, np.int64),
                )  # fmt: skip
                written, placing, _ = generation.start({"decoder": table}, names)
                recordings = placing.finish()
                seconds[name].append(time.perf_counter() - started)
                if recorders:
                    whole, _ = ForwardPasses(capture=capture, pad_id=0, config=config).run(written)
                    found = {"written": recordings, "whole": whole}
        started = time.perf_counter()
        counts["one by one"] = one_by_one(lm, table, bench)
        seconds["one by one"].append(time.perf_counter() - started)
    print(f"python -m benchmarks.generation {' '.join(sys.argv[1:])}\n{machine()}\n")
    print(f"{len(texts)} prompts of {table.lengths.mean():.0f} tokens, {bench.generate} tokens each\n")
    print("| | generated tokens/s |\n|---|---|")
    speed = {name: [counts[name] / each for each in times[1:]] for name, times in seconds.items()}
    for name, values in speed.items():
        print(f"| {name} | {statistics.median(values):,.0f} |")
    for over in ("floor", "one by one"):
        ratios = [ours / theirs for ours, theirs in zip(speed["collector"], speed[over], strict=True)]
        print(f"\ncollector / {over}: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")
    print(f"\ndecisions with other experts when read as a whole: {rerouted(found['written'], found['whole']):.3%}")


def rerouted(written: Any, whole: Any) -> float:
    """Returns the share of decisions whose sets of experts differ."""
    differ = [
        (np.sort(one.experts_tk) != np.sort(other.experts_tk)).any(axis=1)
        for one, other in zip(written[0].layers, whole[0].layers, strict=True)
    ]
    return float(np.mean(differ))


if __name__ == "__main__":
    import tyro

    torch.set_grad_enabled(False)
    main(tyro.cli(Bench))
