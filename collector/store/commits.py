"""Commit records: one JSON file per shard, which makes the files of one attempt count.

A record names those files with their sizes and hashes, and says what they hold. A record that is cut short, or that
another program wrote, raises `DamagedRecordError`; it is never read as another record. `run_directory` stores them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


class DamagedRecordError(ValueError):
    """A commit record cannot be read. The message says how to collect the shard again."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """One published file."""

    path: str
    """Relative to the run directory."""
    rows: int
    bytes: int
    sha256: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Skipped:
    """Rows of one shard that became no document, for one reason."""

    count: int
    examples: tuple[str, ...]
    """Where the first few of them are, without their text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Commit:
    """A shard's commit record: the attempt whose parts count, and what they hold."""

    shard: int
    attempt: str
    plan_hash: str
    files: Mapping[str, Part]
    """Table name -> part."""
    documents: int
    tokens: int
    """Tokens that went through the model, those of the encoder and of the decoder together."""
    rows: int
    """Rows of the tables that recorders wrote: of `routing`, for each router the tokens of its stack."""
    characters: int
    truncated: int
    """Documents cut at the maximum length, text or target."""
    skipped: Mapping[str, Skipped]
    """Reason -> rows that became no document."""
    batches: int
    padded_tokens: int
    """Tokens that went through the model, padding included."""
    halved: int = 0
    """Batches that did not fit into memory and were halved."""
    several_labels: int = 0
    """Documents with more than one label."""
    seconds: Mapping[str, float]
    """Stage -> wall time."""
    node: str

    def to_json(self) -> bytes:
        """The record as it is stored."""
        return json.dumps(dataclasses.asdict(self), indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes, where: str = "a commit record") -> Commit:
        """Reads what `to_json` wrote.

        Args:
            data: the content of a record.
            where: the record's name in error messages.

        Raises:
            DamagedRecordError: it is cut short, or lacks fields of a record.
        """
        try:
            return cls.from_fields(json.loads(data))
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise DamagedRecordError(
                f"{where} is damaged ({type(error).__name__}: {error}): `collector verify RUN --recollect` sets it "
                "aside, and the same collect command then collects the shard again"
            ) from error

    @classmethod
    def from_fields(cls, fields: Mapping[str, Any]) -> Commit:
        """Builds a record from its fields; nested records are dictionaries.

        Raises:
            ValueError, TypeError, KeyError, AttributeError: they are not the fields of a record.
        """
        fields = dict(fields)
        fields["files"] = {table: Part(**part) for table, part in fields["files"].items()}
        fields["skipped"] = {
            reason: Skipped(count=s["count"], examples=tuple(s["examples"])) for reason, s in fields["skipped"].items()
        }
        return cls(**fields)


class Attempts:
    """Identifies the data that counts: a digest of the attempts of commit records, added in the order of shards."""

    def __init__(self, of: str = "") -> None:
        """Begins the digest with what else it depends on."""
        self._hash = hashlib.sha256(of.encode())

    def add(self, commit: Commit) -> None:
        """Adds the next commit."""
        self._hash.update(f"{commit.shard} {commit.attempt}\n".encode())

    def digest(self) -> str:
        """Returns the SHA-256 of the commits added so far."""
        return self._hash.hexdigest()
