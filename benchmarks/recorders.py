"""Measures what each recorder costs, beside the same forward passes without it.

    python -m benchmarks.recorders                      # a model of OLMoE-1B-7B's width, 2 layers, float32
    python -m benchmarks.recorders --model demo         # the demo model

Six ways to run the same batches take turns in one process, round by round: the routing alone, whose pass ends at the
last router (cut); the routing with the pass run to its end (uncut); with outputs; with losses; with the similarity of
512 tokens; with the vocabulary of 512 tokens. Prints the median time of each, and the ratios to the uncut pass, pair by
pair. What the host adds up is in the times.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from typing import Literal

import numpy as np
import torch

from benchmarks.collect import machine, wide_model
from collector.capture.batches import tokenize
from collector.capture.hooks import Capture
from collector.capture.loss import LossRecorder
from collector.capture.outputs import OutputsRecorder
from collector.capture.passes import ForwardPasses
from collector.capture.recorder import Recorder
from collector.capture.routing import RoutingRecorder
from collector.capture.similarity import SimilarityRecorder
from collector.capture.vocabulary import VocabularyRecorder
from collector.config import CaptureConfig, ModelConfig
from collector.data.corpus import read_sentences
from collector.models import heads, loading
from collector.models.routers import find_routers


class Uncut(RoutingRecorder):
    """The routing, of a pass that runs to its end."""

    needs_whole_pass = True


WAYS: dict[str, tuple[type[Recorder], ...]] = {
    "cut": (RoutingRecorder,),
    "uncut": (Uncut,),
    "outputs": (Uncut, OutputsRecorder),
    "loss": (Uncut, LossRecorder),
    "similarity": (Uncut, SimilarityRecorder),
    "vocabulary": (Uncut, VocabularyRecorder),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Bench:
    """Measure what each recorder costs."""

    model: Literal["wide", "demo"] = "wide"
    """A wide model with random weights, or the demo model."""
    layers: int = 2
    """Layers of the wide model."""
    documents: int = 60
    """Sentences, spread over all languages."""
    rounds: int = 5
    """Rounds; each way runs once per round."""


def loaded_model(bench: Bench) -> tuple[loading.LoadedModel, heads.Head]:
    """Loads the model and its head in float32."""
    if bench.model == "demo":
        config = ModelConfig(dtype="float32")
        loaded = loading.load(config, "cpu")
    else:
        _, config, folder = wide_model("float32", layers=bench.layers)
        with folder:
            loaded = loading.load(config, "cpu")
    return loaded, heads.load_head(config, loaded)


def main(bench: Bench) -> None:
    """Runs the rounds."""
    loaded, head = loaded_model(bench)
    routers = find_routers(loaded.model)
    texts = [sentence.text for sentence in read_sentences("heldout")]
    texts = texts[:: max(1, len(texts) // bench.documents)][: bench.documents]
    tokens = {"decoder": tokenize(loaded.tokenizer, texts, 512)}
    config = CaptureConfig(tokens_per_batch=4096)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    for _ in range(bench.rounds + 1):
        for name, recorders in WAYS.items():
            made = [recorder(loaded.model, routers, config, head) for recorder in recorders]
            with Capture(loaded.model, made) as capture:
                started = time.perf_counter()
                recordings, _ = ForwardPasses(capture=capture, pad_id=loaded.pad_id, config=config).run(tokens)
                seconds[name].append(time.perf_counter() - started)
            for recording in recordings:
                recording.check()
    count = len(tokens["decoder"].ids)
    print(f"python -m benchmarks.recorders {' '.join(sys.argv[1:])}\n{machine()}\n{count:,} tokens\n")
    print("| | seconds | tokens/s |\n|---|---|---|")
    for name, times in seconds.items():
        median = statistics.median(times[1:])  # the first round warms up
        print(f"| {name} | {median:.3f} | {count / median:,.0f} |")
    print()
    for name in ("outputs", "loss", "similarity", "vocabulary"):
        ratios = np.array(seconds[name][1:]) / np.array(seconds["uncut"][1:])
        print(f"{name} / uncut: median {np.median(ratios):.3f}, from {ratios.min():.3f} to {ratios.max():.3f}")


if __name__ == "__main__":
    import tyro

    torch.set_grad_enabled(False)
    main(tyro.cli(Bench))
