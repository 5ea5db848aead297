"""Reads one document of a run, token by token, with the query `token_trace`."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any

from collector.look.trace import pieces

if TYPE_CHECKING:
    from collector.query.warehouse import Run

_COLUMNS = (
    "document", "label", "stack", "layer", "position", "token_id", "token", "is_special", "experts", "weights",
    "expert", "router_entropy", "dropped_picks",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Token:
    """A token of the document."""

    position: int
    """Position in the document, from 0, including special tokens."""
    piece: str
    """The vocabulary's spelling, made visible."""
    text: str
    """The text that the token adds, see `pieces.read_on`, made visible."""
    is_special: bool
    """Whether the tokenizer added it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Decision:
    """A router's decision for a token."""

    expert: int
    """The expert with the highest weight."""
    experts: tuple[int, ...]
    """The k chosen experts, in the model's order."""
    weights: tuple[float, ...]
    """Weights of these experts, as the model applied them."""
    entropy: float
    """Entropy of the router's distribution over all experts, in nats."""
    dropped: int
    """Number of the k picks that a capacity limit dropped."""

    @property
    def weight(self) -> float:
        """Weight of `expert`."""
        return self.weights[self.experts.index(self.expert)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Router:
    """A router with its decision for each token."""

    stack: str
    layer: int
    """Number of the layer in the model."""
    n_experts: int
    """Number of experts, E."""
    tokens: tuple[Token, ...]
    decisions: tuple[Decision, ...]
    """Decisions for these tokens, in the same order."""

    @property
    def token_stack(self) -> str:
        """The stack of the tokens: `encoder` or `decoder`."""
        return self.stack.partition(".")[0]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trace:
    """The routing of one document."""

    document: str
    """Id of the document."""
    label: str
    routers: tuple[Router, ...]

    @property
    def several_stacks(self) -> bool:
        """Whether the routers belong to several stacks, so that a layer number alone is ambiguous."""
        return len({router.stack for router in self.routers}) > 1

    def name(self, router: Router) -> str:
        """Returns the display name of a router: `layer 3`, or `encoder layer 3` if there are several stacks."""
        return f"{router.stack} layer {router.layer}" if self.several_stacks else f"layer {router.layer}"


def read(run: Run, **params: object) -> Trace:
    """Reads a document, special tokens included.

    Args:
        run: the run.
        **params: of `token_trace`, which select the document and the routers.

    Raises:
        ValueError: the run has no such router or label, or the parameters select no token.
    """
    if run.lacks & {"weights", "entropy"}:
        raise ValueError(
            "a trace shows each token's highest weight and the router's entropy, which this imported run does not "
            "have; collector query RUN token_trace shows the experts"
        )
    relation = run.query("token_trace", **{"include_special": True, **params}).project(", ".join(_COLUMNS))
    rows = [dict(zip(_COLUMNS, row, strict=True)) for row in relation.fetchall()]
    if not rows:
        why = "; ".join(run.remarks("token_trace", **params))
        raise ValueError(why or f"no token to trace{' with ' + str(params) if params else ''}")
    sizes = {(one["stack"], one["layer"]): one["n_experts"] for one in run.info["layers"]}
    rows.sort(key=lambda row: (row["stack"], row["layer"], row["position"]))
    routers = tuple(
        _router(*key, sizes[key], list(own))
        for key, own in itertools.groupby(rows, key=lambda row: (row["stack"], row["layer"]))
    )
    return Trace(document=rows[0]["document"], label=rows[0]["label"], routers=routers)


def _router(stack: str, layer: int, n_experts: int, rows: list[dict[str, Any]]) -> Router:
    return Router(
        stack=stack,
        layer=layer,
        n_experts=n_experts,
        tokens=tuple(
            Token(
                position=row["position"],
                piece=pieces.visible(row["token"], row["token_id"]),
                text=pieces.visible(added, row["token_id"]),
                is_special=row["is_special"],
            )
            for row, added in zip(rows, pieces.read_on(row["token"] for row in rows), strict=True)
        ),
        decisions=tuple(
            Decision(
                expert=row["expert"],
                experts=tuple(row["experts"]),
                weights=tuple(row["weights"]),
                entropy=row["router_entropy"],
                dropped=row["dropped_picks"],
            )
            for row in rows
        ),
    )
