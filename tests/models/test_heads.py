"""The language-model head of every family, apart from its base model: the same logits as transformers' own model."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

from collector.config import DataConfig, ModelConfig
from collector.models import loading
from collector.models.heads import build_head
from tests.helpers.command_line import collector
from tests.helpers.runs import collect_here, content, run_config, write_jsonl
from tests.models.test_families import CAPTURED, built

WITHOUT_HEAD = {
    "deepseek_ocr2", "diffusion_gemma", "ernie4_5_vl_moe", "glm4v_moe", "glm5_next", "mistral4", "mistral_large4",
    "muse_spark", "openai_privacy_filter", "qwen3_omni_moe", "qwen3_vl_moe", "step3p7", "unlimited_ocr",
}  # fmt: skip
"""Families for whose text model transformers has no class with a head; most are parts of multimodal models."""


def whole_model(base):
    """Transformers' own model with a head, around the base model."""
    torch.manual_seed(0)
    auto = AutoModelForSeq2SeqLM if base.config.is_encoder_decoder else AutoModelForCausalLM
    whole = auto.from_config(base.config).eval()
    places = [name for name, child in whole.named_children() if type(child) is type(base)]
    own = ("shared", "encoder", "decoder")
    for place, part in [(place, base) for place in places] or [(place, getattr(base, place)) for place in own]:
        setattr(whole, place, part)
    if getattr(whole.config.get_text_config(), "tie_word_embeddings", False):
        whole.lm_head.weight = base.get_input_embeddings().weight
    return whole


@pytest.mark.parametrize("name", [name for name in CAPTURED if name not in WITHOUT_HEAD])
def test_logits_are_those_of_the_whole_model(name: str) -> None:
    base = copy.deepcopy(built(name))
    whole = whole_model(base)
    ids = torch.randint(3, 60, (1, 6), generator=torch.Generator().manual_seed(1))
    inputs = {"input_ids": ids, "use_cache": False} | (
        {"decoder_input_ids": ids} if base.config.is_encoder_decoder else {}
    )
    with torch.inference_mode():
        expected = whole(**inputs).logits[0]
        hidden = base(**inputs).last_hidden_state[0]
    head = build_head(base, whole.state_dict(), name, dtype=torch.float32)
    torch.testing.assert_close(head.logits(hidden), expected, rtol=1e-5, atol=1e-6)
    assert head.vocabulary == expected.shape[1]


@pytest.mark.parametrize("name", sorted(WITHOUT_HEAD & set(CAPTURED)))
def test_a_family_without_a_head_is_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match=rf"--record loss or vocabulary: .* --model {name}"):
        build_head(built(name), None, name, dtype=torch.float32)


def test_a_checkpoint_without_a_head_is_refused() -> None:
    base = built("olmoe")
    with pytest.raises(ValueError, match=r"has no lm_head\.weight: it was saved without its head"):
        build_head(base, base.state_dict(), "olmoe", dtype=torch.float32)


def test_a_random_head_depends_on_the_seed_alone() -> None:
    base = built("olmoe")
    hidden = torch.ones(2, base.config.hidden_size)
    one, same, other = (
        build_head(base, None, "x", dtype=torch.float32, seed=seed).logits(hidden) for seed in (1, 1, 2)
    )
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_copy_has_the_head_of_its_model(tmp_path, tiny_folder, tied: bool) -> None:
    base = copy.deepcopy(loading.load(ModelConfig(model=str(tiny_folder)), "cpu").model)
    base.config.tie_word_embeddings = tied
    whole_model(base).save_pretrained(tmp_path / "whole")
    AutoTokenizer.from_pretrained(tiny_folder).save_pretrained(tmp_path / "whole")
    assert collector("quantize", str(tmp_path / "whole"), str(tmp_path / "copy")).returncode == 0
    data = DataConfig(data=(str(write_jsonl(tmp_path / "texts.jsonl", 4)),))
    losses = []
    for name, model in (("copy", "copy"), ("whole", "whole")):
        quantization = "none" if model == "copy" else "nf4"
        config = run_config(
            data, ModelConfig(model=str(tmp_path / model), quantization=quantization), record=("loss",)
        )  # fmt: skip
        losses.append(content(collect_here(tmp_path / f"run-{name}", config))["tokens"]["loss"].to_pylist())
    assert losses[0] == losses[1]
    assert any(loss is not None for loss in losses[0])


def test_a_copy_of_a_model_without_a_head_says_that_it_has_none(tmp_path, tiny_folder) -> None:
    done = collector("quantize", str(tiny_folder), str(tmp_path / "copy"))
    assert done.returncode == 0
    assert "The copy has no language-model head, so --record loss and vocabulary will refuse it." in done.stderr
