"""Every family of transformers that declares routers: the capture against what its experts received.

Each family's tiny model runs the same batch twice: once under the capture, once plain with a hook
before its experts. Ids and weights must be the same to the bit; with padding, which the capture keeps
from the experts, the weights of later layers to rounding. Then every text runs alone.
"""

from __future__ import annotations

import functools
import inspect

import numpy as np
import pytest
import torch

from collector.look import terminal
from collector.models import families
from collector.models.families import NOT_CAPTURED, describe, family, geometry, tiny
from collector.models.routers import find_routers
from tests.helpers.capturing import router_capture
from tests.helpers.generating import assert_same_routing, write
from tests.helpers.paths import ROOT

ROUNDING = 1e-5
LENGTHS = (7, 3, 9, 5)
EVEN = (6, 6, 6)
CAPTURED = [name for name in families.names() if name not in NOT_CAPTURED]

# A token's routing depends on the tokens of other rows: Doge reads its two halves of the keys across positions.
DEPENDS_ON_THE_BATCH = {"doge"}

# Doge attends to tokens that come later; transformers' cache of MiniMax cannot drop texts where the last layer has full
# attention; the tiny Qwen4 has no attention at all, which a cache must have; the others have an encoder.
CANNOT_WRITE = {"doge", "minimax", "qwen4_exp", "openai_privacy_filter", "nllb_moe", "switch_transformers"}

# transformers' own router_logits are not one [T, E] per router there: it leaves out the layers that choose by
# token id (DeepSeek V4), gives the logits of the two halves of the keys (Doge), or those of a router twice (JetMoE).
NO_OWN_LOGITS = {"deepseek_v4", "doge", "jetmoe"}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def texts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(5)
    return [torch.randint(3, 64, (n,), generator=generator) for n in lengths]


def padded(rows):
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=0)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


@functools.cache
def built(name):
    return tiny(family(name), seed=3)


def capture(model, rows):
    """{router name: LayerDecision} over the real tokens of a padded batch; a decoder gets the encoder's texts."""
    routers = find_routers(model)
    with router_capture(model, routers) as capturing:
        decisions = capturing.run(*padded(rows) * (2 if capturing.decodes else 1)).wait()[0]
    return dict(zip([router.name for router in routers], decisions, strict=True))


def plain(model, rows, **inputs):
    ids, mask = padded(rows)
    if model.config.is_encoder_decoder:
        inputs |= {"decoder_input_ids": ids, "decoder_attention_mask": mask}
    with torch.inference_mode():
        return model(input_ids=ids, attention_mask=mask, use_cache=False, **inputs)


@functools.cache
def captured(name):
    return capture(built(name), texts())


# What the experts received, in a plain forward: {router name: (experts [T, k], weights [T, k])}, T all positions.


def received(model, rows):
    seen, handles = {}, []
    for router in find_routers(model):
        listen = LISTENERS.get(type(router.module).__name__, listen_to_experts)
        handles += listen(router, seen)
    try:
        plain(model, rows)
    finally:
        for handle in handles:
            handle.remove()
    return seen


def listen_to_experts(router, seen):
    """Most families: experts(hidden_states, top_k_index, top_k_weights)."""

    def hook(module, args, kwargs):
        given = inspect.signature(module.forward).bind(*args, **kwargs).arguments
        _, experts, weights = given.values()
        seen[router.name] = experts.flatten(0, -2).clone(), weights.flatten(0, -2).clone()

    return [router.owner.experts.register_forward_pre_hook(hook, with_kwargs=True)]


def listen_to_zaya(router, seen):
    """The skip expert arrives as expert 0 with weight 0; it is the last of E = 9."""

    def hook(_module, args):
        _, experts, weights = args
        seen[router.name] = experts.masked_fill(weights == 0, 8), weights.clone()

    return [router.owner.experts.register_forward_pre_hook(hook)]


def listen_to_switch(router, seen):
    """A one-hot mask [T, 1, E], empty where dropped, and the router's probability; dropped picks by the logits."""
    best = []

    def remember(_module, _args, outputs):
        best.append(outputs[2].flatten(0, -2).argmax(-1))

    def hook(_module, args):
        _, mask, weights = args
        kept = mask.bool().any(-1).squeeze(1)
        assert torch.equal(mask.squeeze(1).argmax(-1)[kept], best[-1][kept])
        seen[router.name] = best[-1][:, None], weights.clone(), ~kept

    return [router.module.register_forward_hook(remember), router.owner.experts.register_forward_pre_hook(hook)]


def listen_to_nllb(router, seen):
    """The first pick's mask [T, E] and the combining weights [T, E]; who was dropped is told by the logits alone."""
    ranked = []

    def remember(_module, _args, outputs):
        ranked.append(outputs[2].argsort(-1, descending=True)[:, :2])

    def hook(_module, args):
        _, mask, combining = args
        assert torch.equal(combining.scatter(1, ranked[-1], 0.0), torch.zeros_like(combining)), "two experts at most"
        kept = mask.bool().any(-1)
        assert torch.equal(mask.argmax(-1)[kept], ranked[-1][kept, 0])
        seen[router.name] = ranked[-1], combining.gather(1, ranked[-1]), ~kept

    return [router.module.register_forward_hook(remember), router.owner.experts.register_forward_pre_hook(hook)]


def listen_to_llama4(router, seen):
    """Every expert gets every token, times its score: hidden states [E x T, H], zero where not chosen."""
    scores = []

    def remember(_module, _args, outputs):
        scores.append(outputs[1].double().sigmoid())

    def hook(_module, args):
        chosen_te = args[0].view(len(scores[-1].T), -1, args[0].shape[-1]).any(-1).T
        weights_te = scores[-1] * chosen_te
        experts = weights_te.argsort(-1, descending=True)[:, : int(chosen_te.sum(-1).max())]
        seen[router.name] = experts, weights_te.gather(1, experts).float()

    return [router.module.register_forward_hook(remember), router.owner.experts.register_forward_pre_hook(hook)]


def listen_to_jetmoe(router, seen):
    """Hidden states of the picks, sorted by expert, and how many each expert gets; the weights are by hand."""
    hidden, logits = [], []

    def remember(_module, args, outputs):
        hidden.append(args[0])
        logits.append(outputs.double())

    def hook(_module, args):
        picks, sizes = args
        groups = picks.split(list(sizes))
        chosen_te = torch.stack([(hidden[-1][:, None] == group[None]).all(-1).any(-1) for group in groups], 1)
        kept = logits[-1].masked_fill(~chosen_te, -torch.inf)
        k = int(chosen_te.sum(-1).max())
        assert (chosen_te.sum(-1) == k).all()
        weights, experts = kept.softmax(-1).topk(k)
        seen[router.name] = experts, weights.float()

    return [
        router.module.layer.register_forward_hook(remember),
        router.owner.input_linear.register_forward_pre_hook(hook),
    ]


def listen_to_doge(router, seen):
    """Doge has no experts module: all pairs of keys in numpy, from what the gate returned."""

    def hook(_module, _args, outputs):
        x, y = outputs.double().numpy().reshape(2, -1, router.module.num_keys)
        sums = (x[:, :, None] + y[:, None, :]).reshape(len(x), -1)
        experts = np.argsort(-sums, 1)[:, : router.module.top_k]
        best = np.exp(np.take_along_axis(sums, experts, 1))
        seen[router.name] = torch.tensor(experts), torch.tensor(best / best.sum(1, keepdims=True)).float()

    return [router.module.router_gate.register_forward_hook(hook)]


LISTENERS = {
    "DogeCDMoE": listen_to_doge,
    "JetMoeTopKGating": listen_to_jetmoe,
    "Llama4Router": listen_to_llama4,
    "NllbMoeTop2Router": listen_to_nllb,
    "SwitchTransformersTop1Router": listen_to_switch,
    "ZayaRouter": listen_to_zaya,
}
WEIGHTS_BY_HAND = {"DogeCDMoE", "JetMoeTopKGating", "Llama4Router"}


def assert_received(model, rows, decisions, **tolerance):
    """Ids must be equal, weights within a tolerance; returns the references of the real tokens."""
    reference, real = received(model, rows), padded(rows)[1].flatten().bool()
    routers = find_routers(model)
    assert set(decisions) == set(reference) == {router.name for router in routers}
    for router in routers:
        decision, (experts, weights) = decisions[router.name], (part[real] for part in reference[router.name][:2])
        assert torch.equal(decision.experts_tk.long(), experts), router.name
        by_hand = type(router.module).__name__ in WEIGHTS_BY_HAND
        allowed = {"atol": 1e-6, "rtol": 1e-5} if by_hand else tolerance
        torch.testing.assert_close(decision.weights_tk, weights, msg=lambda said, at=router: f"{at.name}: {said}",
                                   **allowed)  # fmt: skip
    return {name: [part[real] for part in parts] for name, parts in reference.items()}


@pytest.mark.parametrize("name", CAPTURED)
def test_equals_what_the_experts_received(name):
    model = built(name)
    assert_received(model, texts(EVEN), capture(model, texts(EVEN)), atol=0, rtol=0)
    assert_received(model, texts(), captured(name), atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "limit"), [("switch_transformers", {"expert_capacity": 1}),
                        ("nllb_moe", {"moe_eval_capacity_token_fraction": 0.2})],
)  # fmt: skip
def test_drops_equal_what_the_experts_did_not_receive(name, limit):
    model = tiny(family(name), seed=3, **limit)
    decisions = capture(model, texts())
    for router, (_, weights, dropped_first) in assert_received(model, texts(), decisions, atol=1e-6, rtol=1e-4).items():
        dropped = decisions[router].dropped_tk
        assert dropped.any()
        assert not dropped.all()
        assert torch.equal(dropped[:, 0], dropped_first)
        assert torch.equal(dropped[:, 1:], weights[:, 1:] == 0)


@pytest.mark.parametrize("name", [name for name in CAPTURED if name not in DEPENDS_ON_THE_BATCH])
def test_equals_one_text_at_a_time(name):
    model = built(name)
    alone = [capture(model, [row]) for row in texts()]
    for router, decision in captured(name).items():
        experts, weights = (
            torch.cat([getattr(each[router], part) for each in alone]) for part in ("experts_tk", "weights_tk")
        )
        agree = (decision.experts_tk == experts).all(1)
        clear = decision.statistics_3t[2].abs() > ROUNDING
        assert (agree | ~clear).all(), router
        assert agree.float().mean() > 0.95, router
        torch.testing.assert_close(decision.weights_tk[agree], weights[agree], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", CAPTURED)
def test_equals_transformers_own_router_logits(name):
    """By entropy and top-k mass, in numpy; what transformers calls logits of Gemma 4 are probabilities."""
    model, real = built(name), padded(texts())[1].flatten().bool().numpy()
    outputs = plain(model, texts(), output_router_logits=True)
    parts = [outputs.get(part) or () for part in ("router_logits", "encoder_router_logits", "decoder_router_logits")]
    own = [logits.reshape(-1, logits.shape[-1]).double().numpy() for part in parts for logits in part]
    usable = [len(logits) for logits in own] == [len(real)] * len(captured(name))
    assert usable == (name not in NO_OWN_LOGITS), "NO_OWN_LOGITS is not current"
    if not usable:
        return
    for (router, decision), logits in zip(captured(name).items(), [logits[real] for logits in own], strict=True):
        p = logits if "gemma" in name else np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        mass = np.take_along_axis(p, decision.experts_tk.numpy().astype(int), 1).sum(1)
        np.testing.assert_allclose(decision.statistics_3t[0], -(p * np.log(p)).sum(1), atol=1e-4, err_msg=router)
        np.testing.assert_allclose(decision.statistics_3t[1], mass, atol=1e-4, err_msg=router)


@pytest.mark.parametrize("name", CAPTURED)
def test_only_routed_experts_count(name):
    model = built(name)
    n_experts, top_k = geometry(name, model.config)
    n_real = sum(LENGTHS)
    for decision in captured(name).values():
        assert decision.experts_tk.shape == decision.weights_tk.shape == (n_real, top_k)
        assert decision.n_experts == n_experts
        assert decision.experts_tk.min() >= 0
        assert decision.experts_tk.max() < n_experts
        assert torch.isfinite(decision.weights_tk).all()
        picks = decision.experts_tk.sort(1).values
        assert (picks[:, 1:] != picks[:, :-1]).all(), "an expert is chosen once"


@pytest.mark.parametrize("name", [name for name in CAPTURED if name not in CANNOT_WRITE])
def test_the_routing_of_a_text_that_it_writes_is_that_of_the_text_read_as_a_whole(name):
    table, written, whole = write(built(name), texts(), generate=9, stop_ids=range(3, 64, 4), temperature=4.0)
    answers = (table.lengths - table.prompt_lengths).tolist()
    assert len(set(answers)) > 1, "texts leave the batch at different times"
    assert_same_routing(written, whole)


@pytest.mark.parametrize("name", ["doge", "minimax", "qwen4_exp"])
def test_a_model_that_cannot_write_in_batches_is_refused(name):
    with pytest.raises(ValueError, match=f"--generate: {type(built(name)).__name__}"):
        write(built(name), texts())


def hooks_of(model):
    return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in model.modules())


@pytest.mark.parametrize("name", CAPTURED)
def test_hooks_are_gone(name):
    model = built(name)
    before = hooks_of(model)
    with router_capture(model, find_routers(model)):
        assert hooks_of(model) > before
    assert hooks_of(model) == before


@pytest.mark.parametrize("name", CAPTURED)
def test_a_tiny_model_repeats_under_its_seed(name):
    again, other = tiny(family(name), seed=3).state_dict(), tiny(family(name), seed=4).state_dict()
    assert all(torch.equal(tensor, again[key]) for key, tensor in built(name).state_dict().items())
    assert any(not torch.equal(tensor, again[key]) for key, tensor in other.items())


def test_the_list_of_models_is_current(capsys):
    terminal.models([describe(each) for each in families.families()], "markdown")
    page = ROOT / "docs" / "models.md"
    assert capsys.readouterr().out == page.read_text(), "run: collector models --format markdown > docs/models.md"


def test_the_list_of_models_is_printed_as_a_table(capsys):
    terminal.models([describe(family("olmoe")), describe(family("zaya"))], "table")
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert lines[1] == ["olmoe", "OlmoeModel", "OlmoeTopKRouter", "64", "8", "returned", "fused", "3-D"]
    assert lines[2][:6] == ["zaya", "ZayaModel", "ZayaRouter", "17", "1", "bias"]


def test_a_model_that_cannot_be_built_is_named():
    with pytest.raises(ValueError, match=r"^olmoe: no tiny OlmoeModel can be built: .*KeyError: 'none'"):
        tiny(family("olmoe"), hidden_act="none")


def test_every_exception_is_a_family():
    assert set(NOT_CAPTURED) | DEPENDS_ON_THE_BATCH | NO_OWN_LOGITS <= set(families.names())
    assert len(CAPTURED) >= 72
