"""Matrix products: the same numbers as transformers' own, in other precisions and orders."""

from __future__ import annotations

import pytest
import torch

from collector.config import ModelConfig
from collector.models import arithmetic, families, loading
from collector.models.routers import find_routers
from tests.helpers.tiny_models import outputs


@pytest.mark.parametrize("name", families.names())
def test_expert_by_expert_equals_the_familys_own_loop(name):
    model = families.tiny(families.family(name))
    if not any(arithmetic._matrices(module) for module in model.modules()):
        pytest.skip("the family has no replaceable experts implementation")
    model.set_experts_implementation("eager")
    expected = outputs(model)
    model.set_experts_implementation(arithmetic.IMPLEMENTATION)
    torch.testing.assert_close(outputs(model), expected, atol=1e-4, rtol=1e-4)


def test_an_index_that_is_no_experts_is_skipped():
    model = families.tiny(families.family("olmoe"))
    experts = model.layers[0].mlp.experts
    model.set_experts_implementation(arithmetic.IMPLEMENTATION)
    hidden = torch.randn(5, 32)
    index, weights = torch.tensor([[0, 1], [8, 8], [2, 8], [3, 4], [7, 0]]), torch.rand(5, 2)
    with torch.inference_mode():
        out = experts(hidden, index, weights)
        alone = experts(hidden[2:3], index[2:3, :1], weights[2:3, :1])
    assert torch.equal(out[1], torch.zeros(32))
    torch.testing.assert_close(out[2:3], alone)


def test_widening_is_at_least_as_exact_as_emulated_bfloat16():
    """Both against float64 on the same bfloat16 weights and inputs."""
    torch.manual_seed(0)
    layer = torch.nn.Linear(512, 256).bfloat16()
    inputs = torch.randn(64, 512).bfloat16()
    exact = inputs.double() @ layer.weight.double().T + layer.bias.double()
    with torch.inference_mode():
        emulated, wide = layer(inputs), arithmetic._linear(layer, torch.float32, inputs)
    assert wide.dtype == torch.bfloat16
    error = {name: (value.double() - exact).abs().mean() for name, value in (("wide", wide), ("own", emulated))}
    assert error["wide"] <= error["own"] * 1.001


def test_the_weights_keep_their_precision_and_the_routers_their_arithmetic():
    loaded = loading.load(ModelConfig(dtype="bfloat16", compute_dtype="float32"), "cpu")
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.bfloat16}
    assert loaded.compute_dtype == torch.float32
    assert "forward" in vars(loaded.model.layers[0].self_attn.q_proj)
    assert not any("forward" in vars(router.module) for router in find_routers(loaded.model))
    assert outputs(loaded.model).dtype == torch.bfloat16


def test_a_model_computes_in_its_own_precision_where_the_device_has_it(monkeypatch):
    monkeypatch.setattr(arithmetic, "native", lambda _dtype, _device: True)
    loaded = loading.load(ModelConfig(dtype="bfloat16"), "cpu")
    assert loaded.compute_dtype == torch.bfloat16
    assert "forward" not in vars(loaded.model.layers[0].self_attn.q_proj)
    monkeypatch.setattr(arithmetic, "native", lambda _dtype, _device: False)
    assert loading.load(ModelConfig(dtype="bfloat16"), "cpu").compute_dtype == torch.float32
    assert loading.load(ModelConfig(), "cpu").compute_dtype == torch.float32
