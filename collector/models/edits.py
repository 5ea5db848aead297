"""Names changes of what routers hand to their experts: one operation on (stack, layer, expert), and arms of several.

`edited_routing` carries them out. An arm's controls are sets of other experts with the same operations: what the arm
does beyond them is due to its experts, and not to the damage that any such edit does.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable
from typing import Any, Literal, get_args
from urllib.parse import quote, unquote

Operation = Literal["drop", "drop_renorm", "replace", "scale", "bias", "force"]
OPERATIONS: tuple[str, ...] = get_args(Operation)
_WITH_VALUE = {"scale", "bias"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Edit:
    """One operation on one expert.

    - `drop`: it stays chosen with weight 0, and the others keep their weights;
    - `drop_renorm`: as `drop`, with the others' weights scaled so that their sum stays what it was;
    - `replace`: it cannot be chosen, and the next expert by the router's own score takes its place;
    - `scale`: its weight times `value`;
    - `bias`: its logit plus `value` standard deviations of the token's logits, before anything else;
    - `force`: it is always chosen, in place of the last choice unless it is chosen anyway.
    """

    layer: int
    """The model's own number."""
    expert: int
    operation: Operation
    value: float | None = None
    """Of `scale` and `bias`."""
    stack: str = "decoder"
    """As `layers` names it."""
    label: str | None = None
    """Only in documents with this label."""
    token_class: str | None = None
    """Only at tokens of this class, as `--by token_class` names it."""
    position: int | None = None
    """Only at this place of each document, from 0; special tokens count."""

    def __post_init__(self) -> None:
        """Rejects an operation without its value, or with one that it does not take."""
        if self.operation not in OPERATIONS:
            raise ValueError(f"operation {self.operation!r}: it is one of {', '.join(OPERATIONS)}")
        if (self.value is not None) != (self.operation in _WITH_VALUE):
            needs = "needs a value" if self.operation in _WITH_VALUE else "takes no value"
            raise ValueError(f"operation {self.operation} {needs}: layer {self.layer}, expert {self.expert}")
        if self.value is not None and not math.isfinite(self.value):
            raise ValueError(f"operation {self.operation}: value {self.value} is not finite")
        if self.position is not None and self.position < 0:
            raise ValueError(f"positions count from 0, got {self.position}")

    @property
    def limits(self) -> tuple[str | None, str | None, int | None]:
        """Label, token class and position that it is limited to."""
        return self.label, self.token_class, self.position


_KINDS: dict[str, Callable[[str], Any]] = {
    "layer": int, "expert": int, "operation": str, "value": float, "stack": str, "label": unquote,
    "token_class": unquote, "position": int,
}  # fmt: skip
"""How the fields of an edit are read."""


def parse(text: str) -> Edit:
    """Reads an edit from `layer=1 expert=9 operation=scale value=2`, with the other fields of `Edit` where they matter.

    Names with spaces or commas are written as in URLs: `label=Standard%20Arabic`.

    Raises:
        ValueError: a name is unknown or missing, or a value is not of its kind.
    """
    given: dict[str, Any] = {}
    for part in text.replace(",", " ").split():
        name, _, value = part.partition("=")
        if name not in _KINDS or not value:
            raise ValueError(f"edit {text!r}: {part!r} is none of {', '.join(f'{each}=…' for each in _KINDS)}")
        try:
            given[name] = _KINDS[name](value)
        except ValueError as error:
            raise ValueError(f"edit {text!r}: {name} takes a number, got {value!r}") from error
    if missing := [name for name in ("layer", "expert", "operation") if name not in given]:
        raise ValueError(f"edit {text!r} lacks {' and '.join(missing)}, as in 'layer=1 expert=9 operation=drop'")
    return Edit(**given)


def tell(edit: Edit) -> str:
    """Writes an edit as `parse` reads it."""
    parts = {name: getattr(edit, name) for name in _KINDS}
    parts["stack"] = None if edit.stack == "decoder" else edit.stack
    return " ".join(f"{name}={quote(str(value), safe='')}" for name, value in parts.items() if value is not None)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Arm:
    """A set of edits with a name, or one of its controls."""

    name: str
    edits: tuple[Edit, ...]
    control: int = 0
    """0 for the arm itself; its controls count from 1."""

    def __post_init__(self) -> None:
        """Rejects names that mean something else, and an arm without edits."""
        if not self.name or not self.edits:
            raise ValueError(f"arm {self.name!r} needs a name and an edit")
        if self.name == NO_EDIT or _CONTROL.search(self.name) or ":" in self.name:
            raise ValueError(
                f"an arm cannot be called {self.name!r}: it takes no colon, {NO_EDIT!r} is the model as it is, and "
                "'#' with a number marks controls"
            )
        if len({edit.limits for edit in self.edits}) > 1:
            raise ValueError(
                f"arm {self.name!r}: its edits are limited to several labels, token classes or positions; give each "
                "limit an arm of its own"
            )

    @property
    def limits(self) -> tuple[str | None, str | None, int | None]:
        """Label, token class and position that all its edits are limited to."""
        return self.edits[0].limits

    @property
    def is_limited(self) -> bool:
        """Whether its edits act on some tokens only."""
        return any(limit is not None for limit in self.limits)

    @property
    def first(self) -> int:
        """The first edited layer."""
        return min(edit.layer for edit in self.edits)

    @property
    def title(self) -> str:
        """Name and, of a control, number: each arm of a run has its own."""
        return f"{self.name} #{self.control}" if self.control else self.name


NO_EDIT = "no edit"
"""The name under which the numerical noise is recorded."""
_CONTROL = re.compile(r" #(\d+)$")


def parse_arm(text: str) -> Arm:
    """Reads an arm from `NAME: EDIT; EDIT`, or a control from `NAME #3: EDIT; EDIT`.

    Raises:
        ValueError: it has no name or no edit, or an edit is invalid.
    """
    title, colon, edits = text.partition(":")
    found = [parse(each) for each in edits.split(";") if each.strip()]
    if not (title.strip() and colon and found):
        raise ValueError(f"arm {text!r} is not NAME: EDIT; EDIT, as in 'no-9: layer=1 expert=9 operation=drop'")
    number = _CONTROL.search(title.strip())
    name = _CONTROL.sub("", title.strip())
    return Arm(name=name, edits=tuple(found), control=int(number[1]) if number else 0)


def tell_arm(arm: Arm) -> str:
    """Writes an arm as `parse_arm` reads it."""
    return f"{arm.title}: {'; '.join(map(tell, arm.edits))}"
