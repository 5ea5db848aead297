"""What opening and asking a run promises: committed files only, no silent mistakes, nothing written."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest

from collector.query import locked_duckdb
from collector.query.catalog import Param, list_comparisons, read_header
from collector.query.warehouse import Run, list_queries, one_line_errors, open_run, views_sql
from collector.store.run_directory import RunDirectory
from collector.store.tables import Layer
from tests.helpers.paths import ROOT
from tests.helpers.synthetic import Shard, commit_shard, publish_shard, random_shard, write_run

LAYERS = [Layer(layer=1, n_experts=4, top_k=2), Layer(layer=4, n_experts=6, top_k=3)]
TWO_STACKS = [
    Layer(stack="encoder", layer=1, n_experts=4, top_k=1, has_capacity=True),
    Layer(stack="decoder", layer=1, n_experts=6, top_k=3, has_capacity=True),
    Layer(stack="decoder", layer=5, n_experts=6, top_k=2),
]
BASE = {"routing", "tokens", "documents", "rejects", "vocab", "layers"}
BESIDE_VIEWS = {
    "arms", "cache_hits", "components", "label_sets", "layers", "maps", "neighbours", "path_counts", "placements",
    "vocab", "weights",
}  # fmt: skip
QUERY_FOLDER = ROOT / "queries"
VIEWS = {path.stem: path.read_text() for path in QUERY_FOLDER.glob("views/*.sql")}
MACROS = {path.stem: path.read_text() for path in QUERY_FOLDER.glob("macros/*.sql")}
ALIGNING = {path.stem: path.read_text() for path in QUERY_FOLDER.glob("comparison/views/*.sql")}


def shards(count: int = 2, layers: list[Layer] = LAYERS) -> list[Shard]:
    rng = np.random.default_rng(3)
    return [random_shard(rng, layers, [("en", 12), ("ko", 9)]) for _ in range(count)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_run(tmp_path_factory.mktemp("warehouse") / "run", LAYERS, shards())


@pytest.fixture(scope="module")
def run(folder: Path) -> Run:
    return open_run(folder)


@pytest.fixture(scope="module")
def two_stacks(tmp_path_factory: pytest.TempPathFactory) -> Run:
    folder = tmp_path_factory.mktemp("warehouse") / "stacks"
    return open_run(write_run(folder, TWO_STACKS, shards(layers=TWO_STACKS)))


# ---- what a run shows ----


def test_relations_hold_what_was_committed(run: Run) -> None:
    counts = {name: run.sql(f"select count(*) from {name}").fetchall()[0][0] for name in (*BASE, *VIEWS)}
    assert counts.items() >= {
        "routing": 84, "tokens": 42, "documents": 4, "rejects": 0, "vocab": 50, "layers": 2, "labels": 2,
        "experts": 10, "decisions": 84, "token_decisions": 84, "selections": 42 * (2 + 3),
    }.items()  # fmt: skip
    assert run.sql("select * from labels order by label").fetchall() == [("en", 2, 24, 96), ("ko", 2, 18, 72)]


def test_selections_keep_the_models_order_and_leave_out_missing_ranks(run: Run) -> None:
    rows = run.sql("select tok, rank, expert, weight from selections where layer = 1 and shard = 0").fetchall()
    first = shards()[0]
    expected = [
        (tok, rank, int(expert), pytest.approx(float(first.weights[1][tok, rank])))
        for (tok, rank), expert in np.ndenumerate(first.experts[1])
    ]
    assert sorted(rows) == expected


def test_decisions_take_the_highest_weight_wherever_it_stands(run: Run) -> None:
    first = shards()[0]
    for layer in (1, 4):
        query = f"select expert from decisions where layer = {layer} and shard = 0 order by tok"
        best = np.take_along_axis(first.experts[layer], first.weights[layer].argmax(1)[:, None], axis=1)
        assert [row[0] for row in run.sql(query).fetchall()] == best.ravel().tolist()


def test_drops_stand_beside_their_picks_and_are_false_without_a_capacity(run: Run, two_stacks: Run) -> None:
    assert two_stacks.sql("select * from routing").columns[6:15] == [
        "e0",
        "e1",
        "e2",
        "w0",
        "w1",
        "w2",
        "d0",
        "d1",
        "d2",
    ]
    rows = two_stacks.sql(
        "select stack, layer, tok, rank, dropped from selections where shard = 0 and (stack, layer) != ('decoder', 5)"
    ).fetchall()
    first = shards(layers=TWO_STACKS)[0]
    expected = [("encoder", 1, tok, rank, bool(d)) for (tok, rank), d in np.ndenumerate(first.dropped["encoder", 1])]
    expected += [("decoder", 1, 21 + tok, rank, bool(d)) for (tok, rank), d in np.ndenumerate(first.dropped[1])]
    assert sorted(rows) == sorted(expected)
    assert any(dropped for *_, dropped in expected)
    unlimited = "select distinct dropped from selections where stack = 'decoder' and layer = 5"
    assert two_stacks.sql(unlimited).fetchall() == [(False,)]
    assert two_stacks.sql("select count(d0) from routing where layer = 5").fetchall() == [(0,)]
    assert not any(name.startswith("d") for name in run.sql("select * from routing").columns)
    assert run.sql("select distinct dropped from selections").fetchall() == [(False,)]
    assert run.sql("select distinct dropped_picks from decisions").fetchall() == [(0,)]


def test_drops_cost_nothing_where_they_are_not_read(two_stacks: Run) -> None:
    """The files are not asked for the columns of drops, which a view that computes them could bring in."""
    plan = two_stacks.connection.sql("explain select stack, expert, count(*) from selections group by all").fetchall()
    assert re.search(r"\be0\b", plan[0][1])
    assert not re.search(r"\bd[0-9]\b", plan[0][1])
    assert re.search(r"\bd0\b", two_stacks.connection.sql("explain select dropped from selections").fetchall()[0][1])


def test_a_router_and_its_tokens_are_those_of_its_stack(two_stacks: Run) -> None:
    joined = "select distinct r.stack, t.stack from routing as r join tokens as t using (shard, tok)"
    assert sorted(two_stacks.sql(joined).fetchall()) == [("decoder", "decoder"), ("encoder", "encoder")]
    layers = two_stacks.sql("select stack, layer, has_capacity from layers").fetchall()
    assert layers == [("encoder", 1, True), ("decoder", 1, True), ("decoder", 5, False)]
    assert two_stacks.sql("select count(*) from experts").fetchall() == [(16,)]
    values = two_stacks.query("effective_experts", stack="encoder").project("stack, layer, baseline").distinct()
    assert values.fetchall() == [("encoder", 1, 4)]


def test_a_run_of_an_earlier_layout_is_refused(tmp_path: Path) -> None:
    write_run(tmp_path / "run", LAYERS, shards(1))
    info = json.loads((tmp_path / "run" / "run.json").read_text())
    for one in info["layers"]:
        del one["stack"]
    (tmp_path / "run" / "run.json").write_text(json.dumps(info))
    with pytest.raises(ValueError, match=r"run was written by an earlier version.*collect it again"):
        open_run(tmp_path / "run")


def test_a_part_without_a_commit_record_does_not_exist(tmp_path: Path) -> None:
    one, other = shards()
    directory = RunDirectory(write_run(tmp_path / "run", LAYERS, [one], complete=False))
    parts = publish_shard(directory, LAYERS, 1, other)
    before = open_run(tmp_path / "run")
    assert before.sql("select distinct shard from routing").fetchall() == [(0,)]
    assert not before.complete
    commit_shard(directory, 1, parts, other)
    assert open_run(tmp_path / "run").sql("select count(distinct shard) from routing").fetchall() == [(2,)]
    assert before.sql("select count(distinct shard) from routing").fetchall() == [(1,)]


def test_a_run_without_a_commit_has_the_same_columns(tmp_path: Path) -> None:
    for store, layers in (((), LAYERS), (("probabilities",), LAYERS), (("logits",), TWO_STACKS)):
        name = f"{store}-{len(layers)}"
        empty = open_run(write_run(tmp_path / f"{name}-0", layers, [], store=store, complete=False))
        written = shards(1, layers)
        full = open_run(write_run(tmp_path / f"{name}-1", layers, written, store=store))
        for relation in (*BASE, *VIEWS):
            described = f"select column_name, column_type from (describe {relation})"
            assert empty.sql(described).fetchall() == full.sql(described).fetchall(), relation
        assert empty.sql("select count(*) from assignments").fetchall() == [(0,)]


@pytest.mark.parametrize("name", ["o'brien", "a b", "[x]", "what?", "st*r", "layer=3", 'say "hi"', "한국어", "$a"])
def test_any_folder_name_can_be_opened(name: str, tmp_path: Path) -> None:
    opened = open_run(write_run(tmp_path / name / "run", LAYERS, shards(1)))
    assert opened.sql("select distinct layer from routing order by layer").fetchall() == [(1,), (4,)]


def test_a_pattern_in_a_folder_name_does_not_reach_other_runs(tmp_path: Path) -> None:
    write_run(tmp_path / "run1", LAYERS, shards(1))
    starred = open_run(write_run(tmp_path / "run*", LAYERS, shards(1)))
    assert starred.sql("select count(*) from tokens").fetchall() == [(21,)]


def test_runs_are_open_side_by_side(run: Run, tmp_path: Path) -> None:
    other = open_run(write_run(tmp_path / "run", LAYERS[:1], shards(1)))
    assert run.sql("select count(*) from layers").fetchall() == [(2,)]
    assert other.sql("select count(*) from layers").fetchall() == [(1,)]
    assert run.complete
    assert run.info["layers"][1]["n_experts"] == 6


def test_results_come_as_frames_tables_and_rows(run: Run) -> None:
    relation = run.query("effective_experts", layer=4)
    assert relation.df()["label"].tolist() == ["en", "ko"]
    assert relation.to_arrow_table().num_rows == len(relation.fetchall()) == 2


def test_views_sql_gives_the_same_in_any_duckdb(run: Run, folder: Path) -> None:
    (folder / "views.sql").write_text(views_sql(RunDirectory(folder)))
    program = (
        "import duckdb, pathlib; c = duckdb.connect(); c.execute(pathlib.Path('views.sql').read_text());"
        "print(c.sql('from assignments order by all').fetchall())"
    )
    printed = subprocess.run([sys.executable, "-c", program], cwd=folder, check=True, capture_output=True, text=True)
    assert printed.stdout.strip() == str(run.sql("from assignments order by all").fetchall())
    assert str(folder) not in (folder / "views.sql").read_text()
    anywhere = duckdb.connect()
    anywhere.execute(views_sql(RunDirectory(folder), in_place=True))
    assert str(anywhere.sql("from assignments order by all").fetchall()) == printed.stdout.strip()


# ---- what is refused ----


def test_a_missing_run_names_the_remedy(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="collector collect"):
        open_run(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("name", "params", "message"),
    [
        ("router_entropi", {}, "did you mean router_entropy"),
        ("zzz", {}, "there are .*domain_specialization, "),
        (
            "router_entropy",
            {"layr": 1},
            "router_entropy has no parameter 'layr'; it takes stack, layer, labels, include_special",
        ),
        ("router_entropy", {"layer": 2}, "layer 2 is not recorded in this run; it has 1, 4"),
        ("router_entropy", {"stack": "encoder"}, "stack 'encoder' is not recorded in this run; it has decoder"),
        ("router_entropy", {"layer": "one"}, "layer takes integer, got 'one'"),
        ("router_entropy", {"layer": 1.5}, "layer takes integer, got 1.5"),
        ("router_entropy", {"labels": "en,kr"}, "no document of this run has the label 'kr'; it has en, ko"),
        ("router_entropy", {"labels": [1]}, r"labels takes varchar\[\], got \[1\]"),
        ("router_entropy", {"include_special": "maybe"}, "include_special takes boolean, got 'maybe'"),
        ("router_entropy", {"include_special": "all"}, "include_special takes one boolean value"),
        ("language_overlap", {"m": 0}, "m must be at least 1, got 0"),
        ("top_experts", {"n": "all"}, "n takes one integer value, got 'all'"),
    ],
)
def test_a_mistake_is_named(run: Run, name: str, params: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run.query(name, **params)


def test_a_layer_of_another_stack_is_not_recorded(two_stacks: Run) -> None:
    with pytest.raises(ValueError, match="layer 5 is not recorded for the encoder in this run; it has 1"):
        two_stacks.query("router_entropy", stack="encoder", layer=5)


@pytest.mark.parametrize(
    "statement",
    [
        "copy (select 1) to 'written.csv'",
        "with x as (copy (select 1) to 'written.csv') select 1",
        "select * from query('with x as (copy (select 1) to ''written.csv'') select 1')",
        "explain analyze copy (select 1) to 'written.csv'",
        "attach 'written.db'",
        "create table t as select 1",
        "create or replace view routing as select 1",
        "set threads = 1",
        "pragma database_list",
        "select 1; drop view routing",
        "",
        "selec 1",
        "select nothing from routing",
    ],
)
def test_sql_runs_reading_statements_only(
    run: Run, statement: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"only a single statement that reads|Error"):
        run.sql(statement).fetchall()
    assert list(tmp_path.iterdir()) == []
    assert run.sql("select count(*) from routing").fetchall() == [(84,)]


@pytest.mark.parametrize(
    "statement",
    [
        "from layers",
        "with a as (from layers) from a",
        "values (1);",
        "describe routing",
        "summarize layers",
        "select 1; -- one",
    ],
)
def test_sql_takes_every_way_to_read(run: Run, statement: str) -> None:
    assert run.sql(statement).fetchall()


def test_sql_does_not_read_python_variables(run: Run) -> None:
    frame = run.query("effective_experts").df()
    with pytest.raises(ValueError, match="frame does not exist"):
        run.sql("select * from frame")
    assert len(frame) == 4


# ---- the catalogue ----


def test_headers_tell_everything() -> None:
    for query in (*list_queries(), *list_comparisons()):
        assert query.question.endswith("?"), query.name
        assert all((query.formula, query.source, query.grain)), query.name
        of_routers = {"decisions", "selections", "assignments", "document_counts", "aligned_decisions"}
        of_model = query.name == "compute"  # of all layers together
        of_router = {"stack", "layer"} if of_routers & set(query.reads) and not of_model else set()
        of_tokens = {"labels", "include_special"}
        if {"sampled_picks", "maps", "document_effects"} & set(query.reads):
            of_tokens -= {"include_special"}  # no special token is in them
        elif query.reads in (("expert_pairs",), ("weights",)):
            of_tokens = set()  # blocks of a sample, and a model, have no label
        assert {param.name for param in query.params} >= of_tokens | of_router
        assert all(param.help for param in query.params)


def test_a_minimum_and_a_help_of_two_lines_are_read() -> None:
    params = {(query.name, param.name): param for query in list_queries() for param in query.params}
    assert params["top_experts", "n"] == Param(
        name="n", type="integer", default=10, minimum=1, help="experts per layer and label"
    )
    special = params["top_experts", "include_special"]
    assert special.default is False
    assert special.help.endswith("they say nothing about the text")


def tables_of(sql: str) -> set[str]:
    """Relations after FROM and JOIN that no CTE of the statement defines."""
    code = "\n".join(line for line in sql.splitlines() if not line.strip().startswith("--"))
    calls = re.findall(rf"\b(?:{'|'.join(MACROS)})\(\s*((?:'[\w.]+',\s*)+)", code)
    given = [name for names in calls for name in re.findall(r"'([\w.]+)'", names)]
    found = set(re.findall(r"\b(?:from|join) ((?:other\.)?\w+)", code)) - set(
        re.findall(r"(\w+) as (?:not )?(?:materialized )?\(\n", code)
    )
    return (found - MACROS.keys()).union(given)


def test_queries_read_only_views_and_say_which() -> None:
    for query in list_queries():
        assert set(query.reads) == tables_of(query.sql), query.name
        assert set(query.reads) <= {*VIEWS, *BESIDE_VIEWS}
    for query in list_comparisons():
        assert set(query.reads) == tables_of(query.sql), query.name
        assert {name.removeprefix("other.") for name in query.reads} <= {*VIEWS, *ALIGNING, "layers", "label_sets"}


def test_views_say_what_they_read() -> None:
    variants = [*(path for folder in ("views/*", "groupings") for path in QUERY_FOLDER.glob(f"{folder}/*.sql"))]
    assert variants
    for name, sql in [*(VIEWS | ALIGNING).items(), *((str(path), path.read_text()) for path in variants)]:
        reads = {each.strip() for each in read_header(sql)["reads"].split(",")}
        assert reads == tables_of(sql), name


@pytest.mark.parametrize(
    ("declared", "text", "value"),
    [
        ("integer", "3", 3), ("integer", "all", None), ("integer", "", None), ("double", "0.5", 0.5),
        ("boolean", "True", True), ("varchar", "en", "en"), ("varchar[]", "en, ko", ["en", "ko"]),
        ("varchar[]", ("en",), ["en"]), ("varchar[]", [], None), ("varchar[]", "all", None),
    ],
)  # fmt: skip
def test_values_are_read_by_their_declared_type(declared: str, text: object, value: object) -> None:
    assert Param(name="p", type=declared, default=None, help="").parse(text) == value


def test_a_session_variable_never_stands_in_for_a_parameter(run: Run) -> None:
    run.connection.execute("set variable layer = 1")
    assert {row[2] for row in run.query("effective_experts").fetchall()} == {1, 4}


def test_an_undeclared_parameter_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    header = "".join(f"-- {key}: x\n" for key in ("Question", "Formula", "Source", "Grain", "Reads", "Example"))
    (tmp_path / "tokens").mkdir()
    (tmp_path / "tokens" / "sly.sql").write_text(f"{header}select $layer\n")
    monkeypatch.setattr("collector.query.catalog.query_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match="other parameters than the statement uses: layer"):
        list_queries()


# ---- the lock ----


OUTSIDE = [
    "select * from read_text('/etc/passwd')",
    "select * from read_csv('/etc/passwd', header = false)",
    "from read_blob('/etc/passwd')",
    "from sniff_csv('/etc/passwd')",
    "from glob('/etc/*')",
    "from '/etc/passwd'",
    "from read_parquet('https://127.0.0.1:9/x.parquet')",
    "from read_parquet('s3://bucket/x.parquet')",
    "from read_text('{folder}/run.json')",
    "from glob('{folder}/data/*')",
    "from read_parquet('{folder}/data/*.parquet')",
    "from read_parquet('{folder}/data/../plan.parquet')",
]
CHANGES = [
    "copy (select 1) to '{tmp}/written.csv'",
    "copy routing to '{folder}/data/written.parquet'",
    "copy routing to '{folder}/vocab.parquet'",
    "export database '{tmp}/written'",
    "attach '{tmp}/written.db'",
    "install httpfs",
    "load httpfs",
    "set enable_external_access = true",
    "set lock_configuration = false",
    "reset allowed_paths",
    "set allowed_directories = ['/etc']",
    "set python_enable_replacements = true",
    "set autoload_known_extensions = true",
    "set temp_directory = '{tmp}/written'",
    "pragma enable_profiling",
    "create persistent secret (type s3)",
]


def files_below(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("statement", OUTSIDE + CHANGES)
def test_a_connection_opens_the_runs_files_and_nothing_else(
    run: Run, folder: Path, statement: str, tmp_path: Path
) -> None:
    before = files_below(folder)
    with pytest.raises(duckdb.Error, match=r"disabled|locked|does not exist|cannot be|Cannot"):
        run.connection.execute(statement.format(folder=folder, tmp=tmp_path)).fetchall()
    assert list(tmp_path.iterdir()) == []
    assert files_below(folder) == before
    assert run.connection.sql("select count(*) from routing").fetchall() == [(84,)]


@pytest.mark.parametrize("statement", OUTSIDE + CHANGES)
def test_sql_opens_the_runs_files_and_nothing_else(run: Run, folder: Path, statement: str, tmp_path: Path) -> None:
    before = files_below(folder)
    with pytest.raises((ValueError, duckdb.Error), match=r"disabled|only a single statement|does not exist"):
        run.sql(statement.format(folder=folder, tmp=tmp_path)).fetchall()
    assert list(tmp_path.iterdir()) == []
    assert files_below(folder) == before


def test_a_table_of_python_is_joined_by_registering_it(run: Run) -> None:
    names = pa.table({"label": ["en", "ko"], "name": ["English", "Korean"]})
    cursor = run.connection.cursor()
    cursor.register("names", names)
    joined = "select name, documents from labels join names using (label) order by name"
    assert cursor.sql(joined).fetchall() == [("English", 2), ("Korean", 2)]


def test_what_does_not_fit_into_memory_goes_to_a_folder_that_goes_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.chdir(tmp_path)
    connection = locked_duckdb._open()
    connection.execute("set memory_limit = '60MB'")
    locked_duckdb._lock(connection, [])
    assert list(tmp_path.iterdir()) == [], "only when it is needed"
    rows = connection.execute("select * from (select range as i, hash(range) as h from range(5_000_000)) order by h")
    assert rows.fetchone() is not None
    (folder,) = tmp_path.iterdir()
    assert folder.name.startswith("collector-")
    connection.close()
    assert list(tmp_path.iterdir()) == []


def test_reading_needs_no_extension_that_is_not_built_in(run: Run) -> None:
    settings = "select value from duckdb_settings() where name similar to 'auto(load|install)_known_extensions'"
    assert run.connection.execute(settings).fetchall() == [("false",), ("false",)]
    assert run.sql("select count(*) from assignments").fetchall() != [(0,)]
    assert duckdb.__version__ >= "2"


def test_what_duckdb_cannot_do_is_told_in_one_line(run: Run) -> None:
    with (
        pytest.raises(ValueError, match=r"^Conversion Error: Could not convert string 'en' to INT\w+") as error,
        one_line_errors(),
    ):
        run.sql("select label::integer from documents").fetchall()
    assert "\n" not in str(error.value)
