"""The embedded default: a small model that has really specialised, and text that it never saw."""

from __future__ import annotations

import dataclasses
import itertools
import json

import pytest
import torch
from safetensors import safe_open

from collector import open_run
from collector.config import ModelConfig
from collector.data.corpus import LABEL_OF_ISO, read_sentences
from collector.demo import train
from collector.models.loading import DEMO_MODEL
from collector.models.revisions import Checkpoint, find_checkpoints


@pytest.fixture(scope="module")
def runs(demo_runs):
    """The demo, and the same model untrained."""
    return open_run(demo_runs["pretrained"]), open_run(demo_runs["random"])


@pytest.mark.parametrize("layer", range(8))
def test_every_language_has_a_specialist_in_every_layer(runs, layer):
    tops = runs[0].query("domain_specialization", layer=layer).aggregate("label, max(value)", "label").fetchall()
    assert len(tops) == 60
    assert min(value for _, value in tops) > 2 * 8 / 64


@pytest.mark.parametrize("layer", range(8))
def test_languages_differ_far_more_than_in_the_untrained_model(runs, layer):
    """The untrained model has favourite experts too, but the same for every language."""
    trained, untrained = (
        run.query("language_overlap", layer=layer)
        .filter("metric = 'jsd' and label_a <> label_b")
        .aggregate("avg(value)")
        .fetchall()[0][0]
        for run in runs
    )
    assert trained > 2.5 * untrained


def test_related_languages_share_specialists(runs):
    best = runs[0].query("domain_specialization").aggregate("layer, label, arg_max(expert, value)", "layer, label")
    top = {(layer, label): expert for layer, label, expert in best.fetchall()}

    def shared(a, b):
        return sum(top[layer, a] == top[layer, b] for layer in range(8))

    assert shared("bul_Cyrl", "rus_Cyrl") >= 3
    assert shared("bul_Cyrl", "kor_Hang") == 0


def test_the_checkpoint_is_small_and_comes_with_its_record():
    assert (DEMO_MODEL / "model.safetensors").stat().st_size <= 8e6
    with safe_open(DEMO_MODEL / "model.safetensors", "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118
    record = json.loads((DEMO_MODEL / "training.json").read_text())
    assert record["command"].startswith("python -m collector.demo.train")
    assert record["log"][-1]["step"] == record["config"]["steps"]
    assert record["log"][-1]["loss"] < record["log"][0]["loss"] / 2
    assert set(record["heldout_loss"]) == set(LABEL_OF_ISO.values())


def test_what_is_held_out_was_not_trained_on():
    heldout = {sentence.text for sentence in read_sentences("heldout")}
    trained = [sentence.text for sentence in read_sentences("train") if sentence.text not in heldout]
    assert len(heldout) > 5900
    assert len(trained) == json.loads((DEMO_MODEL / "training.json").read_text())["data"]["sentences"]


def test_training_keeps_checkpoints_whose_names_tell_step_and_tokens(tmp_path):
    config = train.TrainConfig(steps=3, rows=1, row_tokens=16, save_at=(0, 2), vocabulary=300)
    texts = [sentence.text for sentence in itertools.islice(read_sentences("heldout"), 20)]
    tokenizer = train.train_tokenizer(texts, config.vocabulary)
    model = train.build_model(config, tokenizer)
    before = model.lm_head.weight.detach().clone()
    reached = []

    def keep(step: int) -> None:
        reached.append(step)
        if step in config.save_at:
            train.save(model, tokenizer, tmp_path / train.checkpoint_name(step, config))

    train.train(model, tokenizer(texts)["input_ids"], config, keep)
    assert reached == [0, 1, 2, 3]
    assert model.lm_head.weight.dtype == torch.float32, "training goes on with what it had"
    found = find_checkpoints(ModelConfig(model=str(tmp_path)))
    assert [(each.step, each.tokens_seen) for each in found] == [(0, 0), (2, 0)]
    with safe_open(tmp_path / found[0].name / "model.safetensors", "pt") as tensors:
        assert torch.equal(tensors.get_tensor("model.embed_tokens.weight"), before.bfloat16())
    name = train.checkpoint_name(200, train.TrainConfig(rows=8))
    assert (Checkpoint(name=name).step, Checkpoint(name=name).tokens_seen) == (200, 410_000)
    with pytest.raises(ValueError, match="--save-at takes steps from 0 to --steps 3, got 4"):
        dataclasses.replace(config, save_at=(1, 4))
