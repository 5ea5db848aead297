"""Counts the load of each expert in the traffic that a run stands for: its documents, or a mix of its labels.

A load is the number of picks per million tokens. Special tokens that the tokenizer added count only if asked for.

Axes: L layers, H halves of the documents (first, second), K labels of a mix, E experts.
"""

from __future__ import annotations

import csv
import math
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from numpy.typing import NDArray

    from collector.query.warehouse import Run
    from collector.store.tables import Layer

PER = 1_000_000
"""Tokens to which loads refer. No expert has more picks than that, so float32 holds all loads exactly."""
_PICKS = """
select layer, label, is_first, expert, sum(picks)
from by_label('half_load', $stack, null, $labels, $include_special, $pooled)
group by layer, label, is_first, expert
"""


def read_mix(text: str) -> dict[str, float]:
    """Reads `LABEL=SHARE,LABEL=SHARE`, and divides the shares by their sum; a label with a comma takes quotes.

    Raises:
        ValueError: a share is missing or not a number, all are 0, or a label comes twice.
    """
    mix: dict[str, float] = {}
    for part in next(csv.reader([text], skipinitialspace=True), []):
        label, _, number = (each.strip() for each in part.rpartition("="))
        try:
            share = float(number)
        except ValueError:
            share = math.nan
        if not label or not (0 <= share < math.inf):
            raise ValueError(f"--mix takes labels with their shares, as in eng_Latn=0.7,kor_Hang=0.3; got {part!r}")
        if label in mix:
            raise ValueError(f"--mix names {label} twice")
        mix[label] = share
    if not sum(mix.values()):
        raise ValueError(f"--mix needs a share above 0, got {text!r}")
    return {label: share / sum(mix.values()) for label, share in mix.items() if share}


class Loads:
    """The picks of the routers of one stack, by half and label."""

    def __init__(
        self, run: Run, layers: Sequence[Layer], mix: Mapping[str, float] | None, *, include_special: bool
    ) -> None:
        """Counts.

        Args:
            run: the run.
            layers: routers of one stack with the same number of experts.
            mix: shares of labels, which sum to 1 (default: all documents as they are).
            include_special: also count the special tokens that the tokenizer added.

        Raises:
            ValueError: a label that the run does not have.
        """
        labels = None if mix is None else list(mix)
        run.check(labels=labels)
        params = {
            "stack": layers[0].stack, "labels": None if labels is None else run.with_sets(labels),
            "include_special": include_special, "pooled": mix is None,
        }  # fmt: skip
        self._names: list[str | None] = [None] if mix is None else [*mix]
        self._share_K = np.array([*mix.values()] if mix else [1.0])
        self._top_k_L = np.array([layer.top_k for layer in layers])
        self._picks_LHKE = np.zeros((len(layers), 2, len(self._names), layers[0].n_experts), np.int64)
        rows = {layer.layer: number for number, layer in enumerate(layers)}
        columns = {label: number for number, label in enumerate(self._names)}
        for layer, label, is_first, expert, picks in run.cursor().sql(_PICKS, params=params).fetchall():
            self._picks_LHKE[rows[layer], 0 if is_first else 1, columns[label], expert] = picks

    def of(self, *, first: bool | None = None) -> NDArray[np.int64]:
        """Returns loads [L, E], rounded to whole picks.

        Args:
            first: count the first or the second half of the documents (default: all).

        Raises:
            ValueError: there are no tokens to count, of some label.
        """
        halves = slice(None) if first is None else [0 if first else 1]
        picks_LKE = self._picks_LHKE[:, halves].sum(axis=1)
        tokens_LK = picks_LKE.sum(axis=2) / self._top_k_L[:, None]
        if not tokens_LK.all():
            whose = self._names[int((tokens_LK == 0).any(axis=0).argmax())]
            raise ValueError(
                f"{'a label' if whose is None else f'label {whose!r}'} needs two documents with tokens to count, "
                "because balance is measured in documents that the placement was not computed from: collect more"
            )
        per_token_LE = np.einsum("k,lke->le", self._share_K, picks_LKE / tokens_LK[:, :, None])
        return np.rint(PER * per_token_LE).astype(np.int64)
