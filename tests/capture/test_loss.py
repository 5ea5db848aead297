"""The loss of every token, against transformers' own loss over the same text alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from collector import open_run
from collector.config import DataConfig, ModelConfig
from collector.models import heads
from collector.models.loading import DEMO_MODEL
from collector.upkeep.verify import verify
from tests.helpers.runs import collect_here, content, run_config, write_jsonl
from tests.helpers.tiny_models import write_switch


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("loss")
    data = DataConfig(data=(str(write_jsonl(folder / "texts.jsonl", 20)),), docs_per_shard=8)
    config = run_config(data, ModelConfig(dtype="float32"), record=("loss",), tokens_per_batch=300)
    return collect_here(folder / "run", config)


def by_document(run) -> list[list[dict]]:
    documents: dict[tuple, list[dict]] = {}
    for token in content(run)["tokens"].to_pylist():
        documents.setdefault((token["shard"], token["doc"], token["stack"]), []).append(token)
    return list(documents.values())


def test_losses_are_those_of_the_whole_model_text_by_text(run) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="float32").eval()
    for tokens in by_document(run):
        ids = torch.tensor([[token["token_id"] for token in tokens]])
        with torch.inference_mode():
            outputs = model(ids, labels=ids)
        losses = [token["loss"] for token in tokens]
        assert losses[0] is None
        expected = torch.nn.functional.cross_entropy(outputs.logits[0, :-1], ids[0, 1:], reduction="none")
        np.testing.assert_allclose(losses[1:], expected.numpy(), rtol=1e-3, atol=1e-4)
        assert np.mean(losses[1:]) == pytest.approx(outputs.loss.item(), rel=1e-4)


def test_the_run_is_sound_and_the_routing_is_as_without(run, tmp_path) -> None:
    assert verify(run).sound
    data = DataConfig(data=(str(write_jsonl(tmp_path / "texts.jsonl", 20)),), docs_per_shard=8)
    plain = collect_here(tmp_path / "run", run_config(data, ModelConfig(dtype="float32"), tokens_per_batch=300))
    assert content(plain)["routing"].equals(content(run)["routing"])
    assert "loss" not in content(plain)["tokens"].column_names
    ((without,),) = open_run(run.root).sql("select count(*) - count(loss) from tokens").fetchall()
    assert without == 20


def test_few_logits_at_a_time_give_the_same(run, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(heads, "_FEWEST_ROWS", 3)
    monkeypatch.setattr(heads, "_LOGITS", {"cpu": 3 * 8192})
    data = DataConfig(data=(str(write_jsonl(tmp_path / "texts.jsonl", 4)),), docs_per_shard=8)
    other = collect_here(tmp_path / "run", run_config(data, ModelConfig(dtype="float32"), record=("loss",)))
    for one, same in zip(by_document(other), by_document(run), strict=False):
        np.testing.assert_allclose(
            [token["loss"] for token in one[1:]], [token["loss"] for token in same[1:]], rtol=1e-3, atol=1e-4
        )


@pytest.fixture(scope="module")
def switch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("switch")
    return folder, write_switch(folder)


def test_a_decoder_has_losses_and_its_encoder_none(switch, tmp_path) -> None:
    folder, model = switch
    data = DataConfig(data=(str(write_jsonl(tmp_path / "texts.jsonl", 4)),))
    settings = {"record": ("loss", "vocabulary"), "stacks": ("encoder", "decoder"), "max_length": 20}
    run = collect_here(tmp_path / "run", run_config(data, ModelConfig(model=str(folder)), **settings))
    encoders, decoders = (
        [doc for doc in by_document(run) if doc[0]["stack"] == stack] for stack in ("encoder", "decoder")
    )
    assert all(token["loss"] is None for tokens in encoders for token in tokens)
    for source, target in zip(encoders, decoders, strict=True):
        ids, inputs = (torch.tensor([[token["token_id"] for token in tokens]]) for tokens in (source, target))
        with torch.inference_mode():
            logits = model(input_ids=ids, decoder_input_ids=inputs).logits[0]
        expected = torch.nn.functional.cross_entropy(logits[:-1], inputs[0, 1:], reduction="none")
        np.testing.assert_allclose([token["loss"] for token in target[1:]], expected.numpy(), rtol=1e-3, atol=1e-4)
    promoted = open_run(run.root).sql(
        "select stack, attribution is null, position + 1 = target_tokens, count(*)\n"
        "from promotions join tokens using (shard, tok, stack) join documents using (shard, doc) group by all"
    )
    ((written,),) = open_run(run.root).sql("select count(*) from promotions").fetchall()
    rows = promoted.fetchall()
    assert {row[:3] for row in rows} == {("decoder", False, False), ("decoder", True, True)}, "but for the last tokens"
    assert sum(count for *_, count in rows) == written


def test_an_encoder_alone_is_refused(switch, tmp_path) -> None:
    data = DataConfig(data=(str(write_jsonl(tmp_path / "texts.jsonl", 4)),))
    with pytest.raises(ValueError, match="an encoder predicts no next token"):
        collect_here(tmp_path / "run", run_config(data, ModelConfig(model=str(switch[0])), record=("loss",)))
