"""Measures how evenly a placement divides the load of a layer among GPUs.

Axes: L layers, E experts, G GPUs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from collector.query.placements.eplb import Placement


def shares(placement: Placement, gpus: int) -> NDArray[np.float64]:
    """Returns which share of each expert's load each GPU gets, [L, E, G]: its replicas there, of all its replicas."""
    layers, slots = placement.expert_LP.shape
    share_LEG = np.zeros((*placement.replicas_LE.shape, gpus))
    gpu_P = np.arange(slots) // (slots // gpus)
    np.add.at(share_LEG, (np.arange(layers)[:, None], placement.expert_LP, gpu_P), 1)
    return share_LEG / placement.replicas_LE[:, :, None]


def balancedness(load_LE: NDArray, placement: Placement, gpus: int) -> NDArray[np.float64]:
    """Returns the mean load of a GPU by the largest, [L]: 1 if all are loaded alike, 1 / G if one has everything.

    The load of a replicated expert is divided evenly among its replicas. The definition is that of SGLang's
    balancedness (`average_utilization_rate`).
    """
    load_LG = np.einsum("le,leg->lg", np.asarray(load_LE, np.float64), shares(placement, gpus))
    return load_LG.mean(axis=1) / load_LG.max(axis=1)
