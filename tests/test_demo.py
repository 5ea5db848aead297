"""The embedded default: a small model that has really specialised, and text that it never saw."""

from __future__ import annotations

import json

import pytest
from safetensors import safe_open

from collector import open_run
from collector.config import DataConfig, ModelConfig
from collector.demo.corpus import LABEL_OF_ISO, MODEL_DIR, read_sentences
from tests.runs import collect_here, run_config

DATA = DataConfig(per_label=12)


@pytest.fixture(scope="module")
def tops(tmp_path_factory):
    """{weights: {(layer, label): (top expert, its domain specialization)}} of the trained and the untrained model."""
    folder = tmp_path_factory.mktemp("demo")
    found = {}
    for weights in ("pretrained", "random"):
        collect_here(folder / weights, run_config(DATA, ModelConfig(weights=weights)))
        best = (
            open_run(folder / weights)
            .query("domain_specialization")
            .aggregate("layer, label, arg_max(expert, value), max(value)", "layer, label")
        )
        found[weights] = {(layer, label): (expert, value) for layer, label, expert, value in best.fetchall()}
    return found


def mean(values):
    values = list(values)
    return sum(values) / len(values)


@pytest.mark.parametrize("layer", range(8))
def test_every_language_has_a_specialist_in_every_layer_and_the_untrained_model_has_none(tops, layer):
    trained, untrained = ([v for (at, _), (_, v) in tops[w].items() if at == layer] for w in ("pretrained", "random"))
    assert len(trained) == len(untrained) == 60
    assert min(trained) > 2 * 8 / 64
    assert mean(trained) > 1.5 * mean(untrained)


def test_related_languages_share_specialists(tops):
    def shared(a, b):
        return sum(tops["pretrained"][layer, a][0] == tops["pretrained"][layer, b][0] for layer in range(8))

    assert shared("bul_Cyrl", "rus_Cyrl") >= 3
    assert shared("bul_Cyrl", "kor_Hang") == 0


def test_the_checkpoint_is_small_and_comes_with_its_record():
    assert (MODEL_DIR / "model.safetensors").stat().st_size <= 8e6
    with safe_open(MODEL_DIR / "model.safetensors", "pt") as tensors:
        assert {tensors.get_slice(name).get_dtype() for name in tensors.keys()} == {"BF16"}  # noqa: SIM118
    record = json.loads((MODEL_DIR / "training.json").read_text())
    assert record["command"].startswith("python -m collector.demo.train")
    assert record["log"][-1]["step"] == record["config"]["steps"]
    assert record["log"][-1]["loss"] < record["log"][0]["loss"] / 2
    assert set(record["heldout_loss"]) == set(LABEL_OF_ISO.values())


def test_what_is_held_out_was_not_trained_on():
    heldout = {sentence.text for sentence in read_sentences("heldout")}
    trained = [sentence.text for sentence in read_sentences("train") if sentence.text not in heldout]
    assert len(heldout) > 5900
    assert len(trained) == json.loads((MODEL_DIR / "training.json").read_text())["data"]["sentences"]
