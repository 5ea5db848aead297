"""`collector collect` as a user runs it: names in any script, rows that become no document, output nobody reads."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray

from collector.fleet.ray_metrics import run_tag
from collector.store.run_directory import SUCCESS, RunDirectory
from tests.helpers.command_line import collector
from tests.helpers.runs import write_jsonl
from tests.helpers.sweeps import break_weights, write_checkpoints

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("local_ray")]


def rewrite(source: Path, target: Path, change: Callable[[int, dict[str, str]], dict[str, str | None]]) -> Path:
    """Writes JSON lines anew: `change` takes number and columns of each row."""
    rows = map(json.loads, source.read_text(encoding="utf-8").splitlines())
    lines = [json.dumps(change(number, row), ensure_ascii=False) + "\n" for number, row in enumerate(rows)]
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text("".join(lines), encoding="utf-8")
    return target


def test_every_name_may_be_in_any_script(tmp_path, tiny_folder):
    home = tmp_path / "josé 文"
    model = shutil.copytree(tiny_folder, home / "модель")
    labels = {"en": "langue é 英", "ko": "한국어"}
    data = rewrite(
        write_jsonl(tmp_path / "texts.jsonl", 30), home / "données" / "тексты é.jsonl",
        lambda number, row: {"texte": row["text"], "étiquette": labels[row["label"]], "clé": f"№{number}-é"},
    )  # fmt: skip
    out = home / "läufe" / "führung-文"

    done = collector("collect", "--out", str(out), "--data", str(data), "--model", str(model), "--docs-per-shard", "10",
                     "--text-column", "texte", "--label-column", "étiquette", "--id-column", "clé", "--store", "text",
                     "--cpus-per-replica", "1")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "fail" not in done.stderr, "metrics and progress work, too"
    assert f"{out}: complete" in done.stdout

    run = RunDirectory(out)
    ids = [name for commit in run.commits()
           for name in pq.read_table(out / commit.files["documents"].path)["doc_id"].to_pylist()]  # fmt: skip
    assert ids == [f"№{number}-é" for number in range(30)]

    def ask(*arguments: str) -> str:
        answer = collector(*arguments)
        assert answer.returncode == 0, (arguments, answer.stderr)
        return answer.stdout

    assert "30 of 30 planned" in ask("status", str(out))
    assert "langue é 英 15" in ask("status", str(out), "--summary")
    assert "sound" in ask("verify", str(out))
    value = ["query", str(out), "domain_specialization", "--layer", "1", "--labels", "한국어", "--format", "json"]
    assert {row["label"] for row in json.loads(ask(*value))} == {"한국어"}
    ask("rollup", str(out))
    assert {row["label"] for row in json.loads(ask(*value))} == {"한국어"}
    ask("report", str(out), "--out", str(home / "rapport é.html"))
    assert "한국어" in (home / "rapport é.html").read_text(encoding="utf-8")
    ask("export", str(out), str(home / "expörted"), "--to", "csv")
    assert any(
        "langue é 英" in path.read_text(encoding="utf-8") for path in (home / "expörted").rglob("documents*.csv")
    )


@pytest.mark.parametrize(
    ("root", "tag"),
    [("/home/josé/läufe/führung", "f%C3%BChrung"), ("s3://bucket/runs/olmoe-1.2_b", "olmoe-1.2_b"),
     (os.fsdecode(b"/runs/\xe9t\xe9 1"), "%E9t%E9%201"), ("/", "")],
)  # fmt: skip
def test_a_runs_tag_is_ascii_and_tells_runs_apart(root, tag):
    assert run_tag(root) == tag


def test_a_run_without_a_document_is_no_success_and_says_why(tmp_path, tiny_folder):
    texts = write_jsonl(tmp_path / "texts.jsonl", 40)
    rewrite(texts, texts, lambda _, row: row | {"label": None})
    out = tmp_path / "run"
    collecting = ["collect", "--out", str(out), "--data", str(texts), "--model", str(tiny_folder), "--cpus-per-replica",
                  "1"]  # fmt: skip
    why = (
        "no document was collected, all 40 rows were rejected: 40 no label (--label-column names the column, @file "
        "or @folder takes it from the path). Other columns or other data need another --out"
    )
    done = collector(*collecting)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == f"collector: {why}"
    assert (out / SUCCESS).exists(), "as data it is complete"
    again = collector(*collecting, "--max-rejected", "1", "--log-format", "json")
    assert again.returncode == 2, "no share makes it a success"
    assert json.loads(again.stderr.splitlines()[-1])["message"] == why

    told = collector("status", str(out))
    assert told.returncode == 2
    assert told.stderr == f"collector: {why}\n"
    for words in ("0 of 40 planned", "40 no label (--label-column names the column", "e.g. texts.jsonl#0"):
        assert words in told.stdout
    assert not {"tokens", "bytes/token"} & set(told.stdout.split())
    verified = collector("verify", str(out))
    assert verified.returncode == 0
    assert verified.stdout == (
        "sound: all of 1 committed shards are correct, but they hold no document: every row was rejected\n"
    )
    assert "a token" not in collector("rollup", str(out)).stdout
    assert "and so is the rollup, but they hold no document" in collector("verify", str(out)).stdout
    report = collector("report", str(out), "--out", str(tmp_path / "report.html"))
    assert report.stderr == f"collector: {out} holds no document to report on: collector status {out} says why\n"


def test_a_sweep_collects_checkpoints_on_one_ray(tmp_path):
    model = write_checkpoints(tmp_path / "trained", ["checkpoint-5", "checkpoint-10", "checkpoint-50"])
    break_weights(model / "checkpoint-5")
    out, texts = tmp_path / "sweep", write_jsonl(tmp_path / "texts.jsonl", 10)
    done = collector("sweep", "--out", str(out), "--model", str(model), "--data", str(texts), "--every", "2",
                     "--cpus-per-replica", "1")  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert "not collected: checkpoint-5: " in done.stderr
    assert "checkpoint 2 of 2: checkpoint-50" in done.stderr
    assert "1 of 2 checkpoints are complete, 10 documents planned for each" in done.stdout
    assert (out / "checkpoint-50" / SUCCESS).exists()
    assert not (out / "checkpoint-10").exists()


def test_rejected_rows_up_to_the_share_are_a_success(tmp_path, tiny_folder):
    texts = write_jsonl(tmp_path / "texts.jsonl", 6)
    with texts.open("a", encoding="utf-8") as file:
        file.write("{\n" * 4)
    collecting = ["collect", "--out", str(tmp_path / "run"), "--data", str(texts), "--model", str(tiny_folder),
                  "--cpus-per-replica", "1"]  # fmt: skip
    refused = collector(*collecting, "--max-rejected", "0.39")
    assert refused.returncode == 2
    assert "4 of 10 rows were rejected, more than --max-rejected 0.39 allows: 4 invalid JSON" in refused.stderr
    assert collector(*collecting).returncode == 0
    assert collector("status", str(tmp_path / "run")).returncode == 0


def in_a_process(*arguments: str, **options) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run([sys.executable, "-m", "collector", *arguments], check=False, **options)


def test_output_that_nobody_reads_changes_neither_the_run_nor_its_status(tmp_path, tiny_folder):
    texts = write_jsonl(tmp_path / "texts.jsonl", 10)
    read, write = os.pipe()
    os.close(read)
    here = ray.get_runtime_context().gcs_address
    done = in_a_process("collect", "--out", str(tmp_path / "run"), "--data", str(texts), "--model", str(tiny_folder),
                        "--cpus-per-replica", "1", "--ray-address", here, stdout=write, stderr=write)  # fmt: skip
    os.close(write)
    assert done.returncode == 0
    assert (tmp_path / "run" / SUCCESS).exists()


def test_a_machine_that_offers_little_is_enough(tmp_path, tiny_folder):
    """No home to write to, temporary files in a folder that Ray cannot use, few open files."""
    texts = write_jsonl(tmp_path / "texts.jsonl", 10)
    folder = tmp_path / "é"
    folder.mkdir()
    little = {"HOME": "/dev/null/home", "TMPDIR": str(folder)}
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")} | little
    done = in_a_process("collect", "--out", str(tmp_path / "run"), "--data", str(texts), "--model", str(tiny_folder),
                        "--cpus-per-replica", "1", env=environment, capture_output=True,
                        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (128, 128)))  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / SUCCESS).exists()
