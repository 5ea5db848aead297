"""Renders a trace as one self-contained HTML file.

Each token is a button in the colour of its expert, weight or entropy. Hovering or focusing it shows all k experts with
their weights; clicking it marks every token with the same expert. The explorer also uses `tokens` and `legend`, whose
style and behaviour are in `view.css` and `view.js`.
"""

from __future__ import annotations

import dataclasses
import html
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from collector.look.trace import palette, pieces

if TYPE_CHECKING:
    from collections.abc import Iterable

    from collector.look.trace.intervening import Outcome
    from collector.look.trace.reading import Decision, Router, Token, Trace

_FOLDER = Path(__file__).parent
CSS = (_FOLDER / "view.css").read_text(encoding="utf-8")
JS = (_FOLDER / "view.js").read_text(encoding="utf-8")
BY = ("expert", "weight", "entropy")
"""Possible meanings of the colours."""

_START = """
const view = document.querySelector(".view");
attach(view, (expert, group) => mark(group.closest("section"), expert));
rove(view);
for (const choice of view.querySelectorAll("[name=by]")) {
  choice.addEventListener("change", () => { view.dataset.by = choice.value; });
}
"""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scales:
    """Ranges of the colour scales of a trace, the same for all its routers."""

    weight: tuple[float, float]
    entropy: tuple[float, float]

    @classmethod
    def of(cls, trace: Trace) -> Scales:
        """Returns the ranges of the values in the trace."""
        decisions = [each for router in trace.routers for each in router.decisions]
        return cls(weight=_ends(each.weight for each in decisions), entropy=_ends(each.entropy for each in decisions))


def page(trace: Trace, title: str) -> str:
    """Renders the whole page.

    Args:
        trace: the trace to show.
        title: description of the model.

    Returns:
        HTML.
    """
    return _page("Routing of one text", title, _sections(trace))


def page_of_outcome(outcome: Outcome, edits: str, title: str) -> str:
    """Renders a text's routing before and after edits, and what comes next.

    Args:
        outcome: of `intervening.compare`.
        edits: the edits, in words.
        title: description of the model.

    Returns:
        HTML.
    """
    parts = [
        f"<p>{html.escape(outcome.changes)}</p>", _next_tokens(outcome),
        f"<h1>With {html.escape(edits)}</h1>", _sections(outcome.after),
        "<h1>As it is</h1>", _sections(outcome.before),
    ]  # fmt: skip
    return _page("One text before and after edits", title, "".join(parts))


def _page(head: str, title: str, content: str) -> str:
    body = f"""<main class="view" data-by="expert">
<h1>{head}</h1>
<p>{html.escape(title)}</p>
<p class="quiet">Each token is followed by the expert that got the highest weight. Point at a token for all that were
chosen; click it, or press Enter, to mark the tokens that have its expert.</p>
{_choice()}
{content}
</main>
<script type="module">
{JS}{_START}</script>"""
    return shell(title, body)


def _sections(trace: Trace) -> str:
    scales = Scales.of(trace)
    sections = [
        f"<section><h2>{name}</h2>{legend(router, scales)}{tokens(router, name, scales)}</section>"
        for router, name in ((router, html.escape(trace.name(router))) for router in trace.routers)
    ]
    summary = "<summary>All numbers: expert, weight, router entropy in nats</summary>"
    return f"{''.join(sections)}<details>{summary}{''.join(_tables(trace))}</details>"


def _next_tokens(outcome: Outcome) -> str:
    if outcome.divergence is None:
        return f"<p>{html.escape(outcome.silence)}</p>"
    rows = "".join(
        f"<tr><td>{rank}</td><td><bdi>{html.escape(pieces.spelled(old.token))}</bdi></td><td>{old.before:.4f}</td>"
        f"<td><bdi>{html.escape(pieces.spelled(new.token))}</bdi></td><td>{new.after:.4f}</td>"
        f"<td>{new.before:.4f}</td></tr>"
        for rank, (old, new) in enumerate(zip(outcome.first_before, outcome.first_after, strict=True), start=1)
    )
    heads = "".join(f'<th scope="col">{name}</th>' for name in ("", "as it is", "p", "with the edits", "p", "was"))
    return (
        '<h2>Most probable next tokens</h2><div class="numbers" tabindex="0" role="region" aria-label="Next tokens">'
        f"<table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
        f"<p>KL(as it is ‖ with the edits) = {outcome.divergence:.4f} nats</p>"
    )


def shell(title: str, body: str, style: str = "") -> str:
    """Renders a self-contained page around a `main` element, with the style of `view.css` and what is given."""
    return f"""<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{html.escape(title)}</title>
<style>
:root {{ color-scheme: light dark; }}
body {{ margin: 0; background: light-dark(#ffffff, #16181d); }}
main {{ max-width: 70em; margin: 0 auto; padding: 2em; }}
{CSS}{style}</style>
{body}
</html>
"""


def _choice() -> str:
    options = "".join(
        f'<label><input type="radio" name="by" value="{by}"{" checked" if by == "expert" else ""}> {by}</label>'
        for by in BY
    )
    return f'<fieldset class="choice"><legend>Colour by</legend>{options}</fieldset>'


# -- parts that the explorer shows too ---------------------------------------------------------------


def tokens(router: Router, name: str, scales: Scales) -> str:
    """Renders the text with a button per token."""
    colours = palette.by_frequency(each.expert for each in router.decisions)
    direction = "rtl" if pieces.is_right_to_left("".join(t.text for t in router.tokens if not t.is_special)) else "ltr"
    buttons = [
        _button(token, decision, colours[decision.expert], scales, math.log(router.n_experts))
        for token, decision in zip(router.tokens, router.decisions, strict=True)
    ]
    label = f"Tokens of {name}"
    return (
        f'<div class="tokens" role="group" aria-label="{html.escape(label)}" dir="{direction}">{"".join(buttons)}</div>'
    )


def _button(token: Token, decision: Decision, colour: str, scales: Scales, most: float) -> str:
    picks = " ".join(f"{e}:{w:.4g}" for e, w in zip(decision.experts, decision.weights, strict=True))
    drops = f"; {decision.dropped} of the chosen experts had no room" if decision.dropped else ""
    about = f"router entropy {decision.entropy:.2f} of {most:.2f} nats{drops}"
    attributes = {
        "data-expert": str(decision.expert),
        "data-picks": picks,
        "data-token": f"{token.position}  {token.piece}",
        "data-about": about,
        "style": f"--expert:{colour};--weight:{palette.along(decision.weight, *scales.weight)};"
        f"--entropy:{palette.along(decision.entropy, *scales.entropy)}",
        **({"class": "special"} if token.is_special else {}),
    }
    told = "".join(f' {key}="{html.escape(value)}"' for key, value in attributes.items())
    shown = f"<bdi>{html.escape(token.text)}</bdi><sub>{decision.expert}</sub>"
    return f'<button type="button"{told}>{shown}</button>{"<br>" if token.text.endswith("⏎") else ""}'


def legend(router: Router, scales: Scales) -> str:
    """Renders the legend of the colours: the most frequent experts, or the two ends of a scale."""
    counts = Counter(each.expert for each in router.decisions)
    named = [(expert, colour) for expert, colour in palette.by_frequency(counts.elements()).items()]
    chips = "".join(
        f'<span><button type="button" data-expert="{expert}" style="--expert:{colour}">{expert}</button> '
        f"× {counts[expert]}</span>"
        for expert, colour in named[: len(palette.EXPERTS)]
    )
    rest = len(named) - len(palette.EXPERTS)
    chips += f'<span class="quiet">{rest} others, grey</span>' if rest > 0 else ""
    ramps = "".join(_ramp(by, *getattr(scales, by)) for by in BY[1:])
    return f'<div class="legend by-expert" role="group" aria-label="Most frequent experts">{chips}</div>{ramps}'


def _ramp(by: str, low: float, high: float) -> str:
    return (
        f'<p class="legend by-{by}"><span>{by} {low:.2f}</span>'
        f'<span class="ramp" style="background:{palette.ramp()}"></span><span>{high:.2f}</span></p>'
    )


# -- numbers -----------------------------------------------------------------------------------------


def _tables(trace: Trace) -> Iterable[str]:
    """Renders a table per stack, with tokens as rows and routers as columns."""
    for stack in dict.fromkeys(router.token_stack for router in trace.routers):
        routers = [router for router in trace.routers if router.token_stack == stack]
        heads = "".join(f'<th scope="col">{html.escape(trace.name(router))}</th>' for router in routers)
        cells = zip(*map(_cells, routers), strict=True)
        rows = "".join(
            f"<tr>{_head(token)}{''.join(row)}</tr>" for token, row in zip(routers[0].tokens, cells, strict=True)
        )
        yield (
            f'<div class="numbers" tabindex="0" role="region" aria-label="Numbers of the {stack}"><table>'
            f'<thead><tr><td></td><th scope="row">token</th>{heads}</tr></thead><tbody>{rows}</tbody></table></div>'
        )


def _head(token: Token) -> str:
    name = html.escape(pieces.spelled(token.piece))
    return f'<td>{token.position}</td><th scope="row"><bdi>{name}</bdi></th>'


def _cells(router: Router) -> Iterable[str]:
    colours = palette.by_frequency(each.expert for each in router.decisions)
    for each in router.decisions:
        expert = f'<b style="background:{colours[each.expert]}">{each.expert}</b>'
        yield f"<td>{expert} {each.weight:.2f} {each.entropy:.2f}</td>"


def _ends(values: Iterable[float]) -> tuple[float, float]:
    found = list(values)
    return min(found), max(found)
