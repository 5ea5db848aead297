"""The capture against independent recomputations, on padded batches of mixed lengths.

float32 throughout: there, batching changes a value by rounding only, so ids must agree wherever
the margin is above rounding, in every layer.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from collector.capture import batches
from collector.capture.padding import ExpertsWithoutPadding, Grid
from collector.config import ModelConfig
from collector.models import loading
from collector.models.routers import find_routers
from tests.helpers.capturing import router_capture

ROUNDING = 5e-6


def capture_all(loaded, texts, side="right", budget=512, layers=None):
    """{layer: (experts, weights, statistics)} over all texts, tokens in document order."""
    table = batches.tokenize(loaded.tokenizer, texts, 512)
    routers = find_routers(loaded.model, layers)
    out = {}
    with router_capture(loaded.model, routers) as capture:
        for documents in batches.pack(table.lengths, budget):
            batch = batches.pad(table, documents, loaded.pad_id, side)
            decisions = capture.run(torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)).wait()[0]
            for router, decision in zip(routers, decisions, strict=True):
                n, k = len(table.ids), decision.experts_tk.shape[1]
                experts, weights, stats = out.setdefault(
                    router.layer, (np.full((n, k), -1), np.full((n, k), np.nan), np.full((n, 3), np.nan))
                )
                experts[batch.slots] = decision.experts_tk.numpy()
                weights[batch.slots] = decision.weights_tk.float().numpy()
                stats[batch.slots] = decision.statistics_3t.numpy().T
    return table, out


def assert_same_routing(captured, logits, k):
    """Compares with the softmax, top-k, entropy, mass and margin of full logits, all by numpy."""
    experts, weights, stats = captured
    shifted = np.exp(logits - logits.max(1, keepdims=True))
    p = shifted / shifted.sum(1, keepdims=True)
    order = np.argsort(-p, axis=1, kind="stable")
    ranked = np.take_along_axis(p, order, 1)
    entropy = -(p * np.log(p)).sum(1)
    np.testing.assert_allclose(stats[:, 0], entropy, atol=1e-4)
    np.testing.assert_allclose(stats[:, 1], ranked[:, :k].sum(1), atol=1e-4)
    np.testing.assert_allclose(stats[:, 2], ranked[:, k - 1] - ranked[:, k], atol=1e-4)
    np.testing.assert_allclose(weights, ranked[:, :k], atol=1e-4)
    np.testing.assert_allclose(weights, np.take_along_axis(p, experts, 1), atol=1e-4)
    clear = ranked[:, k - 1] - ranked[:, k] > ROUNDING
    assert clear.mean() > 0.95, "the comparison must cover nearly all tokens"
    np.testing.assert_array_equal(np.sort(experts[clear]), np.sort(order[clear, :k]))


@pytest.mark.parametrize("side", ["right", "left"])
def test_equals_transformers_own_router_logits_one_sentence_at_a_time(demo_model, mixed_texts, side):
    _, captured = capture_all(demo_model, mixed_texts, side)
    reference = []
    for text in mixed_texts:
        inputs = demo_model.tokenizer(text, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            reference.append(demo_model.model(**inputs, output_router_logits=True).router_logits)
    assert sorted(captured) == list(range(8))
    for layer in captured:
        logits = torch.cat([logits[layer] for logits in reference]).double().numpy()
        assert_same_routing(captured[layer], logits, k=8)


def test_equals_a_router_written_by_hand(demo_model, mixed_texts):
    """Logits = hidden @ W.T from the hidden states that reach the router, unbatched, in numpy."""
    _, captured = capture_all(demo_model, mixed_texts)
    hidden = {layer: [] for layer in captured}
    handles = [
        block.mlp.register_forward_pre_hook(lambda _m, args, at=layer: hidden[at].append(args[0][0].double().numpy()))
        for layer, block in enumerate(demo_model.model.layers)
    ]
    for text in mixed_texts:
        with torch.no_grad():
            demo_model.model(torch.tensor([demo_model.tokenizer(text)["input_ids"]]))
    for handle in handles:
        handle.remove()
    for layer in captured:
        weight = demo_model.model.layers[layer].mlp.gate.weight.detach().double().numpy()
        assert_same_routing(captured[layer], np.concatenate(hidden[layer]) @ weight.T, k=8)


def test_in_bfloat16_it_records_what_the_same_batch_gives_transformers(mixed_texts):
    """In 16 bits batching itself changes the numbers; on one and the same batch all is equal."""
    loaded = loading.load(ModelConfig(dtype="bfloat16"), "cpu")
    table = batches.tokenize(loaded.tokenizer, mixed_texts, 512)
    batch = batches.pad(table, np.arange(len(mixed_texts)), loaded.pad_id)
    ids, mask = torch.from_numpy(batch.input_ids), torch.from_numpy(batch.attention_mask)
    with router_capture(loaded.model, find_routers(loaded.model)) as capture:
        decisions = capture.run(ids, mask).wait()[0]
    with torch.no_grad():
        logits = loaded.model(input_ids=ids, attention_mask=mask, output_router_logits=True).router_logits
    for decision, layer_logits in zip(decisions, logits, strict=True):
        real = layer_logits[mask.flatten().bool()]
        weights, experts = torch.topk(real.float().softmax(-1), 8)
        assert torch.equal(decision.experts_tk.long(), experts)
        assert torch.equal(decision.weights_tk, weights.bfloat16())


def test_rows_are_the_mask_times_the_layers(demo_model, mixed_texts):
    table, captured = capture_all(demo_model, mixed_texts)
    assert sum(len(experts) for experts, _, _ in captured.values()) == len(table.ids) * 8
    for experts, weights, _ in captured.values():
        assert experts.min() >= 0
        assert np.isfinite(weights).all()


def test_left_and_right_padding_agree(demo_model, mixed_texts):
    _, right = capture_all(demo_model, mixed_texts, "right")
    _, left = capture_all(demo_model, mixed_texts, "left")
    for layer in right:
        clear = right[layer][2][:, 2] > ROUNDING
        np.testing.assert_array_equal(np.sort(right[layer][0][clear]), np.sort(left[layer][0][clear]))
        np.testing.assert_allclose(right[layer][1], left[layer][1], atol=1e-4)


def test_nothing_runs_after_the_last_captured_router(demo_model):
    ran = []
    handles = [
        block.mlp.experts.register_forward_hook(lambda *_a, at=layer: ran.append(at))
        for layer, block in enumerate(demo_model.model.layers)
    ]
    handles.append(demo_model.model.norm.register_forward_hook(lambda *_a: ran.append("norm")))
    ids = torch.tensor([[5, 6, 7]])
    with router_capture(demo_model.model, find_routers(demo_model.model, [1, 3])) as capture:
        ran.clear()
        decisions = capture.run(ids, torch.ones_like(ids)).wait()[0]
    for handle in handles:
        handle.remove()
    assert ran == [0, 1, 2], "layers 0-2 whole, layer 3 up to its router"
    assert len(decisions) == 2


PADDED = (torch.tensor([[5, 6, 7, 8], [9, 3, 0, 0]]), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]]))


def rows_that_experts_see(model, ids, mask):
    """Rows per call of an experts module in one captured forward pass."""
    seen = []
    with router_capture(model, find_routers(model)) as capture:
        handles = [
            module.register_forward_pre_hook(lambda _m, args: seen.append([len(each) for each in args]))
            for name, module in model.named_modules()
            if name.endswith(".experts")
        ]
        capture.run(ids, mask).wait()[0]
        for handle in handles:
            handle.remove()
    return seen


def test_padding_reaches_no_expert(tiny_model):
    assert rows_that_experts_see(tiny_model.model, *PADDED) == [[6, 6, 6]] * 2, "the last router ends the pass"
    left = tuple(tensor.flip(1) for tensor in PADDED)
    assert rows_that_experts_see(tiny_model.model, *left) == [[6, 6, 6]] * 2
    ids, mask = PADDED[0], torch.ones_like(PADDED[1])
    assert rows_that_experts_see(tiny_model.model, ids, mask) == [[8, 8, 8]] * 2


@pytest.mark.parametrize("side", ["right", "left"])
def test_records_are_the_same_as_with_padding_in_the_experts(demo_model, mixed_texts, side, monkeypatch):
    _, without = capture_all(demo_model, mixed_texts, side, budget=2048)
    monkeypatch.setattr("collector.capture.padding._experts", lambda _model: ())
    _, with_padding = capture_all(demo_model, mixed_texts, side, budget=2048)
    for layer, (experts, weights, stats) in without.items():
        clear = stats[:, 2] > ROUNDING
        np.testing.assert_array_equal(experts[clear], with_padding[layer][0][clear])
        np.testing.assert_allclose(weights, with_padding[layer][1], atol=1e-5)


class ToyExperts(torch.nn.Module):
    """Doubles what it is given and remembers its rows; fails when told to."""

    def __init__(self):
        super().__init__()
        self.rows = []
        self.broken = False

    def forward(self, hidden_states, top_k_index, top_k_weights):
        assert hidden_states.shape[:-1] == top_k_index.shape[:-1] == top_k_weights.shape[:-1]
        self.rows.append(hidden_states.shape[:-1])
        if self.broken:
            raise KeyError("broken")
        return hidden_states * 2


class Toy(torch.nn.Module):
    config = None

    def __init__(self):
        super().__init__()
        self.experts = ToyExperts()


def toy_inputs(*shape):
    hidden = torch.arange(1.0, 1 + 3 * torch.Size(shape).numel()).view(*shape, 3)
    return hidden, torch.zeros(*shape, 2, dtype=torch.long), torch.ones(*shape, 2)


def test_experts_take_their_arguments_in_any_way_and_give_zeros_for_padding():
    toy = Toy()
    hidden, index, weights = toy_inputs(4)
    grids = {"decoder": Grid(positions=4, real=torch.tensor([0, 2, 3]))}
    expected = hidden * 2
    expected[1] = 0
    with ExpertsWithoutPadding(toy, grids):
        for output in (
            toy.experts(hidden, index, weights),
            toy.experts(hidden, top_k_weights=weights, top_k_index=index),
            toy.experts(hidden_states=hidden, top_k_index=index, top_k_weights=weights),
        ):
            torch.testing.assert_close(output, expected)
    assert toy.experts.rows == [(3,)] * 3
    torch.testing.assert_close(toy.experts(hidden, index, weights), hidden * 2)


@pytest.mark.parametrize("shape", [(2, 2), (5,), (1, 4)])
def test_experts_that_are_given_other_shapes_are_left_alone(shape):
    toy = Toy()
    inputs = toy_inputs(*shape)
    with ExpertsWithoutPadding(toy, {"decoder": Grid(positions=4, real=torch.tensor([1]))}):
        torch.testing.assert_close(toy.experts(*inputs), inputs[0] * 2)
    assert toy.experts.rows == [shape]


def test_an_error_in_the_experts_leaves_nothing_for_the_next_batch():
    toy = Toy()
    grids = {"decoder": Grid(positions=4, real=torch.tensor([0]))}
    with ExpertsWithoutPadding(toy, grids):
        toy.experts.broken = True
        with pytest.raises(KeyError):
            toy.experts(*toy_inputs(4))
        toy.experts.broken = False
        grids["decoder"] = Grid(positions=2, real=None)
        torch.testing.assert_close(toy.experts(*toy_inputs(2)), toy_inputs(2)[0] * 2)
    assert hooks_of(toy) == 0


def test_layers_asked_for_equal_the_same_layers_of_a_full_capture(demo_model, mixed_texts):
    _, full = capture_all(demo_model, mixed_texts)
    _, some = capture_all(demo_model, mixed_texts, layers=[2, 5])
    assert sorted(some) == [2, 5]
    for layer in some:
        np.testing.assert_array_equal(some[layer][0], full[layer][0])


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


def test_hooks_are_gone_after_an_exception(tiny_model):
    before = hooks_of(tiny_model.model)

    def fail_inside():
        with router_capture(tiny_model.model, find_routers(tiny_model.model)):
            assert hooks_of(tiny_model.model) == before + 9, "3 routers; before and after 3 experts"
            raise KeyError("inside")

    with pytest.raises(KeyError, match="inside"):
        fail_inside()
    assert hooks_of(tiny_model.model) == before


def test_a_router_that_fires_twice_fails_the_batch(tiny_model):
    routers = find_routers(tiny_model.model)
    with router_capture(tiny_model.model, routers) as capture:
        again = routers[0].module.register_forward_hook(
            lambda module, args, _out: capture._hook(0)(type(module).forward(module, *args))
        )
        ids = torch.tensor([[5, 6]])
        with pytest.raises(RuntimeError, match="fired twice"):
            capture.run(ids, torch.ones_like(ids))
        again.remove()


def test_a_router_that_does_not_fire_fails_the_batch(tiny_model, tiny_folder):
    stray = find_routers(tiny_model.model)
    other = loading.load(ModelConfig(model=str(tiny_folder)), "cpu")
    with pytest.raises(RuntimeError, match="did not fire"), router_capture(other.model, stray):
        pass


def test_logits_are_those_of_transformers_and_probabilities_their_softmax(tiny_model):
    routers = find_routers(tiny_model.model)
    ids, mask = torch.tensor([[5, 6, 7], [8, 9, 0]]), torch.tensor([[1, 1, 1], [1, 1, 0]])
    with router_capture(tiny_model.model, routers, store=("probabilities", "logits")) as capture:
        decisions = capture.run(ids, mask).wait()[0]
    with torch.no_grad():
        outputs = tiny_model.model(input_ids=ids, attention_mask=mask, output_router_logits=True)
    for decision, logits in zip(decisions, outputs.router_logits, strict=True):
        torch.testing.assert_close(decision.logits_te, logits[mask.flatten().bool()])
        torch.testing.assert_close(decision.probabilities_te, logits[mask.flatten().bool()].softmax(-1))


def test_a_dense_model_is_refused():
    from transformers import LlamaConfig, LlamaModel

    dense = LlamaModel(LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
                                   num_attention_heads=1))  # fmt: skip
    with pytest.raises(ValueError, match="LlamaModel has no router"):
        find_routers(dense)


def test_a_layer_without_router_is_refused(tiny_model):
    with pytest.raises(ValueError, match=r"--layers \[9\].*\[0, 1, 2\]"):
        find_routers(tiny_model.model, [1, 9])


def test_random_weights_repeat_under_a_seed_and_differ_from_the_trained():
    settings = [ModelConfig(weights="random", seed=seed, dtype="bfloat16") for seed in (0, 0, 1)]
    random = [loading.load(config, "cpu") for config in settings]
    prints = [loading.fingerprint(loaded.model) for loaded in random]
    assert prints[0] == prints[1] != prints[2]
    assert random[0].model.dtype == torch.bfloat16
    assert loading.fingerprint(loading.load(ModelConfig(dtype="bfloat16"), "cpu").model) not in prints


def test_an_unknown_model_names_the_remedy():
    with pytest.raises(ValueError, match="--model /no/such/model: there is no such folder"):
        loading.load(ModelConfig(model="/no/such/model"), "cpu")


def test_the_vocabulary_is_readable(demo_model):
    rows = loading.readable_vocabulary(demo_model.tokenizer)
    assert [row[0] for row in rows] == list(range(8192))
    text = {token_id: token for token_id, token, _ in rows}
    assert "".join(text[i] for i in demo_model.tokenizer("the city")["input_ids"]) == "<|bos|>the city"
    assert sum(special for *_, special in rows) == 3
    assert any(token.startswith("<E") for token in text.values()), "parts of a character show their bytes"
