"""Random runs for the tests of queries, and how a query's rows compare with those of `reference`."""

from __future__ import annotations

import atexit
import contextlib
import functools
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import Phase, settings
from hypothesis import strategies as st

from collector.query.catalog import find_query
from collector.query.groupings import LABEL
from collector.query.warehouse import Run, open_run
from collector.store.tables import Layer
from tests.helpers.synthetic import Shard, random_shard, write_run

LABELS = ("en", "ko", "o'brien", "zh-Hant")
VOCABULARY = 7
"""Few ids, so that they repeat."""

STORED = st.sampled_from([(), ("probabilities",), ("logits",)])
"""What a run stores of all experts."""

few_examples = settings(max_examples=10, deadline=None, derandomize=True, phases=[Phase.explicit, Phase.generate])
"""The same in every run, bounded in time, and without shrinking, which would take minutes: failures are small."""

documents = st.lists(st.tuples(st.sampled_from(LABELS), st.integers(1, 9)), min_size=1, max_size=6)


@st.composite
def geometries(draw: st.DrawFn) -> list[Layer]:
    """Routers that differ in stack, layer, E, k and capacity."""
    stacks = st.sampled_from(["decoder", "decoder.mlp", "encoder"])
    routers = draw(st.lists(st.tuples(stacks, st.integers(0, 255)), min_size=1, max_size=3, unique=True))
    sizes = [draw(st.integers(1, 12)) for _ in routers]
    return [
        Layer(
            stack=stack, layer=number, n_experts=size, top_k=draw(st.integers(1, size)),
            has_capacity=draw(st.booleans()),
        )
        for (stack, number), size in zip(routers, sizes, strict=True)
    ]  # fmt: skip


@st.composite
def random_runs(draw: st.DrawFn) -> tuple[list[Layer], list[Shard]]:
    """Routers, and shards with random tokens, documents and routing."""
    layers = draw(geometries())
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    shards = draw(st.lists(documents, min_size=1, max_size=3))
    return layers, [random_shard(rng, layers, each, special=0.3, vocabulary=VOCABULARY) for each in shards]


@contextlib.contextmanager
def opened(layers: Sequence[Layer], shards: Sequence[Shard], *, store: Sequence[str] = ()) -> Iterator[Run]:
    """The run of these shards, for as long as the context."""
    with tempfile.TemporaryDirectory() as folder:
        yield open_run(write_run(Path(folder, "run"), layers, shards, store=store))


def by_sql(run: Run, name: str, **params: object) -> list[tuple]:
    """What the query says over the views and macros as they are, of which nothing is counted on demand."""
    query = find_query(name)
    return run.cursor().sql(query.sql, params=run.bind(query, params)).fetchall()


@functools.lru_cache(maxsize=8)
def opened_once(folder: Path | str, by: str = LABEL) -> Run:
    """A run that several tests read and none changes: opening it takes longer than most queries."""
    return open_run(folder, by=by)


atexit.register(opened_once.cache_clear)  # DuckDB tells of connections that are still open as of leaks


def keyed(run: Run, name: str, keys: int, **params: object) -> dict:
    """Rows by their first columns, which are their keys and their order."""
    rows = run.query(name, **params).fetchall()
    found = {row[:keys]: row[keys:] for row in rows}
    assert len(found) == len(rows), "keys repeat"
    assert list(found) == sorted(found), "not ordered by the keys"
    return found


def assert_same(actual: dict, expected: dict, rel: float = 1e-8) -> None:
    """The same keys, and the same cells up to rounding, or to a relative error."""
    assert set(actual) == set(expected)
    for key, values in expected.items():
        for got, wanted in zip(actual[key], values, strict=True):
            exact = wanted is None or isinstance(wanted, str | bool)
            near = wanted if exact else pytest.approx(wanted, rel=rel, abs=rel / 10)
            assert got == near, (key, actual[key], values)


def assert_same_rows(actual: Sequence[tuple], expected: Sequence[tuple]) -> None:
    """The same rows in the same order; numbers approximately, for DuckDB adds up in the order in which threads come."""
    assert [len(row) for row in actual] == [len(row) for row in expected]
    assert _cells(actual) == pytest.approx(_cells(expected))


def _cells(rows: Sequence[tuple]) -> list:
    """All cells, those of lists one by one."""
    return [each for row in rows for cell in row for each in (cell if isinstance(cell, list) else [cell])]
