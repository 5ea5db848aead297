"""Encoder–decoder models with capacities, whole runs against transformers' own router logits.

The reference runs one document at a time, without padding and without hooks of ours. Models are tiny
with random weights in float32, where batching changes a value by rounding only; the fixtures check
that no choice is close enough for rounding to matter, so ids and drops must be equal.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from transformers import (
    AutoTokenizer,
    NllbMoeConfig,
    NllbMoeModel,
    NllbTokenizer,
    SwitchTransformersConfig,
    SwitchTransformersModel,
)

from collector.config import DataConfig, ModelConfig
from collector.data.corpus import read_sentences
from collector.look import terminal
from collector.models import loading
from collector.models.loading import DEMO_MODEL
from collector.query.warehouse import open_run
from collector.replica.replica import Replica
from tests.helpers.runs import collect_here, content, run_config
from tests.helpers.tiny_models import SWITCH

CAPACITY = SWITCH["expert_capacity"]
NLLB = {"vocab_size": 256, "d_model": 16, "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16,
        "decoder_ffn_dim": 16, "encoder_attention_heads": 2, "decoder_attention_heads": 2, "num_experts": 4,
        "encoder_sparse_step": 2, "decoder_sparse_step": 1, "max_position_embeddings": 512, "pad_token_id": 1,
        "moe_eval_capacity_token_fraction": 1.0, "decoder_start_token_id": 2}  # fmt: skip
START = {"switch": 0, "nllb": 2}
LAYERS = {"switch": {"encoder": [1, 3], "decoder": [1, 3]}, "nllb": {"encoder": [1], "decoder": [0, 1]}}


def nllb_tokenizer() -> NllbTokenizer:
    """A character tokenizer that opens a text with the code of its language, and a target with another."""
    letters = "▁abcdefghijklmnopqrstuvwxyz,."
    vocabulary = {"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3} | {c: 4 + i for i, c in enumerate(letters)}
    return NllbTokenizer(vocab=vocabulary, merges=[], src_lang="eng_Latn", tgt_lang="kor_Hang")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    """Family -> a folder with its tiny model and tokenizer."""
    root = tmp_path_factory.mktemp("encoder-decoder")
    torch.manual_seed(3)
    SwitchTransformersModel(SwitchTransformersConfig(**SWITCH)).save_pretrained(root / "switch")
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(root / "switch")
    nllb = NllbMoeModel(NllbMoeConfig(**NLLB))
    with torch.no_grad():
        for name, parameter in nllb.named_parameters():
            if "router" in name:  # freshly drawn ones hardly prefer any expert
                parameter.mul_(20)
    nllb.save_pretrained(root / "nllb")
    nllb_tokenizer().save_pretrained(root / "nllb")
    return {name: root / name for name in START}


@pytest.fixture(scope="module")
def loaded(folders) -> dict[str, loading.LoadedModel]:
    return {name: loading.load(ModelConfig(model=str(folder)), "cpu") for name, folder in folders.items()}


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    """Sentences, and each once more behind a context, with translations of other lengths."""
    english, korean = ([s.text for s in read_sentences("heldout") if s.iso == iso][:9] for iso in ("en", "ko"))
    rows = [{"text": text, "label": "base", "target": target} for text, target in zip(english, korean, strict=True)]
    rows += [row | {"text": f"In other words: {row['text']}", "label": "context"} for row in rows]
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def frame(table: pa.Table) -> pd.DataFrame:
    """A table as pandas has it, names as text rather than as categories."""
    found = table.to_pandas()
    return found.astype({name: str for name, kind in found.dtypes.items() if kind == "category"})


def settings(family, folders, prompts, *, target: bool = False, **capture):
    """Small batches of several documents, most of them padded."""
    data = DataConfig(data=(str(prompts),), docs_per_shard=8, target_column="target" if target else None)
    return run_config(data, ModelConfig(model=str(folders[family])), **{"tokens_per_batch": 300} | capture)


@torch.no_grad()
def router_logits(model, ids: list[int], decoder_ids: list[int]) -> dict[str, list[np.ndarray]]:
    """Stack -> logits [S, E] of each of its routers for one document, as transformers returns them."""
    outputs = model(
        input_ids=torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        decoder_input_ids=torch.tensor([decoder_ids]),
        decoder_attention_mask=torch.ones(1, len(decoder_ids), dtype=torch.long), output_router_logits=True,
    )  # fmt: skip
    given = {"encoder": outputs.encoder_router_logits, "decoder": outputs.decoder_router_logits}
    return {name: [each.reshape(-1, each.shape[-1]).double().numpy() for each in of] for name, of in given.items()}


def decided(logits: np.ndarray, family: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Experts, softmax, drops of one document at one router, from the definitions of the two papers."""
    p = np.exp(logits - logits.max(1, keepdims=True))
    p /= p.sum(1, keepdims=True)
    k = 1 if family == "switch" else 2
    ranked = -np.sort(-logits, axis=1)
    assert (ranked[:, :k] - ranked[:, 1 : k + 1]).min() > 1e-5, "too close: choose another seed"
    experts = np.argsort(-logits, axis=1)[:, :k]
    dropped = np.zeros(experts.shape, bool)
    if family == "switch":
        seen: Counter[int] = Counter()
        for position, (expert,) in enumerate(experts.tolist()):
            seen[expert] += 1
            dropped[position] = seen[expert] > CAPACITY
    return experts, p, dropped


def assert_routed_alone(family, model, tables, *, stacks) -> int:
    """Every document's recorded routing is that of the document alone; returns how many picks were dropped."""
    tokens, routing = frame(tables["tokens"]), frame(tables["routing"])
    k = 1 if family == "switch" else 2
    compared = drops = 0
    for (shard, doc), own in tokens.groupby(["shard", "doc"]):
        ids = {name: of.token_id.tolist() for name, of in own.groupby("stack")}
        logits = router_logits(model, ids["encoder"], ids.get("decoder", [START[family]]))
        for stack in stacks:
            toks = own.tok[own["stack"] == stack]
            for layer, its_logits in zip(LAYERS[family][stack], logits[stack], strict=True):
                rows = routing[(routing.shard == shard) & (routing["stack"] == stack) & (routing.layer == layer)]
                rows = rows[rows.tok.isin(toks)]
                experts, p, dropped = decided(its_logits, family)
                assert rows.tok.tolist() == toks.tolist(), (doc, stack, layer)
                np.testing.assert_array_equal(rows[[f"e{i}" for i in range(k)]], experts)
                np.testing.assert_array_equal(rows[[f"d{i}" for i in range(k)]], dropped)
                weights = np.take_along_axis(p, experts, 1)
                weights = weights if family == "switch" else weights / weights.sum(1, keepdims=True)
                np.testing.assert_allclose(rows[[f"w{i}" for i in range(k)]], weights, atol=1e-5)
                entropy = -(p * np.log(p.clip(1e-300))).sum(1)
                np.testing.assert_allclose(rows.entropy, entropy, rtol=1e-3, atol=1e-4)
                compared, drops = compared + len(rows), drops + int(dropped.sum())
    assert compared == len(routing), "nothing is recorded beyond what was compared"
    return drops


# ---- the encoder alone: prompt sets as labels ----


@pytest.fixture(scope="module")
def encoder_run(tmp_path_factory, folders, loaded, prompts):
    """The default of an encoder–decoder model, with the decoder set to fail if it runs."""

    def fail(*_: object) -> None:
        raise AssertionError("the decoder ran")

    handle = loaded["switch"].model.decoder.register_forward_pre_hook(fail)
    try:
        folder = tmp_path_factory.mktemp("encoder") / "run"
        return collect_here(folder, settings("switch", folders, prompts), loaded=loaded["switch"])
    finally:
        handle.remove()


def test_the_encoder_alone_routes_as_one_prompt_at_a_time(encoder_run, loaded):
    tables = content(encoder_run)
    assert set(tables["tokens"]["stack"].to_pylist()) == {"encoder"}
    assert tables["documents"]["target_tokens"].null_count == 18
    assert encoder_run.read_json("run.json")["stacks"] == ["encoder"]
    assert assert_routed_alone("switch", loaded["switch"].model, tables, stacks=["encoder"]) > 100
    commits = list(encoder_run.commits())
    assert all(commit.rows == 2 * commit.tokens for commit in commits)
    assert sum(commit.padded_tokens for commit in commits) > 1.02 * sum(commit.tokens for commit in commits)


def test_prompt_sets_are_compared_by_their_label(encoder_run, loaded, prompts):
    """Queries against counts over the reference, tokens that the tokenizer added left out."""
    counts = {(layer, label): np.zeros(8) for layer in (1, 3) for label in ("base", "context")}
    dropped = Counter()
    for row in rows_of(prompts):
        ids = loaded["switch"].tokenizer(row["text"])["input_ids"]
        logits = router_logits(loaded["switch"].model, ids, [0])["encoder"]
        for layer, its_logits in zip((1, 3), logits, strict=True):
            experts, _, drops = decided(its_logits, "switch")
            counts[layer, row["label"]] += np.bincount(experts[1:, 0], minlength=8)
            dropped[layer, row["label"]] += int(drops[1:].sum())
    run = open_run(encoder_run.root)
    found = run.query("selection_frequency").filter("metric = 'selection_frequency'").fetchall()
    assert len(found) == 2 * 2 * 8
    for _, stack, layer, label, expert, value, baseline, n in found:
        own = counts[layer, label]
        assert (stack, baseline, n) == ("encoder", 1 / 8, own.sum())
        assert value == pytest.approx(own[expert] / own.sum())
    for metric, _, layer, label, value, _, n, count in run.query("dropped_tokens").fetchall():
        assert count == dropped[layer, label] > 0, metric
        assert value == pytest.approx(count / n)
    cosines = run.query("language_overlap").filter("metric = 'cosine' and label_a = 'base' and label_b = 'context'")
    for _, _, layer, _, _, value, *_ in cosines.fetchall():
        a, b = counts[layer, "base"], counts[layer, "context"]
        assert value == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b))


def test_a_last_layer_asked_for_ends_the_encoder_there(tmp_path, folders, loaded, prompts):
    ran = []
    blocks = loaded["switch"].model.encoder.block
    handles = [block.register_forward_hook(lambda *_a, at=at: ran.append(at)) for at, block in enumerate(blocks)]
    replica = Replica(str(tmp_path), settings("switch", folders, prompts, layers=(1,)), "h", loaded=loaded["switch"])
    ran.clear()
    with contextlib.closing(replica):
        ids = torch.tensor([[5, 6, 7]])
        replica.capture.run(ids, torch.ones_like(ids))
    for handle in handles:
        handle.remove()
    assert ran == [0]


# ---- the decoder ----


@pytest.mark.parametrize("family", ["switch", "nllb"])
@pytest.mark.parametrize("stacks", [("encoder", "decoder"), ("decoder",)])
def test_encoder_and_decoder_route_as_one_pair_at_a_time(tmp_path, folders, loaded, prompts, family, stacks):
    config = settings(family, folders, prompts, target=True, stacks=stacks, store=("text",), max_length=60)
    run = collect_here(tmp_path / "run", config, loaded=loaded[family])
    tables = content(run)
    drops = assert_routed_alone(family, loaded[family].model, tables, stacks=stacks)
    assert (drops > 100) == (family == "switch"), "a fraction of 1 gives every expert room for all"
    assert_tokens_are_the_texts(tables, loaded[family].tokenizer, START[family], rows_of(prompts))
    for commit in run.commits():
        table = {name: frame(tables[name]).query(f"shard == {commit.shard}") for name in tables}
        assert table["tokens"].tok.tolist() == list(range(commit.tokens))
        assert table["tokens"]["stack"].tolist() == sorted(table["tokens"]["stack"], reverse=True)
        assert commit.tokens == table["documents"][["tokens", "target_tokens"]].to_numpy().sum()
        assert commit.padded_tokens >= commit.tokens
        assert commit.truncated == table["documents"].truncated.sum()
    assert sum(c.padded_tokens for c in run.commits()) > 1.02 * sum(c.tokens for c in run.commits())
    assert run.read_json("run.json")["stacks"] == list(stacks)


def assert_tokens_are_the_texts(tables, tokenizer, start, rows):
    documents = tables["documents"].to_pylist()
    tokens = frame(tables["tokens"])
    for document, row in zip(documents, rows, strict=True):
        assert (document["text"], document["target"]) == (row["text"], row["target"])
        own = tokens[(tokens.shard == document["shard"]) & (tokens.doc == document["doc"])]
        text = tokenizer(row["text"], truncation=True, max_length=60)["input_ids"]
        target = tokenizer(text_target=row["target"], truncation=True, max_length=60)["input_ids"]
        assert own.token_id[own["stack"] == "encoder"].tolist() == text
        decoder = own[own["stack"] == "decoder"]
        assert decoder.token_id.tolist() == [start, *target[:-1]]
        assert decoder.is_special.tolist()[0]
        assert decoder.position.tolist() == list(range(len(target)))
        assert (document["tokens"], document["target_tokens"]) == (len(text), len(target))
        longer = (
            len(tokenizer(row["text"])["input_ids"]) > 60 or len(tokenizer(text_target=row["target"]).input_ids) > 60
        )
        assert document["truncated"] == longer
    assert any(document["truncated"] for document in documents)


def test_a_target_has_the_language_code_of_a_target(folders, loaded, prompts, tmp_path):
    config = settings("nllb", folders, prompts, target=True, stacks=("decoder",))
    tokens = frame(content(collect_here(tmp_path / "run", config, loaded=loaded["nllb"]))["tokens"])
    names = loaded["nllb"].tokenizer.convert_ids_to_tokens
    opening = {stack: set(names(tokens.token_id[(tokens["stack"] == stack) & (tokens.position == at)].tolist()))
               for stack, at in (("encoder", 0), ("decoder", 1))}  # fmt: skip
    assert opening == {"encoder": {"eng_Latn"}, "decoder": {"kor_Hang"}}


def test_without_a_target_column_the_decoder_is_given_the_document_itself(tmp_path, folders, loaded, prompts):
    config = settings("switch", folders, prompts, stacks=("decoder",))
    tables = content(collect_here(tmp_path / "run", config, loaded=loaded["switch"]))
    tokens = frame(tables["tokens"])
    for _, own in tokens.groupby(["shard", "doc"]):
        ids = own.token_id[own["stack"] == "encoder"].tolist()
        assert own.token_id[own["stack"] == "decoder"].tolist() == [0, *ids[:-1]]
    assert tables["documents"]["target_tokens"].to_pylist() == tables["documents"]["tokens"].to_pylist()
    assert "target" not in tables["documents"].column_names


def test_a_batch_holds_the_padded_tokens_of_both_stacks(tmp_path, folders, loaded, prompts, monkeypatch):
    config = settings("switch", folders, prompts, target=True, stacks=("decoder",))
    sizes = []
    replica = Replica(str(tmp_path), config, "h", loaded=loaded["switch"])
    real = replica.capture.run

    def run(*grids, **slots):
        sizes.append((len(grids[0]), grids[0].numel() + grids[2].numel()))
        return real(*grids, **slots)

    monkeypatch.setattr(replica.capture, "run", run)
    from collector.data.plan import make_plan

    with contextlib.closing(replica):
        for shard in make_plan(config).shards:
            replica.collect(shard)
    assert all(documents == 1 or tokens <= 300 for documents, tokens in sizes)
    assert any(documents > 1 for documents, _ in sizes)


def test_both_stacks_show_side_by_side(tmp_path, folders, loaded, prompts, capsys):
    config = settings("nllb", folders, prompts, target=True, stacks=("encoder", "decoder"))
    run = collect_here(tmp_path / "run", config, loaded=loaded["nllb"])
    assert terminal.status(run)
    assert "1 encoder layer, 2 decoder layers, top-2 of 4" in capsys.readouterr().out
    terminal.top_experts_by_layer(open_run(run.root), ["base"])
    heads = " ".join(capsys.readouterr().out.split("label")[1].split("base")[0].split())
    assert heads == "encoder layer 1 decoder layer 0 decoder layer 1"


# ---- what is refused ----


def test_a_row_without_a_target_is_a_bad_row(tmp_path, folders, loaded):
    path = tmp_path / "pairs.jsonl"
    rows = [{"text": "a b", "label": "x", "target": "c"}, {"text": "a", "label": "x"},
            {"text": "a", "label": "x", "target": " "}, {"text": "a", "label": "x", "target": 3}]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = settings("switch", folders, path, target=True, stacks=("decoder",))
    (commit,) = collect_here(tmp_path / "run", config, loaded=loaded["switch"]).commits()
    assert commit.documents == 1
    assert {reason: skipped.count for reason, skipped in commit.skipped.items()} == {
        "no target": 1, "empty target": 1, "target is not a string": 1,
    }  # fmt: skip


def test_a_missing_target_column_is_named(tmp_path, folders):
    path = tmp_path / "pairs.csv"
    path.write_text("text,label\na,x\n")
    with pytest.raises(ValueError, match=r"no column 'target'; it has text, label: set --target-column"):
        collect_here(tmp_path / "run", settings("switch", folders, path, target=True, stacks=("decoder",)))
    with pytest.raises(ValueError, match="texts alone, so there is no column for --target-column"):
        collect_here(tmp_path / "run", settings("switch", folders, "demo", target=True, stacks=("decoder",)))


def test_a_target_that_nothing_reads_is_refused(tmp_path, folders, loaded, prompts):
    with pytest.raises(ValueError, match=r"--target-column target: nothing reads it.*--stacks decoder"):
        Replica(str(tmp_path), settings("switch", folders, prompts, target=True), "h", loaded=loaded["switch"])


def test_a_stack_that_the_model_lacks_is_refused(tmp_path, tiny_folder, tiny_model, prompts):
    config = run_config(DataConfig(data=(str(prompts),)), ModelConfig(model=str(tiny_folder)), stacks=("encoder",))
    with pytest.raises(ValueError, match=r"--stacks .*encoder.*OlmoeModel has routers in stacks .*decoder"):
        Replica(str(tmp_path), config, "h", loaded=tiny_model)


def test_a_decoder_without_a_start_token_is_refused(tmp_path, folders, prompts):
    model = SwitchTransformersModel(SwitchTransformersConfig(**SWITCH | {"decoder_start_token_id": None})).eval()
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    here = loading.load(ModelConfig(model=str(folders["switch"])), "cpu")
    broken = dataclasses.replace(here, model=model, tokenizer=tokenizer)
    with pytest.raises(ValueError, match="no decoder_start_token_id"):
        Replica(str(tmp_path), settings("switch", folders, prompts, stacks=("decoder",)), "h", loaded=broken)
