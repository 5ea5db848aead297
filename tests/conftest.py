"""Models that the tests run: the trained demo model, and a tiny OLMoE with random weights.

Fixtures import what they need: the process that hands out the tests would spend seconds on torch, while its workers
wait for it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from collector.config import DataConfig, LaunchConfig, ModelConfig
from tests.helpers.browser import browser as browser
from tests.helpers.browser import chromium as chromium

if TYPE_CHECKING:
    from collector.models.loading import LoadedModel

# Two threads of OpenMP wait for each other, awake, longer than tiny models compute: for these processes and their own.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell has its background jobs ignore SIGINT, which their processes inherit, and tests interrupt theirs.
signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = {"vocab_size": 8192, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 3,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 2,
        "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}  # fmt: skip


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What runs together under `--dist loadgroup`: all tests that start Ray, first and never two at once; each file."""
    items.sort(key=lambda item: item.get_closest_marker("ray") is None)
    for item in items:
        if item.get_closest_marker("ray"):
            group = "ray"
        else:  # the demo's runs are made once
            group = "demo" if "demo_runs" in getattr(item, "fixturenames", ()) else item.path.stem
        item.add_marker(pytest.mark.xdist_group(group))


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """As OMP_NUM_THREADS says, unless whoever runs the tests set another number."""
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def demo_model() -> LoadedModel:
    """The demo model in float32, so that batching differs from no batching by rounding only."""
    from collector.models import loading

    return loading.load(ModelConfig(dtype="float32"), "cpu")


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a random 3-layer OLMoE (6 experts, top-2) and the demo tokenizer."""
    import torch
    from transformers import AutoTokenizer, OlmoeConfig, OlmoeModel

    from collector.models.loading import DEMO_MODEL

    folder = tmp_path_factory.mktemp("tiny-olmoe")
    torch.manual_seed(7)
    OlmoeModel(OlmoeConfig(**TINY)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_folder: Path) -> LoadedModel:
    from collector.models import loading

    return loading.load(ModelConfig(model=str(tiny_folder)), "cpu")


@pytest.fixture(scope="session")
def tiny_sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep over three random checkpoints, the last without a step, with 24 documents in two labels."""
    from tests.helpers.runs import write_jsonl
    from tests.helpers.sweeps import sweep_here, write_checkpoints

    folder = tmp_path_factory.mktemp("sweep")
    names = ("step2-tokens1M", "step10-tokens5M", "final")
    model = write_checkpoints(folder / "trained", names)
    sweep_here(folder / "sweep", model, write_jsonl(folder / "texts.jsonl", 24), revisions=["*"])
    return folder / "sweep"


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A Ray of this process, which its commands join, so that not each starts one of its own."""
    from collector.fleet import ray_cluster

    with ray_cluster.cluster(LaunchConfig()):
        yield


@pytest.fixture(scope="session")
def mixed_texts() -> list[str]:
    """Real sentences of very different lengths and scripts."""
    from collector.data.corpus import read_sentences

    wanted = {"en": 4, "ko": 3, "th": 3, "lo": 3, "bg": 2, "zh": 2}
    texts = []
    for sentence in read_sentences("heldout"):
        if wanted.get(sentence.iso, 0):
            wanted[sentence.iso] -= 1
            texts.append(sentence.text)
    return texts


DROPPED = (
    "no 31: layer=4 expert=31", "no 31 #1: layer=4 expert=9", "kor_Hang: layer=4 expert=55",
    "eng_Latn: layer=4 expert=44",
)  # fmt: skip
"""Arms of the demo's run, those of the examples in docs/metrics.md."""


@pytest.fixture(scope="session")
def demo_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo over 12 sentences per language, with every recorder; and with random weights, without any."""
    from collector.upkeep.maps import make as make_map
    from collector.upkeep.weights import make as compare_weights
    from tests.helpers.runs import collect_here, run_config

    folder = tmp_path_factory.mktemp("demo")
    for weights in ("pretrained", "random"):
        record, arms = (), ()
        if weights == "pretrained":
            record = ("outputs", "loss", "similarity", "vocabulary", "effects")
            arms = tuple(f"{arm} operation=drop" for arm in DROPPED)
        config = run_config(
            DataConfig(per_label=12),
            ModelConfig(weights=weights),
            store=("text", "logits"),
            record=record,
            sample_tokens=100,
            arms=arms,
        )
        run = collect_here(folder / weights, config)
        if weights == "pretrained":
            compare_weights(run, match=False)
            make_map(run, layer=4, method="pca")
    return {weights: folder / weights for weights in ("pretrained", "random")}
