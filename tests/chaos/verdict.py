"""What was compared and what was wrong; and how a table is compared with what it must hold."""

from __future__ import annotations

import dataclasses

import numpy as np
import pyarrow as pa

WEIGHT_TOLERANCE = 1e-5
STATISTIC_TOLERANCE = 3e-4
"""Statistics are stored with 12 significant bits."""


@dataclasses.dataclass(kw_only=True)
class Verdict:
    """What was compared, and what was wrong."""

    rows: int = 0
    """Rows of the routing table."""
    shards: int = 0
    violations: list[str] = dataclasses.field(default_factory=list)

    def demand(self, holds: bool, what: str) -> bool:
        """Notes a violation unless `holds`."""
        if not holds:
            self.violations.append(what)
        return holds


def compare(verdict: Verdict, name: str, keys: list[str], found: pa.Table, expected: dict[str, np.ndarray]) -> None:
    """Keys first, each exactly once; then, key by key, every column of `expected`."""
    columns = {each: _plain(found[each]) for each in expected}
    order = np.lexsort([columns[key] for key in reversed(keys)])
    wanted = np.lexsort([expected[key] for key in reversed(keys)])
    have = list(zip(*(columns[key][order].tolist() for key in keys), strict=True))
    want = list(zip(*(expected[key][wanted].tolist() for key in keys), strict=True))
    twice = len(have) - len(set(have))
    missing, extra = len(set(want) - set(have)), len(set(have) - set(want))
    wrong = f"{name}: {missing} keys missing, {extra} that should not be there, {twice} twice"
    if not verdict.demand(have == want, wrong):
        return
    for column, values in expected.items():
        left, right = columns[column][order], values[wanted]
        if column[0] == "w" and column[1:].isdigit():
            same = np.abs(left - right) <= WEIGHT_TOLERANCE
        elif right.dtype.kind == "f":
            same = np.abs(left - right) <= STATISTIC_TOLERANCE * np.maximum(np.abs(right), 1e-2)
        else:
            same = left == right
        verdict.demand(bool(same.all()), f"{name}.{column}: {int((~same).sum())} of {len(same)} values differ")


def _plain(column: pa.ChunkedArray) -> np.ndarray:
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    return column.to_numpy()
