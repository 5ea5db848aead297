"""What the chosen experts put out, against the experts' own weights in float64 and transformers' own forward passes."""

from __future__ import annotations

import contextlib

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from collector.capture.batches import tokenize
from collector.capture.experts_apart import ExpertsApart, experts_of
from collector.capture.outputs import SCHEMA, SUMS, ShardOutputs, effects
from collector.config import DataConfig, ModelConfig
from collector.models.routers import find_routers
from collector.upkeep.verify import verify
from tests.helpers.runs import collect_here, content, run_config, write_jsonl
from tests.models.test_families import CAPTURED, built, plain, texts

APART = {"doge", "jetmoe", "llama4", "nllb_moe"}
"""Families whose experts take no ids: the blocks of Doge and JetMoE hold them themselves, Llama 4 weighs the inputs,
and NLLB-MoE hands over its own masks."""


@pytest.mark.parametrize("name", CAPTURED)
def test_single_outputs_of_every_family_add_up_to_what_its_block_returns(name: str) -> None:
    model = built(name)
    routers = find_routers(model)
    if name in APART:
        with pytest.raises(ValueError, match=r"--record: router .* cannot be read one by one"):
            [experts_of(router) for router in routers]
        return
    returned, calls = {}, {}
    with contextlib.ExitStack() as hooks:
        for router in routers:
            experts = experts_of(router)
            keep = experts.register_forward_hook(lambda _m, _i, out, n=router.name: returned.update({n: out.clone()}))
            hooks.callback(keep.remove)
        expected = plain(model, texts())[0]
    with contextlib.ExitStack() as hooks:
        for router in routers:
            listen = lambda call, n=router.name: calls.update({n: call})  # noqa: E731
            hooks.enter_context(ExpertsApart(experts_of(router), listen))
        torch.testing.assert_close(plain(model, texts())[0], expected, rtol=1e-3, atol=1e-4)
    assert calls.keys() == {router.name for router in routers}
    for router, call in calls.items():
        whole = returned[router].reshape(call.total_rh.shape)
        torch.testing.assert_close(call.total_rh, whole, rtol=1e-4, atol=1e-5 * float(whole.abs().max()))
        kept = effects(call)
        total_r = kept.contributions_rk.sum(1)
        torch.testing.assert_close(total_r, (whole != 0).any(1).float(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(plain(model, texts())[0], expected)


# -- a run -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_folder, tiny_model):
    """The same texts with and without outputs, and with outputs in shards of another size."""
    folder = tmp_path_factory.mktemp("outputs")
    source = write_jsonl(folder / "texts.jsonl", 20)
    made = {}
    for name, every, record in (("plain", 8, ()), ("outputs", 8, ("outputs",)), ("one", 100, ("outputs",))):
        data = DataConfig(data=(str(source),), docs_per_shard=every)
        config = run_config(data, ModelConfig(model=str(tiny_folder)), record=record, tokens_per_batch=200)
        made[name] = collect_here(folder / name, config, loaded=tiny_model)
    return made


def outputs_of(run) -> list[dict]:
    rows = []
    for commit in run.commits():
        rows += pq.read_table(run.store.location(commit.files["outputs"].path)).to_pylist()
    return rows


def test_sums_are_those_of_the_weights_in_float64(runs, tiny_model) -> None:
    """Text by text, without a batch: the experts' matrices by hand, over the inputs that they get."""
    model = tiny_model.model
    tables = content(runs["one"])
    found = {(row["layer"], row["doc"], row["is_special"]): row for row in outputs_of(runs["one"])}
    tokens = tables["tokens"].to_pylist()
    checked = 0
    for doc in range(tables["documents"].num_rows):
        own = [token for token in tokens if token["doc"] == doc]
        inputs = inputs_of_experts(model, [token["token_id"] for token in own])
        is_special = np.array([token["is_special"] for token in own])
        for number, (hidden, experts, weights) in inputs.items():
            expected = by_hand(model.layers[number].mlp.experts, hidden, experts, weights)
            for special in np.unique(is_special).tolist():
                checked += compare(found[number, doc, special], expected, is_special == special)
    assert checked == len(found)


def inputs_of_experts(model, ids: list[int]) -> dict[int, list[torch.Tensor]]:
    """What the experts of each layer receive: hidden states, ids and weights."""
    inputs, handles = {}, []
    for number, layer in enumerate(model.layers):
        keep = lambda _, args, n=number: inputs.update({n: [each.detach().clone() for each in args]})  # noqa: E731
        handles.append(layer.mlp.experts.register_forward_pre_hook(keep))
    with torch.inference_mode():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return inputs


def by_hand(experts, hidden, ids, weights) -> dict[str, np.ndarray]:
    """Of each pick [T, k], in float64: expert, and what is summed."""
    up, down = (matrix.detach().double().numpy() for matrix in (experts.gate_up_proj, experts.down_proj))
    x, ids, g = hidden.double().numpy(), ids.numpy(), weights.double().numpy()
    f = np.empty((*ids.shape, x.shape[1]))
    for t, k in np.ndindex(ids.shape):
        gate, value = np.split(up[ids[t, k]] @ x[t], 2)
        f[t, k] = down[ids[t, k]] @ (gate / (1 + np.exp(-gate)) * value)
    y = (g[..., None] * f).sum(1)
    norm = np.sqrt((f**2).sum(2))
    contribution = g * (f * y[:, None]).sum(2) / (y**2).sum(1)[:, None]
    values = (g, norm, norm**2, g * norm, (g * norm) ** 2, contribution)
    return {"experts": ids, **dict(zip(SUMS, values, strict=True)), "largest": np.abs(f).max(2)}


def compare(row: dict, expected: dict[str, np.ndarray], chosen: np.ndarray) -> int:
    ids = expected["experts"][chosen]
    assert row["experts"] == sorted(set(ids.ravel().tolist()))
    for place, expert in enumerate(row["experts"]):
        picks = ids == expert
        assert row["picks"][place] == picks.sum()
        for name in SUMS:
            assert row[name][place] == pytest.approx(expected[name][chosen][picks].sum(), rel=1e-4, abs=1e-7)
        assert row["largest"][place] == pytest.approx(expected["largest"][chosen][picks].max(), rel=1e-4)
    assert sum(row["contributions"]) == pytest.approx(chosen.sum(), rel=1e-5)
    return 1


def test_the_routing_is_the_same_with_and_without_outputs(runs) -> None:
    alone, both = (content(runs[name])["routing"] for name in ("plain", "outputs"))
    experts = [name for name in alone.column_names if name[0] == "e" and name[1:].isdigit()]
    assert alone.select(experts).equals(both.select(experts))
    for name in ("w0", "w1", "entropy", "margin"):
        np.testing.assert_allclose(alone[name].to_numpy(), both[name].to_numpy(), rtol=1e-3, atol=1e-6)


def test_every_token_is_in_the_sums_whatever_the_shards(runs) -> None:
    split, whole = outputs_of(runs["outputs"]), outputs_of(runs["one"])
    keyed = {(8 * row["shard"] + row["doc"], row["layer"], row["is_special"]): row for row in split}
    assert len(keyed) == len(split) == len(whole)
    for row in whole:
        other = keyed[row["doc"], row["layer"], row["is_special"]]
        assert row["experts"] == other["experts"]
        assert row["picks"] == other["picks"]
        for name in (*SUMS, "largest"):
            np.testing.assert_allclose(row[name], other[name], rtol=1e-3, atol=1e-6)
    tokens = content(runs["one"])["tokens"].num_rows
    assert sum(sum(row["picks"]) for row in whole) == tokens * 3 * 2  # three layers, two picks


def test_the_run_is_sound_and_names_its_table(runs) -> None:
    assert verify(runs["outputs"]).sound
    assert "outputs" not in next(runs["plain"].commits()).files
    commit = next(runs["outputs"].commits())
    assert pq.read_schema(runs["outputs"].store.location(commit.files["outputs"].path)).equals(SCHEMA)


def test_a_token_that_was_left_out_stops_the_shard(tiny_model) -> None:
    table = tokenize(tiny_model.tokenizer, ["a text"], 512)
    recording = ShardOutputs(find_routers(tiny_model.model), {"decoder": table})
    with pytest.raises(ValueError, match=r"outputs of decoder layer 0: 0 tokens instead of \d"):
        recording.check()
