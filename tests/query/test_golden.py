"""A published table comes back: runs whose counts are those of a paper give the paper's numbers."""

from __future__ import annotations

import numpy as np
import pytest

from collector.query.warehouse import Run, open_run
from collector.store.tables import Layer
from tests.helpers.synthetic import Shard, write_run

PUBLISHED = {("github", 7, 17): 77.0, ("arxiv", 0, 0): 97.7}
"""OLMoE, arXiv 2409.02060, section 5: domain specialization in percent, of (domain, layer, expert)."""
UNIFORM = 12.5
"""Percent of the tokens that a router choosing 8 of 64 experts at random gives to each."""
DOMAINS, TOKENS = ("arxiv", "github"), 1000
LAYERS = tuple(Layer(layer=layer, n_experts=64, top_k=8) for layer in range(16))


def picks(rng: np.random.Generator, domain: str, layer: int) -> np.ndarray:
    """[T, 8] in which the published expert has its tokens, and the others share what is left evenly."""
    special = {
        expert: round(TOKENS * share / 100)
        for (of, at, expert), share in PUBLISHED.items()
        if (of, at) == (domain, layer)
    }
    experts_tk = np.empty((TOKENS, 8), int)
    others = [expert for expert in range(64) if expert not in special]
    place = 0
    for token in range(TOKENS):
        own = [expert for expert, tokens in special.items() if token < tokens]
        even = [others[(place + i) % len(others)] for i in range(8 - len(own))]
        place += len(even)
        experts_tk[token] = [*own, *even]
    return rng.permuted(experts_tk[rng.permutation(TOKENS)], axis=1)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Two domains through 16 layers of 64 experts; which token it is and where the expert stands are random."""
    rng = np.random.default_rng(0)
    shards = [
        Shard.of_picks(
            LAYERS, documents=[(domain, TOKENS // 4)] * 4,
            experts={one.layer: picks(rng, domain, one.layer) for one in LAYERS},
        )
        for domain in DOMAINS
    ]  # fmt: skip
    return open_run(write_run(tmp_path_factory.mktemp("golden") / "run", LAYERS, shards))


def test_domain_specialization_gives_the_published_percentages(run: Run) -> None:
    rows = run.query("domain_specialization").project("label, layer, expert, value, baseline").fetchall()
    percent = {(label, layer, expert): (100 * value, 100 * baseline) for label, layer, expert, value, baseline in rows}
    assert len(percent) == 2 * 16 * 64
    for key, published in PUBLISHED.items():
        assert percent[key] == (pytest.approx(published), UNIFORM), key
    everywhere_else = [value for key, (value, _) in percent.items() if key not in PUBLISHED]
    assert min(everywhere_else) > 11
    assert max(everywhere_else) < 13


def test_the_whole_frequency_family_agrees_with_the_table(run: Run) -> None:
    for (domain, layer, expert), published in PUBLISHED.items():
        where = {"labels": [domain], "layer": layer}
        frequencies = run.query("selection_frequency", **where).filter(f"expert = {expert}").project("metric, value")
        assert dict(frequencies.fetchall())["selection_frequency"] == pytest.approx(published / 100)
        assert dict(frequencies.fetchall())["selection_share"] == pytest.approx(published / 800)
        ((top, count),) = (
            run.query("top_experts", n=1, **where).filter("metric = 'topk'").project("expert, count").fetchall()
        )
        assert (top, count) == (expert, published * TOKENS / 100)
        other = next(name for name in DOMAINS if name != domain)
        difference = run.query("reference_difference", layer=layer, reference=other).filter(f"expert = {expert}")
        assert difference.project("value").fetchall() == [(pytest.approx((published - UNIFORM) / 100, abs=0.005),)]


def test_what_the_table_calls_uniform_is_the_share_of_all_experts_together(run: Run) -> None:
    means = run.query("domain_specialization").aggregate("label, layer, avg(value)", "label, layer").fetchall()
    assert len(means) == 2 * 16
    assert all(100 * mean == pytest.approx(UNIFORM) for *_, mean in means)
