"""Trains the demo model: a small OLMoE over 60 languages, with its own tokenizer.

    python -m collector.demo.train --out collector/demo/model
    python -m collector.demo.train --out runs/checkpoints --steps 400 --save-at 0 10 50 100 200 400

`collector collect` uses this model by default. It is an OLMoE in every respect that routing depends
on (softmax router, top-8 of 64 experts, weights not normalised), reduced to hidden size 64 and
8 layers so that it trains on two CPU cores and fits into a wheel. The collector does not depend on
this module; it is included so that anyone can reproduce the model.

Training packs sentences, each starting with `<|bos|>`, into rows of 256 tokens in random order, so
that every batch mixes all languages and the load-balancing loss does not penalize an expert for
serving one language. The load-balancing loss is computed per layer (Switch, arXiv 2101.03961,
eq. 4) and averaged; it is not pooled over layers.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import platform
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn import functional as F  # noqa: N812
from transformers import OlmoeConfig, OlmoeForCausalLM, PreTrainedTokenizerFast

from collector.data.corpus import SOURCE, read_sentences
from collector.models.loading import DEMO_MODEL

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BOS, EOS, PAD = "<|bos|>", "<|endoftext|>", "<|pad|>"


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Train the demo model from scratch and write it with its training record."""

    out: Path = DEMO_MODEL
    """Folder for config, safetensors, tokenizer and training.json."""
    seed: int = 0
    """Seed of the initial weights and of the order of sentences."""
    steps: int = 3000
    """Optimizer steps."""
    rows: int = 16
    """Rows per step."""
    row_tokens: int = 256
    """Tokens per row: a step sees rows x row_tokens tokens."""
    learning_rate: float = 3e-3
    """Peak learning rate, after a linear warm-up; it decays linearly over the last 30 % of the steps."""
    warmup: int = 100
    """Warm-up steps."""
    weight_decay: float = 0.1
    """Weight decay of AdamW, applied to matrices only."""
    balance: float = 0.01
    """Coefficient of the load-balancing loss (the default is OLMoE's)."""
    vocabulary: int = 8192
    """Entries of the tokenizer, special tokens included."""
    log_every: int = 50
    """Steps between log lines."""
    save_at: tuple[int, ...] = ()
    """Steps after which to write a checkpoint, too, to OUT/step100-tokens410K and so on; 0 is before the first."""
    evaluate: bool = True
    """Also compute the loss of every held-out sentence at the end."""

    def __post_init__(self) -> None:
        """Rejects checkpoints after the end."""
        if late := [step for step in self.save_at if not 0 <= step <= self.steps]:
            raise ValueError(f"--save-at takes steps from 0 to --steps {self.steps}, got {late[0]}")

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step sees."""
        return self.rows * self.row_tokens


def train_tokenizer(texts: list[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE tokenizer on `texts`; it starts every document with `<|bos|>`."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[PAD, EOS, BOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    bos_id = tokenizer.token_to_id(BOS)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, bos_id)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=PAD, model_max_length=512
    )


def build_model(config: TrainConfig, tokenizer: PreTrainedTokenizerFast) -> OlmoeForCausalLM:
    """Initializes a model with the demo's dimensions, in float32."""
    torch.manual_seed(config.seed)
    model = OlmoeForCausalLM(
        OlmoeConfig(
            vocab_size=config.vocabulary,
            hidden_size=64,
            intermediate_size=32,
            num_hidden_layers=8,
            num_attention_heads=4,
            num_key_value_heads=4,
            num_experts=64,
            num_experts_per_tok=8,
            max_position_embeddings=512,
            tie_word_embeddings=True,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.set_experts_implementation("grouped_mm")
    return model


def packed_rows(documents: list[list[int]], config: TrainConfig) -> Iterator[torch.Tensor]:
    """Yields batches [rows, row_tokens] of packed documents without end, in a new order each epoch."""
    generator = torch.Generator().manual_seed(config.seed)
    size = config.tokens_per_step
    stream: list[int] = []
    while True:
        for index in torch.randperm(len(documents), generator=generator).tolist():
            stream.extend(documents[index])
            if len(stream) >= size:
                yield torch.tensor(stream[:size]).view(config.rows, config.row_tokens)
                del stream[:size]


class BalanceLoss:
    """Collects the load-balancing loss of each layer in a forward pass, with hooks on the routers."""

    def __init__(self, model: OlmoeForCausalLM) -> None:
        self.losses: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._hook)

    def _hook(self, _router: torch.nn.Module, _inputs: Any, outputs: tuple[torch.Tensor, ...]) -> None:
        logits_te, _, experts_tk = outputs
        n_experts = logits_te.shape[1]
        load_e = torch.bincount(experts_tk.flatten(), minlength=n_experts) / len(logits_te)
        probability_e = logits_te.float().softmax(-1).mean(0)
        self.losses.append(n_experts * (load_e * probability_e).sum())

    def pop(self) -> torch.Tensor:
        """Returns and resets the mean over layers of E x sum(f_e x P_e), which is k at perfect balance."""
        mean = torch.stack(self.losses).mean()
        self.losses.clear()
        return mean


def learning_rate(step: int, config: TrainConfig) -> float:
    """Returns the learning rate of a step: warm-up, constant, then linear decay to zero over the last 30 %."""
    decay_from = int(config.steps * 0.7)
    down = (config.steps - step) / max(1, config.steps - decay_from)
    return config.learning_rate * min(1.0, (step + 1) / config.warmup, down)


def train(
    model: OlmoeForCausalLM, documents: list[list[int]], config: TrainConfig, reached: Callable[[int], None]
) -> list[dict[str, float]]:
    """Trains the model in place, calls `reached` with every number of steps done, and returns the log.

    The log has one entry per `log_every` steps.
    """
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": config.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=config.learning_rate, betas=(0.9, 0.95), fused=True,
    )  # fmt: skip
    balance_loss = BalanceLoss(model)
    log: list[dict[str, float]] = []
    recent: list[tuple[float, float]] = []
    started = time.monotonic()
    reached(0)
    for step, rows in zip(range(config.steps), packed_rows(documents, config), strict=False):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, config)
        hidden = model.model(input_ids=rows).last_hidden_state
        logits = model.lm_head(hidden[:, :-1].flatten(0, 1))
        loss = F.cross_entropy(logits, rows[:, 1:].flatten())
        balance = balance_loss.pop()
        (loss + config.balance * balance).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        reached(step + 1)
        recent.append((loss.item(), balance.item()))
        if (step + 1) % config.log_every == 0:
            mean_loss, mean_balance = (math.fsum(column) / len(recent) for column in zip(*recent, strict=True))
            seconds = time.monotonic() - started
            log.append({"step": step + 1, "loss": round(mean_loss, 4), "balance": round(mean_balance, 4)})
            print(f"step {step + 1}/{config.steps} loss {mean_loss:.3f} balance {mean_balance:.3f} "
                  f"{seconds / (step + 1):.2f} s/step", flush=True)  # fmt: skip
            recent.clear()
    return log


@torch.no_grad()
def heldout_loss(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast) -> dict[str, float]:
    """Computes the mean next-token loss (nats) per label over the held-out sentences, one at a time."""
    model.eval()
    sums: dict[str, tuple[float, int]] = {}
    for sentence in read_sentences("heldout"):
        ids = torch.tensor([tokenizer(sentence.text)["input_ids"][:512]])
        if ids.shape[1] < 2:
            continue
        logits = model.lm_head(model.model(input_ids=ids).last_hidden_state[0, :-1])
        loss = F.cross_entropy(logits.float(), ids[0, 1:], reduction="sum").item()
        total, count = sums.get(sentence.label, (0.0, 0))
        sums[sentence.label] = (total + loss, count + ids.shape[1] - 1)
    return {label: round(total / count, 4) for label, (total, count) in sorted(sums.items())}


def save(model: OlmoeForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Writes the checkpoint in bfloat16 to keep it small, with a config that requests float32.

    Most CPUs have no bfloat16 arithmetic, so float32 is several times faster on them. The model stays as it is.
    """
    copy.deepcopy(model).bfloat16().save_pretrained(out)
    (out / "generation_config.json").unlink(missing_ok=True)
    settings = json.loads((out / "config.json").read_text(encoding="utf-8")) | {"dtype": "float32"}
    (out / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    tokenizer.save_pretrained(out)


def checkpoint_name(step: int, config: TrainConfig) -> str:
    """Returns the name of a checkpoint, with step and tokens as on the hub: step100-tokens410K."""
    return f"step{step}-tokens{round(step * config.tokens_per_step / 1000)}K"


def main(config: TrainConfig) -> None:
    """Trains, evaluates and writes the model; the same seed gives the same data in the same order."""
    # Some sentences occur in both splits (18 words of Lao do); held-out ones are removed from training.
    heldout = {sentence.text for sentence in read_sentences("heldout")}
    texts = [sentence.text for sentence in read_sentences("train") if sentence.text not in heldout]
    tokenizer = train_tokenizer(texts, config.vocabulary)
    documents: list[list[int]] = tokenizer(texts)["input_ids"]
    tokens = sum(map(len, documents))
    print(f"{len(texts)} sentences, {tokens} tokens, {config.steps} steps", flush=True)
    model = build_model(config, tokenizer)
    started = time.monotonic()

    def save_if_wanted(step: int) -> None:
        if step in config.save_at:
            save(model, tokenizer, config.out / checkpoint_name(step, config))

    log = train(model, documents, config, save_if_wanted)
    seconds = time.monotonic() - started
    save(model, tokenizer, config.out)
    record = {
        "command": "python -m collector.demo.train " + " ".join(sys.argv[1:]),
        "config": {k: v for k, v in dataclasses.asdict(config).items() if k != "out"},
        "data": {"source": SOURCE, "sentences": len(texts), "tokens": tokens,
                 "tokens_seen": config.steps * config.tokens_per_step},
        "parameters": sum(p.numel() for p in model.parameters()),
        "seconds": round(seconds),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}",
        "log": log,
    }  # fmt: skip
    if config.evaluate:
        record["heldout_loss"] = heldout_loss(model, tokenizer)
    (config.out / "training.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    import tyro

    main(tyro.cli(TrainConfig))
