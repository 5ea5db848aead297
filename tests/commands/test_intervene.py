"""`collector intervene`: the documents and the model of a run, once more with edits."""

from __future__ import annotations

import numpy as np
import pytest

from collector import open_run, prepare_intervention
from collector.config import CaptureConfig, DataConfig, ModelConfig, section
from collector.models.edits import parse_arm, tell_arm
from collector.query.arms import read_arms
from collector.query.expert_sql import named_arms
from collector.query.selection import half
from collector.store.run_directory import RunDirectory
from collector.store.tables import Layer
from collector.upkeep.verify import verify
from tests.helpers.command_line import collector
from tests.helpers.runs import collect_here, content, run_config, write_jsonl
from tests.helpers.synthetic import EFFECTS, Shard, write_run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("intervene")
    data = DataConfig(data=(str(write_jsonl(folder / "texts.jsonl", 12)),), docs_per_shard=6)
    return collect_here(folder / "run", run_config(data, ModelConfig(dtype="float32"), max_length=40, store=("text",)))


@pytest.mark.ray
def test_some_documents_go_through_the_same_model_with_edits_and_controls(run, tmp_path) -> None:
    arms = tmp_path / "arms.csv"
    arms.write_text("arm,layer,expert,operation,value\nno 31,4,31,drop,\nno 31,5,2,drop,\nloud,4,44,scale,2.5\n")
    command = ("intervene", str(run.root), "--arms", str(arms), "--out", str(tmp_path / "out"), "--controls", "2")
    done = collector(*command, "--documents", "from documents where doc % 2 = 1")
    assert done.returncode == 0, done.stderr
    out = RunDirectory(tmp_path / "out")
    assert verify(out).sound
    before, after = (open_run(each.root) for each in (run, out))
    chosen = before.sql("select doc_id, tokens from documents where doc % 2 = 1 order by all").fetchall()
    assert after.sql("select doc_id, tokens from documents order by all").fetchall() == chosen
    texts = "select doc_id, list(token_id order by tok) from tokens join documents using (shard, doc) {} group by all"
    for one, other in zip(
        before.sql(texts.format("where doc % 2 = 1") + " order by 1").fetchall(),
        after.sql(texts.format("") + " order by 1").fetchall(), strict=True,
    ):  # fmt: skip
        assert one == other
    shown = after.query("expert_effect", pooled=True).to_arrow_table().to_pylist()
    assert {row["arm"] for row in shown} == {"no 31", "loud"}
    assert {row["controls"] for row in shown} == {2}
    assert max(row["value"] for row in shown if row["metric"] == "divergence") > 0
    assert all(row["above_floor"] == (row["value"] > row["floor"]) for row in shown if row["metric"] == "divergence")
    config = out.read_json("run.json")["config"]
    assert config["arms"][3] == "no 31: layer=4 expert=31 operation=drop; layer=5 expert=2 operation=drop"
    assert len(config["arms"]) == 6
    assert (config["max_length"], config["store"], config["record"]) == (40, [], ["effects"])
    assert (config["documents"], config["controls"]) == ("from documents where doc % 2 = 1", 2)
    told = collector("status", str(out.root), "--summary").stdout
    assert "2 arms of edits with 4 controls (seed 0), over the documents of: from documents where doc % 2 = 1" in told
    assert collector("export", str(out.root), str(tmp_path / "csv"), "--to", "csv").returncode == 0
    assert len((tmp_path / "csv" / "arms.csv").read_text().splitlines()) == 1 + 3 * 3
    again = collector(*command, "--documents", "from documents where doc % 2 = 1")
    assert again.returncode == 0, again.stderr
    other = collector(*command, "--documents", "from documents where doc % 2 = 0")
    assert other.returncode == 2
    assert "--documents was from documents where doc % 2 = 1, is now" in other.stderr


@pytest.mark.ray
def test_split_measures_in_the_documents_that_did_not_choose(run, tmp_path) -> None:
    sql = tmp_path / "arms.sql"
    sql.write_text(
        "select label as arm, stack, layer, expert, 'drop' as operation from specialization_test\n"
        "where layer = 4 qualify row_number() over (partition by label order by t desc) = 1"
    )
    command = ("intervene", str(run.root), "--arms", str(sql), "--out", str(tmp_path / "out"), "--split")
    done = collector(*command, "--docs-per-shard", "2")
    assert done.returncode == 0, done.stderr
    before, after = (open_run(each) for each in (run.root, tmp_path / "out"))
    second = "select doc_id from (select *, row_number() over (partition by label order by shard, doc) as place from "
    second += "documents) where place % 2 = 0 order by all"
    assert after.sql("select doc_id from documents order by all").fetchall() == before.sql(second).fetchall()
    assert after.sql("select max(doc) from documents").fetchall() == [(1,)], "two in a shard"
    assert {row[1] for row in after.query("effect_specificity").fetchall()} == {"en", "ko"}


@pytest.mark.ray
def test_all_documents_keep_their_shards(run, tmp_path) -> None:
    (tmp_path / "arms.sql").write_text("select 'x' as arm, 7 as layer, 3 as expert, 'force' as operation")
    done = collector("intervene", str(run.root), "--arms", str(tmp_path / "arms.sql"), "--out", str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    out = RunDirectory(tmp_path / "out")
    assert content(out)["tokens"].equals(content(run)["tokens"])
    assert out.read_json("run.json")["config"]["controls"] == 0


# -- arms ----------------------------------------------------------------------------------------------


LAYERS = (Layer(layer=1, n_experts=3, top_k=1), Layer(layer=2, n_experts=3, top_k=1))


@pytest.fixture(scope="module")
def counted(tmp_path_factory):
    """English chooses experts 0 and 1, Korean 1 and 2 of layer 1; layer 2 sends everything to 2."""
    shard = Shard.of_picks(
        LAYERS, documents=[("en", 4), ("ko", 4)],
        experts={1: [0, 0, 0, 1, 1, 2, 2, 2], 2: [2] * 8},
    )  # fmt: skip
    return open_run(write_run(tmp_path_factory.mktemp("counted") / "run", LAYERS, [shard]))


def test_named_arms_are_sql_over_the_run(counted) -> None:
    assert named_arms() == ["dead", "every_expert", "language_experts", "most_loaded", "super_experts"]
    every = read_arms(counted, "every_expert")
    assert len(every) == 6
    assert tell_arm(every[4]) == "decoder 2 1: layer=2 expert=1 operation=drop"
    (most,) = read_arms(counted, "most_loaded")
    assert tell_arm(most) == "most loaded: layer=1 expert=0 operation=drop; layer=2 expert=2 operation=drop"
    (dead,) = read_arms(counted, "dead")
    assert tell_arm(dead) == "dead: layer=2 expert=0 operation=drop; layer=2 expert=1 operation=drop"


def test_super_experts_are_those_of_the_query(tmp_path) -> None:
    layers = (Layer(layer=0, n_experts=3, top_k=1), Layer(layer=1, n_experts=3, top_k=1))
    picks = {0: [0, 1, 2], 1: [0, 1, 2]}
    largest = {layer: {name: np.ones((3, 1), np.float32) for name in EFFECTS} for layer in picks}
    largest[0]["largest"][1] = 100
    shard = Shard.of_picks(layers, documents=[("en", 3)], experts=picks, effects=largest)
    (arm,) = read_arms(open_run(write_run(tmp_path / "run", layers, [shard])), "super_experts")
    assert tell_arm(arm) == "super experts: layer=0 expert=1 operation=drop"


def test_language_experts_are_chosen_significantly_more_often(tmp_path) -> None:
    """English takes expert 0 of layer 1, Korean 1 and 2; layer 2 says nothing."""
    documents = [("en", 6), ("ko", 6)] * 12
    picks = {1: [0, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2] * 12, 2: [0, 1, 2] * 48}
    shard = Shard.of_picks(LAYERS, documents=documents, experts=picks)
    english, korean = read_arms(open_run(write_run(tmp_path / "run", LAYERS, [shard])), "language_experts")
    assert tell_arm(english) == "en: layer=1 expert=0 operation=drop"
    assert tell_arm(korean) == "ko: layer=1 expert=1 operation=drop; layer=1 expert=2 operation=drop"


def test_half_of_the_documents_chooses(tmp_path) -> None:
    """English and Korean change places in the other half; expert 2 belongs to nobody."""
    documents = [("en", 4), ("en", 4), ("ko", 4), ("ko", 4)] * 8
    picks = {1: [0, 0, 0, 2, 1, 1, 1, 2, 1, 1, 1, 2, 0, 0, 0, 2] * 8, 2: [0, 1, 2, 0] * 32}
    shard = Shard.of_picks(LAYERS, documents=documents, experts=picks)
    run = open_run(write_run(tmp_path / "run", LAYERS, [shard]))
    english, korean = read_arms(run, "language_experts", split=True)
    assert (tell_arm(english), tell_arm(korean)) == (
        "en: layer=1 expert=0 operation=drop", "ko: layer=1 expert=1 operation=drop",
    )  # fmt: skip
    with pytest.raises(ValueError, match="it names no edit"):
        read_arms(run, "language_experts")
    with pytest.raises(ValueError, match="--arms most_loaded does not read specialization_test"):
        read_arms(run, "most_loaded", split=True)
    first, second = (half(run, first=which) for which in (True, False))
    assert not first & second
    assert first == {(0, doc) for doc in range(0, 32, 2)}


def test_arms_are_read_from_sql_and_csv(counted, tmp_path) -> None:
    sql = tmp_path / "arms.sql"
    sql.write_text("select 'x' as arm, layer, 0 as expert, 'bias' as operation, -1.5 as value from layers;")
    (arm,) = read_arms(counted, str(sql))
    assert tell_arm(arm) == "x: layer=1 expert=0 operation=bias value=-1.5; layer=2 expert=0 operation=bias value=-1.5"


def test_whatever_wrote_a_csv_file_its_arms_are_read(counted, tmp_path) -> None:
    path = tmp_path / "arms.csv"
    text = "Arm, Layer ,expert,operation,VALUE,label\r\nx, 1.0,2,bias,+2.5,\r\n,,,,,\r\ny,2,0,scale,1e38,en\r\n"
    path.write_bytes(text.encode("utf-8-sig"))
    assert [tell_arm(each) for each in read_arms(counted, str(path))] == [
        "x: layer=1 expert=2 operation=bias value=2.5", "y: layer=2 expert=0 operation=scale value=1e%2B38 label=en",
    ]  # fmt: skip
    assert [parse_arm(tell_arm(each)) for each in read_arms(counted, str(path))] == read_arms(counted, str(path))
    path.write_bytes("arm,layer,expert,operation\né,1,1,drop\n".encode("latin-1"))
    with pytest.raises(ValueError, match="the file is not in UTF-8"):
        read_arms(counted, str(path))


def test_arms_are_the_same_in_whatever_order_rows_come(counted, tmp_path) -> None:
    told = []
    for order in ("", " desc"):
        (tmp_path / "arms.sql").write_text(
            "select 'arm ' || e % 2 as arm, 1 as layer, e as expert, 'drop' as operation from range(3) as t (e)"
            f"order by e{order}"
        )
        told.append(read_arms(counted, str(tmp_path / "arms.sql")))
    assert told[0] == told[1]
    assert [arm.name for arm in told[0]] == ["arm 0", "arm 1"]


def test_answers_are_found_by_the_sql_that_reads_them(counted, tmp_path) -> None:
    (tmp_path / "arms.sql").write_text(
        "-- not from weight_similarity\n"
        "select distinct 'x' as arm, l.layer, l.expert, 'drop' as operation\n"
        'from labels, "EXPERT_LOAD" l where is_dead'
    )
    (arm,) = read_arms(counted, str(tmp_path / "arms.sql"))
    assert tell_arm(arm) == "x: layer=2 expert=0 operation=drop; layer=2 expert=1 operation=drop"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "arm,layer,expert\nx,1,2\n", "row 1 lacks operation; its columns are arm, layer, expert"),
        ("a.csv", "arm,layer,expert,operation\nx,1,1,drop\n,1,2,drop\n", "row 2 lacks arm"),
        ("a.csv", "arm,layer,expert,operation\nx,1,1,drop,5\n", "line 2 has more cells than the header"),
        (
            "a.csv",
            "arm,layer,expert,operation\nx,1.5,1,drop\n",
            "row 1, arm 'x': layer takes a whole number, got '1.5'",
        ),
        ("a.csv", "arm,layer,expert,operation\nx,1,-1,drop\n", "experts count from 0, got -1"),
        ("a.csv", "arm,layer,expert,operation,value\nx,1,1,scale,big\n", "value takes a number, got 'big'"),
        ("a.sql", "select 'A ' as arm, 1 as layer, 1 as expert, 'drop' as operation", "begins and ends without spaces"),
        ("a.sql", "select 'x' as arm, 1 as layer, 1 as expert, 2 as expert, 'drop' as operation", "two columns are"),
        ("a.csv", "arm,layer,expert,operation\n", "names no edit"),
        ("a.sql", "select 1 as arm where false", "names no edit"),
        ("a.sql", "drop table tokens", "a run is read|read-only|reads"),
        ("a.csv", "arm,layer,expert,operation\nno edit,1,1,drop\n", "an arm cannot be called 'no edit'"),
        ("a.csv", "arm,layer,expert,operation\nx #2,1,1,drop\n", "'#' with a number marks controls"),
    ],
)
def test_arms_that_are_none_are_named(counted, tmp_path, name, text, message) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_arms(counted, str(tmp_path / name))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"controls": -1}, "--controls takes a number from 0, got -1"),
        ({"seed": -1}, "--seed takes a number from 0, got -1"),
        ({"docs_per_shard": 0}, "--docs-per-shard takes a number from 1, got 0"),
        ({"documents": "select 0 as shard, -1 as doc"}, "documents of shard 0 that the run does not have"),
        ({"documents": "select 0 as shard, 'x' as doc"}, "--documents: "),
        ({"documents": "select 0 as shard"}, "has no doc"),
        ({"documents": "from documents where false"}, "selects no document"),
    ],
)
def test_options_that_cannot_be_are_named(run, options, message) -> None:
    with pytest.raises(ValueError, match=message):
        prepare_intervention(run.root, "most_loaded", **options)


def test_whole_numbers_may_be_decimals(run) -> None:
    found = prepare_intervention(run.root, "most_loaded", documents="select 0.0 as shard, 1.0 as doc")
    assert found.part_of.rows == {0: [1]}
    assert found.said == []


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("x,4,64,drop", "arm 'x': decoder layer 4 has experts 0 to 63, not 64"),
        ("x,4,1,force\nx,4,1,replace", "none that is replaced"),
        ("x,4,1,drop,nobody", "no document of this run has the label 'nobody'"),
    ],
)
def test_arms_are_checked_before_there_is_a_run(run, tmp_path, rows, message) -> None:
    path = tmp_path / "arms.csv"
    path.write_text(f"arm,layer,expert,operation,label\n{rows}\n")
    with pytest.raises(ValueError, match=message):
        prepare_intervention(run.root, str(path))


def test_an_unknown_name_lists_those_there_are(counted) -> None:
    with pytest.raises(
        FileNotFoundError, match="--arms nobody: no such file; name a CSV, SQL or JSON file, or one of dead, every"
    ):
        read_arms(counted, "nobody")


def test_a_section_comes_back_from_what_is_stored() -> None:
    data = DataConfig(data=("a.jsonl", "b.jsonl"), per_label=3)
    capture = CaptureConfig(layers=(1, 2), store=("text",))
    config = run_config(data, ModelConfig(dtype="float32"), layers=(1, 2), store=("text",))
    flat = config.to_dict()
    assert section(DataConfig, flat) == data
    assert section(ModelConfig, flat) == ModelConfig(dtype="float32")
    assert section(CaptureConfig, flat, tokens_per_batch=None) == capture
