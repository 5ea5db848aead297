"""Orders items so that similar ones are adjacent, by hierarchical clustering with average linkage.

The distances come from a query; scipy builds the tree and finds the leaf order with the closest neighbours.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.cluster import hierarchy
from scipy.spatial import distance

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tree:
    """A dendrogram."""

    leaves: list[Any]
    """The items, in order."""
    joints: list[tuple[list[float], list[float]]]
    """Each joint of two branches as a line of 4 points: positions (0 … number of leaves, each leaf in the middle of
    its unit), and distances."""


def tree(names: Sequence[Any], distances_nn: np.ndarray) -> Tree:
    """Clusters items by the distances between them.

    Args:
        names: n items.
        distances_nn: [n, n], symmetric, 0 on the diagonal.
    """
    if len(names) < 2:
        return Tree(leaves=list(names), joints=[])
    condensed = distance.squareform(distances_nn, checks=False)
    linkage = hierarchy.linkage(condensed, "average", optimal_ordering=True)
    drawn = hierarchy.dendrogram(linkage, no_plot=True)
    # scipy puts the leaves at 5, 15, 25 …
    joints = [
        ([place / 10 for place in where], list(heights))
        for where, heights in zip(drawn["icoord"], drawn["dcoord"], strict=True)
    ]
    return Tree(leaves=[names[leaf] for leaf in drawn["leaves"]], joints=joints)


def by_profile(names: Sequence[Any], profiles_nd: np.ndarray) -> list[Any]:
    """Orders items so that similar profiles are adjacent, by cosine distance.

    Args:
        names: n items.
        profiles_nd: [n, d], not negative.
    """
    # an expert that was never chosen has no direction: it gets a uniform profile
    distances = distance.pdist(profiles_nd + 1e-9, "cosine") if len(names) > 1 else np.zeros(0)
    return tree(names, distance.squareform(np.clip(distances, 0, None)) if len(names) > 1 else np.zeros((1, 1))).leaves
