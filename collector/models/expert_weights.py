"""Compares the weights of all pairs of experts of a layer.

The matrices of an expert are brought into one form, a row per neuron: gate and up projection as they are, the down
projection transposed. Three comparisons follow from it:

- the cosine of each flattened matrix, which sees neurons in their order;
- the mean cosine of matched neurons: a neuron is its gate row, up row and down column together, and the Hungarian
  method finds the pairing of the two experts' neurons with the highest sum of cosines (Kuhn 1955), so that experts that
  differ by a permutation of neurons are equal;
- of routers, the cosine of two experts' rows, and the coupling of a row r with the first matrix W of any expert,
  |W r| / (|W| |r|), Frobenius norm: 1 / sqrt(d) for a random row of d entries, more if the expert answers to what its
  router looks for (router–expert coupling: arXiv 2512.23447).

Quantized weights are dequantized expert by expert; a block of experts is in memory at once.

Shapes: E experts, F neurons of an expert, H hidden size.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from collector.models.four_bit_reading import dequantized, slices

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from numpy.typing import NDArray

    from collector.models.routers import Router

_BLOCK = 1 << 26
"""Numbers of a block of experts; two of them are in memory."""
_SINGLE = (("wi", "wo"), ("fc1", "fc2"))
"""Names of an expert's two layers, where experts are modules of their own."""


class ExpertWeights:
    """The weights of one layer's experts, neuron by neuron."""

    def __init__(self, router: Router) -> None:
        """Finds the matrices.

        Raises:
            ValueError: the experts of this family are stored in a way that is not known here.
        """
        experts: Any = getattr(router.owner, "experts", None)
        read = None if experts is None else _reader(experts)
        if read is None:
            what = type(router.owner).__name__ if experts is None else type(experts).__name__
            raise ValueError(f"the weights of {what}, the experts of router {router.name}, cannot be compared yet")
        self._read, self.count = read

    def matrices(self, expert: int) -> dict[str, torch.Tensor]:
        """Returns `gate` (of gated experts), `up` and `down`, [F, H] each, in float32."""
        return {name: matrix.detach() for name, matrix in self._read(expert).items()}


def _reader(experts: Any) -> tuple[Callable[[int], dict[str, torch.Tensor]], int] | None:
    """Returns a function that reads an expert's matrices, and the number of experts; None for an unknown form."""
    names = {name for name, _ in experts.named_parameters()} | {name for name, _ in experts.named_modules()}
    if "down_proj" in names or "parametrizations.down_proj" in names:
        return _fused(experts)
    if {"mlp", "mlp.w1", "mlp.v1", "mlp.w2"} <= names:  # DBRX: [E F, H] each
        return _stacked(experts)
    keys = [key for key in experts if key.startswith("expert_")] if hasattr(experts, "keys") else []
    for first, second in _SINGLE:
        if keys and all(hasattr(experts[key], first) for key in keys):

            def read(expert: int, first: str = first, second: str = second) -> dict[str, torch.Tensor]:
                own = experts[keys[expert]]
                up, down = (dequantized(getattr(own, name), "weight", torch.float32) for name in (first, second))
                return {"up": up, "down": down.T}

            return read, len(keys)
    return None


def _stacked(experts: Any) -> tuple[Callable[[int], dict[str, torch.Tensor]], int]:
    count, mlp = int(experts.num_experts), experts.mlp

    def read(expert: int) -> dict[str, torch.Tensor]:
        parts = {"gate": mlp.w1, "up": mlp.v1, "down": mlp.w2}
        return {name: part.reshape(count, -1, part.shape[1])[expert].float() for name, part in parts.items()}

    return read, count


def _fused(experts: Any) -> tuple[Callable[[int], dict[str, torch.Tensor]], int]:
    down = slices(experts, "down_proj", torch.float32)
    gated = hasattr(experts, "gate_up_proj")
    up = slices(experts, "gate_up_proj" if gated else "up_proj", torch.float32)
    first, last = up(0).shape, down(0).shape
    halves = 2 if gated else 1
    transposed = first[0] != halves * last[1]  # [H, F] and [F, H] instead of [F, H] and [H, F]
    count = int(experts.down_proj.shape[0])

    def read(expert: int) -> dict[str, torch.Tensor]:
        inward = up(expert).T if transposed else up(expert)
        outward = down(expert) if transposed else down(expert).T
        if not gated:
            return {"up": inward, "down": outward}
        apart = inward.chunk(2) if getattr(experts, "is_concatenated", True) else (inward[::2], inward[1::2])
        return {"gate": apart[0], "up": apart[1], "down": outward}

    return read, count


def router_rows(router: Router, hidden: int) -> torch.Tensor | None:
    """Returns the router's weight, [E, H] in float32; None if it is no single matrix of that width."""
    found = [p for name, p in router.module.named_parameters() if p.ndim == 2 and p.shape[1] == hidden]
    return found[0].detach().float() if len(found) == 1 else None


def pair_blocks(weights: ExpertWeights) -> Iterator[tuple[list[int], list[int]]]:
    """Yields pairs of blocks of experts, each pair of experts i <= j in exactly one."""
    size = sum(matrix.numel() for matrix in weights.matrices(0).values())
    step = max(1, _BLOCK // size)
    blocks = [list(range(start, min(start + step, weights.count))) for start in range(0, weights.count, step)]
    for number, first in enumerate(blocks):
        for second in blocks[number:]:
            yield first, second


def cosines(weights: ExpertWeights) -> dict[str, NDArray[np.float64]]:
    """Returns the cosine of each flattened matrix, and of all of them together (`all`), of all pairs, [E, E]."""
    products: dict[str, NDArray[np.float64]] = {}
    for first, second in pair_blocks(weights):
        ours = _flat(weights, first)
        theirs = ours if first == second else _flat(weights, second)
        for name, flat in ours.items():
            matrix = products.setdefault(name, np.zeros((weights.count, weights.count)))
            block = (flat @ theirs[name].T).double().cpu().numpy()
            matrix[np.ix_(first, second)] = block
            matrix[np.ix_(second, first)] = block.T
    products["all"] = sum(products.values(), np.zeros((weights.count, weights.count)))
    return {name: _normalized(matrix) for name, matrix in products.items()}


def _flat(weights: ExpertWeights, experts: list[int]) -> dict[str, torch.Tensor]:
    read = [weights.matrices(expert) for expert in experts]
    return {name: torch.stack([each[name].flatten() for each in read]) for name in read[0]}


def _normalized(products: NDArray[np.float64]) -> NDArray[np.float64]:
    length = np.sqrt(np.diag(products))
    below = np.outer(length, length)
    return np.divide(products, below, out=np.zeros_like(products), where=below > 0)


def matched(weights: ExpertWeights, done: Callable[[int], None] = lambda _pairs: None) -> NDArray[np.float64]:
    """Returns the mean cosine of matched neurons of all pairs, [E, E].

    Args:
        weights: of the layer.
        done: called after each pair of experts with 1.
    """
    from scipy.optimize import linear_sum_assignment

    found = np.eye(weights.count)
    for first, second in pair_blocks(weights):
        ours = [_neurons(weights, expert) for expert in first]
        theirs = ours if first == second else [_neurons(weights, expert) for expert in second]
        for i, one in zip(first, ours, strict=True):
            for j, other in zip(second, theirs, strict=True):
                if i < j:
                    cosine = (one @ other.T).cpu().numpy()
                    rows, columns = linear_sum_assignment(cosine, maximize=True)
                    found[i, j] = found[j, i] = cosine[rows, columns].mean(dtype=np.float64)
                    done(1)
    return found


def _neurons(weights: ExpertWeights, expert: int) -> torch.Tensor:
    """Each neuron's weights, gate row, up row and down column together, at length 1."""
    return torch.nn.functional.normalize(torch.cat([*weights.matrices(expert).values()], dim=1), dim=1)


def router_cosines(rows_eh: torch.Tensor) -> NDArray[np.float64]:
    """Returns the cosine of all pairs of router rows, [E, E]."""
    rows = rows_eh.double()
    return _normalized((rows @ rows.T).cpu().numpy())


def couplings(weights: ExpertWeights, rows_eh: torch.Tensor) -> NDArray[np.float64]:
    """Returns the coupling of each router row i with the first matrix of each expert j, [E, E]."""
    rows = torch.nn.functional.normalize(rows_eh.float(), dim=1)
    found = np.zeros((len(rows_eh), weights.count))
    for expert in range(weights.count):
        first = next(iter(weights.matrices(expert).values()))
        answer = (first @ rows.to(first.device).T).norm(dim=0) / first.norm().clamp_min(1e-30)
        found[:, expert] = answer.double().cpu().numpy()
    return found
