"""Colours that stay apart for colour-blind readers, all light enough for black letters on them.

An expert's number is always written beside its colour: no palette tells 64 experts apart, so colour shows which tokens
share one of the text's most frequent experts, and the number says which. Experts of different layers have nothing to
do with each other, so each layer has colours of its own.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

INK = "#000000"
"""Of letters on any of these colours; contrast 7:1 and more."""
EXPERTS = ("#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#99DDFF", "#44BB99", "#BBCC33", "#AAAA00")
"""For the eight most frequent: Paul Tol's light scheme, made for labels in black (SRON/EPS/TN/09-002)."""
OTHERS = "#DDDDDD"
"""For all other experts, of the same scheme."""
_RAMP = ("#FFFFE5", "#FFF7BC", "#FEE391", "#FEC44F", "#FB9A29")
"""From low to high: the light half of Tol's YlOrBr."""


def by_frequency(experts: Iterable[int]) -> dict[int, str]:
    """Expert -> colour, for the experts of a text: the most frequent first, then by number."""
    ranked = sorted(Counter(experts).items(), key=lambda item: (-item[1], item[0]))
    return {expert: EXPERTS[rank] if rank < len(EXPERTS) else OTHERS for rank, (expert, _) in enumerate(ranked)}


def along(value: float, low: float, high: float) -> str:
    """Colour of a value between `low` and `high`; the highest where there is no between."""
    share = min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 1.0
    place = share * (len(_RAMP) - 1)
    first = min(int(place), len(_RAMP) - 2)
    pairs = zip(_channels(_RAMP[first]), _channels(_RAMP[first + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - first)):02X}" for a, b in pairs)


def ramp() -> str:
    """All colours of `along` from low to high, as CSS."""
    return f"linear-gradient(to right,{','.join(_RAMP)})"


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))
