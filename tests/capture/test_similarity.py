"""What all experts put out for a sample of tokens, against the experts' own weights and plain forward passes."""

from __future__ import annotations

import contextlib
import math

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from scipy.spatial.distance import pdist

from collector.capture import experts_apart
from collector.capture.batches import TokenTable, tokenize
from collector.capture.experts_apart import ExpertsApart, count_experts, every_output, experts_of, listen_to_inputs
from collector.capture.sampling import sample
from collector.capture.similarity import BLOCK, LISTS, directions
from collector.config import DataConfig, ModelConfig
from collector.models.routers import find_routers
from collector.upkeep.verify import verify
from tests.capture.test_outputs import APART
from tests.capture.test_pair_sums import hsic
from tests.helpers.runs import collect_here, content, run_config, write_jsonl
from tests.models.test_families import CAPTURED, built, plain, texts


@pytest.mark.parametrize("name", sorted({*CAPTURED} - APART))
def test_all_experts_of_every_family_put_out_what_the_chosen_ones_do(name: str, monkeypatch) -> None:
    monkeypatch.setattr(experts_apart, "_ROWS", 100)
    model = built(name)
    routers = find_routers(model)
    calls, inputs = {}, {}
    with contextlib.ExitStack() as hooks:
        for router in routers:
            experts = experts_of(router)
            hooks.callback(listen_to_inputs(experts, lambda each, n=router.name: inputs.update({n: each})).remove)
            listen = lambda call, n=router.name: calls.update({n: call})  # noqa: E731
            hooks.enter_context(ExpertsApart(experts, listen))
        plain(model, texts())
        for router in routers:
            call, given = calls[router.name], inputs[router.name]
            assert torch.equal(call.experts_rk, given.experts_rk)
            with torch.inference_mode():
                every_reh = every_output(experts_of(router), given.hidden_rh)
            assert every_reh.shape[1] == count_experts(experts_of(router))
            picked = call.experts_rk.clamp_min(0).long()
            chosen = every_reh.gather(1, picked[..., None].expand(*picked.shape, every_reh.shape[2]))
            kept = call.experts_rk >= 0
            torch.testing.assert_close(chosen[kept], call.outputs_rkh[kept], rtol=1e-4, atol=1e-5)


# -- the sample --------------------------------------------------------------------------------------


def test_a_sample_depends_on_the_texts_alone(tiny_model) -> None:
    texts = [f"text {number} of some length {number**3}" for number in range(40)]
    table = tokenize(tiny_model.tokenizer, texts, 64)
    drawn = sample(table, 60)
    assert len(set(drawn.tolist())) == 60
    assert not table.is_special[drawn].any()
    assert drawn.tolist() != sorted(drawn.tolist())
    backwards = tokenize(tiny_model.tokenizer, texts[::-1], 64)
    again = sample(backwards, 60)
    place = lambda table, slots: [(table.ids[s], table.position[s]) for s in slots]  # noqa: E731
    assert place(table, drawn) == place(backwards, again)
    assert sample(table, 60).tolist() == sample(table, 200)[:60].tolist()
    ordinary = int((~table.is_special).sum())
    assert len(sample(table, 10**6)) == ordinary
    assert (
        sample(tokenize(tiny_model.tokenizer, ["same words"] * 3, 64), 4).tolist()
        == sample(tokenize(tiny_model.tokenizer, ["same words"] * 3, 64), 4).tolist()
    )


def test_blocks_mix_documents(tiny_model) -> None:
    texts = [f"words {number} " * 12 for number in range(60)]
    table = tokenize(tiny_model.tokenizer, texts, 128)
    drawn = sample(table, 2 * BLOCK)
    for block in np.array_split(drawn, 2):
        assert len(set(table.doc[block].tolist())) > 50


# -- a run -------------------------------------------------------------------------------------------

SAMPLE = 70


@pytest.fixture(scope="module")
def runs(tmp_path_factory, tiny_folder, tiny_model):
    """The same texts with and without similarity, and with all recorders at once."""
    folder = tmp_path_factory.mktemp("similarity")
    source = write_jsonl(folder / "texts.jsonl", 20)
    made = {}
    for name, record in (("plain", ()), ("similarity", ("similarity",)), ("all", ("outputs", "similarity"))):
        config = run_config(
            DataConfig(data=(str(source),), docs_per_shard=8), ModelConfig(model=str(tiny_folder)), record=record,
            tokens_per_batch=200, sample_tokens=SAMPLE,
        )  # fmt: skip
        made[name] = collect_here(folder / name, config, loaded=tiny_model)
    return made


def rows_of(run, table: str = "similarity") -> list[dict]:
    rows = []
    for commit in run.commits():
        rows += pq.read_table(run.store.location(commit.files[table].path)).to_pylist()
    return rows


def test_a_run_compares_the_sample_of_each_shard(runs, tiny_model) -> None:
    """The sample by hand: text by text through the plain model, and all experts by their weights in float64."""
    run, model = runs["similarity"], tiny_model.model
    tokens = content(run)["tokens"].to_pylist()
    for shard in (0, 1):
        own = [token for token in tokens if token["shard"] == shard]
        docs = sorted({token["doc"] for token in own})
        ids = [[token["token_id"] for token in own if token["doc"] == doc] for doc in docs]
        table = TokenTable(
            ids=np.array([token["token_id"] for token in own]), truncated=np.zeros(len(docs), bool),
            is_special=np.array([token["is_special"] for token in own]), starts=np.cumsum([0, *map(len, ids)]),
        )  # fmt: skip
        drawn = sample(table, SAMPLE)
        received = [received_by_experts(model, each) for each in ids]
        for number, layer in enumerate(model.layers):
            hidden = np.concatenate([each[number][0] for each in received])[drawn]
            routed = np.concatenate([each[number][1] for each in received])[drawn]
            outputs = all_outputs(layer.mlp.experts, hidden)
            rows = [r for r in rows_of(run) if r["shard"] == shard and r["layer"] == number]
            assert {row["over"] for row in rows} == {"sampled", "either", "both"}
            for row in rows:
                assert (row["tokens"], row["experts"], row["block"]) == (SAMPLE, outputs.shape[1], 0)
                compare(row, outputs, routed)
            kept = rows_of(run, "projections")
            found = {
                (row["tok"], row["expert"]): row["output"]
                for row in kept
                if (row["shard"], row["layer"]) == (shard, number)
            }
            few = range(math.ceil(SAMPLE / 8))
            expected = {(drawn[i], expert): outputs[i, expert] for i in few for expert in routed[i]}
            assert found.keys() == expected.keys()
            for key, output in expected.items():
                np.testing.assert_allclose(found[key], output, rtol=2e-3, atol=1e-4)


def test_random_directions_keep_distances_and_are_always_the_same() -> None:
    points = np.random.default_rng(3).normal(size=(20, 2048)).astype(np.float32)
    projected = points @ directions(2048).numpy()
    assert projected.shape == (20, 256)
    ratios = pdist(projected) / pdist(points)
    assert abs(ratios.mean() - 1) < 0.02
    assert ratios.std() < 0.06, "1 / sqrt(2 * 256) is 0.044"
    assert torch.equal(directions(2048), directions(2048))
    assert directions(256) is None


def compare(row: dict, outputs: np.ndarray, routed: np.ndarray) -> None:
    pair = 0
    for i in range(outputs.shape[1]):
        for j in range(i + 1, outputs.shape[1]):
            has = [(routed == each).any(1) for each in (i, j)]
            every = np.ones(len(routed), bool)
            kept = {"sampled": every, "either": has[0] | has[1], "both": has[0] & has[1]}[row["over"]]
            x, y = outputs[kept, i], outputs[kept, j]
            cosine = ((x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)).sum()
            assert row["n"][pair] == kept.sum()
            assert row["cosine"][pair] == pytest.approx(cosine, abs=1e-5 * SAMPLE)
            found = [row[name][pair] for name in ("hsic", "hsic_first", "hsic_second")]
            wanted = [hsic(x, y), hsic(x, x), hsic(y, y)]
            assert found == pytest.approx(wanted, rel=1e-4, abs=1e-4 * max(wanted[1:]))
            pair += 1


def received_by_experts(model, ids: list[int]) -> dict[int, tuple[np.ndarray, np.ndarray]]:
    """Hidden states [T, H] and ids [T, k] that each layer's experts receive for a text."""
    found, handles = {}, []
    for number, layer in enumerate(model.layers):
        keep = lambda _, args, n=number: found.update({n: (args[0].double().numpy(), args[1].numpy())})  # noqa: E731
        handles.append(layer.mlp.experts.register_forward_pre_hook(keep))
    with torch.inference_mode():
        model(torch.tensor([ids]))
    for handle in handles:
        handle.remove()
    return found


def all_outputs(experts, hidden: np.ndarray) -> np.ndarray:
    """[T, E, H] by the matrices of a gated expert."""
    up, down = (matrix.detach().double().numpy() for matrix in (experts.gate_up_proj, experts.down_proj))
    gate, value = np.split(np.einsum("xij,tj->xti", up, hidden), 2, axis=2)
    return np.einsum("xhi,xti->txh", down, gate / (1 + np.exp(-gate)) * value)


def test_the_routing_is_the_same_to_the_byte(runs) -> None:
    for one, other in zip(runs["plain"].commits(), runs["similarity"].commits(), strict=True):
        for name in ("routing", "tokens", "documents"):
            digests = [part.files[name].sha256 for part in (one, other)]
            assert digests[0] == digests[1], name


def test_recorders_do_not_disturb_each_other(runs) -> None:
    alone, together = rows_of(runs["similarity"]), rows_of(runs["all"])
    for one, other in zip(alone, together, strict=True):
        assert all(one[name] == other[name] for name in one if name not in LISTS)
        for name in LISTS:
            assert one[name] == pytest.approx(other[name], rel=1e-3, abs=1e-4), name


def test_verify_knows_the_table(runs) -> None:
    assert verify(runs["similarity"]).sound
