"""The command line: what it says, what it refuses, and that every command of the README exists."""

from __future__ import annotations

import csv
import io
import json
import re
import shlex
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from collector import __main__ as cli
from collector.config import CaptureConfig, DataConfig, LaunchConfig, ModelConfig
from collector.look import terminal
from collector.query.comparison import list_comparisons
from collector.query.warehouse import list_queries, open_run
from tests.helpers.command_line import collector
from tests.helpers.paths import ROOT
from tests.helpers.runs import collect_here, run_config, write_jsonl


def process(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "collector", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def run(tmp_path_factory, tiny_folder, tiny_model) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    data = DataConfig(data=(str(write_jsonl(folder / "texts.jsonl", 20)),), docs_per_shard=8)
    collect_here(folder / "run", run_config(data, ModelConfig(model=str(tiny_folder))), loaded=tiny_model)
    return folder / "run"


@pytest.mark.parametrize("arguments", [["--help"], ["collect", "--help"], ["query", "--help"]])
def test_help_imports_nothing_heavy(arguments):
    program = (
        "import sys; sys.argv = ['collector', *sys.argv[1:]]\n"
        "from collector.__main__ import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'ray', 'pyarrow', 'duckdb', 'datasets', 'pandas'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "usage: collector" in done.stdout


def test_no_arguments_mean_the_demo():
    command = cli.parse(["collect"])
    assert command == cli.Collect(out="runs/demo", data=DataConfig(data=("demo",)), model=ModelConfig(model="demo"),
                                  capture=CaptureConfig(), launch=LaunchConfig())  # fmt: skip


def test_every_setting_has_its_flag():
    command = cli.parse(
        shlex.split(
            "collect --out s3://b/run --model a/b --revision r --dtype bfloat16 --weights random --seed 3 --layers 0 5 "
            "--max-length 7 --tokens-per-batch 8 --docs-per-shard 9 --per-label 10 --limit 11 --replicas 2 "
            "--gpus-per-replica 0.25 --cpus-per-replica 3 --device cuda --text-column t --label-column l "
            "--id-column i --store text probabilities --ray-address auto --data x.jsonl hf:a/b:c:test "
            "--target-column u --stacks encoder decoder --quantization nf4 --no-double-quantization "
            "--compute-dtype float16 --unquantized-experts --offload disk --host-memory 24GB"
        )
    )
    assert command.data == DataConfig(data=("x.jsonl", "hf:a/b:c:test"), text_column="t", label_column="l",
                                      id_column="i", per_label=10, limit=11, docs_per_shard=9,
                                      target_column="u")  # fmt: skip
    assert command.model == ModelConfig(model="a/b", revision="r", dtype="bfloat16", weights="random", seed=3,
                                        quantization="nf4", double_quantization=False, compute_dtype="float16",
                                        unquantized_experts=True)  # fmt: skip
    assert command.capture == CaptureConfig(layers=(0, 5), max_length=7, tokens_per_batch=8,
                                            store=("text", "probabilities"), stacks=("encoder", "decoder"))  # fmt: skip
    assert command.launch == LaunchConfig(replicas=2, gpus_per_replica=0.25, cpus_per_replica=3, device="cuda",
                                          ray_address="auto", offload="disk", host_memory="24GB")  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["collect", "--per-label", "0"], "--per-label must be positive, got 0"),
        (["query"], "takes RUN and NAME"),
        (["query", "nowhere", "top_experts"], "nowhere"),
        (["query", "nowhere", "top_experts", "--beside", "nothing"], "nowhere"),
        (["query", "nowhere", "top_experts", "--layer"], "--layer needs a value"),
        (["status", "nowhere"], "nowhere"),
    ],
)
def test_bad_input_is_one_line_with_the_value(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = collector(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_so_it_is_in_a_process_of_its_own(tmp_path):
    done = process("status", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("collector: ")
    assert "nowhere" in line


def test_query_parameters_may_stand_anywhere():
    rest, params = cli.split_query_params(["query", "run", "--layer", "5", "name", "--labels=a,b", "--format", "csv"])
    assert rest == ["query", "run", "name", "--format", "csv"]
    assert params == (("layer", "5"), ("labels", "a,b"))


def test_all_formats_say_the_same(run):
    arguments = ["query", str(run), "domain_specialization", "--layer", "1", "--labels", "ko"]
    styles = ("table", "csv", "json", "parquet")
    out = {style: collector(*arguments, "--format", style, text=False).stdout for style in styles}
    rows = json.loads(out["json"])
    assert [row["expert"] for row in rows] == list(range(6))
    assert sum(row["value"] for row in rows) == pytest.approx(2)
    assert pq.read_table(io.BytesIO(out["parquet"])).to_pylist() == rows
    table = list(csv.DictReader(io.StringIO(out["csv"].decode())))
    assert [float(row["value"]) for row in table] == [row["value"] for row in rows]
    assert len(out["table"].decode().strip().splitlines()) == 1 + len(rows)


def test_lists_are_json_in_csv_and_short_in_a_table(run, capsysbinary):
    rows = open_run(run).query("dynamic_k", layer=1).fetchall()
    assert cli.parse(["query", str(run), "dynamic_k", "--layer", "1", "--format", "csv"]).run() == 0
    table = list(csv.DictReader(io.StringIO(capsysbinary.readouterr().out.decode())))
    assert [json.loads(row["shares"]) for row in table] == [row[-1] for row in rows]
    assert terminal.cell([2 / 3, 1, None]) == "[0.6667, 1, ]"


def test_two_runs_stand_side_by_side(run, capsys):
    assert cli.parse(["query", str(run), "router_saturation", "--beside", str(run), "--format", "json"]).run() == 0
    shown = capsys.readouterr()
    assert {row["value"] for row in json.loads(shown.out)} == {1}
    assert shown.err == ""
    line = shlex.split(f"--beside {shlex.quote(str(run))} --labels ko --layer 1 --format markdown")
    assert cli.parse(["query", str(run), "effective_experts", *line]).run() == 0
    head, rule, *rows = capsys.readouterr().out.splitlines()
    assert head.startswith("| metric | stack | layer | label | value | value_beside | difference | baseline | ")
    assert rule.count("---") == head.count("|") - 1
    assert len(rows) == 1


def test_what_two_runs_could_not_be_compared_in_is_told(run, tmp_path, capsys, tiny_folder, tiny_model):
    data = DataConfig(data=(str(run.parent / "texts.jsonl"),), docs_per_shard=5)
    config = run_config(data, ModelConfig(model=str(tiny_folder)), token_ids="drop")
    collect_here(tmp_path / "dropped", config, loaded=tiny_model)
    line = ["query", str(run), "router_saturation", "--beside", str(tmp_path / "dropped"), "--format", "csv"]
    assert cli.parse(line).run() == 0
    shown = capsys.readouterr()
    assert shown.err == f"not compared: vocabulary and token ids, for {tmp_path / 'dropped'} has none\n"
    assert {row["value"] for row in csv.DictReader(io.StringIO(shown.out))} == {"1"}


def test_sql_reads_and_never_writes(run):
    done = collector("sql", str(run), "select count(*) as n from documents", "--format", "json")
    assert json.loads(done.stdout) == [{"n": 20}]
    refused = collector("sql", str(run), "create table x as select 1")
    assert refused.returncode == 2


def test_status_shows_the_card(run):
    done = collector("status", str(run))
    assert done.returncode == 0
    text = done.stdout
    for fact in ("complete", "top-2 of 6", "20 of 20", "padding efficiency"):
        assert fact in text


def test_a_quantized_copy_is_collected_like_its_original(tmp_path, capsys, tiny_folder):
    copy = tmp_path / "copy"
    assert cli.parse(["quantize", str(tiny_folder), str(copy), "--dtype", "bfloat16"]).run() == 0
    said = capsys.readouterr().out
    assert "in nf4" in said
    assert str(copy) in said
    run = collect_here(tmp_path / "run", run_config(DataConfig(limit=4), ModelConfig(model=str(copy))))
    card = run.read_json("run.json")
    assert "nf4" in card["memory"]["treatments"]
    with pytest.raises(ValueError, match="not empty"):
        cli.parse(["quantize", str(tiny_folder), str(copy)]).run()


def test_the_list_tells_every_query():
    text = collector("query", "--list").stdout
    for query in (*list_queries(), *list_comparisons()):
        assert query.name in text
        assert query.question in text.replace("\n", " ")
    assert "of two runs: collector query RUN router_saturation --beside OTHER" in text


def readme_commands() -> list[str]:
    blocks = re.findall(r"```(?:sh|console|text)?\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [line.removeprefix("$ ") for line in lines if line.removeprefix("$ ").startswith("collector ")]


def test_every_command_of_the_readme_can_be_parsed_and_every_query_exists():
    commands = readme_commands()
    assert len(commands) >= 5
    queries = (*list_queries(), *list_comparisons())
    names = {query.name: {param.name for param in query.params} for query in queries}
    for line in commands:
        command = cli.parse(shlex.split(line.split(" #")[0].split(" > ")[0])[1:])
        if isinstance(command, cli.Query) and not command.list:
            assert {name for name, _ in command.params} <= names[command.name], line


@pytest.mark.slow
def test_an_installed_wheel_finds_its_queries_its_model_and_its_app(tmp_path):
    build = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    program = (
        "import collector.query.catalog, collector.models.loading\n"
        "from collector.config import ModelConfig\n"
        f"assert collector.__file__.startswith({str(tmp_path)!r})\n"
        "assert len(collector.query.catalog.list_queries()) >= 6\n"
        "assert len(collector.query.catalog.list_comparisons()) >= 2\n"
        "assert collector.models.loading.load(ModelConfig(), 'cpu').model.config.num_experts == 64\n"
        "from collector.look.explore import panel, serving\n"
        "assert serving.app_file() == collector.query.catalog.query_folder().parent / 'notebooks' / 'explore.py'\n"
        "assert panel.Panel._css and serving.app_file().is_file()\n"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path / "site", check=True)
    parts = {path.suffix for path in (tmp_path / "site" / "collector" / "look" / "report").glob("page.*")}
    assert parts >= {".css", ".jinja", ".js"}


def test_the_command_answers_at_once():
    """Not a benchmark: an import of torch or ray would take several times as long."""
    best = min(_seconds("collect", "--help") for _ in range(3))
    assert best < 2.0


def _seconds(*arguments: str) -> float:
    started = time.perf_counter()
    process(*arguments)
    return time.perf_counter() - started
