"""Has a model write on from the documents of a shard, and keeps what recorders read at every token.

A batch of prompts, padded on the left, is one forward pass; after it each text gets one token a pass, from the cache.
A text that ends leaves the batch. Its last token goes through the model as well, so every token of a text has its
routing. What is recorded is what the model did while it wrote: nothing is computed again afterwards.

Guarantees: batches and draws depend on the shard and the seed alone, so a shard that is collected again repeats its
texts as far as the device repeats its arithmetic; text and routing are always of one attempt. A batch that does not
fit into the GPU's memory starts anew in halves.

Shapes: B texts in a batch, S positions of a pass, N tokens of an answer at most, D documents.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from collector.capture import batches
from collector.capture.next_token import draw, most_probable, random_numbers
from collector.capture.passes import Here, Passes, Placing, in_halves

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from collector.capture.hooks import Capture
    from collector.config import CaptureConfig
    from collector.models.heads import Head

_STACK = "decoder"
_TOLERANCE = 0.2
"""Relative difference of hidden states with and without the cache that rounding may make, a changed choice of an expert
in 16 bits included. A cache that does not fit the model makes one of about 1."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Step:
    """One forward pass of texts that are being written."""

    documents_b: NDArray[np.int64]
    first_b: NDArray[np.int64]
    """[B] the place in its text of each row's first token."""
    ids_bs: NDArray[np.int64]
    mask_bs: NDArray[np.int64]
    kept: Future[list[list[Any]]]

    def wait(self) -> list[list[Any]]:
        """What the recorders kept, see `Captured.wait`."""
        return self.kept.result()

    def release(self) -> None:
        """Nothing waits for the memory."""

    def batch(self, table: batches.TokenTable) -> batches.Batch:
        """The pass with the slots of its tokens in the finished texts."""
        start_b, count_b = table.starts[self.documents_b] + self.first_b, self.mask_bs.sum(axis=1)
        within = np.arange(count_b.sum()) - np.repeat(count_b.cumsum() - count_b, count_b)
        slots = np.repeat(start_b, count_b) + within
        return batches.Batch(input_ids=self.ids_bs, attention_mask=self.mask_bs, slots=slots)


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Written:
    """A batch of finished texts."""

    steps: list[_Step]
    answers: dict[int, list[int]]
    """Document -> the tokens that follow its prompt."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """Writes on from the documents of a shard."""

    capture: Capture
    """Inside its context, with passes that go to the end."""
    head: Head
    pad_id: int
    stop_ids: NDArray[np.int64]
    """The tokens that end a text."""
    special_ids: NDArray[np.int64]
    """The tokens that are no text."""
    config: CaptureConfig
    """With `generate` and `tokens_per_batch`."""
    seed: int
    placer: Executor = dataclasses.field(default_factory=Here)
    """Where results are put in place."""

    def start(
        self, tokens: dict[str, batches.TokenTable], names: Sequence[str]
    ) -> tuple[dict[str, batches.TokenTable], Placing, Passes]:
        """Writes the answers of a shard; returns when the last pass has ended, while results are being put in place.

        Args:
            tokens: the prompts of the decoder.
            names: [D] what the draws of each document depend on.

        Returns:
            The finished texts, the placing of the results, and the counts.

        Raises:
            torch.OutOfMemoryError: a single document does not fit into the device's memory.
            RuntimeError: a hook did not fire exactly once.
        """
        prompts, passes = tokens[_STACK], Passes()
        numbers_dn = random_numbers(names, self._most, self.seed) if self.config.temperature else None
        written = list(
            in_halves(
                self._packed(prompts), lambda documents: self._write(prompts, documents, numbers_dn), passes,
                lambda document: f"{prompts.lengths[document]} tokens with an answer of up to {self._most}",
                f"a lower --generate (now {self._most}) or --max-length (now {self.config.max_length})",
            )
        )  # fmt: skip
        answers = {document: answer for one in written for document, answer in one.answers.items()}
        table = _continued(prompts, answers, self.stop_ids, self.special_ids)
        texts = {_STACK: table}
        placing = Placing(self.placer, self.capture.recorders, texts)
        for step in (step for one in written for step in one.steps):
            placing.add({_STACK: step.batch(table)}, step)
            passes.batches += 1
            passes.padded_tokens += step.ids_bs.size
        placing.conclude(self.capture.conclude())
        return texts, placing, passes

    def _packed(self, prompts: batches.TokenTable) -> list[NDArray[np.int64]]:
        """The documents of each batch; nothing can be written after no token at all."""
        assert self.config.tokens_per_batch is not None, "resolved before a replica exists"
        lengths = np.where(prompts.lengths > 0, prompts.lengths + self._most, 0)
        return batches.pack(lengths, self.config.tokens_per_batch)

    @property
    def _most(self) -> int:
        """N."""
        assert self.config.generate is not None, "answers are asked for"
        return self.config.generate

    def _write(
        self, prompts: batches.TokenTable, documents: NDArray[np.int64], numbers_dn: NDArray[np.float64] | None
    ) -> _Written:
        """Writes the answers of one batch."""
        prompt = batches.pad(prompts, documents, self.pad_id, "left")
        rows, mask, cache = documents, prompt.attention_mask, None
        ids_bs, first_b = prompt.input_ids, np.zeros(len(rows), np.int64)
        steps: list[_Step] = []
        answers: dict[int, list[int]] = {int(document): [] for document in documents}
        for number in range(self._most + 1):
            captured, hidden_bh, cache = self.capture.step(torch.from_numpy(ids_bs), torch.from_numpy(mask), cache)
            kept = self.placer.submit(captured.kept_for_good)
            width = ids_bs.shape[1]
            steps.append(
                _Step(documents_b=rows, first_b=first_b, ids_bs=ids_bs, mask_bs=mask[:, -width:], kept=kept)
            )  # fmt: skip
            staying = np.ones(len(rows), bool) if number == 0 else ~np.isin(ids_bs[:, -1], self.stop_ids)
            if number == self._most or not staying.any():
                break
            if not staying.all():
                places = torch.from_numpy(np.flatnonzero(staying)).to(hidden_bh.device)
                leave(cache, places)
                rows, mask, hidden_bh = rows[staying], mask[staying], hidden_bh[places]
            chosen_b = self._choose(hidden_bh, None if numbers_dn is None else numbers_dn[rows, number])
            for row, token in zip(rows.tolist(), chosen_b.tolist(), strict=True):
                answers[row].append(token)
            first_b = prompts.lengths[rows] + number
            ids_bs, mask = chosen_b[:, None], np.concatenate([mask, np.ones((len(rows), 1), np.int64)], axis=1)
        return _Written(steps=steps, answers=answers)

    @torch.inference_mode()
    def _choose(self, hidden_bh: torch.Tensor, number_b: NDArray[np.float64] | None) -> NDArray[np.int64]:
        """Chooses the next token of each text."""
        hidden_bh, step, chosen = hidden_bh.to(self.head.device), self.head.rows_at_once, []
        for first in range(0, len(hidden_bh), step):
            logits_bv = self.head.logits(hidden_bh[first : first + step])
            if number_b is None:
                chosen.append(most_probable(logits_bv))
            else:
                own_b = torch.from_numpy(number_b[first : first + step]).to(logits_bv.device)
                chosen.append(
                    draw(logits_bv, own_b, temperature=self.config.temperature, top_p=self.config.top_p)
                )  # fmt: skip
        return torch.cat(chosen).cpu().numpy()


def _continued(
    prompts: batches.TokenTable, answers: dict[int, list[int]], stop_ids: NDArray[np.int64],
    special_ids: NDArray[np.int64],
) -> batches.TokenTable:  # fmt: skip
    """The finished texts: each document's prompt and answer."""
    own = [np.array(answers.get(document, []), np.int64) for document in range(len(prompts.lengths))]
    lengths = prompts.lengths + [len(answer) for answer in own]
    after = np.repeat(prompts.starts[1:], [len(answer) for answer in own])
    added = np.concatenate([np.zeros(0, np.int64), *own])
    return dataclasses.replace(
        prompts,
        ids=np.insert(prompts.ids, after, added),
        is_special=np.insert(prompts.is_special, after, np.isin(added, special_ids)),
        span=None if prompts.span is None else np.insert(prompts.span, after, -1),
        starts=np.concatenate([[0], lengths.cumsum()]).astype(np.int64),
        prompt_lengths=prompts.lengths,
        stopped=np.array([len(answer) > 0 and answer[-1] in stop_ids for answer in own], bool),
    )


def leave(cache: Any, staying: torch.Tensor) -> None:
    """Keeps only some rows of a model's cache.

    Args:
        cache: of transformers.
        staying: [B'] the rows that stay.
    """
    # Named for beam search, but rows may be left out. `batch_select_indices` would leave linear attention as it is.
    cache.reorder_cache(staying)


def require_cache(capture: Capture) -> None:
    """Makes sure that a model writes with its cache as it would without, by two tiny texts of which one leaves.

    Args:
        capture: inside its context.

    Raises:
        ValueError: it does not, or its cache cannot be used.
    """
    name = type(capture.model).__name__
    try:
        difference = _difference_with_cache(capture)
    except Exception as error:
        raise ValueError(f"--generate: {name} cannot write on from its cache in batches: {error}") from error
    if difference > _TOLERANCE:
        raise ValueError(
            f"--generate: {name} does not read its cache as it reads whole texts (its hidden states differ by "
            f"{difference:.0%}): collect texts that it has written, without --generate"
        )


def _difference_with_cache(capture: Capture) -> float:
    """The larger of the two texts' relative differences."""
    texts = torch.arange(1, 9), torch.arange(8, 2, -1)
    ids, mask = torch.zeros((2, 6), dtype=torch.long), torch.zeros((2, 6), dtype=torch.long)
    for row, text in enumerate(texts):
        ids[row, 8 - len(text) :], mask[row, 8 - len(text) :] = text[:-2], 1
    captured, _, cache = capture.step(ids, mask)
    captured.release()
    one_b1 = torch.ones((2, 1), dtype=torch.long)
    mask = torch.cat([mask, one_b1], dim=1)
    captured, first_bh, cache = capture.step(torch.stack([text[-2:-1] for text in texts]), mask, cache)
    captured.release()
    leave(cache, torch.tensor([1], device=first_bh.device))
    captured, second_bh, _ = capture.step(texts[1][None, -1:], torch.cat([mask, one_b1], dim=1)[1:], cache)
    captured.release()
    differences = []
    for text, found_h in ((texts[0][:-1], first_bh[0]), (texts[1], second_bh[0])):
        captured, whole_bh, _ = capture.step(text[None], torch.ones((1, len(text)), dtype=torch.long))
        captured.release()
        differences.append(((found_h - whole_bh[0]).float().norm() / whole_bh[0].float().norm()).item())
    return max(differences)
