"""Reads responses of serving engines: JSON lines, a request in each, with token ids and the experts of each token.

A request has one sequence or several. Each is a document: the tokens of prompt and answer, as far as their routing was
returned. The last token of a sequence never went through the model, so it has no routing and is no token of the run.

A line that cannot be used costs a row with its reason. Where lines begin is looked up once, while planning.
"""

from __future__ import annotations

import abc
import binascii
import collections
import functools
import json
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from collector.config import DataConfig
from collector.data import sources
from collector.data.dumps.base import UNLABELLED, Cut, Dump, Dumped, Router, possible_layers
from collector.data.formats.columns import dig
from collector.data.formats.lines import split_lines
from collector.data.sources import BadRow, Source, compressed, files
from collector.data.sources.documents import are_utf8
from collector.data.sources.labels import UnusableError, as_text, label_of, meaning_of, of_path, parse

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from typing import BinaryIO

    from numpy.typing import NDArray

    from collector.config import ImportConfig
    from collector.data.plan import Shard

NO_TOKENS, NO_ROUTING = "no token ids", "no routed experts"
NOT_BASE64, NOT_NUMBERS = "routed experts are cut short or not base64", "routed experts are not an array of integers"
OTHER_LENGTH = "routed experts are of another number of tokens"
OTHER_SHAPE = "routed experts are of other layers, or of another k, than those before"
DOCS_PER_SHARD = 512


class Sequence(NamedTuple):
    """Prompt and answer of a request, as a format finds them in its record."""

    token_ids: NDArray[np.int64]
    """[T] of prompt and answer."""
    prompt_tokens: int
    """Tokens of the prompt."""
    first: int
    """Position of the first row of routing."""
    experts: NDArray[np.integer]
    """[rows, L, k]"""


class Responses(Dump):
    """The responses of an engine; subclasses know its fields."""

    def __init__(self, location: str, config: ImportConfig) -> None:
        super().__init__(location, config)
        if config.experts is None:
            raise ValueError(
                "--experts: responses do not tell how many experts the model has; give the number that its routers "
                "choose from"
            )
        self.experts = config.experts
        self.files = {source.location: source for source in sources.resolve(DataConfig(data=(location,)))}
        for source in self.files.values():
            if source.format != "jsonl":
                raise ValueError(f"{source.location} is {source.kind}, and responses are read from JSON lines (.jsonl)")
        self.label = parse(config.label_column or "label")
        self._unusable: collections.Counter[str] = collections.Counter()
        """Lines from which the routers could not be learned, by reason."""

    # -- what a format says --------------------------------------------------------------------------

    @abc.abstractmethod
    def outputs(self, record: Mapping[str, Any]) -> list[Mapping[str, Any]]:
        """Returns the answers of a request."""

    @abc.abstractmethod
    def sequence(self, record: Mapping[str, Any], output: Mapping[str, Any]) -> Sequence:
        """Returns prompt, answer and routing of one of them.

        Raises:
            UnusableError: a field is missing or damaged.
        """

    @abc.abstractmethod
    def own_id(self, record: Mapping[str, Any]) -> object:
        """Returns the engine's id of a request, or None."""

    # -- planning ------------------------------------------------------------------------------------

    def fingerprints(self) -> dict[str, str]:
        """See `Dump.fingerprints`."""
        return {location: files.fingerprint(location) for location in self.files}

    def cut(self) -> Iterator[Cut]:
        """See `Dump.cut`."""
        every = self.config.docs_per_shard or DOCS_PER_SHARD
        for source in self.files.values():
            first = row = begins = 0
            for offset, line in self._lines(source, 0):
                if row - first >= every:
                    yield Cut(
                        source=source.location, name=source.name, first_row=first, rows=row - first, offset=begins
                    )
                    first, begins = row, offset
                row += self._look_at(line)
            if row > first:
                yield Cut(source=source.location, name=source.name, first_row=first, rows=row - first, offset=begins)
        if not self.routers:
            reasons = ", ".join(f"{count:,} lines with {reason}" for reason, count in self._unusable.most_common())
            raise ValueError(f"{self.location} holds no routing: {reasons or 'no token has k different experts'}")

    def _look_at(self, line: bytes) -> int:
        """Learns the routers from the first usable sequence; returns the rows of the line."""
        try:
            record = _record(line)
            outputs = self.outputs(record)
            if not self.routers:
                for output in outputs:
                    self._learn_from(self.sequence(record, output).experts)
        except UnusableError as error:
            self._unusable[str(error)] += 1
            return 1
        return len(outputs)

    def _learn_from(self, experts_tlk: NDArray[np.integer]) -> None:
        found = np.flatnonzero(possible_layers(experts_tlk)) if len(experts_tlk) else ()
        self.depth, top_k = experts_tlk.shape[1:]
        self.routers = tuple(Router(layer=int(layer), n_experts=self.experts, top_k=top_k) for layer in found)

    # -- reading -------------------------------------------------------------------------------------

    def read(self, shard: Shard) -> Iterator[Dumped | BadRow]:
        """See `Dump.read`."""
        row, source = shard.first_row, self.files[shard.source]
        for _, line in self._lines(source, shard.offset or 0, shard.fingerprint):
            if row >= shard.first_row + shard.rows:
                return
            for document in self._documents(line, source, row):
                yield document
                row += 1

    def _lines(self, source: Source, offset: int, version: str | None = None) -> Iterator[tuple[int, bytes]]:
        """Yields each line from a byte on, with the byte where it begins."""
        open_file = functools.partial(files.open_file, source.location)
        packed = source.compression
        file: BinaryIO = (
            compressed.open_unpacked(open_file, source.location, packed, version) if packed else open_file()
        )
        with file:
            file.seek(offset)
            for line in split_lines(file):
                yield offset, line
                offset += len(line)

    def _documents(self, line: bytes, source: Source, row: int) -> Iterator[Dumped | BadRow]:
        try:
            record = _record(line)
            outputs = self.outputs(record)
        except UnusableError as error:
            yield BadRow(source=source.name, row=row, reason=str(error))
            return
        for number, output in enumerate(outputs):
            try:
                document = self._document(record, output, source, row + number, number if len(outputs) > 1 else None)
            except UnusableError as error:
                yield BadRow(source=source.name, row=row + number, reason=str(error))
            else:
                yield self.checked(document, source.name)

    def _document(
        self, record: Mapping[str, Any], output: Mapping[str, Any], source: Source, row: int, number: int | None
    ) -> Dumped:  # fmt: skip
        token_ids, prompt_tokens, first, experts_tlk = self.sequence(record, output)
        if experts_tlk.shape[1] != self.depth or experts_tlk.shape[2] != self.routers[0].top_k:
            raise UnusableError(OTHER_SHAPE)
        routed = [router.layer for router in self.routers]
        others = np.setdiff1d(np.arange(self.depth), routed)
        if others.size and (decided := possible_layers(experts_tlk[:, others])).any():
            raise ValueError(
                f"{source.name}#{row} has choices in layer {others[decided][0]}, in which the first sequence of the "
                "dump has none: its routing was lost; put a whole one first"
            )
        given = _text(record.get(self.config.id_column)) or _text(self.own_id(record)) or f"{source.name}#{row}"
        return Dumped(
            id=given if number is None else f"{given}:{number}", label=self._label(record, source.location),
            parallel_id=_text(record.get("parallel_id")), source=_text(record.get("source")) or source.name, row=row,
            token_ids=token_ids[first : first + len(experts_tlk)], positions=first + np.arange(len(experts_tlk)),
            prompt_tokens=prompt_tokens, experts=experts_tlk[:, routed],
        )  # fmt: skip

    def _label(self, record: Mapping[str, Any], location: str) -> str:
        """Returns the label of a request; without `--label-column` it need not have one."""
        fields = {meaning: dig(record, column)[0] for meaning, column in self.label.meanings.items()}
        fields |= {
            meaning_of(number): of_path(field, location)[0]
            for number, field in enumerate(self.label.fields)
            if field[0] == "@"
        }
        if self.config.label_column is None and fields["label"] is None:
            return UNLABELLED
        label = label_of(self.label, fields)
        if not are_utf8([label]):
            raise UnusableError("invalid UTF-8")
        return label


def _record(line: bytes) -> Mapping[str, Any]:
    if not line.strip():
        raise UnusableError("empty line")
    try:
        record = json.loads(line)
    except UnicodeDecodeError as error:
        raise UnusableError("invalid UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise UnusableError("invalid JSON") from error
    if not isinstance(record, dict):
        raise UnusableError("not an object")
    return record


def _text(value: object) -> str | None:
    text = as_text(value) if isinstance(value, (str, int, float)) else None
    return text if text and are_utf8([text]) else None


def ids_of(value: object) -> NDArray[np.int64]:
    """Returns a list of token ids as [T].

    Raises:
        UnusableError: it is none.
    """
    if not isinstance(value, list) or not all(type(one) is int and 0 <= one < 2**32 for one in value):
        raise UnusableError(NO_TOKENS)
    return np.array(value, np.int64)


def bytes_of(value: object) -> bytes:
    """Decodes base64.

    Raises:
        UnusableError: it is none, or cut short.
    """
    if not isinstance(value, str):
        raise UnusableError(NO_ROUTING if value is None else NOT_NUMBERS)
    try:
        return binascii.a2b_base64(value, strict_mode=True)
    except ValueError as error:
        raise UnusableError(NOT_BASE64) from error


def of_sequence(
    token_ids: NDArray[np.int64], prompt_tokens: int, first: int, experts_tlk: NDArray[np.integer]
) -> Sequence:  # fmt: skip
    """Puts tokens and rows of routing together: all from `first` on, with the last token or without.

    Some engines return a row for the last token, too, which nobody wrote.

    Raises:
        UnusableError: rows and tokens differ in number.
    """
    tokens = len(token_ids) - first
    if not tokens - 1 <= len(experts_tlk) <= tokens or tokens < 1:
        raise UnusableError(OTHER_LENGTH)
    if len(experts_tlk) == tokens and not possible_layers(experts_tlk[-1:]).any():
        experts_tlk = experts_tlk[:-1]
    return Sequence(token_ids, prompt_tokens, first, experts_tlk)
