"""What experts promote, against logit differences of the whole model and plain experts, token by token."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from collector import open_run
from collector.capture.experts_apart import ExpertsApart, experts_of
from collector.capture.vocabulary import PROMOTED, TABLE, VocabularyRecorder
from collector.config import CaptureConfig, DataConfig, ModelConfig
from collector.models.families import family, tiny
from collector.models.final_norm import find_final_norm
from collector.models.loading import DEMO_MODEL
from collector.models.routers import find_routers
from collector.upkeep.verify import verify
from tests.helpers.runs import collect_here, content, run_config, write_jsonl
from tests.models.test_families import CAPTURED, built

SAMPLE = 70


# -- the final norm ----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted({*CAPTURED} - {"qwen4_exp"}))
def test_parts_of_the_stream_add_up_to_the_last_hidden_state(name: str) -> None:
    """Of every family; a layer norm's bias belongs to no part."""
    model = built(name)
    norm = find_final_norm(model)
    seen = {}
    handle = norm.module.register_forward_pre_hook(lambda _module, arguments: seen.update(stream=arguments[0]))
    ids = torch.tensor([[3, 4, 5, 6]])
    with torch.inference_mode():
        extra = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        last = model(input_ids=ids, use_cache=False, **extra).last_hidden_state[0]
    handle.remove()
    stream = seen["stream"][0]
    one = torch.randn(stream.shape, generator=torch.Generator().manual_seed(0))
    parts = [norm.apply_to_part(part, stream) for part in (one, stream - one)]
    bias = getattr(norm.module, "bias", None)
    torch.testing.assert_close(sum(parts) + (0 if bias is None else bias), last, rtol=1e-3, atol=1e-3)


def test_a_model_that_does_not_end_in_a_norm_is_refused() -> None:
    with pytest.raises(ValueError, match="Qwen4ExpTextModel does not end in a norm"):
        find_final_norm(tiny(family("qwen4_exp")))


# -- a run -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return DataConfig(data=(str(write_jsonl(tmp_path_factory.mktemp("data") / "texts.jsonl", 24)),), docs_per_shard=8)


@pytest.fixture(scope="module")
def run(tmp_path_factory, data):
    config = run_config(
        data, ModelConfig(dtype="float32"), record=("vocabulary",), sample_tokens=SAMPLE, tokens_per_batch=300
    )
    return collect_here(tmp_path_factory.mktemp("vocabulary") / "run", config)


def promotions(run):
    rows = open_run(run.root).sql(f"from {TABLE} order by shard, stack, layer, tok, expert")
    return rows.to_arrow_table().to_pandas()


def test_every_pick_is_what_the_whole_model_says_of_it(run) -> None:
    """By the derivative of the logits in the direction of the output, text by text."""
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype="float32").eval()
    tables = {name: table.to_pandas() for name, table in content(run).items()}
    checked, apart = 0, 0
    tokens, promoted = tables["tokens"].set_index(["shard", "tok"]), promotions(run)
    for (shard, doc), own in tables["tokens"].groupby(["shard", "doc"]):
        ids = torch.tensor(own.token_id.to_numpy(np.int64))[None]
        picks = promoted[(promoted.shard == shard) & promoted.tok.isin(own.tok)]
        if doc % 4 or picks.empty:
            continue
        for layer, put_out, stream in whole_pass(model, ids):
            for pick in picks[picks.layer == layer].itertuples():
                place = int(tokens.loc[(shard, pick.tok)].position)
                ids_k, f_kh, g_k = (each[place] for each in put_out)
                number = ids_k.tolist().index(pick.expert)
                raised_v = derivative(model, stream[place], f_kh[number])
                best = raised_v.topk(4)
                checked += 1
                if (best.values[:3] - best.values[1:]).min() > 1e-4:
                    apart += 1
                    assert [getattr(pick, name) for name in PROMOTED] == best.indices[:3].tolist()
                if place + 1 == ids.shape[1]:
                    assert np.isnan(pick.attribution)
                else:
                    expected = g_k[number] * (raised_v[ids[0, place + 1]] - raised_v.mean())
                    assert pick.attribution == pytest.approx(float(expected), rel=1e-3, abs=1e-5)
    assert checked > 500
    assert apart > 0.9 * checked


def whole_pass(model, ids):
    """Of each layer: number, what its chosen experts put out (ids, outputs, weights), the stream before the norm."""
    calls, seen = {}, {}
    routers = find_routers(model.model)
    hooks = [ExpertsApart(experts_of(one), lambda call, n=one.layer: calls.update({n: call})) for one in routers]
    handle = model.model.norm.register_forward_pre_hook(lambda _module, arguments: seen.update(stream=arguments[0][0]))
    with torch.inference_mode():
        for hook in hooks:
            hook.__enter__()
        model(ids)
        for hook in hooks:
            hook.__exit__(None, None, None)
    handle.remove()
    for one in routers:
        call = calls[one.layer]
        yield one.layer, (call.experts_rk, call.outputs_rkh, call.weights_rk), seen["stream"]


def derivative(model, stream_h, part_h):
    """How the logits change with the part, the divisor of the norm held fixed."""
    scale_h = model.model.norm.weight / stream_h.square().mean().sqrt()
    with torch.inference_mode():
        return model.lm_head(part_h * scale_h)


def test_all_picks_of_the_sample_are_there_and_nothing_else_changes(run, tmp_path, data) -> None:
    tables = content(run)
    sizes = promotions(run).groupby(["shard", "layer"]).tok.agg(["nunique", "size"])
    ordinary = tables["tokens"].to_pandas().query("not is_special").groupby("shard").size()
    for (shard, _), (sampled, picks) in sizes.iterrows():
        assert sampled == min(SAMPLE, ordinary[shard])
        assert picks == 8 * sampled
    plain = collect_here(tmp_path / "plain", run_config(data, ModelConfig(dtype="float32"), tokens_per_batch=300))
    assert content(plain)["routing"].equals(tables["routing"])
    everything = run_config(
        data, ModelConfig(dtype="float32"), record=("outputs", "loss", "similarity", "vocabulary"),
        sample_tokens=SAMPLE, tokens_per_batch=300,
    )  # fmt: skip
    together = collect_here(tmp_path / "all", everything)
    assert content(together)["routing"].equals(tables["routing"])
    joint, alone = promotions(together), promotions(run)
    np.testing.assert_allclose(joint.attribution, alone.attribution, rtol=1e-3, atol=1e-5)
    assert verify(run).wrong == verify(together).wrong == {}


def test_what_hides_tokens_is_refused() -> None:
    for kind in ("drop", "hash"):
        with pytest.raises(ValueError, match=f"--token-ids {kind} hides"):
            CaptureConfig(record=("vocabulary",), token_ids=kind)


def test_an_encoder_alone_is_refused() -> None:
    model = tiny(family("switch_transformers"))
    routers = [router for router in find_routers(model) if router.token_stack == "encoder"]
    with pytest.raises(ValueError, match="an encoder writes no tokens"):
        VocabularyRecorder(model, routers, CaptureConfig(record=("vocabulary",)))
