"""Reads what vLLM returns with `--enable-return-routed-experts`: expert ids, int16 [tokens, layers, k].

A line is a `RequestOutput`, or a response of the HTTP server, as JSON:

    {"prompt_token_ids": [...], "prompt_routed_experts": ..., "outputs": [{"token_ids": [...], "routed_experts": ...}]}

`choices` stands for `outputs` where the server wrote it. Routing is a nested list, or base64 of an .npy file. Where
there are no `prompt_routed_experts` (before 0.21), `routed_experts` begins with the prompt's first token.
"""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

import numpy as np

from collector.data.dumps.responses import (
    NO_ROUTING,
    NOT_NUMBERS,
    OTHER_SHAPE,
    Responses,
    Sequence,
    bytes_of,
    ids_of,
    of_sequence,
)
from collector.data.sources.labels import UnusableError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from numpy.typing import NDArray


class VllmResponses(Responses):
    """Responses of vLLM."""

    def outputs(self, record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """See `Responses.outputs`."""
        found = record.get("outputs") or record.get("choices")
        if not isinstance(found, list) or not all(isinstance(output, dict) for output in found):
            raise UnusableError(NO_ROUTING)
        return found

    def sequence(self, record: Mapping[str, Any], output: Mapping[str, Any]) -> Sequence:
        """See `Responses.sequence`."""
        own = output.get("prompt_token_ids")  # of a completion, which may answer several prompts
        prompt = ids_of(record.get("prompt_token_ids") if own is None else own)
        token_ids = np.concatenate([prompt, ids_of(output.get("token_ids"))])
        of_prompt, of_answer = record.get("prompt_routed_experts"), output.get("routed_experts")
        parts = [_array(value) for value in (of_prompt, of_answer) if value is not None]
        if not parts:
            raise UnusableError(NO_ROUTING)
        parts = [part for part in parts if len(part)] or parts[:1]
        if len({part.shape[1:] for part in parts}) > 1:
            raise UnusableError(OTHER_SHAPE)
        return of_sequence(token_ids, len(prompt), 0, np.concatenate(parts))

    def own_id(self, record: Mapping[str, Any]) -> object:
        """See `Responses.own_id`."""
        return record.get("request_id")


def _array(value: object) -> NDArray[np.integer]:
    """[tokens, L, k] from a nested list, or from base64 of an .npy file."""
    try:
        if isinstance(value, list):
            array = np.array(value) if value else np.zeros((0, 1, 1), np.int64)
        else:
            array = np.load(io.BytesIO(bytes_of(value)), allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:  # rows of different lengths; no .npy, or one that is cut short
        raise UnusableError(NOT_NUMBERS) from error
    if array.ndim != 3 or not np.issubdtype(array.dtype, np.integer) or 0 in array.shape[1:]:
        raise UnusableError(NOT_NUMBERS)
    return array
