"""What a query says of an answer that is empty or ambiguous."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collector.query import catalog
from collector.query.catalog import list_comparisons, list_queries, query_folder
from collector.query.warehouse import open_run
from collector.store.tables import Layer
from tests.helpers.command_line import exit_status
from tests.helpers.synthetic import random_shard, write_run

LAYERS = (Layer(layer=0, n_experts=4, top_k=2),)


def made(folder: Path, *, vocabulary: bool = True, **texts):
    shard = random_shard(np.random.default_rng(1), LAYERS, [("en", 5), ("ko", 4), ("en", 3)], special=0)
    options = {} if vocabulary else {"vocabulary": None}
    return open_run(write_run(folder / "run", LAYERS, [dataclasses.replace(shard, **texts)], **options))


def test_a_run_without_parallel_texts(tmp_path) -> None:
    run = made(tmp_path, parallel_ids=[None] * 3)
    assert run.query("routing_divergence").fetchall() == []
    (remark,) = run.remarks("routing_divergence")
    assert remark.startswith("no document has a parallel_id: collect with --parallel-column")


def test_parallel_ids_that_no_two_labels_share_and_that_repeat(tmp_path) -> None:
    run = made(tmp_path, parallel_ids=["a", "b", "a"])
    assert run.remarks("routing_divergence") == [
        "no parallel_id is shared by two labels, so there is nothing to compare",
        "1 times documents of a label share a parallel_id; they count as one",
    ]


def test_parallel_texts_need_no_remark(tmp_path) -> None:
    assert made(tmp_path, parallel_ids=["a", "a", "b"]).remarks("routing_divergence") == []


def test_arms_that_do_not_drop_single_experts(tmp_path) -> None:
    drop, other = "layer=0 expert=1 operation=drop", "layer=0 expert=2 operation=drop"
    arms = [f"x: {drop}", f"y: {drop}; {other}", f"z: {other} label=ko", f"x #1: {other}"]
    run = open_run(write_run(tmp_path / "run", LAYERS, [], settings={"arms": arms}))
    (remark,) = run.remarks("importance_agreement")
    assert remark.startswith("no layer has two arms that drop a single expert everywhere")
    run = open_run(write_run(tmp_path / "other", LAYERS, [], settings={"arms": [*arms, f"w: {other}"]}))
    assert run.remarks("importance_agreement") == []


def test_an_id_that_names_several_documents_or_none(tmp_path, capsys) -> None:
    run = made(tmp_path, document_ids=["same", "other", "same"])
    assert run.remarks("token_trace", document="same") == [
        "the id same names 2 documents, shard/doc 0/0, 0/2: the first is shown; choose with --shard and --doc"
    ]
    assert run.remarks("token_trace", document="same", doc=2) == run.remarks("token_trace", document="other") == []
    assert run.remarks("token_trace") == []
    assert exit_status("query", str(tmp_path / "run"), "token_trace", "--document", "none") == 0
    assert capsys.readouterr().err == "no document has the id none\n"


def test_a_label_with_a_single_document_is_served_by_no_placement(tmp_path) -> None:
    run = made(tmp_path)
    assert {row[3] for row in run.query("plan_transfer").fetchall()} == {"en"}
    (remark,) = run.remarks("plan_transfer")
    assert remark.startswith("1 labels have no document apart from those that place their experts, first ko")
    assert run.remarks("plan_transfer", labels="en") == []


def test_groups_of_tokens_have_no_characters(tmp_path) -> None:
    made(tmp_path)
    assert open_run(tmp_path / "run").remarks("fertility") == []
    (remark,) = open_run(tmp_path / "run", by="position").remarks("fertility")
    assert remark.startswith("characters are not recorded of groups of tokens")


@pytest.mark.parametrize(
    "name",
    [
        "conditional_mutual_information",
        "expert_token_overlap",
        "expert_tokens",
        "token_npmi",
        "vocabulary_specialization",
    ],
)
def test_a_run_that_dropped_its_token_ids(tmp_path, name: str) -> None:
    assert made(tmp_path).remarks(name) == []
    made(tmp_path / "dropped", vocabulary=False)
    for part in (tmp_path / "dropped" / "run" / "data").glob("*.tokens.parquet"):
        table = pq.read_table(part)
        place = table.schema.get_field_index("token_id")
        pq.write_table(table.set_column(place, table.schema.field(place), pa.nulls(len(table), pa.uint32())), part)
    run = open_run(tmp_path / "dropped" / "run")
    assert run.query(name).fetchall() == []
    assert run.remarks(name) == [
        "the run holds no token ids, which this query needs: collect with --token-ids keep or hash"
    ]


def test_remarks_are_of_queries_and_take_their_parameters() -> None:
    names = {query.name: {param.name for param in query.params} for query in [*list_queries(), *list_comparisons()]}
    for path in (query_folder() / "remarks").glob("*.sql"):
        assert path.stem in names
        used = catalog.duckdb.extract_statements(path.read_text())[0].named_parameters
        assert set(used) <= names[path.stem]


def test_two_queries_of_one_name_are_an_error(tmp_path, monkeypatch) -> None:
    for group in ("load", "tokens"):
        (tmp_path / group).mkdir()
        (tmp_path / group / "twice.sql").write_text("select 1")
    monkeypatch.setattr(catalog, "query_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match=r"two queries are called twice: .*load/twice\.sql and .*tokens/twice\.sql"):
        catalog.find_query("twice")
