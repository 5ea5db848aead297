"""Has models write, and reads the texts that they wrote as a whole."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from collector.capture.batches import TokenTable
from collector.capture.generation import Generation, require_cache
from collector.capture.hooks import Capture
from collector.capture.passes import ForwardPasses
from collector.capture.routing import RoutingRecorder
from collector.config import CaptureConfig
from collector.models.routers import find_routers


@dataclasses.dataclass(frozen=True)
class RandomHead:
    """A language-model head of random numbers, for base models."""

    matrix: torch.Tensor

    @classmethod
    def of(cls, model) -> RandomHead:
        rows, width = model.get_input_embeddings().weight.shape[0], model.config.get_text_config().hidden_size
        return cls(torch.randn((rows, width), generator=torch.Generator().manual_seed(1)))

    @property
    def device(self):
        return self.matrix.device

    rows_at_once = 2

    def logits(self, hidden):
        return hidden.float() @ self.matrix.T


def table_of(texts) -> TokenTable:
    lengths = [len(text) for text in texts]
    ids = np.concatenate([np.asarray(text, np.int64) for text in texts])
    return TokenTable(
        ids=ids, is_special=np.zeros(len(ids), bool), starts=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
        truncated=np.zeros(len(texts), bool),
    )  # fmt: skip


def write(model, prompts, *, head=None, stop_ids=(), seed=0, names=None, **settings):
    """Has a model write on from prompts.

    Returns:
        The finished texts, the routing that was recorded meanwhile, and that of the finished texts read as a whole; a
        routing is a list of (experts [T, k], weights [T, k], margin [T]), by router.
    """
    config = CaptureConfig(**{"generate": 6, "tokens_per_batch": 64} | settings)
    recorder = RoutingRecorder(model, find_routers(model), config)
    with Capture(model, [recorder], to_the_end=True) as capture:
        require_cache(capture)
        generation = Generation(
            capture=capture, head=head or RandomHead.of(model), pad_id=0, stop_ids=np.array(stop_ids, np.int64),
            special_ids=np.zeros(0, np.int64), config=config, seed=seed,
        )  # fmt: skip
        table = table_of(prompts)
        texts, placing, _ = generation.start({"decoder": table}, names or [str(d) for d in range(len(prompts))])
        written = placing.finish()
        whole, _ = ForwardPasses(capture=capture, pad_id=0, config=config).run(texts)
    return texts["decoder"], routing(written), routing(whole)


def routing(recordings):
    (shard,) = recordings
    shard.check()
    return [(layer.experts_tk, layer.weights_tk, layer.statistics["margin"]) for layer in shard.layers]


def assert_same_routing(written, whole, rounding=1e-5):
    """Compares the experts of tokens whose choice rounding cannot change, and all weights of the same experts."""
    for (experts, weights, margin), (other_experts, other_weights, _) in zip(written, whole, strict=True):
        agree, clear = (experts == other_experts).all(1), np.abs(margin) > rounding
        assert (agree | ~clear).all()
        assert agree.mean() > 0.95
        np.testing.assert_allclose(weights[agree], other_weights[agree], atol=2e-4, rtol=2e-4)
