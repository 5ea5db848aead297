"""Sweeps over tiny checkpoints with random weights, collected in this process."""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import OlmoeConfig, OlmoeModel

from collector.config import DataConfig, ModelConfig
from collector.data.corpus import read_sentences
from collector.data.plan import PartOf
from collector.demo.train import train_tokenizer
from collector.fleet import driver
from collector.fleet.sweep import Choice, Sweeping
from collector.fleet.sweep_setup import list_checkpoints
from collector.store.run_directory import RunDirectory
from collector.store.sweep_directory import SweepDirectory
from tests.helpers.runs import run_config

TINY = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 2, "num_experts": 6, "num_experts_per_tok": 2,
        "max_position_embeddings": 512, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}  # fmt: skip


def write_checkpoints(folder: Path, names: Iterable[str]) -> Path:
    """A folder with a random model for each name, each different, and a tokenizer of bytes and a few words."""
    tokenizer = train_tokenizer([sentence.text for sentence in itertools.islice(read_sentences("heldout"), 50)], 300)
    for seed, name in enumerate(names):
        torch.manual_seed(seed)
        OlmoeModel(OlmoeConfig(**TINY)).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


def break_weights(checkpoint: Path) -> bytes:
    """Takes the weights of a checkpoint away; returns them."""
    file = checkpoint / "model.safetensors"
    content = file.read_bytes()
    file.unlink()
    return content


def sweeping(
    root: Path | str, model: Path | str, texts: Path, said: list[str] | None = None, *, collect_one: Any = None,
    delete_after_use: bool = False, max_rejected: float = 1.0, limit: int | None = None, **choice: Any,
) -> Sweeping:  # fmt: skip
    """A launch of a sweep without Ray."""

    def collect_here(at: str, config: Any, part_of: PartOf) -> RunDirectory:
        return driver.collect_in_process(at, config, part_of=part_of, threads=1)

    said = [] if said is None else said
    data, settings = DataConfig(data=(str(texts),), docs_per_shard=8, limit=limit), ModelConfig(model=str(model))
    return Sweeping(
        str(root), run_config(data, settings),
        list_checkpoints(SweepDirectory(root), settings, Choice(**choice), said.append),
        collect_one or collect_here, said.append, delete_after_use=delete_after_use, max_rejected=max_rejected,
    )  # fmt: skip


def sweep_here(
    root: Path | str, model: Path | str, texts: Path, said: list[str] | None = None, **choice: Any
) -> SweepDirectory:
    """Runs or resumes a sweep in this process."""
    return sweeping(root, model, texts, said, **choice).run()
