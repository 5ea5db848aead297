"""Values corrected for the number of documents, and labels with little text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from collector.query import inference
from collector.query.catalog import list_queries
from collector.query.document_counts import document_counts
from collector.query.inference import correction, resampling
from collector.query.inference.answers import ask
from collector.query.warehouse import Run, open_run
from collector.store.tables import Layer
from tests.helpers.command_line import collector
from tests.helpers.synthetic import Shard, random_shard, write_run
from tests.query.test_inference import DOCUMENTS, LAYERS


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    shard = random_shard(np.random.default_rng(5), LAYERS, DOCUMENTS)
    return write_run(tmp_path_factory.mktemp("correction") / "run", LAYERS, [shard])


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return open_run(folder)


def test_the_correction_takes_off_the_bias_of_few_documents(tmp_path: Path) -> None:
    # two labels that choose alike, in 40 routers: the entropy of n picks is too low by about (E - 1) / (2 n)
    rng, layers = np.random.default_rng(3), [Layer(layer=layer, n_experts=8, top_k=1) for layer in range(40)]
    documents = [(label, 1) for label in ("en", "ko") for _ in range(60)]
    experts = {layer: rng.integers(8, size=(120, 1)) for layer in range(40)}
    run = open_run(write_run(tmp_path / "run", layers, [Shard.of_picks(layers, documents=documents, experts=experts)]))
    for name, truth in (("effective_experts", 8), ("language_divergence", 0)):
        rows = inference.corrected(run, name).to_pylist()
        bias, left = (np.mean([row[column] for row in rows]) - truth for column in ("value", "corrected"))
        assert abs(left) < 0.2 * abs(bias)


def test_the_corrected_value_is_the_value_less_the_mean_excess_of_the_samples(run: Run) -> None:
    table = inference.corrected(run, "language_overlap", layer=0, resamples=20, seed=4)
    answer, asked = ask(run, "language_overlap", {"layer": 0})
    assert table.drop_columns(["corrected", "documents"]).equals(answer)
    (counts,) = document_counts(run, layer=0)
    samples = [asked.values(answer, counts, sums)
               for sums in resampling.bootstrap(counts, resamples=20, seed=4, left_out=1)]  # fmt: skip
    mean = np.concatenate(samples, axis=1).mean(axis=1)
    for row, sampled in zip(table.to_pylist(), mean, strict=True):
        wanted = None if row["metric"] == "jaccard" else pytest.approx(2 * row["value"] - sampled)
        assert row["corrected"] == wanted


def test_labels_of_a_single_document_have_no_corrected_value(tmp_path: Path) -> None:
    shard = random_shard(np.random.default_rng(1), LAYERS, [("en", 5), ("en", 4), ("ko", 6)])
    table = inference.corrected(open_run(write_run(tmp_path / "run", LAYERS, [shard])), "effective_experts")
    assert {row["label"] for row in table.to_pylist() if row["corrected"] is None} == {"ko"}
    assert {(row["label"], row["documents"]) for row in table.to_pylist()} == {("en", 2), ("ko", 1)}


def test_every_biased_metric_is_one_of_its_query(run: Run) -> None:
    for query in list_queries():
        if query.biased:
            rows = inference.corrected(run, query.name).to_pylist()
            assert {row["metric"] for row in rows if row["corrected"] is not None} == {*query.biased}


def test_the_command_corrects_and_names_labels_with_little_text(folder: Path) -> None:
    done = collector("query", str(folder), "language_divergence", "--format", "csv")
    assert done.stdout.splitlines()[0].startswith('"metric","stack","layer","value","corrected",')
    assert "th, ko, en: fewer than 20 documents, or 20 picks per expert" in done.stderr
    assert "fewer than" not in collector("query", str(folder), "repetition").stderr


def test_a_large_run_without_a_rollup_says_what_it_takes(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(correction, "_FEW_PICKS", 60)
    assert "corrected" in collector("query", str(folder), "effective_experts", "--layer", "3").stdout
    done = collector("query", str(folder), "effective_experts")
    assert "corrected" not in done.stdout
    assert (
        f"without the column `corrected`: it takes counts of documents, see `collector rollup {folder}`" in done.stderr
    )
