"""Conversations as the chat template writes them, and the spans that their tokens lie in."""

from __future__ import annotations

import copy
import json
import shutil
from typing import TYPE_CHECKING

import numpy as np
import pytest
from transformers import AddedToken, AutoTokenizer

from collector.capture.batches import shift_right, tokenize
from collector.capture.conversations import put_into_words, require_tokenizer
from collector.config import DataConfig, ModelConfig
from collector.data.sources import BadRow, Document, Message, TextSpan
from collector.models.loading import DEMO_MODEL
from tests.helpers.runs import collect_here, content, run_config

if TYPE_CHECKING:
    from pathlib import Path

CHATML = """{% for m in messages %}<|im_start|>{{ m.role }}
{{ m.content }}<|im_end|>
{% endfor %}"""
INST = """{{ bos_token }}{% for m in messages %}
{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles') }}{% endif %}
{%- if m.role == 'user' %}[INST] {{ m.content | trim }} [/INST]
{%- else %} {{ m.content | trim }} {{ eos_token }}{% endif %}
{%- endfor %}"""
FORGETFUL = """{% for m in messages %}{{ m.role }}: {% if loop.last or '</think>' not in m.content %}{{ m.content }}
{%- else %}{{ m.content.split('</think>')[1].strip() }}{% endif %}
{% endfor %}"""
FRAMED = "{% for m in messages %}{{ bos_token }}{{ m.role }}\n{{ m.content }}{{ eos_token }}{% endfor %}"
CHAT = (Message("system", "Be brief."), Message("user", "user, what is 2+2?"),
        Message("assistant", "<think>two and two</think>\n\nIt is 4. "), Message("user", "And 3 + 3?"),
        Message("assistant", "<think>easy</think>6"))  # fmt: skip


def with_template(tokenizer, template: str | None):
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.add_tokens([AddedToken("<|im_start|>", special=True), AddedToken("<|im_end|>", special=True)])
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(DEMO_MODEL)


def document(messages: tuple[Message, ...] = (), text: str = "", row: int = 0) -> Document:
    return Document(text=text, label="x", id="d", parallel_id=None, source=None, messages=messages, row=row)


def spans_of(tokenizer, messages: tuple[Message, ...]) -> list[tuple[str, str]]:
    (found,) = put_into_words(tokenizer, [document(messages)], "chat.jsonl")
    return [(span.label, found.text[span.start : span.end]) for span in found.spans]


@pytest.mark.parametrize("template", [CHATML, FORGETFUL])
def test_each_turn_is_a_span_and_so_are_thoughts(tokenizer, template: str) -> None:
    found = spans_of(with_template(tokenizer, template), CHAT)
    whole = [("assistant", "<think>two and two</think>\n\nIt is 4."), ("think", "two and two")]
    assert found == [
        ("system", "Be brief."), ("user", "user, what is 2+2?"),
        *(whole if template == CHATML else [("assistant", "It is 4.")]),
        ("user", "And 3 + 3?"), ("assistant", "<think>easy</think>6"), ("think", "easy"),
    ]  # fmt: skip


def test_a_turn_that_says_what_the_header_says_is_found_behind_it(tokenizer) -> None:
    (found,) = put_into_words(with_template(tokenizer, CHATML), [document((Message("user", "user"),))], "a")
    assert found.spans == (TextSpan(len("<|im_start|>user\n"), len("<|im_start|>user\nuser"), "user"),)


def test_what_the_template_refuses_is_a_bad_row_and_the_others_stay(tokenizer) -> None:
    wrong = document((Message("assistant", "first"), Message("user", "second")), row=3)
    fine, plain = document((Message("user", "Hi"), Message("assistant", "Ho"))), document(text="plain")
    known = BadRow(source="a", row=9, reason="no text")
    found = list(put_into_words(with_template(tokenizer, INST), [wrong, fine, plain, known], "a"))
    assert found[0] == BadRow(source="a", row=3, reason="chat template does not take the messages")
    assert [(span.label, found[1].text[span.start : span.end]) for span in found[1].spans] == [
        ("user", "Hi"), ("assistant", "Ho"),
    ]  # fmt: skip
    assert found[2:] == [plain, known]


@pytest.mark.parametrize("template", [CHATML, INST])
def test_tokens_are_those_that_the_tokenizer_itself_makes_of_a_conversation(tokenizer, template: str) -> None:
    chat = with_template(tokenizer, template)
    messages = (Message("user", "What is 2 + 2?"), Message("assistant", "It is 4."))
    (found,) = put_into_words(chat, [document(messages)], "a")
    table = tokenize(chat, [found.text, "plain"], 512, spans=[found.spans, ()], is_framed=[True, False])
    turns = [{"role": turn.role, "content": turn.content} for turn in messages]
    expected = chat.apply_chat_template(turns, tokenize=True, return_dict=False)
    assert table.ids[: table.starts[1]].tolist() == list(expected)
    assert table.ids[table.starts[1] :].tolist() == chat("plain")["input_ids"]
    special = {number for number, token in chat.added_tokens_decoder.items() if token.special}
    first = slice(0, table.starts[1])
    assert table.is_special[first].tolist() == [number in special for number in table.ids[first]]
    assert table.is_special[first].any()


def test_a_token_lies_in_the_shortest_span_around_its_middle(tokenizer) -> None:
    text = "one two three four"
    spans = [TextSpan(0, 13, "outer"), TextSpan(4, 7, "inner"), TextSpan(14, 18, "last")]
    table = tokenize(tokenizer, [text, "x"], 512, spans=[spans, ()])
    encoded = tokenizer(text, return_offsets_mapping=True)
    expected = []
    for start, end in encoded["offset_mapping"]:
        around = [span for span in spans if span.start <= (start + end) // 2 < span.end and start < end]
        expected.append(min(around, key=lambda span: span.end - span.start).label if around else None)
    labels = [None if place < 0 else table.span_labels[place] for place in table.span]
    assert labels == [*expected, *[None] * (len(labels) - len(expected))]
    assert {"outer", "inner", "last"} <= set(labels)
    shifted = shift_right(table, 0)
    assert shifted.span[0] == -1
    assert shifted.span[1 : table.starts[1]].tolist() == table.span[: table.starts[1] - 1].tolist()


def test_characters_beyond_the_basic_plane_count_as_one(tokenizer) -> None:
    text = "🙂🙂 word"
    table = tokenize(tokenizer, [text], 512, spans=[[TextSpan(3, 7, "word")]])
    inside = [tokenizer.decode([number]) for number, place in zip(table.ids, table.span, strict=True) if place == 0]
    assert "".join(inside).strip() == "word"


def test_texts_without_spans_have_none(tokenizer) -> None:
    assert tokenize(tokenizer, ["a b"], 512).span is None
    assert tokenize(tokenizer, ["a b"], 512, spans=[()]).span is None


def test_a_model_without_template_or_offsets_is_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match="has no chat template: take the instruction-tuned model"):
        require_tokenizer(with_template(tokenizer, None), "some/model", conversations=True)
    require_tokenizer(with_template(tokenizer, None), "some/model", conversations=False)
    require_tokenizer(with_template(tokenizer, CHATML), "some/model", conversations=True)


# -- collected ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chat") / "chats.jsonl"
    turns = [{"role": turn.role, "content": turn.content} for turn in CHAT]
    rows = [{"messages": turns, "lang": ["en", "de"]}, {"messages": turns[:2], "lang": "en"},
            {"messages": [{"role": "user"}], "lang": "en"}]  # fmt: skip
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def test_a_run_records_the_role_of_every_token(tmp_path, tiny_folder, tokenizer, chats) -> None:
    shutil.copytree(tiny_folder, tmp_path / "model")
    tokenizer = copy.deepcopy(tokenizer)
    tokenizer.chat_template = FRAMED
    tokenizer.save_pretrained(tmp_path / "model")
    data = DataConfig(data=(str(chats),), text_column="messages", label_column="lang")
    run = collect_here(tmp_path / "run", run_config(data, ModelConfig(model=str(tmp_path / "model")), store=("text",)))
    (commit,) = run.commits()
    assert {reason: skipped.count for reason, skipped in commit.skipped.items()} == {
        "messages without role and content": 1
    }
    assert commit.several_labels == 1
    tables = content(run)
    assert tables["documents"]["label"].to_pylist() == ["de␟en", "en"]
    assert "system\nBe brief." in tables["documents"]["text"][0].as_py()
    rows = tables["tokens"].to_pylist()
    spans = np.array([row["span"] or "" for row in rows if row["doc"] == 0])
    runs_of_spans = [str(span) for span, before in zip(spans, ["", *spans], strict=False) if span != before and span]
    assert runs_of_spans == ["system", "user", "assistant", "think", "assistant", "user", "assistant", "think",
                             "assistant"]  # fmt: skip
    assert all(row["span"] is None for row in rows if row["is_special"])


def test_conversations_for_a_model_without_template_are_refused_while_planning(tmp_path, tiny_folder, chats) -> None:
    data = DataConfig(data=(str(chats),), text_column="messages", label_column="lang")
    with pytest.raises(ValueError, match="no chat template"):
        collect_here(tmp_path / "run", run_config(data, ModelConfig(model=str(tiny_folder))))
    assert not (tmp_path / "run").exists()
