"""A run whose documents the model writes on from: what its tables say of prompts and answers."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from collector.config import CaptureConfig, DataConfig, ModelConfig
from collector.models.loading import DEMO_MODEL
from collector.query.warehouse import open_run
from collector.upkeep.verify import verify
from tests.helpers.runs import assert_same_content, collect_here, content, run_config, write_jsonl
from tests.helpers.tiny_models import write_switch

CHAT = """{% for m in messages %}- {{ m.role }}
{{ m.content }}.
{% endfor %}{% if add_generation_prompt %}- assistant
{% endif %}"""
SETTINGS = {"generate": 6, "max_length": 400, "tokens_per_batch": 256}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> DataConfig:
    folder = tmp_path_factory.mktemp("prompts")
    return DataConfig(data=(str(write_jsonl(folder / "texts.jsonl", 10)),), docs_per_shard=4)


@pytest.fixture(scope="module")
def written(tmp_path_factory, data, demo_model):
    config = run_config(data, ModelConfig(), store=("text",), record=("outputs",), **SETTINGS)
    return collect_here(tmp_path_factory.mktemp("written") / "run", config, loaded=demo_model)


def texts_of(run) -> dict[str, list[int]]:
    rows = open_run(run.root).sql(
        "select doc_id, list(token_id order by position) from tokens join documents using (shard, doc) group by doc_id"
    )
    return dict(rows.fetchall())


def test_every_document_is_its_prompt_and_an_answer(written, demo_model):
    found, tokenizer = texts_of(written), demo_model.tokenizer
    documents = content(written)["documents"].to_pylist()
    assert len(documents) == 10
    for document in documents:
        ids, prompt = found[document["doc_id"]], document["prompt_tokens"]
        assert ids[:prompt] == tokenizer(document["text"]).input_ids
        assert document["tokens"] == len(ids)
        assert document["answer"] == tokenizer.decode(ids[prompt:], skip_special_tokens=True)
        assert document["characters"] == len(document["text"]) + len(document["answer"])
        assert document["stopped"] == (ids[-1] == tokenizer.eos_token_id)
        assert len(ids) - prompt == 6 or document["stopped"]
    assert verify(written).sound


def test_it_records_what_the_texts_give_that_are_read_as_a_whole(written, tmp_path, demo_model):
    """The texts, as token ids in a file: the same tokens, experts, weights, and sums of what experts put out."""
    found = texts_of(written)
    table = pa.table({"id": list(found), "label": ["en"] * len(found), "input_ids": list(found.values())})
    pq.write_table(table, tmp_path / "texts.parquet")
    data = DataConfig(data=(str(tmp_path / "texts.parquet"),), text_column="input_ids")
    read = collect_here(tmp_path / "read", run_config(data, ModelConfig(), record=("outputs",)), loaded=demo_model)
    joined = """select {0} from {1} t join documents d using (shard, doc) {2} order by all"""
    tokens = joined.format("doc_id, position, token_id, t.is_special", "tokens", "")
    assert open_run(written.root).sql(tokens).fetchall() == open_run(read.root).sql(tokens).fetchall()
    sums = "(select *, unnest(experts) expert, unnest(picks) n, unnest(weighted_norms) x from outputs)"
    sums = joined.format("doc_id, layer, t.is_special, expert, n, x", sums, "")
    ours, theirs = (open_run(run.root).sql(sums).fetchall() for run in (written, read))
    assert [row[:-1] for row in ours] == [row[:-1] for row in theirs]
    np.testing.assert_allclose([row[-1] for row in ours], [row[-1] for row in theirs], rtol=1e-3)


def test_a_shard_that_is_collected_again_repeats_its_texts(written, tmp_path, data, demo_model):
    config = run_config(data, ModelConfig(), store=("text",), record=("outputs",), **SETTINGS)
    assert_same_content(written, collect_here(tmp_path / "again", config, loaded=demo_model))


def test_draws_do_not_depend_on_the_shards(tmp_path, data, demo_model):
    def drawn(name, size, seed):
        own = dataclasses.replace(data, docs_per_shard=size)
        config = run_config(own, ModelConfig(seed=seed), temperature=1.0, **SETTINGS)
        return collect_here(tmp_path / name, config, loaded=demo_model)

    runs = [drawn("a", 4, 0), drawn("b", 10, 0), drawn("c", 4, 1)]
    one, other, other_seed = map(texts_of, runs)
    assert one == other
    assert one != other_seed
    assert "answer" not in content(runs[0])["documents"].column_names


def test_prompts_and_answers_can_be_asked_apart(written):
    tokens = dict(open_run(written.root, by="phase").sql("select label, tokens from labels").fetchall())
    prompts, whole = open_run(written.root).sql("select sum(prompt_tokens), sum(tokens) from documents").fetchall()[0]
    assert tokens == {"prompt": prompts, "generated": whole - prompts}


def test_a_conversation_is_answered(tmp_path, demo_model):
    shutil.copytree(DEMO_MODEL, tmp_path / "model")
    tokenizer = copy.deepcopy(demo_model.tokenizer)
    tokenizer.chat_template = CHAT
    tokenizer.save_pretrained(tmp_path / "model")
    turns = [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A model."}]
    rows = [turns, [*turns, {"role": "user", "content": "so long " * 50}], turns[1:]]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"label": "en", "messages": row}) + "\n" for row in rows))
    data = DataConfig(data=(str(tmp_path / "chat.jsonl"),), text_column="messages")
    model = ModelConfig(model=str(tmp_path / "model"))
    run = collect_here(tmp_path / "run", run_config(data, model, store=("text",), generate=5, max_length=60))
    (document,) = content(run)["documents"].to_pylist()
    assert document["text"] == "- user\nWho are you?.\n- assistant\n", "the answer in the data is left out"
    (commit,) = run.commits()
    assert {reason: skipped.count for reason, skipped in commit.skipped.items()} == {
        "conversation without a turn to answer": 1, "conversation to be answered is longer than --max-length": 1,
    }  # fmt: skip
    spans = open_run(run.root).sql(
        "select position >= prompt_tokens, span from tokens join documents using (shard, doc)"
    )
    found = spans.fetchall()
    assert {span for is_answer, span in found if is_answer} <= {"assistant", None}
    assert sum(span == "assistant" for _, span in found) >= 4
    assert {span for is_answer, span in found if not is_answer} == {"user", None}
    roles = dict(open_run(run.root, by="role").sql("select label, tokens from labels").fetchall())
    assert roles["assistant"] == sum(span == "assistant" for _, span in found)


def test_settings_that_cannot_be_are_refused(tmp_path, data, demo_model):
    for settings, message in (
        ({"generate": 0}, "--generate must be positive"),
        ({"generate": 4, "record": ("loss",)}, "records routing and outputs while the model writes, not loss"),
        ({"temperature": 1.0}, "give --generate, too"),
        ({"generate": 4, "top_p": 0.5}, "give --temperature"),
        ({"generate": 4, "top_p": 0.0, "temperature": 1.0}, "--top-p takes a probability"),
        ({"generate": 4, "temperature": -1.0}, "--temperature takes 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            CaptureConfig(**settings)
    for settings, message in (
        (
            {"generate": 200},
            "--max-length 512 and --generate 200 exceeds the model's 512 positions; use --max-length 312",
        ),
        ({"generate": 4, "max_length": 64, "stop_at": ("no such text in any token",)}, "no single token"),
    ):
        with pytest.raises(ValueError, match=message):
            collect_here(tmp_path / message[:9], run_config(data, ModelConfig(), **settings), loaded=demo_model)


def test_an_encoder_decoder_model_is_refused(tmp_path, data):
    write_switch(tmp_path / "switch")
    with pytest.raises(ValueError, match="is an encoder–decoder model"):
        collect_here(tmp_path / "run", run_config(data, ModelConfig(model=str(tmp_path / "switch")), generate=4))


def test_an_answer_ends_at_a_token_that_holds_the_text(tmp_path, written, data, demo_model):
    text = next(d["answer"] for d in content(written)["documents"].to_pylist() if len(d["answer"]) > 3)
    config = run_config(data, ModelConfig(), store=("text",), stop_at=(text.strip()[0],), **SETTINGS)
    documents = content(collect_here(tmp_path / "run", config, loaded=demo_model))["documents"].to_pylist()
    assert any(document["stopped"] for document in documents)
    for document in documents:
        assert text.strip()[0] not in document["answer"][:-12] or document["stopped"]
