"""Colours that colour-blind readers can distinguish, all light enough for black text.

No palette distinguishes 64 experts, so an expert's number is always written next to its colour: the colour shows which
tokens share one of the text's most frequent experts, and the number says which one. Experts of different layers are
unrelated, so each layer assigns its colours separately.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

INK = "#000000"
"""Colour of text on all of these colours; the contrast is 7:1 or more."""
EXPERTS = ("#77AADD", "#EE8866", "#EEDD88", "#FFAABB", "#99DDFF", "#44BB99", "#BBCC33", "#AAAA00")
"""Colours of the eight most frequent experts: Paul Tol's light scheme, made for black labels (SRON/EPS/TN/09-002)."""
OTHERS = "#DDDDDD"
"""Colour of all other experts, from the same scheme."""
_RAMP = ("#FFFFE5", "#FFF7BC", "#FEE391", "#FEC44F", "#FB9A29")
"""From low to high: the light half of Tol's YlOrBr."""


def by_frequency(experts: Iterable[int]) -> dict[int, str]:
    """Returns the colours of a text's experts, the most frequent first, then by number."""
    ranked = sorted(Counter(experts).items(), key=lambda item: (-item[1], item[0]))
    return {expert: EXPERTS[rank] if rank < len(EXPERTS) else OTHERS for rank, (expert, _) in enumerate(ranked)}


def along(value: float, low: float, high: float) -> str:
    """Returns the colour of a value between `low` and `high`; the last colour if the range is empty."""
    share = min(1.0, max(0.0, (value - low) / (high - low))) if high > low else 1.0
    place = share * (len(_RAMP) - 1)
    first = min(int(place), len(_RAMP) - 2)
    pairs = zip(_channels(_RAMP[first]), _channels(_RAMP[first + 1]), strict=True)
    return "#" + "".join(f"{round(a + (b - a) * (place - first)):02X}" for a, b in pairs)


def ramp() -> str:
    """Returns the colours of `along` from low to high as a CSS gradient."""
    return f"linear-gradient(to right,{','.join(_RAMP)})"


def _channels(colour: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(colour[1:]))
