"""What edits do to predictions, document by document: against transformers' own model with an expert taken out."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from collector import open_run
from collector.config import CaptureConfig, DataConfig, ModelConfig
from collector.models.loading import DEMO_MODEL
from collector.upkeep.verify import verify
from tests.helpers.runs import assert_same_content, collect_here, content, run_config, write_jsonl

DROPPED = 31, 44
ARMS = (
    "nothing: layer=4 expert=31 operation=scale value=1",
    "no bias: layer=2 expert=5 operation=bias value=0; layer=6 expert=1 operation=scale value=1",
    f"silent: layer=4 expert={DROPPED[0]} operation=drop; layer=5 expert={DROPPED[1]} operation=drop",
    "late: layer=7 expert=3 operation=force",
)
DEMO = ModelConfig(dtype="float32")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return DataConfig(data=(str(write_jsonl(tmp_path_factory.mktemp("data") / "texts.jsonl", 14)),), docs_per_shard=5)


def settings(data, arms=ARMS, **capture):
    return run_config(data, DEMO, record=("effects",), arms=arms, tokens_per_batch=300, **capture)


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    return collect_here(tmp_path_factory.mktemp("effects") / "run", settings(data))


def rows(run):
    return open_run(run.root).sql("from effects order by shard, doc, arm").to_arrow_table().to_pandas()


def test_an_arm_that_changes_nothing_differs_by_exactly_nothing(run) -> None:
    everything = rows(run)
    for arm, layers_behind in (("nothing", 3), ("no bias", 5)):
        own = everything[everything.arm == arm]
        assert len(own) == 14
        assert (own.loss == own.base_loss).all()
        assert (own[["divergence", "flips", "rerouted"]] == 0).all(axis=None)
        assert (own.tokens > 0).all()
        assert (own.decisions == layers_behind * own.tokens).all(), "the first token is special"


def test_dropped_experts_cost_what_transformers_says_of_experts_without_output(run) -> None:
    """Text by text, both models whole; special tokens have no part in it."""
    plain, silent = (AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="float32").eval() for _ in range(2))
    with torch.no_grad():
        for layer, expert in zip((4, 5), DROPPED, strict=True):
            silent.model.layers[layer].mlp.experts.down_proj[expert] = 0
    own = rows(run).query("arm == 'silent'").set_index(["shard", "doc"])
    for key, tokens in content(run)["tokens"].to_pandas().groupby(["shard", "doc"]):
        ids = torch.tensor(tokens.token_id.to_numpy(np.int64))
        with torch.inference_mode():
            before, after = (model(ids[None]).logits[0, :-1].double().log_softmax(-1) for model in (plain, silent))
        ordinary = torch.tensor(~tokens.is_special.to_numpy()[1:])
        losses = [-each.gather(1, ids[1:, None])[ordinary].sum().item() for each in (after, before)]
        divergence = (before.exp() * (before - after)).sum(-1)[ordinary].sum().item()
        flips = (before.argmax(-1) != after.argmax(-1))[ordinary].sum().item()
        found = own.loc[key]
        assert found.tokens == ordinary.sum().item()
        assert [found.loss, found.base_loss] == pytest.approx(losses, rel=1e-4)
        assert found.divergence == pytest.approx(divergence, rel=2e-3, abs=1e-4)
        assert abs(found.flips - flips) <= 1, "a near tie"
    assert own.rerouted.sum() > 0


def test_nothing_is_behind_an_edit_of_the_last_layer(run) -> None:
    own = rows(run).query("arm == 'late'")
    assert (own.decisions == 0).all()
    assert (own.loss != own.base_loss).any()


def test_a_layer_that_is_not_recorded_can_be_edited(tmp_path, data, run) -> None:
    few = collect_here(tmp_path / "run", settings(data, layers=(6,)))
    one, other = rows(few), rows(run)
    assert (one.loss == other.loss).all()
    assert (one.query("arm == 'silent'").decisions == one.query("arm == 'silent'").tokens).all()


def test_the_routing_is_that_of_the_model_as_it_is(run, tmp_path, data) -> None:
    plain = collect_here(tmp_path / "plain", run_config(data, DEMO, tokens_per_batch=300))
    assert content(plain)["routing"].equals(content(run)["routing"])
    assert verify(run).sound


def test_effects_stand_beside_everything_else_and_repeat(run, tmp_path, data) -> None:
    everything = run_config(
        data, DEMO, record=("outputs", "loss", "similarity", "vocabulary", "effects"), arms=ARMS, tokens_per_batch=300,
        sample_tokens=20,
    )  # fmt: skip
    together = collect_here(tmp_path / "all", everything)
    one, other = rows(run), rows(together)
    np.testing.assert_allclose(one.loss, other.loss, rtol=1e-5)
    assert (other.query("arm == 'nothing'").divergence == 0).all()
    again = collect_here(tmp_path / "again", settings(data))
    assert_same_content(run, again)


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ((), "--record effects and --arms go together"),
        (("layer=4 expert=1 operation=drop",), "is not NAME: EDIT; EDIT"),
        (("x: layer=4 expert=1 operation=swap",), "it is one of drop"),
        (("x: layer=4 expert=99 operation=drop",), "has experts 0 to 63, not 99"),
        (("x: layer=1 expert=1 operation=drop", "x: layer=2 expert=1 operation=drop"), "two arms are called 'x'"),
    ],
)
def test_arms_that_cannot_be_are_named(tmp_path, data, arms, message) -> None:
    with pytest.raises(ValueError, match=message):
        collect_here(tmp_path / "run", settings(data, arms))


def test_arms_without_effects_are_refused() -> None:
    with pytest.raises(ValueError, match="go together"):
        CaptureConfig(arms=ARMS)
