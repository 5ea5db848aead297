"""Loading: what does not fit is refused before it costs anything, and says what would help."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from collector.config import LaunchConfig, ModelConfig, Spread
from collector.models import footprint, loading, weight_files
from collector.models.loading import DEMO_MODEL


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the tiny checkpoint to spoil."""
    return shutil.copytree(tiny_folder, tmp_path / "model")


def rewrite(folder, change) -> None:
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})


def load(folder, **settings) -> loading.LoadedModel:
    return loading.load(ModelConfig(model=str(folder), **settings), "cpu")


def test_a_missing_tensor_is_an_error_and_never_a_random_value(folder):
    rewrite(folder, lambda tensors: {k: v for k, v in tensors.items() if k != "layers.1.mlp.gate.weight"})
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.gate\.weight are not in it"):
        load(folder)


def test_an_old_layout_names_what_is_there_instead(folder):
    rewrite(folder, lambda tensors: {k.replace("mlp.gate", "mlp.router.classifier"): v for k, v in tensors.items()})
    with pytest.raises(ValueError, match=r"mlp\.gate\.weight.*mlp\.router\.classifier\.weight instead"):
        load(folder)


def test_a_tensor_of_another_shape_is_refused(folder):
    rewrite(folder, lambda tensors: tensors | {"norm.weight": torch.ones(7)})
    with pytest.raises(ValueError, match=r"another shape: norm\.weight \(7,\) instead of \(16,\)"):
        load(folder)


def test_a_dense_model_is_refused_before_its_weights_are_read(folder):
    from transformers import LlamaConfig

    LlamaConfig(vocab_size=8192, hidden_size=16, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
                architectures=["LlamaForCausalLM"]).save_pretrained(folder)  # fmt: skip
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="LlamaModel has no router"):
        load(folder)


@pytest.mark.parametrize(("free", "remedy"), [(5e6, "--quantization nf4"), (1e6, "--gpus-per-replica, --offload")])
def test_too_little_memory_names_what_would_fit(folder, monkeypatch, free, remedy):
    shutil.copy(DEMO_MODEL / "config.json", folder)
    (folder / "model.safetensors").unlink()
    monkeypatch.setattr(footprint, "free_bytes", lambda _device: int(free))
    with pytest.raises(ValueError, match=f"takes 7.7 MB in bfloat16, but free are .*{remedy}"):
        load(folder, dtype="bfloat16")


def test_the_checkpoints_own_precision_is_kept_where_the_config_names_none(folder):
    config = json.loads((folder / "config.json").read_text())
    config.pop("dtype", None)
    (folder / "config.json").write_text(json.dumps(config))
    rewrite(folder, lambda tensors: {k: v.bfloat16() for k, v in tensors.items()})
    assert load(folder).model.dtype == torch.bfloat16


def test_a_checkpoint_in_several_files_of_the_layout_of_the_hub(tiny_folder, tmp_path):
    """One matrix per expert and a language-model head, as OLMoE is published."""
    from transformers import AutoTokenizer, OlmoeForCausalLM

    plain = load(tiny_folder)
    lm = OlmoeForCausalLM._from_config(plain.model.config)
    lm.model.load_state_dict(plain.model.state_dict())
    lm.save_pretrained(tmp_path, max_shard_size="100KB")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path)
    assert len(weight_files.weight_files(str(tmp_path), None)) > 2
    again = load(tmp_path)
    assert loading.fingerprint(again.model) == loading.fingerprint(plain.model)


def test_random_weights_are_drawn_in_the_precision_asked_for(tiny_folder):
    half, full = (load(tiny_folder, weights="random", dtype=dtype) for dtype in ("bfloat16", "float32"))
    assert {parameter.dtype for parameter in half.model.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in full.model.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("settings", "room"),
    [({"dtype": "float32"}, "8MB"), ({"dtype": "bfloat16"}, "4MB"), ({"weights": "random"}, "8MB")],
)
def test_weights_on_the_disk_compute_the_same(tmp_path, settings, room):
    """With room for a part of the model only, the rest is read from disk in every pass."""
    spread = Spread(offload="disk", host_memory=room, folder=str(tmp_path))
    spread_out = loading.load(ModelConfig(**settings), "cpu", spread)
    assert set(map(str, spread_out.model.hf_device_map.values())) == {"cpu", "disk"}
    plain = loading.load(ModelConfig(**settings), "cpu")
    ids = torch.randint(3, 8000, (2, 9))
    with torch.inference_mode():
        torch.testing.assert_close(spread_out.model(ids)[0], plain.model(ids)[0], rtol=1e-5, atol=1e-5)
    assert loading.fingerprint(spread_out.model) == loading.fingerprint(plain.model)


def test_the_disk_is_used_only_when_asked_for(tiny_folder, monkeypatch):
    monkeypatch.setattr(footprint, "free_bytes", lambda _device: 120_000)
    with pytest.raises(ValueError, match="--offload"):
        loading.load(ModelConfig(model=str(tiny_folder)), "cpu", Spread())


def test_how_a_launch_spreads_its_replicas():
    assert LaunchConfig(gpus_per_replica=0.5).spread("cuda") is None
    assert LaunchConfig(gpus_per_replica=2).spread("cuda") == Spread()
    assert LaunchConfig(gpus_per_replica=2).spread("cpu") is None
    assert LaunchConfig(offload="disk", host_memory="8GB").spread("cpu") == Spread(offload="disk", host_memory="8GB")
    with pytest.raises(ValueError, match="on CPUs use --offload disk"):
        LaunchConfig(offload="cpu").spread("cpu")
    with pytest.raises(ValueError, match=r"whole ones, got 1\.5"):
        LaunchConfig(gpus_per_replica=1.5)
    with pytest.raises(ValueError, match="--host-memory limits"):
        LaunchConfig(host_memory="8GB")


def test_offloaded_weights_cannot_be_quantized():
    with pytest.raises(ValueError, match="--offload moves plain weights only"):
        loading.load(ModelConfig(quantization="nf4"), "cpu", Spread(offload="disk"))
