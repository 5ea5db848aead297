"""Every query on an imported run: the answer of a collected run of the same decisions, or a refusal that says why."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from collector.capture.routing_table import round_statistic
from collector.config import DataConfig, DumpKind, ImportConfig
from collector.query import inference
from collector.query.catalog import find_query, list_comparisons, list_queries
from collector.query.comparison import open_runs
from collector.query.lacking import read_needs
from collector.query.rollup import making
from collector.query.warehouse import Run, open_run
from collector.replica.importing import import_dump
from collector.store.run_directory import RunDirectory
from collector.store.tables import Layer
from tests.helpers import dumps
from tests.helpers.dumps import Routed
from tests.helpers.query_runs import assert_same_rows
from tests.helpers.runs import collect_here, run_config
from tests.helpers.synthetic import Shard, random_shard, write_run

LAYERS = [Layer(layer=0, n_experts=7, top_k=3), Layer(layer=2, n_experts=7, top_k=3)]
DOCUMENTS = [("en", 9), ("ko", 7), ("en", 1), ("ko", 12), ("zh", 8)]
NAMES = [query.name for query in list_queries()]
OF_IDS = {
    "conditional_mutual_information", "domain_specialization", "log_odds", "mutual_information", "reference_difference",
    "language_divergence", "language_overlap", "dropped_tokens", "effective_experts", "expert_load", "coactivation",
    "expert_token_overlap", "position_profile", "expert_tokens", "plan_transfer", "phase_divergence",
    "committee", "label_npmi", "token_npmi",
}  # fmt: skip
"""Queries that ids answer alone."""
IN_PART = {
    "selection_frequency", "top_experts", "vocabulary_specialization", "load_balance", "repetition", "expert_profile",
    "fertility", "token_trace",
}  # fmt: skip
OF_WEIGHTS = {
    "router_entropy", "router_entropy_quantiles", "router_stats", "dynamic_k", "layer_transition",
    "routing_divergence",
}  # fmt: skip
"""Queries of the routing that ids cannot answer. Those of what only a model tells are all the others."""


def vllm_dump(folder: Path, shards: list[Shard]) -> Path:
    """The documents of these shards with a further, last token each; layer 1 has no router."""
    records = []
    for number, shard in enumerate(shards):
        starts = np.cumsum([0, *shard.lengths])
        for doc, (start, stop) in enumerate(itertools.pairwise(starts)):
            routed = np.stack([shard.experts[one.layer][start:stop] for one in LAYERS], axis=1)
            experts = np.insert(np.concatenate([routed, routed[-1:]]), 1, 0, axis=1)
            document = Routed(
                id=f"synthetic#{number}-{doc}", label=shard.documents[doc][0], experts=experts,
                token_ids=np.append(shard.ids[start:stop], 0),
            )  # fmt: skip
            parallel = shard.parallel_ids and shard.parallel_ids[doc]
            records.append(
                dumps.vllm(document, int(shard.prompts[doc]), how="npy")
                | {"source": "synthetic", "parallel_id": parallel}
            )
    return dumps.write_lines(folder / "out.jsonl", records)


def imported(dump: Path, out: Path, kind: DumpKind, **config: object) -> RunDirectory:
    run, _ = import_dump(str(dump), str(out), kind, ImportConfig(model="m", **config))
    return run


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A collected run, and the same decisions imported."""
    folder = tmp_path_factory.mktemp("imported")
    rng = np.random.default_rng(5)
    shards = [random_shard(rng, LAYERS, DOCUMENTS, special=0, vocabulary=9) for _ in range(2)]
    shards = [dataclasses.replace(shard, truncated=None) for shard in shards]
    own = write_run(folder / "own", LAYERS, shards, record=(), vocabulary=None)
    imported(vllm_dump(folder, shards), folder / "imported", "vllm", experts=7, docs_per_shard=len(DOCUMENTS))
    return own, folder / "imported"


@pytest.fixture(scope="module", params=["tokens", "rollup"])
def runs(request: pytest.FixtureRequest, pair: tuple[Path, Path]) -> tuple[Run, Run]:
    """Both opened, with counts of tokens and with those of a rollup."""
    if request.param == "rollup":
        for root in pair:
            making.make(RunDirectory(root))
    own, other = (open_run(root, rollup=request.param == "rollup") for root in pair)
    return own, other


def left(answer: pa.Table, other: Run, name: str) -> list[tuple]:
    """The rows of the collected run in their order, without what the imported one leaves out."""
    query = find_query(name)
    missing = other.left_out(query, other.bind(query, {}))
    rows, columns = ({}, ()) if missing is None else (missing.rows, missing.columns)
    return [
        tuple(value for column, value in row.items() if column not in columns)
        for row in answer.to_pylist()
        if all(row[place] not in names for place, names in rows.items())
    ]


@pytest.mark.parametrize("name", NAMES)
def test_a_query_answers_as_for_a_collected_run_or_refuses(runs, name):
    own, other = runs
    if name in OF_IDS | IN_PART:
        ours, theirs = own.query(name).to_arrow_table(), other.query(name).to_arrow_table()
        assert theirs.num_rows
        assert_same_rows([tuple(row.values()) for row in theirs.to_pylist()], left(ours, other, name))
        assert bool(other.remarks(name)) == (name in IN_PART)
        assert not any(
            theirs[column].null_count and not ours[column].null_count for column in theirs.column_names
        )  # fmt: skip
    else:
        with pytest.raises(ValueError, match="imported") as refused:
            other.query(name)
        assert "\n" not in str(refused.value)
        assert ("weights of the chosen experts" in str(refused.value)) == (name in OF_WEIGHTS)


def test_these_are_all_queries():
    assert set(NAMES) > OF_IDS | IN_PART | OF_WEIGHTS
    assert {query.name for query in list_comparisons()} == {"router_saturation", "quantization_fidelity"}


def test_what_is_left_out_is_named(runs):
    _, other = runs
    assert other.remarks("selection_frequency") == [
        "left out: top1_frequency, weighted_share; weights of the chosen experts are not in a dump of vllm, from which "
        "the run was imported"
    ]
    assert {row[0] for row in other.query("selection_frequency").fetchall()} == {
        "selection_share",
        "selection_frequency",
    }


def test_a_parameter_that_takes_weights_is_refused(runs):
    with pytest.raises(ValueError, match="coactivation with --mode released cannot be answered: weights of the chosen"):
        runs[1].query("coactivation", mode="released")


@pytest.mark.parametrize("by", ["length", "source", "position"])
def test_groups_count_as_for_a_collected_run(pair, by):
    own, other = (open_run(root, by=by) for root in pair)
    for name in ("selection_frequency", "load_balance"):
        assert_same_rows(other.query(name).fetchall(), left(own.query(name).to_arrow_table(), other, name))


def test_statements_of_the_user_see_nulls_and_never_zeros(runs):
    select = (
        "select count(top1) filter (picks > 0), count(weight_sum) filter (picks > 0), sum(picks) > 0 from assignments"
    )
    assert runs[1].sql(select).fetchall() == [(0, 0, True)]
    select = (
        "select count(expert), count(weights), count(weight_entropy), count(margin), count(experts) > 0 from decisions"
    )
    assert runs[1].sql(select).fetchall() == [(0, 0, 0, 0, True)]
    select = "select count(weight_entropy), count(router_entropy), sum(len(list_filter(top1, lambda x: x is not null)))"
    assert runs[1].sql(f"{select} from document_counts").fetchall() == [(0, 0, 0)]


def test_intervals_are_those_of_a_collected_run(runs):
    own, other = (inference.intervals(run, "domain_specialization", resamples=20, seed=1).to_pylist() for run in runs)
    assert_same_rows([tuple(row.values()) for row in other], [tuple(row.values()) for row in own])
    metrics = inference.intervals(runs[1], "selection_frequency", resamples=3)["metric"]
    assert set(metrics.to_pylist()) == {"selection_share", "selection_frequency"}


def test_groups_that_need_a_vocabulary_name_the_remedy(pair):
    with pytest.raises(ValueError, match=r"--by token_class needs vocab, .* import it with --tokenizer"):
        open_run(pair[1], by="token_class")


def test_needs_are_parsed_and_other_words_refused():
    (need, other) = read_needs("weights for metric a,\n  b; margin")
    assert (need.what, need.place, need.names) == ("weights", "metric", ("a", "b"))
    assert (other.what, other.place, other.names) == ("margin", None, ())
    with pytest.raises(ValueError, match="Needs: takes NEED"):
        read_needs("wishes for metric a")


# -- FLAME: with probabilities of the chosen ---------------------------------------------------------


@pytest.fixture(scope="module")
def flames(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, Run]:
    """The same for FLAME-MoE-Traces: blocks of five tokens, weights of 16 bits."""
    folder = tmp_path_factory.mktemp("flame")
    rng, tokens = np.random.default_rng(6), 20
    p = {one.layer: rng.dirichlet(np.ones(7), tokens).astype(np.float16).astype(np.float32) for one in LAYERS}
    shard = Shard.of_probabilities(LAYERS, documents=[("unlabelled", 5)] * 4, probabilities=p)
    statistics = {layer: dict(named) for layer, named in shard.statistics.items()}
    for layer, named in statistics.items():
        named["topk_mass"] = round_statistic(shard.weights[layer].sum(axis=1))
    names = [f"iter_0540#{doc}" for doc in range(4)]
    shard = dataclasses.replace(
        shard, statistics=statistics, document_ids=names, sources=["iter_0540"] * 4,
        experts=dict(zip((2, 3), shard.experts.values(), strict=True)),
        weights=dict(zip((2, 3), shard.weights.values(), strict=True)),
    )  # fmt: skip
    layers = [dataclasses.replace(one, layer=number) for one, number in zip(LAYERS, (2, 3), strict=True)]
    shard = dataclasses.replace(
        shard,
        **{
            name: dict(zip((2, 3), getattr(shard, name).values(), strict=True))
            for name in ("statistics", "dropped", "effects", "probabilities")
            if getattr(shard, name)
        },
    )
    own = write_run(folder / "own", layers, [shard], record=(), vocabulary=None)
    dump = dumps.write_flame(
        folder / "model", shard.ids, np.stack([shard.experts[layer] for layer in (2, 3)], axis=1),
        np.stack([shard.weights[layer] for layer in (2, 3)], axis=1),
    )  # fmt: skip
    imported(dump, folder / "imported", "flame", experts=7, tokens_per_document=5)
    return open_run(own), open_run(folder / "imported")


@pytest.mark.parametrize(
    "name",
    [
        *sorted((OF_IDS | IN_PART) - {"phase_divergence"}),
        "router_entropy",
        "router_entropy_quantiles",
        "dynamic_k",
        "layer_transition",
    ],
)
def test_flame_answers_what_weights_tell(flames, name):
    own, other = flames
    assert_same_rows(other.query(name).fetchall(), left(own.query(name).to_arrow_table(), other, name))


def test_flame_knows_top_1_and_mass_but_no_entropy(flames):
    assert {row[0] for row in flames[1].query("router_entropy").fetchall()} == {"topk_mass", "weight_entropy"}
    assert {row[0] for row in flames[1].query("router_stats").fetchall()} == {"weight"}
    assert len({row[0] for row in flames[1].query("selection_frequency").fetchall()}) == 4


# -- the same tokens, collected and served -----------------------------------------------------------


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory, tiny_folder: Path, tiny_model) -> Path:
    """A run of the tiny model: 3 layers, top-2 of 6."""
    from collector.config import ModelConfig

    root = tmp_path_factory.mktemp("served") / "own"
    collect_here(root, run_config(DataConfig(limit=12), ModelConfig(model=str(tiny_folder))), loaded=tiny_model)
    return root


def served(collected: Path, folder: Path, how: str) -> tuple[Path, DumpKind, dict]:
    """A dump of the run's decisions, as an engine writes it; its format, and what its format does not tell."""
    documents = dumps.documents_of(open_run(collected))
    if how == "responses":
        records = [dumps.sglang(one, len(one.token_ids) // 2) for one in documents]
        return dumps.write_lines(folder / "out.jsonl", records), "sglang", {"experts": 6, "top_k": 2}
    records = [dumps.vllm(one, len(one.token_ids) // 2, how=how) for one in documents]
    return dumps.write_lines(folder / "out.jsonl", records), "vllm", {"experts": 6}


@pytest.mark.parametrize("how", ["split", "responses"])
def test_an_engine_that_routes_alike_agrees_in_every_token(collected, tmp_path, tiny_folder, how):
    dump, kind, config = served(collected, tmp_path, how)
    imported(dump, tmp_path / "run", kind, tokenizer=str(tiny_folder), **config)
    pair = open_runs(collected, tmp_path / "run")
    tokens, documents, special = (
        open_run(collected)
        .sql("select count(*), count(distinct (shard, doc)), count_if(is_special) from tokens")
        .fetchall()[0]
    )
    rows = pair.query("router_saturation", pooled=True, include_special=True).fetchall()
    assert [(layer, value, n) for _, _, layer, _, value, _, n in rows] == [(i, 1, tokens - documents) for i in range(3)]
    jaccard = pair.query("quantization_fidelity", pooled=True, include_special=True).filter("metric = 'topk_jaccard'")
    rows = jaccard.project("layer, decile, value").fetchall()
    assert {value for *_, value in rows} == {1}
    assert {(layer, decile) for layer, decile, _ in rows} == {(i, decile) for i in range(3) for decile in range(11)}
    assert any("top1_flips" in remark for remark in pair.remarks("quantization_fidelity"))
    assert pair.unchecked() == (f"{documents:,} tokens that only {collected} has",)
    ours = pair.query("domain_specialization", layer=1)
    assert ours.filter("n_beside > n").fetchall() == []  # the last tokens are in one run alone
    assert special < tokens


def test_the_imported_run_first_has_no_deciles_and_says_so(collected, tmp_path):
    dump, kind, config = served(collected, tmp_path, "lists")
    imported(dump, tmp_path / "run", kind, **config)
    pair = open_runs(tmp_path / "run", collected)
    rows = pair.query("quantization_fidelity", pooled=True).fetchall()
    assert {row[4] for row in rows} == {0}
    assert any(remark.startswith("no deciles") for remark in pair.remarks("quantization_fidelity"))
    assert pair.unchecked()[-1] == f"the vocabulary, for {tmp_path / 'run'} was imported without --tokenizer"


def test_a_lost_token_and_another_choice_are_seen_where_they_are(collected, tmp_path):
    documents = dumps.documents_of(open_run(collected))
    first = documents[0]
    first.experts[2] = 0
    moved = sorted({0, 1, 2, 3, 4, 5} - set(first.experts[4, 1].tolist()))[:2]
    first.experts[4, 1] = moved
    dump = dumps.write_lines(tmp_path / "out.jsonl", [dumps.vllm(one, 1) for one in documents])
    imported(dump, tmp_path / "run", "vllm", experts=6, lost="drop")
    pair = open_runs(collected, tmp_path / "run")
    tokens = sum(len(one.token_ids) - 1 for one in documents) - 1
    found = pair.query("router_saturation", pooled=True, include_special=True).project("value, n").fetchall()
    assert found == [(1, tokens), (pytest.approx((tokens - 1) / tokens), tokens), (1, tokens)]


def test_other_tokens_are_no_comparison(collected, tmp_path):
    documents = dumps.documents_of(open_run(collected))
    documents[0].token_ids[3] += 1
    dump = dumps.write_lines(tmp_path / "out.jsonl", [dumps.vllm(one, 1) for one in documents])
    imported(dump, tmp_path / "run", "vllm", experts=6)
    with pytest.raises(ValueError, match=r"tokens: 1 differ, first in .* at decoder position 3: id"):
        open_runs(collected, tmp_path / "run").query("router_saturation")
