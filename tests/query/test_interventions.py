"""Interventions as a whole: what a run of arms and controls says of a model in which no expert is special."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import binom
from transformers import OlmoeConfig, OlmoeForCausalLM

from collector import collect_in_process, open_run
from collector.config import DataConfig, ModelConfig, resolve
from collector.demo.train import train_tokenizer
from collector.query.interventions import FEWEST_DOCUMENTS, prepare_intervention
from tests.helpers.runs import collect_here, run_config, write_jsonl
from tests.helpers.sweeps import TINY

ARMS, CONTROLS = 50, 19
LEVEL = 0.05


@pytest.fixture(scope="module")
def collected(tmp_path_factory):
    """A run of a model with random weights, and its effects: each arm drops two random experts of each layer."""
    folder = tmp_path_factory.mktemp("level")
    torch.manual_seed(0)
    config = OlmoeConfig(**TINY | {"num_experts": 24})
    OlmoeForCausalLM(config).save_pretrained(folder / "model")
    train_tokenizer([], config.vocab_size).save_pretrained(folder / "model")
    data = DataConfig(data=(str(write_jsonl(folder / "texts.jsonl", 6)),), docs_per_shard=4)
    run = collect_here(folder / "run", run_config(data, ModelConfig(model=str(folder / "model")), max_length=30))
    rng = np.random.default_rng(0)
    lines = [f"arm {arm},{layer},{expert},drop" for arm in range(ARMS) for layer in range(2)
             for expert in rng.choice(24, 2, replace=False)]  # fmt: skip
    (folder / "arms.csv").write_text("\n".join(["arm,layer,expert,operation", *lines]))
    found = prepare_intervention(run.root, str(folder / "arms.csv"), controls=CONTROLS)
    config = resolve(data=found.data, model=found.model, capture=found.capture, device="cpu")
    return run, found, open_run(collect_in_process(str(folder / "out"), config, part_of=found.part_of).root)


def test_experts_of_random_weights_are_like_their_controls(collected) -> None:
    """Under the null hypothesis p is uniform, and no arm is left once it is adjusted for their number."""
    _, _, effects = collected
    rows = effects.query("expert_effect", pooled=True).to_arrow_table().to_pylist()
    for metric in ("nats_per_token", "divergence"):
        p = np.array([row["p"] for row in rows if row["metric"] == metric])
        assert len(p) == ARMS
        assert (p <= LEVEL).sum() <= binom.ppf(0.99, ARMS, LEVEL)
        assert 0.35 < p.mean() < 0.65
    assert all(row["q"] > LEVEL for row in rows)
    assert {row["controls"] for row in rows} == {CONTROLS}


def test_an_intervention_repeats_the_documents_and_model_of_its_run(collected) -> None:
    run, found, effects = collected
    assert found.data.docs_per_shard == 4 < FEWEST_DOCUMENTS
    assert found.capture.record == ("effects",)
    documents = "select shard, doc, doc_id, label, tokens from documents order by all"
    assert effects.sql(documents).fetchall() == open_run(run.root).sql(documents).fetchall()
    ((arms,),) = effects.sql("select count(distinct (arm, control)) from arms").fetchall()
    assert arms == ARMS * (1 + CONTROLS)
