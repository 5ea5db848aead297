"""Names changes of what routers hand to their experts: one operation on (stack, layer, expert), and arms of several.

`edited_routing` carries them out. An arm's controls are sets of other experts with the same operations: what the arm
does beyond them is due to its experts, and not to the damage that any such edit does.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Collection, Mapping
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
        for name in ("layer", "expert", "position"):
            number = getattr(self, name)
            if number is not None and number < 0:
                raise ValueError(f"operation {self.operation}: {name}s count from 0, got {number}")

    @property
    def limits(self) -> tuple[str | None, str | None, int | None]:
        """Label, token class and position that it is limited to."""
        return self.label, self.token_class, self.position


def _whole(value: Any) -> int:
    """Reads a whole number, which other programs may have written as 4.0."""
    number = float(value)
    if number != int(number):
        raise ValueError(value)
    return int(number)


_KINDS: dict[str, Callable[[Any], Any]] = {
    "layer": _whole, "expert": _whole, "operation": str, "value": float, "stack": str, "label": str,
    "token_class": str, "position": _whole,
}  # fmt: skip
"""How the fields of an edit are read."""


def read(fields: Mapping[str, Any]) -> Edit:
    """Makes an edit of texts or numbers by name; None is not given.

    Raises:
        ValueError: a name is unknown or missing, or a value is not of its kind.
    """
    given: dict[str, Any] = {}
    for name, value in fields.items():
        if name not in _KINDS:
            raise ValueError(f"{name!r} is none of {', '.join(f'{each}=…' for each in _KINDS)}")
        if value is None:
            continue
        try:
            given[name] = _KINDS[name](value)
        except (ValueError, TypeError, OverflowError) as error:
            kind = "a whole number" if _KINDS[name] is _whole else "a number"
            raise ValueError(f"{name} takes {kind}, got {value!r}") from error
    if missing := [name for name in ("layer", "expert", "operation") if name not in given]:
        raise ValueError(f"it lacks {' and '.join(missing)}, as in 'layer=1 expert=9 operation=drop'")
    return Edit(**given)


def parse(text: str) -> Edit:
    """Reads an edit from `layer=1 expert=9 operation=scale value=2`, with the other fields of `Edit` where they matter.

    Names with spaces or commas are written as in URLs: `label=Standard%20Arabic`.

    Raises:
        ValueError: a name is unknown or missing, or a value is not of its kind.
    """
    given: dict[str, str] = {}
    for part in text.replace(",", " ").split():
        name, _, value = part.partition("=")
        if not value:
            raise ValueError(f"edit {text.strip()!r}: {part!r} is not NAME=VALUE")
        given[name] = unquote(value)
    try:
        return read(given)
    except ValueError as error:
        raise ValueError(f"edit {text.strip()!r}: {error}") from error


def tell(edit: Edit) -> str:
    """Writes an edit as `parse` reads it."""
    parts = {name: getattr(edit, name) for name in _KINDS}
    parts["stack"] = None if edit.stack == "decoder" else edit.stack
    return " ".join(f"{name}={quote(str(value), safe='')}" for name, value in parts.items() if value is not None)


def check(edits: Collection[Edit], where: str, experts: int, top_k: int) -> None:
    """Checks the edits of one router.

    Args:
        edits: all of them.
        where: the router in messages.
        experts: E.
        top_k: k.

    Raises:
        ValueError: there is no such expert, or too few or too many could be chosen.
    """
    for edit in edits:
        if edit.expert >= experts:
            raise ValueError(f"{where} has experts 0 to {experts - 1}, not {edit.expert}")
    blocked = {edit.expert for edit in edits if edit.operation == "replace"}
    forced = {edit.expert for edit in edits if edit.operation == "force"}
    if len(blocked) > experts - top_k:
        raise ValueError(f"{where}: replacing {len(blocked)} of {experts} experts leaves fewer than k = {top_k}")
    if len(forced) > top_k or forced & blocked:
        raise ValueError(f"{where}: at most k = {top_k} experts can be forced, and none that is replaced")


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
        if self.name != self.name.strip() or "\n" in self.name:
            raise ValueError(
                f"an arm cannot be called {self.name!r}: a name begins and ends without spaces, on one line"
            )
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
