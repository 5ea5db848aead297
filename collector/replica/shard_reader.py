"""Reads the documents of a shard, and tokenizes them as the model wants them: a replica's first stage.

Knows no device: it reads rows, has the chat template and the tokenizer make tokens of them, and rejects what the model
cannot take.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np

from collector.capture import batches
from collector.capture.conversations import put_into_words
from collector.capture.shard_text import ShardText
from collector.data import plan
from collector.data.formats import BEYOND_VOCABULARY, PROMPT_TOO_LONG
from collector.data.sources import BadRow, Document
from collector.models import loading
from collector.models.edits import parse_arm
from collector.query.token_classes import token_classes
from collector.replica.card import vocabulary_table

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from collector.config import RunConfig
    from collector.pipeline import Stopwatch


class ShardReader:
    """Reads the shards of one run, for one model."""

    def __init__(self, config: RunConfig, loaded: loading.LoadedModel, *, two_stacks: bool, decodes: bool) -> None:
        """Checks the settings that the model must go along with; reads nothing.

        Args:
            config: what to record.
            loaded: the model and its tokenizer.
            two_stacks: whether it has an encoder and a decoder.
            decodes: whether the decoder runs, too.

        Raises:
            ValueError: texts of this length do not fit, nothing reads the target, or no token has a class of the arms.
        """
        self._config, self._loaded = config, loaded
        self._tokenizer = loaded.tokenizer
        self._two_stacks, self._decodes = two_stacks, decodes
        self._generates = config.capture.generate is not None
        self._check_length()
        self._check_target()
        self._arms = [parse_arm(text) for text in config.capture.arms]
        self._classes = self._token_classes()

    def _check_length(self) -> None:
        room = getattr(self._loaded.model.config.get_text_config(), "max_position_embeddings", None)
        longest, written = self._config.capture.max_length, self._config.capture.generate or 0
        if room is not None and longest + written > room:
            what = f"--max-length {longest}" + (f" and --generate {written}" if written else "")
            remedy = f"--max-length {room - written} or less" if written < room else "a lower --generate"
            raise ValueError(f"{what} exceeds the model's {room} positions; use {remedy}")

    def _check_target(self) -> None:
        column = self._config.data.target_column
        if column is not None and not self._decodes:
            raise ValueError(
                f"--target-column {column}: nothing reads it; it is the text of the decoder of an encoder–decoder "
                "model, recorded with --stacks decoder"
            )
        if self._decodes and self._loaded.model.config.decoder_start_token_id is None:
            raise ValueError(
                "--stacks decoder: the model's config has no decoder_start_token_id, which every text of the decoder "
                "begins with; set it in the checkpoint's config.json"
            )

    def _token_classes(self) -> NDArray[np.str_] | None:
        """[embedded ids] the class of each token, if an arm is limited to one."""
        asked = {arm.limits[1] for arm in self._arms} - {None}
        if not asked:
            return None
        classes = token_classes(vocabulary_table(self._tokenizer))
        if unknown := asked - {*classes.tolist(), "special"}:
            raise ValueError(
                f"--arms: no token has the class {unknown.pop()!r}; there are {', '.join(sorted({*classes.tolist()}))}"
            )
        beyond = max(0, loading.embedded_ids(self._loaded.model) - len(classes))
        return np.concatenate([classes, np.full(beyond, "other")])

    def read(self, shard: plan.Shard, watch: Stopwatch) -> ShardText:
        """Reads rows, makes documents, tokenizes them.

        Raises:
            ValueError: the source changed.
        """
        with watch("read"):
            found = plan.read_shard(shard, self._config.data)
            rows = list(put_into_words(self._tokenizer, found, shard.name, to_answer=self._generates))
        documents = [row for row in rows if isinstance(row, Document)]
        bad = [row for row in rows if isinstance(row, BadRow)]
        with watch("tokenize"):
            tokens = self._tokenize(documents)
            if reasons := self._unusable(documents, tokens):
                bad += [BadRow(source=shard.name, row=documents[d].row, reason=reasons[d]) for d in sorted(reasons)]
                documents = [document for d, document in enumerate(documents) if d not in reasons]
                tokens = self._tokenize(documents)
            if any(arm.is_limited for arm in self._arms):
                tokens = {stack: self._with_limits(table, documents) for stack, table in tokens.items()}
        return ShardText(documents=documents, tokens=tokens, bad=bad)

    def _unusable(self, documents: list[Document], tokens: dict[str, batches.TokenTable]) -> dict[int, str]:
        """The documents that the model cannot take, with the reason."""
        rows = loading.embedded_ids(self._loaded.model)
        # Such tokens were added to the tokenizer alone.
        found = {int(d): BEYOND_VOCABULARY for table in tokens.values() for d in table.doc[table.ids >= rows]}
        if self._generates:  # the end of a conversation is what the model answers
            (table,) = tokens.values()
            cut = np.flatnonzero(table.truncated).tolist()
            found |= {d: PROMPT_TOO_LONG for d in cut if documents[d].messages}
        return found

    def _tokenize(self, documents: list[Document]) -> dict[str, batches.TokenTable]:
        """The tokens of each stack that runs."""
        longest = self._config.capture.max_length
        spans = [document.spans for document in documents]
        text = batches.tokenize(
            self._tokenizer, [document.text for document in documents], longest, spans=spans,
            is_framed=[bool(document.messages) for document in documents],
            ids=[document.ids for document in documents],
        )  # fmt: skip
        if self._generates:
            plain = [d for d, document in enumerate(documents) if not (document.messages or document.ids)]
            text = batches.without_closing(text, plain)
        if not self._two_stacks:
            return {"decoder": text}
        tokens = {"encoder": text}
        if self._decodes:
            targets = [document.text if document.target is None else document.target for document in documents]
            own = spans if self._config.data.target_column is None else None
            target = batches.tokenize(self._tokenizer, targets, longest, as_target=True, spans=own)
            tokens["decoder"] = batches.shift_right(target, int(self._loaded.model.config.decoder_start_token_id))
        return tokens

    def _with_limits(self, table: batches.TokenTable, documents: list[Document]) -> batches.TokenTable:
        """Adds the labels and classes to which edits are limited."""
        classes = None if self._classes is None else np.where(table.is_special, "special", self._classes[table.ids])
        labels = tuple(tuple(document.labels) for document in documents)
        return dataclasses.replace(table, labels=labels, token_class=classes)
