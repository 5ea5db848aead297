"""What is no model is refused with a remedy that fits, an adapter by the name of its base; remote code never runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tokenizers import AddedToken
from transformers import AutoTokenizer

from collector.config import DataConfig, ModelConfig
from collector.models import loading
from collector.models.loading import DEMO_MODEL
from tests.helpers.paths import ROOT
from tests.helpers.runs import collect_here, content, run_config


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A copy of the tiny checkpoint to spoil."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def load(model: object, **settings) -> loading.LoadedModel:
    return loading.load(ModelConfig(model=str(model), **settings), "cpu")


def refusal(model: object, **settings) -> str:
    with pytest.raises(ValueError, match="--model") as error:
        load(model, **settings)
    return str(error.value)


# -- where it is -------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there_or_holds_no_model(tmp_path) -> None:
    for missing in (tmp_path / "nothing", "./nothing", "~/nothing", "a/b/c"):
        assert refusal(missing).endswith("there is no such folder")
    assert "has no config.json" in refusal(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "is a file: give the folder with its config.json" in refusal(tmp_path / "model.safetensors")


def test_an_id_of_the_hub_that_cannot_be_reached(monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    message = refusal("no-such-owner/no-such-model")
    assert "no-such-owner/no-such-model" in message
    assert "HF_TOKEN" not in message
    assert "network" in message or "not in the cache" in message


def test_a_folder_without_a_tokenizer_says_so(folder) -> None:
    for file in folder.glob("tokenizer*"):
        file.unlink()
    message = refusal(folder)
    assert "cannot load its tokenizer of --model" in message
    assert "HF_TOKEN" not in message


# -- adapters ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("settings", [{}, {"weights": "random"}, {"quantization": "nf4"}])
def test_an_adapter_is_refused_and_names_its_base_model(folder, alone: bool, settings: dict) -> None:
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": "allenai/OLMoE-1B-7B-0924"}), encoding="utf-8"
    )
    if alone:
        (folder / "config.json").unlink()
    message = refusal(folder, **settings)
    assert "holds an adapter (adapter_config.json) for allenai/OLMoE-1B-7B-0924" in message
    assert "merge_and_unload" in message


# -- tokenizers --------------------------------------------------------------------------------------


def with_tokenizer(folder: Path, change) -> Path:
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    change(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_tokenizer_with_ids_beyond_the_embedding_is_refused_before_the_weights_are_read(folder) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 8000}))
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="gives texts ids up to 8191, but the model embeds only 8000"):
        load(folder)


def test_an_id_beyond_the_embedding_counts_however_few_entries_there_are(folder) -> None:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    entry = max(vocabulary, key=vocabulary.get)
    vocabulary[entry] = 9000
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    with pytest.raises(ValueError, match="gives texts ids up to 9000, but the model embeds only 8192"):
        load(folder)


def test_added_tokens_beyond_the_embedding_cost_only_the_texts_that_spell_them(folder, tmp_path) -> None:
    with_tokenizer(folder, lambda tokenizer: tokenizer.add_tokens([AddedToken("<new>", special=True)]))
    source = tmp_path / "texts.jsonl"
    rows = [{"text": text, "label": "x"} for text in ("first", "a <new> word", "last")]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = run_config(DataConfig(data=(str(source),)), ModelConfig(model=str(folder)), store=("text",))
    run = collect_here(tmp_path / "run", config)
    assert content(run)["documents"]["text"].to_pylist() == ["first", "last"]
    (commit,) = run.commits()
    assert {reason: (s.count, s.examples) for reason, s in commit.skipped.items()} == {
        "token beyond the model's vocabulary": (1, ("texts.jsonl#1",))
    }


# -- remote code -------------------------------------------------------------------------------------

CANARY = "from pathlib import Path\nPath({marker!r}).write_text('ran')\nraise SystemExit('remote code ran')\n"


@pytest.fixture
def canary(folder, tmp_path) -> tuple[Path, Path]:
    """A checkpoint that brings code for everything, which leaves a mark when it is imported."""
    marker = tmp_path / "ran"
    for name in ("modeling_own", "configuration_own", "tokenization_own"):
        (folder / f"{name}.py").write_text(CANARY.format(marker=str(marker)), encoding="utf-8")
    own = {
        "AutoConfig": "configuration_own.OwnConfig", "AutoModel": "modeling_own.OwnModel",
        "AutoModelForCausalLM": "modeling_own.OwnModelForCausalLM",
    }  # fmt: skip
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"auto_map": own}))
    path = folder / "tokenizer_config.json"
    tokenizer = json.loads(path.read_text())
    path.write_text(json.dumps(tokenizer | {"auto_map": {"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]}}))
    return folder, marker


def test_no_command_runs_the_code_of_a_checkpoint_or_asks_whether_it_may(canary, tmp_path) -> None:
    folder, marker = canary
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "Hello there", "label": "x"}\n', encoding="utf-8")
    program = f"""
import sys
from pathlib import Path

from collector import __main__ as cli
from collector.config import CaptureConfig, DataConfig, ModelConfig, resolve
from collector.fleet import driver

def nothing_ran(command):
    assert not Path({str(marker)!r}).exists(), command

for arguments in (
    ["quantize", {str(folder)!r}, {str(tmp_path / "quantized")!r}], ["trace", "Hello", "--model", {str(folder)!r}]
):
    sys.argv[1:] = arguments
    try:
        cli.main()
    except SystemExit as end:
        assert end.code == 0, (arguments, end.code)
    nothing_ran(arguments)
config = resolve(data=DataConfig(data=({str(texts)!r},)), model=ModelConfig(model={str(folder)!r}),
                 capture=CaptureConfig(record=("loss",)), device="cpu")
try:
    driver.collect_in_process({str(tmp_path / "run")!r}, config)
except ValueError as error:
    assert "no lm_head.weight" in str(error), error
nothing_ran("collect")
print("all three ran")
"""
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, input="y\n" * 20, text=True, capture_output=True, timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("all three ran\n")
    assert "[y/N]" not in done.stdout + done.stderr


def test_a_family_that_only_its_own_code_knows_is_refused_without_advising_a_flag(canary) -> None:
    folder, marker = canary
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "own"}))
    message = refusal(folder)
    assert "needs code of its own (auto_map in its config.json), which the collector never runs" in message
    assert "trust_remote_code" not in message
    assert not marker.exists()
