"""Documents with several labels: counted for each of them, once in all, and drawn once with all their labels.

Label by label, a run answers like its twin, in which each such document stands once per label. All labels together, it
answers like the run in which every document has a single label.
"""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest

from collector.data.sources import LABEL_SEPARATOR
from collector.look.explore import views
from collector.query.document_counts import document_counts
from collector.query.inference import intervals, sample_size_curve, specialization_test, split_half
from collector.query.rollup import making
from collector.query.warehouse import list_queries, open_run
from collector.store.run_directory import RunDirectory
from collector.store.tables import Layer
from tests.helpers.query_runs import opened_once
from tests.helpers.synthetic import Shard, joined, random_shard, write_run

LAYERS = (Layer(layer=1, n_experts=8, top_k=2, has_capacity=True), Layer(layer=4, n_experts=5, top_k=3))
LABELS = [("en",), ("ko",), ("en", "ko"), ("de", "en"), ("ko",), ("de",), ("de", "en", "ko"), ("en",), ("fr",)]

BY_LABEL = [
    "committee", "compute", "conditional_mutual_information", "contribution_overlap", "contribution_specialization",
    "control_effects", "direct_attribution", "domain_specialization", "dropped_tokens", "dynamic_k",
    "effect_specificity", "effective_experts", "expert_contribution", "expert_effect", "fertility",
    "importance_agreement", "label_npmi", "language_divergence", "language_overlap", "load_balance", "log_odds",
    "loss", "mutual_information", "phase_divergence", "position_profile", "reference_difference", "repetition",
    "router_entropy", "router_entropy_quantiles", "router_stats", "routing_divergence", "routing_locality",
    "selection_frequency", "top_experts",
]  # fmt: skip
POOLED = ["coactivation", "expert_load", "expert_similarity", "expert_token_overlap", "expert_tokens",
          "layer_transition", "output_specialization", "output_vocabulary", "paths", "super_experts",
          "token_npmi", "vocabulary_specialization"]  # fmt: skip
HAVE_POOLED = [
    "control_effects",
    "direct_attribution",
    "dynamic_k",
    "expert_contribution",
    "expert_effect",
    "load_balance",
    "phase_divergence",
    "router_stats",
]
"""importance_agreement has it, too, and still compares labels: experts that few of them choose are selective."""
OF_STORED = ["dynamic_k", "load_balance", "router_stats", "routing_divergence"]
"""Those that read what is stored of all experts, which the run with a rollup lacks."""
OTHER = ["expert_map", "expert_profile", "nearest_documents", "plan_transfer", "token_trace", "weight_similarity"]
"""plan_transfer halves the documents of each set of labels, so that no document is in both halves."""


def documents() -> list[Shard]:
    """A shard for each document."""
    rng = np.random.default_rng(5)
    found = []
    for number, labels in enumerate(LABELS):
        shard = random_shard(rng, LAYERS, [(LABEL_SEPARATOR.join(labels), 6 + number)], special=0.2, vocabulary=7)
        found.append(dataclasses.replace(shard, document_ids=[f"doc {number}"], parallel_ids=[f"text {number % 2}"]))
    return found


def with_label(shard: Shard, label: str) -> Shard:
    return dataclasses.replace(shard, documents=[(label, shard.documents[0][1])])


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The run, with and without a rollup; its twin; the run in which all have one label; each in two shards."""
    root, shards = tmp_path_factory.mktemp("several"), documents()
    twin = [[with_label(shard, label) for label in labels] for shard, labels in zip(shards, LABELS, strict=True)]
    made = {
        "run": [joined(shards[:4]), joined(shards[4:])],
        "rollup": [joined(shards[:4]), joined(shards[4:])],
        "twin": [joined(list(itertools.chain(*half))) for half in (twin[:4], twin[4:])],
        "single": [joined([with_label(shard, "x") for shard in half]) for half in (shards[:4], shards[4:])],
    }
    for name, halves in made.items():
        write_run(root / name, LAYERS, halves, store=() if name == "rollup" else ("logits",))
    making.make(RunDirectory(root / "rollup"))
    return {name: root / name for name in made}


def rows(run, name: str, **params) -> list[dict]:
    """The rows, without what counts all labels together."""
    relation = run.query(name, **params)
    left_out = {"baseline"} if name in ("compute", "conditional_mutual_information", "fertility", "loss") else set()
    found = [dict(zip(relation.columns, row, strict=True)) for row in relation.fetchall()]
    return [{key: value for key, value in row.items() if key not in left_out} for row in found]


def assert_equal(one: list[dict], other: list[dict]) -> None:
    assert one
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        for key in a:
            assert a[key] == (pytest.approx(b[key], rel=1e-5, abs=1e-9) if isinstance(b[key], float) else b[key]), (
                a,
                b,
            )


def test_every_query_is_here() -> None:
    assert sorted([*BY_LABEL, *POOLED, *OTHER]) == sorted(query.name for query in list_queries())


@pytest.mark.parametrize("chosen", [None, ["en", "fr"], ["de"]])
@pytest.mark.parametrize("name", BY_LABEL)
def test_label_by_label_a_document_counts_for_each_of_its_labels(folders, name: str, chosen) -> None:
    params = {"labels": chosen} | ({"reference": (chosen or ["ko"])[0]} if name == "reference_difference" else {})
    expected = rows(opened_once(folders["twin"]), name, **params)
    if name in ("language_divergence", "reference_difference", "routing_divergence") and chosen == ["de"]:
        assert expected == rows(opened_once(folders["run"]), name, **params) == []
        return
    assert_equal(rows(opened_once(folders["run"]), name, **params), expected)
    if name not in OF_STORED:
        assert_equal(rows(opened_once(folders["rollup"]), name, **params), expected)


@pytest.mark.parametrize("name", [*POOLED, *HAVE_POOLED])
def test_all_labels_together_a_document_counts_once(folders, name: str) -> None:
    params = {"pooled": True} if name in HAVE_POOLED else {"n": 2} if name == "paths" else {}
    expected = rows(opened_once(folders["single"]), name, **params)
    assert_equal(rows(opened_once(folders["run"]), name, **params), expected)
    if name == "expert_load":
        assert_equal(rows(opened_once(folders["rollup"]), name, **params), expected)


def test_the_labels_of_an_expert_are_single_ones(folders) -> None:
    run, twin = (
        [
            row
            for row in rows(opened_once(folders[name]), "expert_profile", expert=1, layer=4)
            if row["aspect"] == "label"
        ]
        for name in ("run", "twin")
    )
    assert [(row["item"], row["n"], row["count"]) for row in run] == [(r["item"], r["n"], r["count"]) for r in twin]


def test_a_neighbour_agrees_in_each_label_that_both_have(folders) -> None:
    found = rows(open_run(folders["run"]), "nearest_documents", n=2)
    has = {f"doc {number}": labels for number, labels in enumerate(LABELS)}
    nearest = [(row["document"], row["neighbour"]) for row in found if row["metric"] == "neighbour_cosine"]
    for row in (row for row in found if row["metric"] == "label_agreement"):
        own = [row["label"] in has[other] for document, other in nearest if row["label"] in has[document]]
        documents = sum(row["label"] in labels for labels in LABELS)
        assert (row["value"], row["baseline"], row["n"]) == (
            pytest.approx(np.mean(own)), (documents - 1) / (len(LABELS) - 1), documents
        )  # fmt: skip
    assert {row["label"] for row in found if row["metric"] == "label_agreement"} == {"de", "en", "fr", "ko"}
    only, *_ = rows(open_run(folders["run"]), "nearest_documents", labels=["de"])
    assert (only["label"], only["value"], only["baseline"], only["n"]) == ("de", 1, 1, 3)
    assert rows(open_run(folders["run"]), "nearest_documents", labels=["fr"]) == [], "one document has no neighbour"


def test_views_of_labels(folders) -> None:
    run = opened_once(folders["run"])
    counts = {label: sum(label in labels for labels in LABELS) for label in ("de", "en", "fr", "ko")}
    assert dict(run.sql("select label, documents from labels order by label").fetchall()) == counts
    pairs = run.sql(
        "select documents.doc_id, list(document_labels.label order by document_labels.label) "
        "from document_labels join documents using (shard, doc) group by documents.doc_id order by documents.doc_id"
    ).fetchall()
    assert pairs == [(f"doc {number}", sorted(labels)) for number, labels in enumerate(LABELS)]
    assert len(run.sql("from documents").fetchall()) == len(LABELS)
    with pytest.raises(ValueError, match="no document of this run has the label 'xx'; it has de, en, fr, ko"):
        run.query("top_experts", labels=["xx"])


def test_a_grouping_takes_the_place_of_all_labels(folders) -> None:
    run = open_run(folders["run"], by="length")
    assert sum(row[0] for row in run.sql("select documents from labels").fetchall()) == len(LABELS)
    assert_equal(rows(run, "expert_load"), rows(opened_once(folders["single"]), "expert_load"))


# -- intervals and tests -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Forty documents, all of them both en and ko."""
    rng = np.random.default_rng(0)
    texts = [
        random_shard(rng, LAYERS[1:], [(f"en{LABEL_SEPARATOR}ko", 12)], special=0, vocabulary=7) for _ in range(40)
    ]
    folder = tmp_path_factory.mktemp("both")
    named = [dataclasses.replace(text, document_ids=[f"{i}"], parallel_ids=[None]) for i, text in enumerate(texts)]
    return open_run(write_run(folder / "run", LAYERS[1:], [joined(named)]))


def test_labels_of_the_same_documents_are_drawn_together(both) -> None:
    table = intervals(both, "domain_specialization", resamples=200)
    by_label = {label: table.filter(table["label"].to_numpy() == label) for label in ("en", "ko")}
    for column in ("value", "low", "high", "standard_error", "documents"):
        assert by_label["en"][column].to_pylist() == by_label["ko"][column].to_pylist()
    assert set(by_label["en"]["documents"].to_pylist()) == {40}
    apart = intervals(both, "language_divergence", resamples=100)
    assert apart["high"].to_pylist() == [pytest.approx(0, abs=1e-12)]


def test_shuffling_moves_whole_sets_of_labels(folders) -> None:
    """The statistic is that of each label against all documents without it, each once."""
    counts = next(document_counts(opened_once(folders["run"]), layer=4))
    table = specialization_test([counts], resamples=99)
    order = np.argsort(counts.shard_D * 100 + counts.doc_D)
    sets = [LABELS[number] for number in range(len(order))]
    for row in table.to_pylist():
        has = np.array([row["label"] in sets[place] for place in range(len(order))])
        picks, tokens = counts.picks_DE[order][:, row["expert"]], counts.tokens_D[order]
        assert row["documents"] == has.sum()
        assert row["value"] == pytest.approx(picks[has].sum() / tokens[has].sum())
        assert row["pooled"] == pytest.approx(picks.sum() / tokens.sum())
        assert row["t"] == pytest.approx(welch(picks[has], tokens[has], picks[~has], tokens[~has]), rel=1e-6, abs=1e-9)


def welch(picks, tokens, other_picks, other_tokens) -> float:
    """The difference of two ratios of sums by its standard error, written out."""
    parts = []
    for y, n in ((picks, tokens), (other_picks, other_tokens)):
        y, n = y.astype(float), n.astype(float)
        ratio = y.sum() / n.sum()
        parts.append((ratio, len(y) / max(len(y) - 1, 1) * ((y - ratio * n) ** 2).sum() / n.sum() ** 2))
    error = np.sqrt(parts[0][1] + parts[1][1])
    return (parts[0][0] - parts[1][0]) / error if error > 0 else 0.0


def test_where_labels_say_nothing_p_is_uniform(tmp_path) -> None:
    rng = np.random.default_rng(3)
    layer = (Layer(layer=0, n_experts=4, top_k=1),)
    found = []
    for number in range(40):
        taste = rng.dirichlet(np.ones(4), 60)
        texts, experts = [], []
        for text in range(60):
            labels = [("en",), ("ko",), ("en", "ko")][rng.integers(3)]
            texts.append((LABEL_SEPARATOR.join(labels), 8))
            experts.append(rng.choice(4, size=(8, 1), p=taste[text]))
        shard = Shard.of_picks(layer, documents=texts, experts={0: np.concatenate(experts)})
        run = open_run(write_run(tmp_path / str(number), layer, [shard]))
        found += specialization_test(document_counts(run), resamples=199)["p"].to_pylist()
    assert 0.02 < np.mean(np.array(found) <= 0.05) < 0.09
    assert 0.42 < np.mean(found) < 0.58


def test_halves_take_a_document_with_all_its_labels(both) -> None:
    table = split_half(document_counts(both), splits=20).to_pylist()
    en, ko = ([row for row in table if row["label"] == label] for label in ("en", "ko"))
    assert [row | {"label": "ko"} for row in en] == ko
    assert all(row["documents"] == 40 for row in table)


def test_a_curve_of_documents_per_label_is_refused(both) -> None:
    with pytest.raises(ValueError, match="documents have several labels here"):
        sample_size_curve(both, resamples=10)


def test_the_explorer_finds_a_document_under_each_of_its_labels(folders) -> None:
    run = opened_once(folders["run"])
    for label in ("de", "en", "fr", "ko"):
        found = [document.doc_id for document in views.documents(run, label, "tokens > 3")]
        assert found == [f"doc {number}" for number, labels in enumerate(LABELS) if label in labels]
