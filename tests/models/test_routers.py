"""How each kind of router is read: cases worked out by hand, and DeepSeek-V3's formula in numpy."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from collector.models.families import family, tiny
from collector.models.routers import Router, find_routers


@pytest.fixture(autouse=True)
def _one_thread_and_no_gradients():
    torch.set_num_threads(1)
    with torch.inference_mode():
        yield


def model_of(name, **fields):
    return tiny(family(name), seed=1, **fields)


def router_in(block, name="router"):
    module = block.get_submodule(name)
    return Router(name=f"layers.0.mlp.{name}", layer=0, module=module, owner=block)


def passing_through(module, name):
    """Makes a Linear layer pass its input on, so that hidden states are logits."""
    with torch.no_grad():
        module.get_submodule(name).weight.copy_(torch.eye(len(module.get_submodule(name).weight)))
    return module.eval()


def softmax(x):
    x = np.exp(np.asarray(x, dtype=np.float64))
    return x / x.sum(-1, keepdims=True)


# Switch


def switch_router(n_experts=3, capacity=1):
    from transformers import SwitchTransformersConfig
    from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router

    config = SwitchTransformersConfig(d_model=n_experts, num_experts=n_experts, expert_capacity=capacity)
    module = passing_through(SwitchTransformersTop1Router(config), "classifier")
    return Router(name="encoder.block.1.layer.1.mlp.router", layer=1, module=module)


def test_switch_records_the_choice_of_dropped_tokens_too():
    """Capacity 1 per sequence: the second token of an expert in a row is dropped."""
    hidden = torch.tensor([[[2.0, 0, 0], [1, 0, 0], [0, 3, 0]], [[2, 1, 0], [0, 0, 1], [5, 0, 0]]])
    router = switch_router()
    reading = router.read(router.module(hidden))
    assert reading.experts_tk.flatten().tolist() == [0, 0, 1, 0, 2, 0]
    assert reading.dropped_tk.flatten().tolist() == [False, True, False, False, False, True]
    np.testing.assert_allclose(reading.weights_tk, softmax(hidden.reshape(6, 3)).max(1, keepdims=True), rtol=1e-6)
    assert torch.equal(reading.logits_te, hidden.reshape(6, 3))


def test_switch_chooses_among_probabilities_rounded_to_the_input():
    """In bfloat16 the two largest probabilities are often equal; the first of them is the module's choice."""
    router = switch_router(n_experts=4, capacity=10_000)
    hidden = torch.randn(1, 4096, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    mask, probability, logits = router.module(hidden)
    reading = router.read((mask, probability, logits))
    assert torch.equal(reading.experts_tk.flatten(), mask.argmax(-1).flatten())
    assert not torch.equal(reading.experts_tk.flatten(), logits.argmax(-1).flatten()), "ties must occur in this test"
    assert reading.weights_tk.dtype == torch.bfloat16
    assert not reading.dropped_tk.any()


# NLLB-MoE


def nllb_router(**fields):
    from transformers import NllbMoeConfig
    from transformers.models.nllb_moe.modeling_nllb_moe import NllbMoeTop2Router

    module = NllbMoeTop2Router(NllbMoeConfig(d_model=3, num_experts=3, **fields))
    return Router(name="encoder.layers.3.ffn.router", layer=3, module=passing_through(module, "classifier"))


# First and second choices: 01, 01, 02, 10.
NLLB_HIDDEN = torch.tensor([[3.0, 2, 0], [3, 1, 0], [4, 0, 2], [1, 2, 0]])
NLLB_CHOICES = [[0, 1], [0, 1], [0, 2], [1, 0]]


def test_nllb_records_drops_of_both_picks():
    """4 tokens at fraction 0.5: capacity 2, first picks before second ones.

    Expert 0 is the first pick of three tokens, so the third (token 2) is dropped, and the second pick of token 3.
    Expert 1 has one first pick (token 3), one second pick fits (token 0), the next (token 1) is dropped.
    A token's weights are normalised over the picks that it keeps.
    """
    router = nllb_router(moe_eval_capacity_token_fraction=0.5)
    reading = router.read(router.module(NLLB_HIDDEN))
    assert reading.experts_tk.tolist() == NLLB_CHOICES
    assert reading.dropped_tk.tolist() == [[False, False], [False, True], [True, False], [False, True]]
    p = softmax(NLLB_HIDDEN)
    both = p[0, :2] / p[0, :2].sum()
    np.testing.assert_allclose(reading.weights_tk, [both, [1, 0], [0, 1], [1, 0]], rtol=1e-6)
    assert torch.equal(reading.logits_te, NLLB_HIDDEN)


def test_nllb_at_full_capacity_drops_nothing():
    router = nllb_router()
    reading = router.read(router.module(NLLB_HIDDEN))
    assert reading.experts_tk.tolist() == NLLB_CHOICES
    assert not reading.dropped_tk.any()
    p = np.take_along_axis(softmax(NLLB_HIDDEN), np.array(NLLB_CHOICES), 1)
    np.testing.assert_allclose(reading.weights_tk, p / p.sum(1, keepdims=True), rtol=1e-6)


def test_nllb_with_a_random_second_expert_is_refused():
    router = nllb_router(second_expert_policy="sampling")
    with pytest.raises(ValueError, match=r"layers\.3\.ffn\.router .*at random .*'sampling'.*set it to 'all'"):
        router.read(router.module(NLLB_HIDDEN.clone()))


# JetMoE, Llama 4, DBRX, Gemma 4, Zaya, Doge


def test_jetmoe_undoes_the_sort_by_expert():
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeTopKGating

    router = router_in(nn.ModuleDict({"router": passing_through(JetMoeTopKGating(4, 4, 2), "layer")}))
    hidden = torch.tensor([[0.0, 1, 2, 5], [4, 1, 0, 3], [0, 3, 2, 1]])
    reading = router.read(router.module(hidden))
    assert reading.experts_tk.tolist() == [[3, 2], [0, 3], [1, 2]]
    np.testing.assert_allclose(reading.weights_tk, softmax([[5, 2], [4, 3], [3, 2]]), rtol=1e-6)
    assert torch.equal(reading.logits_te, hidden)


def test_llama4_weights_are_sigmoids_of_the_chosen_logits():
    from transformers import Llama4TextConfig
    from transformers.models.llama4.modeling_llama4 import Llama4Router

    module = Llama4Router(Llama4TextConfig(hidden_size=3, num_local_experts=3, num_experts_per_tok=2))
    router = router_in(nn.ModuleDict({"router": passing_through(module, "")}))
    hidden = torch.tensor([[0.0, -1, 2], [-200, -300, -100]])
    reading = router.read(router.module(hidden))
    assert reading.experts_tk.tolist() == [[2, 0], [2, 0]], "also where a chosen score is 0 in float32"
    np.testing.assert_allclose(reading.weights_tk, 1 / (1 + np.exp(-np.array([[2.0, 0], [-100, -200]]))), atol=1e-7)
    assert torch.equal(reading.logits_te, hidden)


def test_dbrx_weights_are_normalised_by_the_block():
    block = model_of("dbrx").blocks[0].ffn
    router = router_in(block)
    hidden = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    logits = router.module(hidden)
    reading = router.read(logits)
    p = softmax(logits)
    experts = np.argsort(-p, 1)[:, :2]
    weights = np.take_along_axis(p, experts, 1)
    np.testing.assert_array_equal(reading.experts_tk, experts)
    np.testing.assert_allclose(reading.weights_tk, weights / weights.sum(1, keepdims=True), rtol=1e-5)


def test_gemma4_returns_probabilities_which_become_logits():
    model = model_of("gemma4")
    router = find_routers(model)[0]
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    outputs = router.module(hidden)
    reading = router.read(outputs)
    logits = router.module.proj(router.module.norm(hidden) * router.module.scale * 32**-0.5)
    torch.testing.assert_close(reading.logits_te.softmax(-1), logits.softmax(-1))
    assert torch.equal(reading.experts_tk, outputs[2])
    scale = router.module.per_expert_scale[outputs[2]]
    torch.testing.assert_close((reading.weights_tk / scale).sum(-1), torch.ones(5))


def test_zaya_records_the_skipped_layer_as_the_last_expert():
    """2 experts and the skip: tokens choose expert 1, the skip, and the real expert 0."""
    router = find_routers(model_of("zaya"))[0]
    logits = torch.tensor([[0.0, 2, 1], [0, 1, 3], [2, 0, 1]])
    p = logits.softmax(-1)
    weights, experts = torch.stack([p[0, 1], torch.tensor(0.0), p[2, 0]])[:, None], torch.tensor([[1], [0], [0]])
    reading = router.read((logits, weights, experts, torch.zeros(1, 3, 16)))
    assert reading.experts_tk.tolist() == [[1], [2], [0]]
    assert torch.equal(reading.weights_tk, weights)


def test_zaya_skips_when_its_bias_says_so():
    model = model_of("zaya")
    router = find_routers(model)[1]
    with torch.no_grad():
        router.module.balancing_biases[-1] = 5.0
    reading = router.read(router.module(torch.randn(2, 3, 32)))
    assert reading.experts_tk.flatten().tolist() == [8] * 6
    assert reading.logits_te.shape == (6, 9)


def test_doge_chooses_pairs_of_keys():
    """2 keys a half: experts (x, y) have the id 2x + y and the sum of both logits."""
    from transformers import DogeConfig
    from transformers.models.doge.modeling_doge import DogeCDMoE

    config = DogeConfig(hidden_size=4, intermediate_size=4, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True)
    block = passing_through(DogeCDMoE(config), "router_gate")
    router = Router(name="layers.0.mlp", layer=0, module=block)
    hidden = torch.tensor([[[0.0, 3, 1, 0], [2, 0, 0, 1]]])
    # The module reads the first two tokens' worth of memory as x and the rest as y: x = 03, 10 and y = 20, 01.
    reading = router.read(block(hidden))
    assert reading.logits_te.tolist() == [[2, 0, 5, 3], [1, 2, 0, 1]]
    assert reading.experts_tk.tolist()[0] == [2, 3]
    assert reading.experts_tk.tolist()[1][0] == 1
    np.testing.assert_allclose(reading.weights_tk, softmax([[5, 3], [2, 1]]), rtol=1e-6)


# Families that return what they decided


def deepseek_v3(hidden, router):
    """Sigmoid scores, biased choice in the groups with the best two, unbiased weights: arXiv 2412.19437, 2.1.2."""
    gate = router.module
    n_groups, kept, k = gate.num_group, gate.topk_group, gate.top_k
    logits = hidden.double().numpy() @ gate.weight.double().numpy().T
    scores = 1 / (1 + np.exp(-logits))
    biased = scores + gate.e_score_correction_bias.double().numpy()
    groups = biased.reshape(len(biased), n_groups, -1)
    value = np.sort(groups, -1)[:, :, -2:].sum(-1)
    open_groups = value >= np.sort(value, 1)[:, [-kept]]
    choosable = np.where(np.repeat(open_groups, groups.shape[-1], 1), biased, -np.inf)
    experts = np.argsort(-choosable, 1)[:, :k]
    weights = np.take_along_axis(scores, experts, 1)
    return logits, experts, weights / weights.sum(1, keepdims=True) * gate.routed_scaling_factor


def test_sigmoid_bias_and_groups_equal_deepseek_v3s_formula():
    router = find_routers(model_of("deepseek_v3", routed_scaling_factor=2.5))[0]
    hidden = torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
    reading = router.read(router.module(hidden))
    logits, experts, weights = deepseek_v3(hidden, router)
    order, expected_order = np.argsort(reading.experts_tk.numpy(), 1), np.argsort(experts, 1)
    np.testing.assert_array_equal(np.take_along_axis(reading.experts_tk.numpy(), order, 1), np.sort(experts, 1))
    np.testing.assert_allclose(
        np.take_along_axis(reading.weights_tk.numpy(), order, 1),
        np.take_along_axis(weights, expected_order, 1),
        rtol=1e-4,
    )
    np.testing.assert_allclose(reading.logits_te, logits, atol=1e-5)
    plain = np.sort(np.argsort(-logits, 1)[:, :2], 1)
    assert (plain != np.sort(experts, 1)).any(1).mean() > 0.2, "bias and groups must change choices in this test"


def test_longcat_counts_its_zero_experts():
    router = find_routers(model_of("longcat_flash"))[0]
    reading = router.read(router.module(torch.randn(300, 32, generator=torch.Generator().manual_seed(0))))
    assert reading.logits_te.shape == (300, 8 + 2)
    assert reading.experts_tk.max() >= 8


def test_deepseek_v4_hash_layers_choose_by_token_id():
    routers = find_routers(model_of("deepseek_v4"))
    assert [router.layer for router in routers] == [0, 1, 2]
    assert type(routers[0].module).__name__ == "DeepseekV4HashRouter"
    ids = torch.tensor([[5, 9], [5, 7]])
    reading = routers[0].read(routers[0].module(torch.randn(2, 2, 32), ids))
    assert torch.equal(reading.experts_tk, routers[0].module.tid2eid[ids.flatten()])


def test_ernie_vl_is_read_at_its_text_router():
    routers = find_routers(model_of("ernie4_5_vl_moe"))
    assert [router.name for router in routers] == ["layers.1.mlp.text_moe.gate", "layers.2.mlp.text_moe.gate"]


def test_batch_and_positions_are_flattened():
    router = Router(name="layers.0.gate", layer=0, module=nn.Identity())
    logits, weights, experts = torch.rand(2, 3, 4), torch.rand(2, 3, 2), torch.randint(0, 4, (2, 3, 2))
    reading = router.read((logits, weights, experts))
    assert torch.equal(reading.logits_te, logits.view(6, 4))
    assert torch.equal(reading.weights_tk, weights.view(6, 2))
    assert torch.equal(reading.experts_tk, experts.view(6, 2))
    assert reading.dropped_tk is None


# Stacks


def test_routers_of_one_layer_are_told_apart_by_their_paths():
    found = {router.name: router.stack for router in find_routers(model_of("jetmoe"), layers=[1])}
    assert found == {
        "layers.1.mlp.router": "decoder.mlp",
        "layers.1.self_attention.experts.router": "decoder.self_attention",
    }


@pytest.mark.parametrize("name", ["switch_transformers", "nllb_moe"])
def test_translation_models_have_two_stacks(name):
    model = model_of(name)
    found = [(router.stack, router.layer) for router in find_routers(model)]
    assert found == [("encoder", 1), ("encoder", 3), ("decoder", 1)]
    assert [router.layer for router in find_routers(model, stacks=["decoder"])] == [1]
    assert [router.stack for router in find_routers(model, layers=[1])] == ["encoder", "decoder"]
    with pytest.raises(ValueError, match=r"--layers \[3\]: .* has routers in layers \[1\]"):
        find_routers(model, layers=[3], stacks=["decoder"])


def test_a_stack_is_named_by_the_part_before_the_dot():
    model = model_of("jetmoe")
    assert find_routers(model, stacks=["decoder"]) == find_routers(model)
    with pytest.raises(ValueError, match=r"--stacks \['encoder'\]: no router there; JetMoeModel .* \['decoder'\]"):
        find_routers(model, stacks=["encoder"])


# Errors


def test_a_config_that_builds_no_expert_is_refused():
    with pytest.raises(ValueError, match=r"DogeModel has no router: its class declares DogeCDMoE.*config"):
        find_routers(model_of("doge", is_moe=False))


def test_a_layer_without_router_is_refused():
    with pytest.raises(ValueError, match=r"--layers \[0, 7\]: no router there; .* has routers in layers \[1, 2\]"):
        find_routers(model_of("qwen3_moe"), [0, 1, 7])


LOGITS, WEIGHTS, EXPERTS = torch.rand(3, 4), torch.rand(3, 2), torch.zeros(3, 2, dtype=torch.long)


@pytest.mark.parametrize(
    "outputs",
    [
        LOGITS,
        (LOGITS, WEIGHTS),
        (LOGITS, EXPERTS, WEIGHTS),
        (LOGITS, WEIGHTS, EXPERTS[:, :1]),
        (LOGITS, WEIGHTS, EXPERTS.bool()),
        (LOGITS[:2], WEIGHTS, EXPERTS),
        (LOGITS, WEIGHTS, EXPERTS, LOGITS),
        (LOGITS, WEIGHTS, None),
        SimpleNamespace(logits=LOGITS),
    ],
    ids=["logits", "pair", "swapped", "other k", "mask", "other T", "four", "none", "object"],
)
def test_another_shape_is_refused_by_name(outputs):
    router = Router(name="layers.4.gate", layer=4, module=nn.Identity())
    with pytest.raises(ValueError, match=r"router layers\.4\.gate \(Identity\) does not return \(logits, weights, exp"):
        router.read(outputs)
