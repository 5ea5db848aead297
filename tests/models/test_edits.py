"""Edits of routing: every operation in every family, against the readings of the plain model and other mechanisms."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from collector.models.edited_routing import EditedRouting
from collector.models.edits import OPERATIONS, Arm, Edit, parse_arm, tell_arm
from collector.models.families import family, tiny
from collector.models.routers import find_routers
from collector.models.unedited_layers import UneditedLayers
from tests.models.test_families import CAPTURED, EVEN, assert_received, built, capture, padded, plain, texts

VALUES = {"scale": 0.25, "bias": -1.5}
NO_MEANING = {
    "doge": {*OPERATIONS}, "inkling": {"bias"}, "jetmoe": {"drop_renorm"},
    "zaya": {"drop", "drop_renorm", "scale"},
}  # fmt: skip

BY_HAND = {"jetmoe", "llama4", "nllb_moe"}
"""Families whose received choice the tests work out from logits, which do not tell of edits."""


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def last_router(model):
    """Whose inputs no edit changes."""
    return find_routers(model)[-1]


def readings(model, rows):
    """[T real, ..] of the last router in one plain pass."""
    router, found = last_router(model), []
    handle = router.module.register_forward_hook(lambda _module, _inputs, outputs: found.append(router.read(outputs)))
    try:
        plain(model, rows)
    finally:
        handle.remove()
    real = padded(rows)[1].flatten().bool()
    return type(found[-1])(*(None if part is None else part[real].clone() for part in found[-1]))


def most_chosen(reading) -> int:
    return int(reading.experts_tk.flatten().bincount(minlength=reading.logits_te.shape[1]).argmax())


def least_chosen(reading) -> int:
    return int(reading.experts_tk.flatten().bincount(minlength=reading.logits_te.shape[1]).argmin())


def edited(model, rows, operation, expert, value=None):
    router = last_router(model)
    edit = Edit(stack=router.stack, layer=router.layer, expert=expert, operation=operation, value=value)
    with EditedRouting(model, [router], [edit]):
        return readings(model, rows)


@pytest.mark.parametrize("name", [name for name in CAPTURED if name not in NO_MEANING])
def test_weights_change_as_the_operation_says(name: str) -> None:
    model = built(name)
    before = readings(model, texts(EVEN))
    expert = most_chosen(before)
    chosen = before.experts_tk == expert
    weights = before.weights_tk.double()
    for operation, value in (("drop", None), ("drop_renorm", None), ("scale", 2.5)):
        after = edited(model, texts(EVEN), operation, expert, value)
        assert torch.equal(after.experts_tk, before.experts_tk)
        expected = torch.where(chosen, weights * (value or 0), weights)
        if operation == "drop_renorm":
            rest = expected.sum(-1, keepdim=True)
            scaled = expected * weights.sum(-1, keepdim=True) / rest
            expected = torch.where(chosen.any(-1, keepdim=True) & (rest != 0), scaled, expected)
        torch.testing.assert_close(after.weights_tk.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", [name for name in CAPTURED if "replace" not in NO_MEANING.get(name, ())])
def test_a_replaced_expert_gives_its_place_to_one_other(name: str) -> None:
    model = built(name)
    before = readings(model, texts(EVEN))
    expert = most_chosen(before)
    after = edited(model, texts(EVEN), "replace", expert)
    had = (before.experts_tk == expert).any(-1)
    assert had.any()
    assert not (after.experts_tk == expert).any()
    assert torch.equal(after.experts_tk[~had], before.experts_tk[~had])
    assert torch.equal(after.weights_tk[~had], before.weights_tk[~had])
    torch.testing.assert_close(after.logits_te, before.logits_te, rtol=0, atol=0)
    if name == "nllb_moe":  # which reads its weights where it thinks that it chose
        assert (after.weights_tk != 0).any(-1).all()
    for old, new in zip(before.experts_tk[had].tolist(), after.experts_tk[had].tolist(), strict=True):
        assert set(old) - {expert} <= set(new)
        assert len(set(new)) == len(new)


@pytest.mark.parametrize("name", [name for name in CAPTURED if "force" not in NO_MEANING.get(name, ())])
def test_a_forced_expert_takes_the_last_place(name: str) -> None:
    model = built(name)
    before = readings(model, texts(EVEN))
    expert = least_chosen(before)
    after = edited(model, texts(EVEN), "force", expert)
    had = (before.experts_tk == expert).any(-1)
    assert not had.all()
    assert (after.experts_tk == expert).any(-1).all()
    for old, new in zip(before.experts_tk.tolist(), after.experts_tk.tolist(), strict=True):
        assert len(set(new)) == len(new)
        assert len(set(old) & set(new)) >= len(old) - 1


@pytest.mark.parametrize("name", [name for name in CAPTURED if "bias" not in NO_MEANING.get(name, ())])
def test_a_bias_counts_in_deviations_of_the_token_s_logits(name: str) -> None:
    model = built(name)
    before = readings(model, texts(EVEN))
    expert = most_chosen(before)
    after = edited(model, texts(EVEN), "bias", expert, -1.5)
    if name.startswith(("gemma4", "diffusion_gemma")):  # what they call logits are log probabilities: to a constant
        moved = after.logits_te - before.logits_te
        moved = moved - moved.mean(-1, keepdim=True)
        assert (moved[:, expert] < 0).all()
        return
    expected = before.logits_te.double()
    expected[:, expert] -= 1.5 * before.logits_te.double().std(-1, correction=0)
    torch.testing.assert_close(after.logits_te.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "operation"),
    [
        (name, operation)
        for name in CAPTURED
        for operation in OPERATIONS
        if name not in BY_HAND and operation not in NO_MEANING.get(name, ())
    ],
)
def test_what_is_recorded_is_what_the_experts_receive(name: str, operation: str) -> None:
    model = built(name)
    router = find_routers(model)[0]
    edit = Edit(stack=router.stack, layer=router.layer, expert=1, operation=operation, value=VALUES.get(operation))
    with EditedRouting(model, [router], [edit]):
        assert_received(model, texts(EVEN), capture(model, texts(EVEN)), atol=1e-6, rtol=1e-5)


# -- exact references ---------------------------------------------------------------------------------


def test_olmoe_by_its_formula() -> None:
    """Softmax over all experts, weights not renormalized: those of the others stay as they were."""
    model = built("olmoe")
    before = readings(model, texts())
    p = before.logits_te.double().softmax(-1).numpy()
    k = before.experts_tk.shape[1]
    for operation in ("replace", "force"):
        expert = most_chosen(before) if operation == "replace" else least_chosen(before)
        scores = p.copy()
        scores[:, expert] = -1 if operation == "replace" else 2
        chosen = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        after = edited(model, texts(), operation, expert)
        assert [set(row) for row in after.experts_tk.tolist()] == [set(row) for row in chosen.tolist()]
        expected = np.take_along_axis(p, after.experts_tk.numpy(), 1)
        np.testing.assert_allclose(after.weights_tk, expected, rtol=1e-5)
        if operation == "replace":  # a logit of minus infinity would shift the weights of all others
            masked = before.logits_te.double().index_fill(1, torch.tensor([expert]), -torch.inf).softmax(-1).numpy()
            shifted = np.take_along_axis(masked, after.experts_tk.numpy(), 1)
            assert (shifted > 1.0001 * expected).all()


@pytest.mark.parametrize("name", ["deepseek_v3", "glm4_moe", "gpt_oss"])
@pytest.mark.parametrize("operation", ["replace", "force"])
def test_a_router_with_a_bias_for_choosing_does_the_same(name: str, operation: str) -> None:
    """DeepSeek's selection bias leaves weights alone; GPT-OSS adds its bias to the logits before the softmax."""
    groups = {} if name == "gpt_oss" else {"n_group": 1, "topk_group": 1}  # a bias counts for groups, too
    model = tiny(family(name), **groups)
    before = readings(model, texts())
    expert = most_chosen(before) if operation == "replace" else least_chosen(before)
    after = edited(model, texts(), operation, expert)
    other = copy.deepcopy(model)
    bias = next(value for key, value in [*last_router(other).module.named_buffers(),
                                         *last_router(other).module.named_parameters()] if "bias" in key)  # fmt: skip
    if name == "gpt_oss" and operation == "force":
        return  # its weight would be that of the large logit
    with torch.no_grad():
        bias[expert] += -1e9 if operation == "replace" else 1e9
    wanted = readings(other, texts())
    order = [torch.argsort(each.experts_tk, dim=1) for each in (after, wanted)]
    ids, weights = (
        [getattr(each, part).gather(1, by) for each, by in zip((after, wanted), order, strict=True)]
        for part in ("experts_tk", "weights_tk")
    )
    assert torch.equal(*ids)
    torch.testing.assert_close(*weights, rtol=1e-5, atol=1e-6)


def test_a_dropped_expert_is_one_that_puts_out_nothing() -> None:
    model = built("olmoe")
    silent = copy.deepcopy(model)
    with torch.no_grad():
        for router in find_routers(silent):
            router.owner.experts.down_proj[1] = 0
    edits = [Edit(layer=router.layer, expert=1, operation="drop") for router in find_routers(model)]
    with EditedRouting(model, find_routers(model), edits):
        got = plain(model, texts()).last_hidden_state
    torch.testing.assert_close(got, plain(silent, texts()).last_hidden_state, rtol=1e-5, atol=1e-6)


# -- nothing more than asked -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["olmoe", "switch_transformers", "deepseek_v3", "dbrx", "gpt_oss"])
def test_edits_that_change_nothing_change_nothing(name: str) -> None:
    model = built(name)
    routers = find_routers(model)
    before = plain(model, texts())[0].clone()
    nothing = [("scale", 1.0), ("bias", 0.0)]
    for operation, value in nothing:
        edits = [Edit(stack=r.stack, layer=r.layer, expert=0, operation=operation, value=value) for r in routers]
        with EditedRouting(model, routers, edits):
            assert torch.equal(plain(model, texts())[0], before)
    with EditedRouting(model, routers, []):
        assert torch.equal(plain(model, texts())[0], before)
    edit = Edit(stack=routers[0].stack, layer=routers[0].layer, expert=0, operation="force")
    with EditedRouting(model, routers, [edit]):
        assert not torch.equal(plain(model, texts())[0], before)
    assert torch.equal(plain(model, texts())[0], before), "the edits are gone"


def test_edits_act_on_chosen_positions_only() -> None:
    model, rows = built("olmoe"), texts(EVEN)
    before, router = readings(model, rows), last_router(model)
    at = torch.zeros(len(before.experts_tk), dtype=torch.bool)
    at[[1, 4]] = True
    for operation in OPERATIONS:
        expert = least_chosen(before) if operation == "force" else int(before.experts_tk[1, 0])
        edit = Edit(
            layer=router.layer, expert=expert, operation=operation, value={"scale": 3.0, "bias": -4.0}.get(operation)
        )
        with EditedRouting(model, [router], [edit], where=lambda _stack, positions: at[:positions]):
            after = readings(model, rows)
        same = (after.experts_tk == before.experts_tk).all(1) & (after.weights_tk == before.weights_tk).all(1)
        assert same[~at].all(), operation
        assert not same[1], operation


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"layer": 9, "expert": 0, "operation": "drop"}, "no router in decoder layer 9; the model has decoder 0"),
        ({"layer": 0, "expert": 99, "operation": "drop"}, "has experts 0 to 5, not 99|has experts 0 to"),
        ({"layer": 0, "expert": 0, "operation": "scale"}, "scale needs a value"),
        ({"layer": 0, "expert": 0, "operation": "drop", "value": 1.0}, "drop takes no value"),
        ({"layer": 0, "expert": 0, "operation": "remove"}, "it is one of drop, drop_renorm"),
        ({"layer": 0, "expert": 0, "operation": "bias", "value": float("nan")}, "not finite"),
    ],
)
def test_what_cannot_be_is_named(edit, message) -> None:
    model = built("olmoe")
    with pytest.raises(ValueError, match=message):
        EditedRouting(model, find_routers(model), [Edit(**edit)])


def test_too_many_experts_cannot_be_replaced_or_forced() -> None:
    model = built("olmoe")
    router = last_router(model)
    count = readings(model, texts()).logits_te.shape[1]
    for operation, message in (("replace", "leaves fewer than k"), ("force", "at most k")):
        edits = [Edit(layer=router.layer, expert=e, operation=operation) for e in range(count)]
        with pytest.raises(ValueError, match=message):
            EditedRouting(model, [router], edits)


@pytest.mark.parametrize(
    ("name", "operation"), [(name, operation) for name, without in NO_MEANING.items() for operation in sorted(without)]
)
def test_an_operation_without_meaning_is_refused_by_name(name: str, operation: str) -> None:
    model = built(name)
    router = last_router(model)
    edit = Edit(stack=router.stack, layer=router.layer, expert=0, operation=operation, value=VALUES.get(operation))
    with pytest.raises(ValueError, match=f"operation {operation} has no meaning in .*{type(router.module).__name__}"):
        EditedRouting(model, [router], [edit])


@pytest.mark.parametrize("name", [name for name in CAPTURED if name not in {"doge", "nllb_moe", "switch_transformers"}])
def test_layers_before_an_edit_run_once_for_all_arms(name: str) -> None:
    """The same edits in a whole pass and in one that starts at the edited layer; twice, as arms do."""
    model, (ids, mask) = built(name), padded(texts(EVEN))
    routers = find_routers(model)
    router = routers[-1]
    layers = UneditedLayers(model, routers)
    assert layers.are_skipped
    operation = "drop" if "drop" not in NO_MEANING.get(name, ()) else "replace"
    edit = Edit(stack=router.stack, layer=router.layer, expert=most_chosen(readings(model, texts(EVEN))),
                operation=operation)  # fmt: skip

    def hidden():
        with torch.inference_mode():
            return model(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state

    with layers.keeping({router.layer}):
        plain_rh = hidden()
    with EditedRouting(model, routers, [edit]):
        whole_rh = hidden()
    for _ in range(2):
        with EditedRouting(model, routers, [edit]), layers.skipping(router.layer):
            assert torch.equal(hidden(), whole_rh)
    with layers.skipping(router.layer):
        assert torch.equal(hidden(), plain_rh)
    assert torch.equal(hidden(), plain_rh), "all layers are as they were"
    assert not torch.equal(whole_rh, plain_rh)


def test_layers_that_hand_on_more_than_they_return_run_again() -> None:
    """As caches that later layers read would be."""
    model = copy.deepcopy(built("olmoe"))
    first, last = model.layers[0], model.layers[-1]
    seen: list[torch.Tensor] = []
    first.register_forward_hook(lambda _module, _inputs, outputs: seen.append(outputs.mean()))
    last.register_forward_pre_hook(lambda _module, inputs: (inputs[0] + seen.pop(), *inputs[1:]))
    layers = UneditedLayers(model, find_routers(model))
    assert not layers.are_skipped
    with layers.keeping({2}), layers.skipping(2):
        pass
    assert "forward" not in first.__dict__


# -- in words --------------------------------------------------------------------------------------------


def test_arms_are_read_as_they_are_written() -> None:
    edits = (
        Edit(layer=1, expert=9, operation="scale", value=-2.5, label="Standard Arabic; others", position=3),
        Edit(stack="encoder", layer=0, expert=1, operation="force", label="Standard Arabic; others", position=3),
    )
    for arm in (Arm(name="a b", edits=edits), Arm(name="x", edits=edits[:1], control=12)):
        assert parse_arm(tell_arm(arm)) == arm
    assert tell_arm(Arm(name="x", edits=edits[:1], control=12)).startswith("x #12: layer=1 expert=9 operation=scale")
