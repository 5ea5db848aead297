"""4-bit replicas: what is converted, what stays, and that nothing else changes.

The reference everywhere is a model of plain floats whose weights were replaced by what bitsandbytes
itself makes of them, bitsandbytes' own quantization of the whole tensor, or its table of values.
"""

from __future__ import annotations

import json

import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.nn.parametrize import replace_parameter_4bit
from torch import nn
from transformers import AutoModel, AutoTokenizer, BitsAndBytesConfig

from collector.config import ModelConfig
from collector.models import (
    arithmetic,
    checkpoints,
    families,
    footprint,
    four_bit,
    four_bit_reading,
    loading,
    quantization,
)
from collector.models.loading import DEMO_MODEL
from collector.models.routers import find_routers
from tests.helpers.tiny_models import outputs

SHAPES = [(8, 96, 80), (6, 32, 48), (5, 20, 18), (3, 64)]
"""Whole blocks per expert; two dimensions below a block; blocks that reach over experts; a plain matrix."""
FAMILIES = families.names()


def by_table(packed, state, kind):
    """Each half byte is a row of the table of 16 values, times its block's scale."""
    scales = state.absmax if not state.nested else bnb.dequantize_blockwise(state.absmax, state.state2) + state.offset
    halves = torch.stack([packed.reshape(-1) >> 4, packed.reshape(-1) & 15], dim=1).reshape(-1).long()
    values = bnb.get_4bit_type(kind, device="cpu")[halves] * scales.repeat_interleave(state.blocksize)[: len(halves)]
    return values.reshape(state.shape).to(state.dtype)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES)
def test_pieces_give_what_bitsandbytes_makes_of_the_whole(shape, kind, double, monkeypatch):
    monkeypatch.setattr(four_bit, "_PIECE", 256)
    values = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02).bfloat16()
    packed, state = four_bit.quantize(values, kind, double=double)
    expected, expected_state = bnb.quantize_4bit(values, quant_type=kind, compress_statistics=double)
    assert torch.equal(packed, expected)
    module = nn.Module()
    module.w = nn.Parameter(values)
    four_bit.replace(module, "w", packed, state.as_dict(packed=True))
    # not bnb.dequantize_4bit: with AVX-512 it is wrong for rows of 80 or 48 values
    whole = by_table(expected, expected_state, kind)
    assert torch.equal(module.w, whole)
    assert torch.equal(four_bit_reading.dequantized(module, "w", torch.bfloat16), whole)
    if len(shape) == 3:
        one = four_bit_reading.slices(module, "w", torch.float32)
        assert all(torch.equal(one(index).bfloat16(), whole[index]) for index in range(shape[0]))


def test_a_state_dict_is_the_one_bitsandbytes_writes():
    values = torch.randn(4, 64, 64)
    ours, theirs = nn.Module(), nn.Module()
    ours.w, theirs.w = nn.Parameter(values), nn.Parameter(values)
    four_bit.quantize_parameter(ours, "w", values, "nf4", double=True)
    replace_parameter_4bit(theirs, "w", compress_statistics=True)
    a, b = ours.state_dict(), theirs.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[key], b[key]) for key in a)


def dequantized_copy(model, original):
    """`original` with the values that the 4-bit model has, all in plain floats."""
    for target in quantization.targets(original):
        path, _, name = target.rpartition(".")
        values = getattr(model.get_submodule(path), name).detach().clone()
        original.get_submodule(path)._parameters[name] = nn.Parameter(values, requires_grad=False)
    return original


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_computes_with_4_bits_as_with_the_same_values_in_floats(name):
    """Routers, norms, embeddings and biases stay; experts do not; the experts implementation changes nothing."""
    family = families.family(name)
    plain, model = families.tiny(family), families.tiny(family)
    routers = tuple(f"{router.name}." for router in find_routers(plain))
    quantization.quantize_model(model, "nf4", double=True)
    arithmetic.apply(model, torch.float32, torch.float32, torch.device("cpu"))
    for path, module in plain.named_modules():
        kept = isinstance(module, nn.Embedding) or f"{path}.".startswith(routers)
        for leaf, parameter in module.named_parameters(recurse=False):
            if kept or parameter.ndim == 1 or "bias" in leaf:
                assert not four_bit_reading.is_quantized(model.get_submodule(path), leaf), f"{path}.{leaf}"
    if name != "doge":  # its experts are rows of embeddings
        assert quantization.unquantized_experts(model) == []
    reference = dequantized_copy(model, plain)
    torch.testing.assert_close(outputs(model), outputs(reference), atol=1e-4, rtol=1e-4)


# -- loading -----------------------------------------------------------------------------------------


def same_state(one, other):
    a, b = one.model.state_dict(), other.model.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture(scope="module")
def nf4() -> loading.LoadedModel:
    return loading.load(ModelConfig(dtype="bfloat16", quantization="nf4"), "cpu")


def test_loading_tensor_by_tensor_equals_quantizing_the_loaded_model(nf4):
    plain = loading.load(ModelConfig(dtype="bfloat16"), "cpu")
    quantization.quantize_model(plain.model, "nf4", double=True)
    assert same_state(nf4, plain)


def test_the_demo_is_quantized_but_for_routers_norms_and_embeddings(nf4):
    layers, hidden, inner, experts, words = 8, 64, 32, 64, 8192
    quantized = layers * (4 * hidden * hidden + experts * 3 * hidden * inner)
    rest = words * hidden + layers * (experts * hidden + 4 * hidden) + hidden
    held = quantization.treatments(nf4.model)
    assert {how: part.parameters for how, part in held.items()} == {"nf4": quantized, "bfloat16": rest}
    blocks = quantized // 64
    assert held["nf4"].bytes == pytest.approx(quantized / 2 + blocks * (1 + 4 / 256), rel=0.01)
    assert held["bfloat16"].bytes == 2 * rest


def test_what_is_told_before_the_first_batch(nf4):
    told = footprint.describe(nf4.model, nf4.compute_dtype)["summary"]
    assert "3.28 M in nf4, 559 k in bfloat16" in told
    assert "less than in bfloat16" in told


def test_random_weights_are_quantized_alike_in_every_replica():
    config = ModelConfig(weights="random", seed=5, dtype="bfloat16", quantization="nf4")
    one, other = loading.load(config, "cpu"), loading.load(config, "cpu")
    assert same_state(one, other)
    plain = loading.load(ModelConfig(weights="random", seed=5, dtype="bfloat16"), "cpu")
    quantization.quantize_model(plain.model, "nf4", double=True)
    assert same_state(one, plain), "of the weights that the unquantized baseline has"


def test_a_quantized_copy_loads_as_what_it_was_made_of(nf4, tmp_path):
    checkpoints.save(nf4.model, nf4.tokenizer, tmp_path / "copy")
    again = loading.load(ModelConfig(model=str(tmp_path / "copy")), "cpu")
    assert same_state(nf4, again)
    assert loading.fingerprint(nf4.model) == loading.fingerprint(again.model)
    assert torch.equal(outputs(nf4.model), outputs(again.model))
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["quantization_config"]["kind"] == "nf4"


def test_a_quantized_copy_in_several_files(nf4, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "_SHARD_BYTES", 2**19)
    checkpoints.save(nf4.model, nf4.tokenizer, tmp_path / "copy")
    assert len(list((tmp_path / "copy").glob("*.safetensors"))) > 3
    assert same_state(nf4, loading.load(ModelConfig(model=str(tmp_path / "copy")), "cpu"))
    with pytest.raises(ValueError, match="not empty"):
        checkpoints.save(nf4.model, nf4.tokenizer, tmp_path / "copy")


@pytest.fixture(scope="module")
def usual_recipe(tmp_path_factory):
    """What transformers' own 4-bit loading saves: Linear layers in 4 bits, fused experts in 16."""
    folder = tmp_path_factory.mktemp("usual")
    recipe = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
                                llm_int8_skip_modules=["gate"])  # fmt: skip
    model = AutoModel.from_pretrained(DEMO_MODEL, dtype=torch.bfloat16, quantization_config=recipe, device_map="cpu")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    return str(folder)


def test_a_checkpoint_that_left_its_experts_out_is_refused(usual_recipe):
    with pytest.raises(ValueError, match=r"experts\.(down|gate_up)_proj.*--quantization nf4.*--unquantized-experts"):
        loading.load(ModelConfig(model=usual_recipe), "cpu")


def test_a_checkpoint_that_left_its_experts_out_is_accepted_or_completed(usual_recipe, nf4):
    accepted = loading.load(ModelConfig(model=usual_recipe, unquantized_experts=True), "cpu")
    assert quantization.treatments(accepted.model)["nf4"].parameters == 8 * 4 * 64 * 64
    completed = loading.load(ModelConfig(model=usual_recipe, quantization="nf4"), "cpu")
    assert same_state(completed, nf4)


def test_int8_converts_linear_layers_only():
    loaded = loading.load(ModelConfig(dtype="bfloat16", quantization="int8-linear"), "cpu")
    held = quantization.treatments(loaded.model)
    assert held["int8"].parameters == 8 * 4 * 64 * 64
    routers = find_routers(loaded.model)
    assert {router.module.weight.dtype for router in routers} == {torch.bfloat16}
    plain = loading.load(ModelConfig(dtype="bfloat16"), "cpu")
    close = (outputs(loaded.model) - outputs(plain.model)).float().abs().mean()
    assert 0 < close < 0.1 * outputs(plain.model).float().abs().mean()


def test_a_quantized_model_states_what_it_takes(monkeypatch):
    monkeypatch.setattr(footprint, "free_bytes", lambda _device: 10_000_000)
    with pytest.raises(
        ValueError, match=r"15\.3 MB in float32.*free are 10\.0 MB on cpu.*--dtype bfloat16 \(7\.7 MB\) or .*nf4"
    ):
        loading.load(ModelConfig(), "cpu")
    loading.load(ModelConfig(quantization="nf4"), "cpu")
