"""Weights of experts, pair by pair: against the model's own matrices, and experts that are permutations."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group

from collector.config import ModelConfig
from collector.models import loading
from collector.models.expert_weights import ExpertWeights, cosines, couplings, matched, router_cosines, router_rows
from collector.models.routers import find_routers
from tests.models.test_families import CAPTURED, built, plain, texts

UNKNOWN = {"doge", "jetmoe"}
"""Families whose blocks hold the experts themselves."""
PLAIN = {"nemotron_h", "nllb_moe", "switch_transformers"}


@pytest.mark.parametrize("name", CAPTURED)
def test_every_family_has_its_matrices(name: str) -> None:
    router = find_routers(built(name))[0]
    if name in UNKNOWN:
        with pytest.raises(ValueError, match="cannot be compared yet"):
            ExpertWeights(router)
        return
    weights = ExpertWeights(router)
    found = [weights.matrices(expert) for expert in range(weights.count)]
    assert {tuple(each) for each in found} == {("up", "down") if name in PLAIN else ("gate", "up", "down")}
    assert len({matrix.shape for each in found for matrix in each.values()}) == 1
    assert len({float(each["up"].sum()) for each in found}) == weights.count


@pytest.mark.parametrize("name", ["olmoe", "gpt_oss", "aria", "llama4", "nemotron_h", "switch_transformers", "dbrx"])
def test_a_neuron_is_a_row_of_each_matrix(name: str) -> None:
    """Without a neuron's row of `down`, the expert forgets the neuron; of `up`, it is silent."""
    import copy

    model = copy.deepcopy(built(name))
    router = find_routers(model)[0]
    before = plain(model, texts())[0]
    weights = ExpertWeights(router)
    with torch.no_grad():
        for expert in range(weights.count):
            for neuron in range(len(weights.matrices(expert)["up"])):
                views(router, expert)["up"][neuron] = 0
    silent = plain(model, texts())[0]
    assert not torch.allclose(before, silent)
    with torch.no_grad():
        for expert in range(weights.count):
            views(router, expert)["down"][:] = 7
    if name != "gpt_oss":  # whose neurons have biases, and add 1 to what goes up
        torch.testing.assert_close(plain(model, texts())[0], silent)


def views(router, expert: int) -> dict[str, torch.Tensor]:
    """The matrices of float32 experts share the memory of the parameters."""
    return ExpertWeights(router).matrices(expert)


class Layer:
    """Three experts of four neurons: the second is the first with its neurons in another order, the third is new."""

    def __init__(self) -> None:
        rng = np.random.default_rng(0)
        first = {name: torch.tensor(rng.normal(size=(4, 6)), dtype=torch.float32) for name in ("gate", "up", "down")}
        order = [2, 0, 3, 1]
        other = {name: torch.tensor(rng.normal(size=(4, 6)), dtype=torch.float32) for name in first}
        self.count, self.all = 3, [first, {name: matrix[order] for name, matrix in first.items()}, other]

    def matrices(self, expert: int) -> dict[str, torch.Tensor]:
        return self.all[expert]


def test_a_permutation_of_neurons_is_seen_by_matching_alone() -> None:
    layer = Layer()
    by_place, by_neuron = cosines(layer)["all"], matched(layer)
    assert abs(by_place[0, 1]) < 0.5
    assert by_neuron[0, 1] == pytest.approx(1)
    assert by_neuron[0, 2] == pytest.approx(by_neuron[1, 2])
    assert by_neuron[0, 2] == pytest.approx(best_by_trying(layer, 0, 2))


def best_by_trying(layer: Layer, i: int, j: int) -> float:
    """The best mean cosine over all orders of neurons."""
    one, other = (torch.cat([*layer.matrices(each).values()], dim=1).double().numpy() for each in (i, j))
    one, other = (each / np.linalg.norm(each, axis=1, keepdims=True) for each in (one, other))
    return max((one * other[list(order)]).sum(1).mean() for order in itertools.permutations(range(4)))


def test_cosines_are_those_of_numpy() -> None:
    layer = Layer()
    found = cosines(layer)
    for name in ("gate", "down", "all"):
        flat = [
            np.concatenate([m.numpy().ravel() for key, m in each.items() if name in (key, "all")]) for each in layer.all
        ]
        for i, j in itertools.product(range(3), repeat=2):
            expected = flat[i] @ flat[j] / np.linalg.norm(flat[i]) / np.linalg.norm(flat[j])
            assert found[name][i, j] == pytest.approx(expected, abs=1e-6)


def test_blocks_of_experts_change_nothing(monkeypatch) -> None:
    layer = Layer()
    whole = cosines(layer)["all"], matched(layer)
    monkeypatch.setattr("collector.models.expert_weights._BLOCK", 1)
    np.testing.assert_allclose(cosines(layer)["all"], whole[0], atol=1e-6)
    np.testing.assert_allclose(matched(layer), whole[1], atol=1e-6)


def test_coupling_is_1_over_the_root_of_the_width_where_an_expert_answers_to_all_directions_alike() -> None:
    layer = Layer()
    rotation = torch.tensor(ortho_group.rvs(6, random_state=1), dtype=torch.float32)
    layer.all[0]["gate"] = rotation
    rows = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    assert couplings(layer, rows)[:, 0] == pytest.approx(1 / np.sqrt(6), rel=1e-5)
    layer.all[1]["gate"] = rows[1:2].repeat(4, 1)
    assert couplings(layer, rows)[1, 1] == pytest.approx(1)
    assert router_cosines(rows)[0, 1] == pytest.approx(float(torch.cosine_similarity(rows[0], rows[1], dim=0)))


def test_quantized_experts_are_those_that_are_multiplied(tiny_folder) -> None:
    plain_model, nf4 = (
        loading.load(ModelConfig(model=str(tiny_folder), quantization=how), "cpu").model for how in ("none", "nf4")
    )
    routers = [find_routers(model)[1] for model in (plain_model, nf4)]
    ours, theirs = (ExpertWeights(router).matrices(2) for router in routers)
    for name in ours:
        assert 0.98 < float(torch.cosine_similarity(ours[name].ravel(), theirs[name].ravel(), dim=0)) < 0.99999
    rows = router_rows(routers[1], ours["up"].shape[1])
    assert rows is not None
    assert len(rows) == ExpertWeights(routers[0]).count
