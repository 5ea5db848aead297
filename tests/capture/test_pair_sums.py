"""Pairs of experts over a block of tokens, against the definitions in float64, pair by pair."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from collector.capture.pair_sums import OVER, massive, pair_sums

TOKENS, EXPERTS, HIDDEN, TOP_K = 40, 7, 12, 3


def block(seed: int, offset: float = 0.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs [B, E, H] of experts that partly agree, and weights [B, E] with k of them chosen."""
    rng = np.random.default_rng(seed)
    shared = rng.normal(size=(TOKENS, 1, HIDDEN))
    outputs = shared * rng.uniform(0, 2, (1, EXPERTS, 1)) + rng.normal(size=(TOKENS, EXPERTS, HIDDEN)) + offset
    weights = np.zeros((TOKENS, EXPERTS))
    for row in weights:
        row[rng.choice(EXPERTS, TOP_K, replace=False)] = rng.uniform(0.1, 1, TOP_K)
    return torch.tensor(outputs, dtype=torch.float32), torch.tensor(weights, dtype=torch.float32)


def hsic(x: np.ndarray, y: np.ndarray) -> float:
    """HSIC₁ as it is defined, of [n, H] each."""
    n = len(x)
    if n < 4:
        return 0.0
    k, m = x @ x.T, y @ y.T
    np.fill_diagonal(k, 0)
    np.fill_diagonal(m, 0)
    one = np.ones(n)
    cross = np.trace(k @ m) + (one @ k @ one) * (one @ m @ one) / ((n - 1) * (n - 2))
    return float((cross - 2 / (n - 2) * one @ k @ m @ one) / (n * (n - 3)))


def expected(outputs: torch.Tensor, weights: torch.Tensor, over: str, i: int, j: int) -> list[float]:
    f, routed = outputs.double().numpy(), weights.numpy() > 0
    kept = {
        "sampled": np.ones(len(f), bool), "either": routed[:, i] | routed[:, j], "both": routed[:, i] & routed[:, j],
        "usual": ~massive(outputs, weights).numpy(),
    }[over]  # fmt: skip
    x, y = f[kept, i], f[kept, j]
    cosine = (x * y).sum(1) / np.linalg.norm(x, axis=1) / np.linalg.norm(y, axis=1)
    return [len(x), cosine.sum(), (1 - np.arccos(cosine) / np.pi).sum(), hsic(x, y), hsic(x, x), hsic(y, y)]


@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_every_pair_has_the_sums_of_the_definitions(offset: float) -> None:
    outputs, weights = block(1, offset)
    outputs[3] *= torch.where(torch.arange(HIDDEN) == 2, 1e5, 1.0)
    found = pair_sums(outputs, weights)
    assert tuple(found) == OVER
    for over, sums in found.items():
        pair = 0
        for i in range(EXPERTS):
            for j in range(i + 1, EXPERTS):
                got = [float(each[pair]) for each in sums]
                wanted = expected(outputs, weights, over, i, j)
                assert got[:2] == pytest.approx(wanted[:2], abs=1e-5 * TOKENS), (over, i, j)
                assert got[2] == pytest.approx(wanted[2], abs=1e-4 * TOKENS), (over, i, j)  # arccos is steep at 1
                largest = max(wanted[4], wanted[5])  # the scale of what is subtracted
                assert got[3:] == pytest.approx(wanted[3:], rel=1e-7, abs=1e-7 * largest), (over, i, j)
                pair += 1


def test_few_tokens_of_a_pair_have_no_hsic() -> None:
    outputs, weights = block(2)
    weights[:, :2] = 0
    weights[:3, :2] = 1
    both = pair_sums(outputs, weights)["both"]
    assert int(both.n_p[0]) == 3
    assert both.hsic_p[0] == both.hsic_first_p[0] == both.hsic_second_p[0] == 0
    assert float(both.cosine_p[0]) != 0


def test_an_expert_that_puts_out_nothing_has_cosine_0() -> None:
    outputs, weights = block(3)
    outputs[:, 1] = 0
    sums = pair_sums(outputs, weights)["sampled"]
    assert float(sums.cosine_p[0]) == 0
    assert float(sums.angular_p[0]) == pytest.approx(TOKENS / 2)
    assert float(sums.hsic_p[0]) == pytest.approx(0, abs=1e-9)


def test_massive_activations_stand_out_of_their_own_token() -> None:
    outputs, weights = block(4)
    assert not massive(outputs, weights).any()
    assert "usual" not in pair_sums(outputs, weights)
    chosen = int(weights[5].argmax())
    outputs[5, chosen, 0] = 1e6
    assert massive(outputs, weights).nonzero().flatten().tolist() == [5]
    other = int((weights[6] == 0).nonzero()[0])
    outputs[6, other, 0] = 1e6  # an expert that the token was not routed to
    assert massive(outputs, weights).nonzero().flatten().tolist() == [5]
    assert set(pair_sums(outputs, weights)["usual"].n_p.tolist()) == {TOKENS - 1}


def test_debiased_cka_of_independent_outputs_is_0_where_the_biased_one_is_not() -> None:
    """The reason for HSIC₁: 64 tokens of 256 dimensions look alike without it."""
    outputs = torch.randn(64, 2, 256, generator=torch.Generator().manual_seed(0))
    sums = pair_sums(outputs, torch.ones(64, 2))["sampled"]
    debiased = float(sums.hsic_p[0] / (sums.hsic_first_p[0] * sums.hsic_second_p[0]).sqrt())
    x, y = (outputs[:, e] - outputs[:, e].mean(0) for e in (0, 1))
    biased = float((x.T @ y).square().sum() / ((x.T @ x).norm() * (y.T @ y).norm()))
    assert biased > 0.7
    assert abs(debiased) < 0.05
