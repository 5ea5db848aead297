"""The weight files that checkpoints come in: which are read, and what is said of the others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, SwitchTransformersConfig, SwitchTransformersForConditionalGeneration

from collector.config import DataConfig, ModelConfig
from collector.models import loading, weight_files
from collector.models.loading import DEMO_MODEL
from tests.helpers.runs import assert_same_content, collect_here, run_config, write_jsonl
from tests.helpers.tiny_models import SWITCH

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture
def folder(tiny_folder, tmp_path) -> Path:
    """A copy of the tiny checkpoint without its weights."""
    made = shutil.copytree(tiny_folder, tmp_path / "model")
    (made / "model.safetensors").unlink()
    return made


@pytest.fixture(scope="module")
def tensors(tiny_folder) -> dict[str, torch.Tensor]:
    return load_file(tiny_folder / "model.safetensors")


def load(folder: Path, **settings) -> loading.LoadedModel:
    return loading.load(ModelConfig(model=str(folder), **settings), "cpu")


def halves(tensors: dict, kind: str) -> dict[str, dict]:
    """The tensors in two shards, by the shards' names."""
    names = sorted(tensors)
    parts = (names[::2], names[1::2])
    return {kind.format(i + 1): {name: tensors[name] for name in part} for i, part in enumerate(parts)}


def index_of(shards: dict[str, dict]) -> str:
    return json.dumps(
        {"metadata": {}, "weight_map": {tensor: name for name, part in shards.items() for tensor in part}}
    )


def save_pickled(path: Path, content: object) -> None:
    torch.save(content, path)


def save_old(path: Path, content: object) -> None:
    torch.save(content, path, _use_new_zipfile_serialization=False)


# -- what is read ------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [save_pickled, save_old])
@pytest.mark.parametrize("wrap", [dict, lambda tensors: {"state_dict": tensors}])
def test_one_pickled_file(folder, tensors, tiny_model, save: Callable, wrap: Callable) -> None:
    save(folder / "pytorch_model.bin", wrap(tensors))
    assert loading.fingerprint(load(folder).model) == loading.fingerprint(tiny_model.model)


@pytest.mark.parametrize("quantization", ["nf4", "fp4"])
def test_pickled_files_are_quantized_as_they_are_read(folder, tensors, tiny_folder, quantization: str) -> None:
    save_pickled(folder / "pytorch_model.bin", tensors)
    one, same = (load(each, quantization=quantization) for each in (folder, tiny_folder))
    assert loading.fingerprint(one.model) == loading.fingerprint(same.model)


def test_tensors_of_a_pickled_file_are_copied_when_they_are_read(tmp_path) -> None:
    save_pickled(tmp_path / "a.bin", {"x": torch.arange(6.0).reshape(2, 3), "y": torch.ones(2, dtype=torch.bfloat16)})
    found = weight_files.lazy_tensors([str(tmp_path / "a.bin")])
    assert (found["x"].get_shape(), found["x"].get_dtype(), found["y"].get_dtype()) == ([2, 3], "F32", "BF16")
    value = found["x"][...]
    value += 1
    assert torch.equal(found["x"][1:], torch.tensor([[3.0, 4.0, 5.0]]))


@pytest.mark.parametrize(
    ("shard", "index"),
    [
        ("pytorch_model-{:05d}-of-00002.bin", "pytorch_model.bin.index.json"),
        ("model-{:05d}-of-00002.safetensors", "model.safetensors.index.json"),
        ("model.fp16-{:05d}-of-00002.safetensors", "model.safetensors.index.fp16.json"),
        ("pytorch_model.fp16-{:05d}-of-00002.bin", "pytorch_model.bin.index.fp16.json"),
        ("model-{:05d}-of-00002.safetensors", None),
        ("pytorch_model-{:05d}-of-00002.bin", None),
    ],
)
def test_shards_with_and_without_an_index(folder, tensors, tiny_model, shard: str, index: str | None) -> None:
    shards = halves(tensors, shard)
    for name, part in shards.items():
        (save_file if name.endswith("safetensors") else lambda t, path: torch.save(t, path))(part, folder / name)
    if index is not None:
        (folder / index).write_text(index_of(shards), encoding="utf-8")
    assert loading.fingerprint(load(folder).model) == loading.fingerprint(tiny_model.model)


@pytest.mark.parametrize("name", ["model.fp16.safetensors", "pytorch_model.fp16.bin"])
def test_the_only_variant_is_read(folder, tensors, tiny_model, name: str) -> None:
    (save_file if name.endswith("safetensors") else lambda t, path: torch.save(t, path))(tensors, folder / name)
    assert loading.fingerprint(load(folder).model) == loading.fingerprint(tiny_model.model)


def test_safetensors_win_over_pickled_files(folder, tensors, tiny_model) -> None:
    save_file(tensors, folder / "model.safetensors")
    save_pickled(folder / "pytorch_model.bin", {name: torch.zeros_like(tensor) for name, tensor in tensors.items()})
    assert loading.fingerprint(load(folder).model) == loading.fingerprint(tiny_model.model)


def test_a_pickled_switch_is_collected_like_its_twin_in_safetensors(tmp_path) -> None:
    torch.manual_seed(1)
    model = SwitchTransformersForConditionalGeneration(SwitchTransformersConfig(**SWITCH))
    model.save_pretrained(tmp_path / "safe")
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(tmp_path / "safe")
    shutil.copytree(tmp_path / "safe", tmp_path / "bin")
    (tmp_path / "bin" / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "bin" / "pytorch_model.bin")  # with all names of shared tensors
    data = DataConfig(data=(str(write_jsonl(tmp_path / "texts.jsonl", 12)),))
    settings = {"stacks": ("encoder", "decoder"), "max_length": 24}
    runs = [
        collect_here(tmp_path / f"run-{kind}", run_config(data, ModelConfig(model=str(tmp_path / kind)), **settings))
        for kind in ("safe", "bin")
    ]
    assert_same_content(*runs)


# -- what is refused ---------------------------------------------------------------------------------


class Payload:
    """Writes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return (Path.write_text, (self.marker, "ran"))


def test_a_file_with_more_than_tensors_is_refused_and_does_not_run(folder, tensors, tmp_path) -> None:
    for save in (save_pickled, save_old):
        save(folder / "pytorch_model.bin", {**tensors, "extra": Payload(tmp_path / "ran")})
        with pytest.raises(ValueError, match="holds more than tensors, and unpickling it could run any code"):
            load(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"has no weights: neither model\.safetensors nor"),
        ({"model.gguf": b""}, r"only as GGUF \(model\.gguf\): convert them to safetensors"),
        ({"tf_model.h5": b"", "flax_model.msgpack": b""}, r"only as Flax \(flax_model\.msgpack\), TensorFlow"),
        ({"consolidated.safetensors": b""}, r"has consolidated\.safetensors, but neither model\.safetensors nor"),
        ({"model.fp16.safetensors": b"", "model.bf16.safetensors": b""},
         "no plain weights but the variants bf16, fp16"),
        ({"model-00002-of-00003.safetensors": b""},
         r"lacks model-00001-of-00003\.safetensors, model-00003-of-00003\.safetensors and has no index"),
        ({"model.safetensors.index.json": b'{"weight_map": {"a": "model-00001-of-00002.safetensors"}}'},
         r"lacks model-00001-of-00002\.safetensors of the 1 shards that model\.safetensors\.index\.json lists"),
        ({"pytorch_model.bin": b"not a checkpoint"}, r"pytorch_model\.bin (cannot be read|holds more than tensors)"),
    ],
)  # fmt: skip
def test_what_is_there_instead_is_named(folder, files: dict[str, bytes], message: str) -> None:
    for name, content in files.items():
        (folder / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load(folder)
    assert "HF_TOKEN" not in str(error.value)


def test_a_pickled_file_of_something_else_is_refused(folder) -> None:
    save_pickled(folder / "pytorch_model.bin", [torch.ones(2)])
    with pytest.raises(ValueError, match="holds something else than named tensors"):
        load(folder)
