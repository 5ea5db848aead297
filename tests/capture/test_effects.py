"""What edits do to predictions, document by document: against transformers' own model with an expert taken out."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from collector import open_run
from collector.config import CaptureConfig, DataConfig, ModelConfig
from collector.models.loading import DEMO_MODEL
from collector.upkeep.verify import verify
from tests.helpers.runs import assert_same_content, collect_here, content, run_config, write_jsonl
from tests.helpers.tiny_models import write_switch

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
    return open_run(run.root).sql("from effects order by shard, doc, arm, control").to_arrow_table().to_pandas()


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


def test_the_noise_of_other_batches_is_an_arm(run) -> None:
    """The same model with every other document; the arithmetic is that of float32."""
    own = rows(run).query("arm == 'no edit'")
    assert len(own) == 14
    assert (own.decisions == 8 * own.tokens).all(), "all layers"
    assert (own.rerouted == 0).all()
    change = (own.loss - own.base_loss).abs() / own.tokens
    assert 0 < change.max() < 1e-5
    assert own.divergence.abs().max() < 1e-3


def test_controls_are_arms_with_numbers(tmp_path, data) -> None:
    edits = "layer=4 expert=31 operation=drop"
    numbered = collect_here(tmp_path / "run", settings(data, (f"x: {edits}", f"x #1: {edits}", f"x #2: {edits}")))
    own = rows(numbered).query("arm == 'x'")
    assert sorted(own.control.unique()) == [0, 1, 2]
    for _, same in own.groupby(["shard", "doc"]):
        assert same.loss.nunique() == same.divergence.nunique() == 1
    shown = open_run(numbered.root).sql(
        "select arm, control, stack, layer, expert, operation, value from arms order by 2"
    )
    assert shown.fetchall() == [("x", number, "decoder", 4, 31, "drop", None) for number in range(3)]


def test_effects_of_tokens_add_up_to_those_of_documents(tmp_path, data, run) -> None:
    arms = (*ARMS, "silent #1: layer=4 expert=1 operation=drop")
    kept = collect_here(tmp_path / "run", settings(data, arms, store=("token_effects",)))
    assert verify(kept).sound
    assert (rows(kept)[lambda each: each.control == 0].loss.values == rows(run).loss.values).all()
    summed = open_run(kept.root).sql(
        "select shard, doc, arm, count(*) as tokens, sum(change::double) as change,\n"
        "sum(divergence::double) as divergence, count(*) filter (where flipped) as flips\n"
        "from token_effects join tokens using (shard, tok) group by all order by all"
    )
    found, wanted = summed.to_arrow_table().to_pandas(), rows(run).query("arm != 'no edit'")
    assert (found.tokens.values == wanted.tokens.values).all()
    np.testing.assert_allclose(found.change, wanted.loss - wanted.base_loss, atol=1e-4)
    np.testing.assert_allclose(found.divergence, wanted.divergence, atol=1e-5)
    assert (found.flips.values == wanted.flips.values).all()
    by_class = open_run(kept.root, by="token_class").query("expert_effect", arm="silent").to_arrow_table().to_pylist()
    total = sum(row["value"] * row["n"] for row in by_class if row["metric"] == "nats_per_token")
    assert total == pytest.approx((wanted.loss - wanted.base_loss)[wanted.arm == "silent"].sum(), abs=1e-4)
    assert {row["label"] for row in by_class} >= {"Latn", "Hang", "punctuation"}


# -- edits of some tokens ------------------------------------------------------------------------------

DROP = "layer=4 expert=31 operation=drop"


@pytest.fixture(scope="module")
def limited(tmp_path_factory, data):
    arms = (
        f"everywhere: {DROP}", f"in Korean: {DROP} label=ko", f"at Hangul: {DROP} token_class=Hang",
        f"at 3: {DROP} position=3", f"at nothing: {DROP} label=en token_class=Thai",
    )  # fmt: skip
    return collect_here(tmp_path_factory.mktemp("limited") / "run", settings(data, arms))


def by_label(run, arm):
    documents = open_run(run.root).sql("select shard, doc, label from documents").to_arrow_table().to_pandas()
    found = rows(run)[rows(run).arm == arm].merge(documents)
    return found[found.label == "ko"], found[found.label == "en"]


def test_an_edit_of_one_label_leaves_the_others_alone(limited) -> None:
    korean, english = by_label(limited, "in Korean")
    everywhere, _ = by_label(limited, "everywhere")
    assert (english.loss - english.base_loss).abs().max() < 1e-3
    assert (english.rerouted == 0).all()
    np.testing.assert_allclose(korean.loss, everywhere.loss, rtol=1e-5)
    assert (korean.loss - korean.base_loss).sum() > 0.5


def test_an_edit_that_acts_nowhere_is_no_pass(limited) -> None:
    own = rows(limited).query("arm == 'at nothing'")
    assert (own.loss == own.base_loss).all()
    assert (own.divergence == 0).all()
    assert (own.decisions == 3 * own.tokens).all()


def with_weights_zeroed(model, ids, acts):
    """Losses [T - 1] of a text; where `acts`, expert 31 of layer 4 has weight 0, by a plain hook."""

    def zero(_module, _inputs, outputs):
        logits, weights, experts = outputs
        dropped = (experts == 31) & torch.tensor(acts)[:, None]
        return logits, weights.masked_fill(dropped, 0), experts

    handle = model.model.layers[4].mlp.gate.register_forward_hook(zero)
    try:
        with torch.inference_mode():
            logits = model(ids[None]).logits[0, :-1]
    finally:
        handle.remove()
    return torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")


@pytest.mark.parametrize("arm", ["at Hangul", "at 3"])
def test_edits_of_some_tokens_are_those_of_a_plain_hook(limited, arm) -> None:
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="float32").eval()
    tokens = open_run(limited.root, by="token_class").sql("from labelled_tokens order by shard, tok")
    own = rows(limited).query("arm == @arm").set_index(["shard", "doc"])
    marked = 0
    for key, each in tokens.to_arrow_table().to_pandas().groupby(["shard", "doc"]):
        acts = (each.label == "Hang" if arm == "at Hangul" else each.position == 3).to_numpy()
        ids = torch.tensor(each.token_id.to_numpy(np.int64))
        losses = with_weights_zeroed(model, ids, acts)[torch.tensor(~each.is_special.to_numpy()[1:])]
        assert own.loc[key].loss == pytest.approx(losses.sum().item(), rel=1e-5)
        marked += acts.sum()
    assert marked > 10
    assert (own.loss != own.base_loss).any()


def test_a_class_that_no_token_has_is_named(tmp_path, data) -> None:
    with pytest.raises(ValueError, match=r"no token has the class 'Latin'; there are .*Latn"):
        collect_here(tmp_path / "run", settings(data, (f"x: {DROP} token_class=Latin",)))


# -- encoder and decoder -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def switch(tmp_path_factory):
    folder = tmp_path_factory.mktemp("switch")
    return folder, write_switch(folder)


@pytest.mark.parametrize("stack", ["encoder", "decoder"])
def test_edits_of_encoder_and_decoder_change_what_the_decoder_predicts(switch, tmp_path, stack) -> None:
    folder, model = switch
    data = DataConfig(data=(str(write_jsonl(tmp_path / "texts.jsonl", 4)),))
    blocks = [block.layer[-1].mlp for block in getattr(model, stack).block]
    layer = next(number for number, block in enumerate(blocks) if hasattr(block, "experts"))
    arms = tuple(f"x{expert}: stack={stack} layer={layer} expert={expert} operation=drop" for expert in range(2))
    limited = tuple(f"ko{arm.removeprefix('x')} label=ko" for arm in arms)
    config = {"record": ("effects",), "stacks": ("encoder", "decoder"), "max_length": 20}
    run = collect_here(
        tmp_path / "run", run_config(data, ModelConfig(model=str(folder)), arms=(*arms, *limited), **config)
    )
    for expert in range(2):
        found = rows(run).query(f"arm == 'x{expert}'").reset_index()
        of_some = rows(run).query(f"arm == 'ko{expert}'").reset_index()
        silent = copy.deepcopy(model)
        with torch.no_grad():
            getattr(silent, stack).block[layer].layer[-1].mlp.experts[f"expert_{expert}"].wo.weight[:] = 0
        tokens = content(run)["tokens"].to_pandas()
        for doc, own in tokens.groupby(["shard", "doc"]):
            ids, inputs = (
                torch.tensor([own[own["stack"] == each].token_id.tolist()]) for each in ("encoder", "decoder")
            )
            ordinary = torch.tensor(~own[own["stack"] == "decoder"].is_special.to_numpy()[1:])
            with torch.inference_mode():
                losses = [
                    torch.nn.functional.cross_entropy(
                        each(input_ids=ids, decoder_input_ids=inputs).logits[0, :-1], inputs[0, 1:], reduction="none"
                    )[ordinary].sum().item()
                    for each in (silent, model)
                ]  # fmt: skip
            row, some = found.iloc[doc[1]], of_some.iloc[doc[1]]
            assert [row.loss, row.base_loss] == pytest.approx(losses, rel=1e-4)
            is_korean = doc[1] % 2 == 1
            assert some.loss == pytest.approx(row.loss if is_korean else row.base_loss, rel=1e-5)
    assert (rows(run).loss != rows(run).base_loss).any()


def test_an_encoder_alone_is_refused(switch, tmp_path) -> None:
    data = DataConfig(data=(str(write_jsonl(tmp_path / "texts.jsonl", 4)),))
    arms = ("x: stack=encoder layer=1 expert=0 operation=drop",)
    with pytest.raises(ValueError, match="an encoder predicts no next token"):
        collect_here(
            tmp_path / "run", run_config(data, ModelConfig(model=str(switch[0])), record=("effects",), arms=arms)
        )


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ((), "--record effects and --arms go together"),
        (("layer=4 expert=1 operation=drop",), "is not NAME: EDIT; EDIT"),
        (("x: layer=4 expert=1 operation=swap",), "it is one of drop"),
        (("x: layer=4 expert=99 operation=drop",), "has experts 0 to 63, not 99"),
        (("x: layer=1 expert=1 operation=drop", "x: layer=2 expert=1 operation=drop"), "two arms are called 'x'"),
        (
            ("x: layer=1 expert=1 operation=drop label=en; layer=2 expert=1 operation=drop",),
            "limited to several labels",
        ),
        (("x: layer=1 expert=1 operation=drop position=-1",), "positions count from 0"),
    ],
)
def test_arms_that_cannot_be_are_named(tmp_path, data, arms, message) -> None:
    with pytest.raises(ValueError, match=message):
        collect_here(tmp_path / "run", settings(data, arms))


def test_token_effects_without_arms_are_refused() -> None:
    with pytest.raises(ValueError, match="--store token_effects takes --record effects and --arms"):
        CaptureConfig(store=("token_effects",))


def test_arms_without_effects_are_refused() -> None:
    with pytest.raises(ValueError, match="go together"):
        CaptureConfig(arms=ARMS)
