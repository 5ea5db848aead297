"""Operations of a token, against a count of real forward passes, and against what is published."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import OlmoeConfig, OlmoeModel

from collector.config import ModelConfig
from collector.models import compute, loading
from collector.models.compute import Component, components
from collector.query.warehouse import open_run
from tests.helpers.runs import collect_here, run_config, write_jsonl
from tests.models.test_families import built

EXACT = [
    "afmoe", "deepseek_v3", "dots1", "glm4_moe", "gpt_oss", "hunyuan_v1_moe", "minimax_m2", "mimo_v2_flash", "mixtral",
    "mistral4", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "step3p7",
]  # fmt: skip
"""With shared experts, dense layers, latent attention, windows and sinks among them."""
TOKENS = 12


def counted(model, ids: torch.Tensor) -> int:
    """What torch counts, without the rotary embedding, which is no part of any layer."""
    with torch.inference_mode(), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, use_cache=False)
    rotary = [sum(c.values()) for name, c in counter.get_flop_counts().items() if name.endswith(".rotary_emb")]
    return counter.get_total_flops() - sum(rotary[:1])


def plain_copy(name: str):
    """A model whose every product the counter sees."""
    model = copy.deepcopy(built(name))
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")
    return model


def operations(found: list[Component], top_k: int) -> int:
    """Of all tokens, each of which sees every position: the plain attention computes those that it masks, too."""
    times = {"experts": top_k}
    return sum(
        TOKENS * (each.flops * times.get(each.component, 1) + TOKENS * each.context_flops) for each in found
    )  # fmt: skip


@pytest.mark.parametrize("name", EXACT)
def test_operations_are_those_that_torch_counts(name: str) -> None:
    model = plain_copy(name)
    ids = torch.arange(3, 3 + TOKENS)[None]
    assert operations(components(model), model.config.get_text_config().num_experts_per_tok) == counted(model, ids)


def test_parameters_are_all_there() -> None:
    for name in (*EXACT, "switch_transformers", "longcat_flash"):
        found = components(built(name))
        assert sum(each.parameters for each in found) == sum(p.numel() for p in built(name).parameters()), name


def test_an_encoder_and_a_decoder_are_apart() -> None:
    found = components(built("switch_transformers"))
    encoder = [each for each in found if each.stack == "encoder"]
    assert {each.component for each in encoder} == {"attention", "router", "experts", "dense", "embedding"}
    assert {each.stack for each in found} == {"encoder", "decoder"}


def test_experts_that_compute_nothing_are_not_among_the_computing_ones() -> None:
    model = built("longcat_flash")
    (experts,) = {each.experts for each in components(model) if each.component == "experts"}
    assert experts == model.config.n_routed_experts < experts + model.config.zero_expert_num


def test_the_published_size_of_olmoe() -> None:
    """OLMoE-1B-7B, arXiv 2409.02060: 6.9 B parameters, 1.3 B active, of which a layer has 67.2 M."""
    with torch.device("meta"):
        model = OlmoeModel(OlmoeConfig(intermediate_size=1024, num_key_value_heads=16))
    found = components(model)
    by_kind = {each.component: each for each in found if each.layer == 5}
    active = by_kind["attention"].flops + by_kind["router"].flops + 8 * by_kind["experts"].flops
    assert active // 2 == 67_239_936
    everything = sum(each.parameters for each in found)
    assert everything + 50304 * 2048 == pytest.approx(6.92e9, rel=1e-3)  # with the unembedding


def test_a_quantized_model_counts_like_any_other(tiny_folder) -> None:
    plain = loading.load(ModelConfig(model=str(tiny_folder)), "cpu").model
    nf4 = loading.load(ModelConfig(model=str(tiny_folder), quantization="nf4"), "cpu").model
    assert components(nf4) == components(plain)


def test_a_run_says_what_its_tokens_cost(tmp_path, tiny_folder, tiny_model, monkeypatch) -> None:
    from collector.config import DataConfig

    data = DataConfig(data=(str(write_jsonl(tmp_path / "texts.jsonl", 5)),))
    run = collect_here(tmp_path / "run", run_config(data, ModelConfig(model=str(tiny_folder))), loaded=tiny_model)
    total = "select sum(flops * if(component = 'experts', 2, 1)) from components"
    expected = sum(each.flops * (2 if each.component == "experts" else 1) for each in components(tiny_model.model))
    assert open_run(run.root).sql(total).fetchall() == [(expected,)]

    def uncountable(_model):
        raise RuntimeError("no such class")

    monkeypatch.setattr(compute, "components", uncountable)
    other = collect_here(tmp_path / "other", run_config(data, ModelConfig(model=str(tiny_folder))), loaded=tiny_model)
    with pytest.raises(ValueError, match="compute reads components, which this run does not have"):
        open_run(other.root).query("compute")
    assert open_run(other.root).query("expert_load").fetchall()
