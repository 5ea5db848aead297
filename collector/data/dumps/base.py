"""Defines what all dumps share: their documents, their routers, and the base class `Dump`.

A row of routing in which an expert occurs twice is no choice of k experts. Engines return rows of zeros for tokens that
were preempted or never written, which such rows are; they must never count as choices of expert 0.
"""

from __future__ import annotations

import abc
import dataclasses
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from collector.data.sources import BadRow

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from numpy.typing import NDArray

    from collector.config import ImportConfig
    from collector.data.plan import Shard

UNLABELLED = "unlabelled"
"""Label of documents for which the dump has none."""
LOST = "no token with routing"
IDS_ONLY = ("weights", "entropy", "topk_mass", "margin", "probabilities", "logits", "characters", "stopped")
"""What a dump of expert ids and token ids does not have."""
NO_PROMPTS = "prompt_tokens"
"""What a dump does not have that does not tell prompts from answers."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router:
    """A router of the model."""

    layer: int
    """The model's own number of the layer."""
    n_experts: int
    top_k: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cut:
    """Consecutive rows of one file (of FLAME: folder), a shard of the plan.

    A row is a document, or none for a reason.
    """

    source: str
    name: str
    first_row: int
    rows: int
    offset: int | None = None
    """Byte where the first row begins, in the decompressed file; None if the format does not need it."""


@dataclasses.dataclass(kw_only=True)
class Dumped:
    """A document of a dump: T tokens, L routers, k the largest top-k."""

    id: str
    label: str = UNLABELLED
    parallel_id: str | None = None
    source: str | None = None
    row: int
    """Number of the row in its file, from 0."""
    token_ids: NDArray[np.int64]
    """[T]"""
    positions: NDArray[np.int64]
    """[T] places of the tokens in the text, ascending; with gaps where the engine lost tokens."""
    prompt_tokens: int = 0
    """The place where the answer begins, unless the dump has `NO_PROMPTS`."""
    experts: NDArray[np.integer]
    """[T, L, k] ids of the chosen; a router with fewer than k leaves the rest unspecified."""
    probabilities: NDArray[np.floating] | None = None
    """[T, L, k] of the chosen, if the dump has them."""

    def keep(self, kept: NDArray[np.bool_]) -> None:
        """Leaves out tokens; `kept` is [T]. The others stay where they are in the text."""
        self.token_ids, self.positions, self.experts = self.token_ids[kept], self.positions[kept], self.experts[kept]
        self.probabilities = None if self.probabilities is None else self.probabilities[kept]


class Dump(abc.ABC):
    """The documents of a dump, and the routers that decided about them."""

    lacks: ClassVar[tuple[str, ...]] = IDS_ONLY
    """What runs have and this format does not."""

    def __init__(self, location: str, config: ImportConfig) -> None:
        self.location, self.config = location, config
        self.routers: tuple[Router, ...] = ()
        """The routers, known once `cut` is exhausted, or taken from a plan."""
        self.depth = 0
        """L of the dump's arrays, layers without a router counted; known like the routers."""
        self.lost = 0
        """Tokens without routing that were left out."""

    @abc.abstractmethod
    def fingerprints(self) -> dict[str, str]:
        """Location of each file -> what changes with its content, in reading order."""

    @abc.abstractmethod
    def cut(self) -> Iterator[Cut]:
        """Looks through the dump once, and yields its shards.

        Raises:
            ValueError: it is not of this format, or holds no routing.
        """

    @abc.abstractmethod
    def read(self, shard: Shard) -> Iterator[Dumped | BadRow]:
        """Yields the rows of a shard, each as a document or with the reason why it is none.

        Raises:
            ValueError: an id is no expert, or tokens are without routing and `--lost` refuses them.
        """

    def notes(self) -> list[str]:
        """Returns what a user should know of the dump, a line each."""
        return []

    def geometry(self) -> dict[str, Any]:
        """Returns what `cut` learned of the routers, as JSON values."""
        return {"depth": self.depth, "routers": [dataclasses.asdict(router) for router in self.routers]}

    def learn(self, geometry: Mapping[str, Any]) -> None:
        """Takes what `geometry` returned when the dump was planned."""
        self.depth, self.routers = geometry["depth"], tuple(Router(**one) for one in geometry["routers"])

    # -- for the formats -----------------------------------------------------------------------------

    def checked(self, document: Dumped, name: str) -> Dumped | BadRow:
        """Leaves tokens without routing out, or refuses them.

        Args:
            document: as the format has it, its routers in the order of `routers`.
            name: of its file.

        Raises:
            ValueError: an id is no expert, or tokens are without routing and `--lost` refuses them.
        """
        lost = lost_tokens(document.experts, self.routers)
        count, tokens = int(lost.sum()), len(lost)
        if count and self.config.lost == "refuse":
            raise ValueError(
                f"{name}: {count:,} of {tokens:,} tokens of document {document.id} have no routing (an expert twice, "
                "as in the rows of zeros that engines return for tokens that they lost); --lost drop leaves them out"
            )
        if count:
            self.lost += count
            document.keep(~lost)
        if count == tokens:
            return BadRow(source=name, row=document.row, reason=LOST)
        for number, router in enumerate(self.routers):
            ids = document.experts[:, number, : router.top_k]
            if int(ids.min()) < 0 or int(ids.max()) >= router.n_experts:
                wrong = int(ids.max()) if int(ids.max()) >= router.n_experts else int(ids.min())
                raise ValueError(
                    f"{name}: document {document.id} chooses expert {wrong} in layer {router.layer}, which has "
                    f"experts 0 to {router.n_experts - 1}: --experts says how many the model has"
                )
        return document


def lost_tokens(experts_tlk: NDArray[np.integer], routers: Sequence[Router]) -> NDArray[np.bool_]:
    """[T] whether a token has no routing: an expert twice, or none (-1), at any router.

    With k = 1 no expert can be there twice; then a token with expert 0 at every one of several routers has none.
    """
    lost = np.zeros(len(experts_tlk), bool)
    for number, router in enumerate(routers):
        ordered = np.sort(experts_tlk[:, number, : router.top_k], axis=1)
        lost |= (ordered[:, 1:] == ordered[:, :-1]).any(axis=1) | (ordered[:, 0] < 0)
    if len(routers) > 1 and all(router.top_k == 1 for router in routers):
        lost |= (experts_tlk[:, :, 0] == 0).all(axis=1)
    return lost


def possible_layers(experts_tlk: NDArray[np.integer]) -> NDArray[np.bool_]:
    """[L] whether a layer has a router: one that chose k different experts for any token.

    Engines return zeros for layers without a router. With k = 1 a layer of zeros alone has none.
    """
    ordered = np.sort(experts_tlk, axis=2)
    if experts_tlk.shape[2] == 1:
        return np.asarray((ordered != 0).any(axis=(0, 2)))
    return np.asarray((ordered[:, :, 1:] != ordered[:, :, :-1]).all(axis=2).any(axis=0))
