"""Sets of experts: what SQL selects comes back from a file, as arms that drop it, or in another program's form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from collector.look.export.experts import written
from collector.models.edits import tell_arm
from collector.query.arms import read_arms
from collector.query.expert_sets import read_sets, select_sets
from collector.query.warehouse import open_run
from collector.store.run_directory import RunDirectory
from collector.store.tables import Layer
from tests.helpers.command_line import collector
from tests.helpers.query_runs import opened_once
from tests.helpers.synthetic import Shard, write_run

LAYERS = (Layer(layer=1, n_experts=3, top_k=1), Layer(layer=4, n_experts=3, top_k=1))
SHARD = Shard.of_picks(
    LAYERS, documents=[("en", 4), ("ko", 4)], experts={1: [0, 0, 0, 1, 1, 2, 2, 2], 4: [2] * 8}
)  # fmt: skip
BY_LABEL = """
select label, layer, expert, picks from assignments
qualify row_number() over (partition by label, layer order by picks desc, expert) = 1
"""
PRETRAINED = {"model": "a/model", "revision": None, "weights": "pretrained"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_run(tmp_path_factory.mktemp("sets") / "run", LAYERS, [SHARD], settings=PRETRAINED)


def selected(folder: Path, select: str, name: str = "it"):
    return select_sets(open_run(folder), RunDirectory(folder), select, name=name)


def saved(folder: Path, path: Path, select: str) -> str:
    path.write_text(selected(folder, select).to_json())
    return str(path)


# ---- what is kept ----


def test_a_file_keeps_rows_statement_model_and_what_was_read(folder, tmp_path) -> None:
    path = Path(saved(folder, tmp_path / "set.json", BY_LABEL))
    kept = json.loads(path.read_text())
    assert kept["sets"] == {
        "en": [
            {"stack": "decoder", "layer": 1, "expert": 0, "picks": 3},
            {"stack": "decoder", "layer": 4, "expert": 2, "picks": 4},
        ],
        "ko": [
            {"stack": "decoder", "layer": 1, "expert": 2, "picks": 3},
            {"stack": "decoder", "layer": 4, "expert": 2, "picks": 4},
        ],
    }
    assert (kept["model"], kept["sql"], kept["select"]) == (PRETRAINED, BY_LABEL, None)
    assert kept["run"]["plan_hash"] == "0"
    assert read_sets(path) == selected(folder, BY_LABEL)


def test_another_attempt_at_a_shard_is_another_run(tmp_path) -> None:
    path = write_run(tmp_path / "run", LAYERS, [SHARD], settings=PRETRAINED) / "commits" / "000000.json"
    record = json.loads(path.read_text())
    before = [selected(tmp_path / "run", "dead").run for _ in range(2)]
    path.write_text(json.dumps(record | {"attempt": "another"}))
    assert before[0] == before[1]
    assert selected(tmp_path / "run", "dead").run["commits"] != before[0]["commits"]


def test_a_named_selection_keeps_its_sql(folder) -> None:
    found = selected(folder, "most_loaded")
    assert list(found.sets) == ["most loaded"]
    assert "from assignments" in found.sql
    assert found.select == "most_loaded"


def test_sql_without_names_makes_one_set_with_each_expert_once(folder) -> None:
    sql = "select metric, layer, expert, value / 0 as odd from top_experts where label = 'ko' order by value"
    assert selected(folder, sql, name="korean").sets == {
        "korean": [
            {"stack": "decoder", "layer": layer, "expert": expert, "metric": "top1", "odd": None}
            for layer, expert in ((1, 1), (1, 2), (4, 2))
        ]
    }


def test_the_order_of_rows_does_not_matter(folder) -> None:
    found = [selected(folder, f"from ({BY_LABEL}) order by layer {way}").sets for way in ("asc", "desc")]
    assert json.dumps(found[0]) == json.dumps(found[1])


# ---- as arms ----


def test_each_set_is_an_arm_that_drops_its_experts(folder, tmp_path) -> None:
    path = saved(folder, tmp_path / "set.json", BY_LABEL)
    arms = read_arms(opened_once(folder), path)
    assert [tell_arm(arm) for arm in arms] == [
        "en: layer=1 expert=0 operation=drop; layer=4 expert=2 operation=drop",
        "ko: layer=1 expert=2 operation=drop; layer=4 expert=2 operation=drop",
    ]
    with pytest.raises(ValueError, match="--split tests experts in half of the documents"):
        read_arms(opened_once(folder), path, split=True)


def test_a_named_set_is_the_arm_of_that_name(folder, tmp_path) -> None:
    path = saved(folder, tmp_path / "set.json", "most_loaded")
    run = opened_once(folder)
    assert read_arms(run, path) == read_arms(run, "most_loaded")


@pytest.mark.parametrize(
    ("settings", "layers", "message"),
    [
        ({"model": "b/model"}, LAYERS, "the expert sets are of model a/model, the run of model b/model"),
        ({"weights": "random"}, LAYERS, "are of weights pretrained, the run of weights random"),
        ({}, LAYERS[:1], "no router in decoder layer 4; it has decoder 1"),
        ({}, (LAYERS[0], Layer(layer=4, n_experts=2, top_k=1)), "layer 4 of the run has experts 0 to 1, not 2"),
    ],
)
def test_a_set_that_a_run_cannot_have_is_refused(folder, tmp_path, settings, layers, message) -> None:
    path = saved(folder, tmp_path / "set.json", BY_LABEL)
    other = write_run(tmp_path / "other", layers, [], settings=PRETRAINED | settings, complete=False)
    with pytest.raises(ValueError, match=message):
        read_arms(open_run(other), path)


def test_quantized_runs_of_the_model_take_its_sets(folder, tmp_path) -> None:
    path = saved(folder, tmp_path / "set.json", BY_LABEL)
    settings = PRETRAINED | {"quantization": "nf4", "revision": "abc"}
    other = write_run(tmp_path / "other", LAYERS, [], settings=settings, complete=False)
    assert len(read_arms(open_run(other), path)) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no expert sets of collector experts --save: Expecting value"),
        ("[]", "holds no expert sets"),
        ('{"kind": "expert sets 9"}', "it is of another kind or version"),
        ('{"kind": "expert sets 1", "sets": {}}', "it has no set, or one without experts"),
        ('{"kind": "expert sets 1", "sets": {"a": [{"layer": 1}]}}', "it lacks expert"),
        ('{"kind": "expert sets 1", "sets": {"a": [{"layer": 1, "expert": "x"}]}}', "expert takes a whole number"),
    ],
)
def test_what_is_no_file_of_sets_is_refused(folder, tmp_path, text, message) -> None:
    path = tmp_path / "set.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_arms(opened_once(folder), str(path))
    with pytest.raises(FileNotFoundError, match="no such file; collector experts --save writes one"):
        read_arms(opened_once(folder), str(tmp_path / "none.json"))


# ---- what is refused ----


@pytest.mark.parametrize(
    ("select", "message"),
    [
        ("select 1 as layer", "row 1 lacks expert; its columns are layer"),
        ("select 1 as layer, null as expert", "row 1 lacks expert"),
        ("select 2 as layer, 1 as expert", "the run has no router in decoder layer 2; it has decoder 1, decoder 4"),
        ("select 1 as layer, 3 as expert", "layer 1 of the run has experts 0 to 2, not 3"),
        ("select 1 as layer, 1 as expert, 'force' as operation", "has the operation force"),
        ("select 1 as layer, 1 as expert, 'a:b' as label", "an arm cannot be called 'a:b'"),
        ("from experts where expert > 5", "--select selects no expert"),
        ("select layer from nothing", "nothing"),
        ("nobody", "or one of dead, every_expert, .*; got nobody"),
    ],
)
def test_what_selects_no_experts_is_refused(folder, select, message) -> None:
    with pytest.raises(ValueError, match=message):
        selected(folder, select)


# ---- other programs ----


def rows(*experts: tuple[int, int], stack: str = "decoder") -> list[dict]:
    return [{"stack": stack, "layer": layer, "expert": expert} for layer, expert in experts]


def test_easysteer_switches_the_experts_of_a_layer_off(folder) -> None:
    assert written(opened_once(folder), rows((4, 2), (4, 0)), "easysteer") == (
        '{"layer_configs": {"4": {"mode": "deactivate", "expert_ids": [0, 2]}}}\n'
    )


def test_esft_has_every_layer_with_experts(folder) -> None:
    assert written(opened_once(folder), rows((4, 2), (4, 0)), "esft") == (
        '{"experts": {"1": [], "4": [0, 2]}, "shared_experts": false, "non_expert_modules": false}\n'
    )


def test_llama_cpp_omits_the_same_experts_in_every_layer(folder) -> None:
    run = opened_once(folder)
    assert written(run, rows((1, 2), (4, 2), (4, 0), (1, 0)), "llama.cpp") == "--omit-experts 0,2\n"
    for differing in (rows((1, 2), (4, 1)), rows((4, 1))):
        with pytest.raises(
            ValueError,
            match=r"the same experts in every layer, and this set has .* in layer 1 and experts 1 in layer 4",
        ):
            written(run, differing, "llama.cpp")


def test_layers_are_those_of_one_decoder(folder) -> None:
    with pytest.raises(ValueError, match="esft numbers the layers of one decoder, and this set has experts of encoder"):
        written(opened_once(folder), rows((1, 0), stack="encoder"), "esft")


# ---- the command ----


def test_a_saved_set_is_listed_printed_and_taken_again(folder, tmp_path) -> None:
    path = tmp_path / "set.json"
    done = collector("experts", str(folder), "--select", BY_LABEL, "--save", str(path))
    assert done.stdout == f"en: 2 experts in 2 of 2 layers\nko: 2 experts in 2 of 2 layers\n{path}\n"
    assert [each.name for each in tmp_path.iterdir()] == ["set.json"]
    again = collector("experts", str(folder), "--select", str(path), "--to", "easysteer", "--name", "ko")
    assert json.loads(again.stdout)["layer_configs"]["1"] == {"mode": "deactivate", "expert_ids": [2]}
    which = collector("experts", str(folder), "--select", str(path), "--to", "esft")
    assert (which.returncode, which.stdout) == (2, "")
    assert which.stderr == "collector: --to esft takes one set: choose it with --name, of en, ko\n"
    other = collector("experts", str(folder), "--select", str(path), "--to", "esft", "--name", "fr")
    assert other.stderr == "collector: there is no set 'fr'; there are en, ko\n"
    refused = collector("experts", str(folder), "--select", BY_LABEL, "--name", "en", "--to", "llama.cpp", "--save",
                        str(tmp_path / "other.json"))  # fmt: skip
    assert "llama.cpp omits the same experts in every layer" in refused.stderr
    assert [each.name for each in tmp_path.iterdir()] == ["set.json"]


def test_a_set_without_a_name_is_called_like_its_file(folder, tmp_path) -> None:
    path, sql = tmp_path / "two.json", tmp_path / "two.sql"
    sql.write_text("select layer, 2 as expert from layers;\n")
    done = collector("experts", str(folder), "--select", str(sql), "--save", str(path))
    assert done.stdout.startswith("two: 2 experts in 2 of 2 layers\n")
    assert list(read_sets(path).sets) == ["two"]
    assert collector("experts", str(folder), "--select", str(path), "--to", "llama.cpp").stdout == "--omit-experts 2\n"
