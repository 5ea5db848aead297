"""Every block of docs/loading.md runs, and what it loads is what the run holds."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from collector import committed_files, open_run
from collector.config import DataConfig, ModelConfig
from tests.helpers.paths import ROOT
from tests.helpers.query_runs import assert_same_rows
from tests.helpers.runs import collect_here, run_config

PAGE = ROOT / "docs" / "loading.md"
BLOCKS = re.findall(r"```(python|sh)\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
pytest.importorskip("polars")
pytest.importorskip("deltalake")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A folder with a small runs/demo, beside whose committed parts an orphan lies."""
    folder = tmp_path_factory.mktemp("loading")
    run = collect_here(folder / "runs" / "demo", run_config(DataConfig(per_label=2, docs_per_shard=50), ModelConfig()))
    first = next(iter(run.commits()))
    for table, part in first.files.items():
        shutil.copy(run.store.location(part.path), run.store.location(f"data/000000-orphan.{table}.parquet"))
    return folder


def shell(line: str, folder: Path) -> str:
    """Runs a line of the page with this Python's `collector` and `duckdb`."""
    programs = Path(sys.executable).parent
    if "duckdb " in line and not (programs / "duckdb").exists():
        pytest.skip("the command line of DuckDB is not installed (pip install duckdb-cli)")
    line = line.replace("duckdb ", f"{programs / 'duckdb'} ")
    line = line.replace("collector ", f"{sys.executable} -m collector ", 1)
    done = subprocess.run(["bash", "-c", line], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_page_does_what_it_says(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(place / "cache"))
    found, said = {}, []
    for kind, block in BLOCKS:
        if kind == "python":
            exec(compile(block, str(PAGE), "exec"), found)
        else:
            said += [shell(line, place) for line in block.splitlines()]
    run = open_run("runs/demo")

    def asked(statement):
        return run.sql(statement).fetchall()

    assert len(found["chosen"]) == asked("select count(*) from routing where layer = 4")[0][0]
    korean = "select mode(e0) from routing where layer = 4 and label = 'kor_Hang'"
    counts = found["chosen"].query("label == 'kor_Hang'").e0.value_counts()
    assert counts[found["favourites"]["kor_Hang"]] == counts[asked(korean)[0][0]] == counts.max()
    means = asked("select layer, label, avg(entropy) from routing where not is_special group by all order by all")
    entropy = found["entropy"].sort("layer", "label")
    assert entropy.select("layer", "label").rows() == [(layer, label) for layer, label, _ in means]
    assert entropy["entropy"].to_list() == pytest.approx([mean for *_, mean in means], rel=1e-5)
    assert list(found["first"].values()) == list(asked("from routing limit 1")[0])
    assert len(found["texts"]) == asked("select count(*) from documents")[0][0] == 120
    assert_same_rows(found["top"].rows(), run.query("top_experts", layer=4, labels=["kor_Hang"], n=3).fetchall())
    assert len(found["tokens"]) == asked("select count(*) from tokens")[0][0]
    assert found["vocabulary"].token.tolist() == [row[0] for row in asked("select token from vocab order by token_id")]
    label, tokens = asked("select label, tokens from labels order by tokens desc limit 1")[0]
    assert re.search(rf"{label}\W+{tokens}\b", said[0])
    assert sorted(path.name for path in (place / "csv-demo").iterdir()) == [
        "README.md", "components.csv.gz", "documents.csv.gz", "layers.csv.gz", "routing.csv.gz", "tokens.csv.gz",
        "vocab.csv.gz",
    ]  # fmt: skip


def test_committed_files_leave_orphans_out_and_name_their_tables(place):
    files = committed_files(place / "runs" / "demo", "routing")
    assert len(files) == 3
    assert set(files) < {str(path) for path in (place / "runs" / "demo" / "data").glob("*.routing.parquet")}
    assert committed_files(place / "runs" / "demo", "rejects") == []
    with pytest.raises(ValueError, match="no table 'layers'; it has routing, tokens, documents, rejects, vocab"):
        committed_files(place / "runs" / "demo", "layers")
    with pytest.raises(FileNotFoundError, match="no run at"):
        committed_files(place / "nothing", "routing")
