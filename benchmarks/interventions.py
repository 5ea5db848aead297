"""Measures what an arm of edits costs, by the layer that it edits first, beside arms that run one by one.

    python -m benchmarks.interventions                      # the demo model
    python -m benchmarks.interventions --model wide --layers 6 --documents 40

The same batches run with arms that edit the first, the middle and the last layer, in turns, in one process: together,
as the recorder runs them, with the layers before the edit and the head of the model as it is computed once; and one by
one, where each arm is a whole pass and compares with predictions that are computed again. Prints the median time per
arm of both, and their ratio beside the share of layers from the edit on, which the head comes on top of.
"""

from __future__ import annotations

import dataclasses
import statistics
import sys
import time
from typing import Any

import numpy as np
import torch

from benchmarks.collect import machine
from benchmarks.recorders import Bench, loaded_model
from collector.capture import effects
from collector.capture.batches import tokenize
from collector.capture.hooks import Capture
from collector.capture.passes import ForwardPasses
from collector.capture.recorder import Recorder
from collector.capture.routing import RoutingRecorder
from collector.config import CaptureConfig
from collector.data.corpus import read_sentences
from collector.models.routers import find_routers


class OneByOne(effects.EffectsRecorder):
    """Arms that share nothing."""

    def hooks(self) -> list[Any]:
        """See `Recorder`; no layer is skipped."""
        made = super().hooks()
        assert self._layers is not None
        self._layers._layers = []
        return made


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arms(Bench):
    """Measure what an arm of edits costs."""

    model: Any = "demo"
    """A wide model with random weights, or the demo model."""
    arms: int = 16
    """Arms that run together."""
    rounds: int = 3
    """Rounds; each way runs once per round."""


def main(bench: Arms) -> None:
    """Runs the rounds."""
    loaded, head = loaded_model(bench)
    routers = find_routers(loaded.model)
    texts = [sentence.text for sentence in read_sentences("heldout")]
    texts = texts[:: max(1, len(texts) // bench.documents)][: bench.documents]
    tokens = {"decoder": tokenize(loaded.tokenizer, texts, 512)}
    layers = [router.layer for router in routers]
    places = {"first": layers[0], "middle": layers[len(layers) // 2], "last": layers[-1]}

    def run(recorders: list[type[Recorder]], arms: int, layer: int) -> float:
        texts = tuple(f"a{number}: layer={layer} expert={number} operation=drop" for number in range(arms))
        config = CaptureConfig(tokens_per_batch=4096, record=("effects",) if arms else (), arms=texts)
        made = [recorder(loaded.model, routers, config, head) for recorder in recorders]
        with Capture(loaded.model, made) as capture:
            started = time.perf_counter()
            ForwardPasses(capture=capture, pad_id=loaded.pad_id, config=config).run(tokens)
            return time.perf_counter() - started

    per_arm: dict[tuple[str, str], list[float]] = {}
    for turn in range(bench.rounds + 1):  # the first round warms up
        for place, layer in places.items():
            for way, recorder, together in (
                ("together", effects.EffectsRecorder, effects._TOGETHER),
                ("one by one", OneByOne, 1),
            ):
                before, effects._TOGETHER = effects._TOGETHER, together
                few, many = (run([RoutingRecorder, recorder], count, layer) for count in (1, 1 + bench.arms))
                effects._TOGETHER = before
                if turn:
                    per_arm.setdefault((way, place), []).append((many - few) / bench.arms)
    count = len(tokens["decoder"].ids)
    print(f"python -m benchmarks.interventions {' '.join(sys.argv[1:])}\n{machine()}\n{count:,} tokens\n")
    print("| first edited layer | s per arm, one by one | together | times as fast | time | layers from the edit on |")
    print("|---|---|---|---|---|---|")
    for place, layer in places.items():
        alone, both = (np.array(per_arm[way, place]) for way in ("one by one", "together"))
        ratio, share = statistics.median(alone / both), 1 - layers.index(layer) / len(layers)
        print(f"| {layer} of {len(layers)} | {np.median(alone):.3f} | {np.median(both):.3f} | {ratio:.2f} "
              f"| {100 / ratio:.0f} % | {100 * share:.0f} % |")  # fmt: skip


if __name__ == "__main__":
    import tyro

    torch.set_grad_enabled(False)
    main(tyro.cli(Arms))
