"""Compiled models choose the same experts, with one compilation for all layers and shapes."""

from __future__ import annotations

import pytest
import torch
from transformers import OlmoeConfig, OlmoeModel
from transformers.integrations import moe

from collector.config import ModelConfig
from collector.models import compiling, loading
from collector.models.routers import find_routers
from tests.conftest import TINY
from tests.helpers.capturing import router_capture


def made(dtype: torch.dtype = torch.float32) -> OlmoeModel:
    torch.manual_seed(0)
    return OlmoeModel(OlmoeConfig(**(TINY | {"num_hidden_layers": 4}))).to(dtype).eval()


def batch(rows: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(3, 8000, (rows, length), generator=torch.Generator().manual_seed(rows))
    mask = torch.ones_like(ids)
    mask[0, length // 2 :] = 0
    return ids, mask


@pytest.mark.slow
def test_a_compiled_model_routes_like_the_plain_one_and_compiles_once_for_all_layers_and_shapes():
    plain, compiled = made(), made()
    assert "layers.0.self_attn" in (names := compiling.compile_parts(compiled))
    assert not any("gate" in name or name.endswith(".mlp") for name in names), "routers run as they are"
    shapes = [(2, 20), (3, 31), (4, 9), (5, 17)]
    for number, shape in enumerate(shapes):
        # The first two shapes may compile: the second one shows what varies.
        with torch.compiler.set_stance("fail_on_recompile" if number > 1 else "default"):
            results = []
            for model in (plain, compiled):
                with router_capture(model, find_routers(model)) as capture:
                    results.append(capture.run(*batch(*shape)).wait()[0])
        for one, other in zip(*results, strict=True):
            assert torch.equal(one.experts_tk.sort(1)[0], other.experts_tk.sort(1)[0])
            torch.testing.assert_close(one.weights_tk, other.weights_tk, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_summed_pick_by_pick_equal_transformers_own(dtype):
    experts = made(dtype).layers[0].mlp.experts
    hidden = torch.randn(50, TINY["hidden_size"]).to(dtype)
    index = torch.rand(50, experts.num_experts).argsort(1)[:, :2]
    weights = torch.rand(50, 2).to(dtype)
    with torch.inference_mode():
        own, theirs = (
            function(experts, hidden, index, weights)
            for function in (compiling.grouped_by_pick, moe.grouped_mm_experts_forward)
        )
    torch.testing.assert_close(own, theirs)


@pytest.mark.parametrize("quantization", ["nf4", "int8-linear"])
def test_quantized_weights_are_refused_by_name(quantization):
    with pytest.raises(ValueError, match="--compile takes plain weights"):
        loading.load(ModelConfig(quantization=quantization, compile=True), "cpu")
