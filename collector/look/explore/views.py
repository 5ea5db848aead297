"""Renders the explorer's views of a run as HTML: the experts of a layer, and the card of one expert.

Label-level numbers come from the rollup if the run has one. Token-level numbers need the tokens themselves, so for a
large run a card reads only one shard in N, and states the number of tokens.
"""

from __future__ import annotations

import dataclasses
import html
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from collector.look import profile
from collector.look.trace import page, palette, pieces
from collector.query.views import literal

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from collector.query.warehouse import Run

SAMPLE = 250_000
"""Approximate number of tokens that a card reads, which takes two cores half a second."""
MOST_DOCUMENTS = 200
"""Maximum number of documents to choose from."""
ITEMS = 10
"""Items per aspect of a card."""
WIDTH = 12
"""Tokens of context on each side."""
METHODS = ("umap", "tsne", "pca")
"""Methods of maps, the one to show first."""
MOST_POINTS = 1500
"""Maximum number of other experts' points on a map, about."""
MARKS = (
    '<p class="quiet">Framed: the selected expert has the highest weight. Underlined: it is among the k. '
    "Click a token or an expert to select an expert.</p>"
)
"""Explanation below a document."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Document:
    """A document to choose from."""

    shard: int
    doc: int
    doc_id: str
    tokens: int

    @property
    def key(self) -> str:
        """Name of the document in links: its shard and its number there."""
        return f"{self.shard}.{self.doc}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Frequency:
    """How often a label's tokens choose an expert: domain specialization."""

    label: str
    expert: int
    value: float
    baseline: float
    n: int
    """Tokens of the label."""


def documents(run: Run, label: str, condition: str = "") -> list[Document]:
    """Returns the first documents of a label that meet a condition.

    Args:
        run: the run.
        label: of the documents.
        condition: SQL over the columns of `documents`, for example `tokens > 100`; empty means all.

    Raises:
        ValueError: the condition is not valid SQL, or would write.
    """
    rows = run.sql(
        "select shard, doc, doc_id, tokens from documents\n"
        f"semi join (select shard, doc from document_labels where label = {literal(label)}) using (shard, doc)\n"
        f"where tokens > 0 and ({condition.strip() or 'true'}\n) order by shard, doc limit {MOST_DOCUMENTS}"
    ).fetchall()
    return [Document(shard=shard, doc=doc, doc_id=doc_id, tokens=tokens) for shard, doc, doc_id, tokens in rows]


def frequencies(run: Run, stack: str, layer: int) -> list[Frequency]:
    """Returns the domain specialization of every label and expert of a router."""
    relation = run.query("domain_specialization", stack=stack, layer=layer)
    names = [field.name for field in dataclasses.fields(Frequency)]
    rows = relation.project(", ".join(names)).fetchall()
    return [Frequency(**dict(zip(names, row, strict=True))) for row in rows]


def sampling(run: Run) -> int:
    """Returns N such that a card reads one shard in N."""
    tokens, shards = run.sql("select sum(tokens), count(distinct shard) from documents").fetchall()[0]
    return max(1, min(shards, (tokens or 0) // SAMPLE))


def message(text: str) -> str:
    """Renders a message in place of a document."""
    return f'<p role="alert">{html.escape(text)}</p>'


# -- experts -----------------------------------------------------------------------------------------


def experts(found: Iterable[Frequency], label: str, name: str) -> str:
    """Renders all experts of a router, coloured by how often a label chooses them."""
    own = [each for each in found if each.label == label]
    if not own:
        return message(f"No token of {label} was recorded in {name}.")
    highest = max(each.value for each in own)
    cells = "".join(
        f'<button type="button" data-expert="{each.expert}" style="background:{palette.along(each.value, 0, highest)}" '
        f'data-token="expert {each.expert}" data-about="{_chosen(each)}">{each.expert}</button>'
        for each in own
    )
    told = f"Experts of {name} by the share of {label} tokens that choose them"
    scale = (
        f'<p class="quiet">0 <span class="ramp" style="background:{palette.ramp()}"></span> {highest:.2f}; '
        f"by chance {own[0].baseline:.3f}; {own[0].n:,} tokens</p>"
    )
    return f'<h2>{html.escape(told)}</h2><div class="cells" role="group" aria-label="Experts">{cells}</div>{scale}'


def _chosen(frequency: Frequency) -> str:
    told = f"chosen by {frequency.value:.3f} of the {frequency.n:,} tokens of {frequency.label}"
    return html.escape(f"{told}; by chance {frequency.baseline:.3f}")


# -- one expert --------------------------------------------------------------------------------------


def card(run: Run, found: Sequence[Frequency], *, stack: str, layer: int, expert: int, label: str, name: str) -> str:
    """Renders the card of an expert: its languages, tokens, companions, positions, contexts, and what it puts out.

    Args:
        run: the run.
        found: `frequencies` of the router.
        stack: of the router.
        layer: of the router.
        expert: number of the expert.
        label: the language shown in bold.
        name: display name of the router.

    Raises:
        ValueError: the run has no such router or label.
    """
    every = sampling(run)
    given = {"stack": stack, "layer": layer, "expert": expert, "n": ITEMS, "width": WIDTH, "every": every}
    aspects = run.query("expert_profile", **given).project("aspect, item, value, baseline, n, count").fetchall()
    languages = sorted((each for each in found if each.expert == expert), key=lambda each: -each.value)[:ITEMS]
    lists = [_bars("Languages", [(_bold(e.label, label), e.value, e.baseline, e.n) for e in languages])]
    for aspect, title in (
        ("token", "Receives the tokens"),
        ("expert", "Together with experts"),
        ("position", "Positions"),
    ):
        rows = [(_item(aspect, item), *numbers) for kind, item, *numbers, _ in aspects if kind == aspect]
        lists.append(_bars(title, rows))
    # baseline = N_e / N; positions that never chose the expert have no row, so n does not sum to N
    own = [(count, baseline) for aspect, _, _, baseline, _, count in aspects if aspect == "position"]
    tokens = round(sum(count for count, _ in own) / own[0][1]) if own else 0
    sample = "" if every == 1 else f", of one shard in {every}"
    return (
        f"<h2>Expert {expert} in {html.escape(name)}</h2>"
        "<p class=\"quiet\">Bars: the share of a language's, a spelling's or a position's tokens that chose it, and "
        "the share of its own tokens that also chose another expert. Lines: the baseline. Last column: the number of "
        "tokens. Languages count all tokens, the rest "
        f"{tokens:,} tokens{sample}; spellings are those that chose it most often.</p>"
        f'<div class="aspects">{"".join(lists)}</div>'
        + _outputs(profile.outputs(run, stack=stack, layer=layer, expert=expert, n=ITEMS))
        + _plane(run, stack=stack, layer=layer, expert=expert)
        + _contexts([(item, weight) for aspect, item, weight, *_ in aspects if aspect == "context"])
    )


def _outputs(found: Mapping[str, Any]) -> str:
    """Renders what an expert puts out: a sentence, and tables of promoted tokens and of the experts most like it."""
    told = []
    if parts := found["contribution"]:
        whole, chosen = parts["contribution"], parts["contribution_if_chosen"]
        told.append(f"It contributes {whole['value']:.3f} of the layer's output (by chance {whole['baseline']:.3f})")
        if chosen["value"] is not None:
            told[-1] += f", and {chosen['value']:.3f} where it is chosen ({chosen['baseline']:.3f})"
    if (own := found["direct_attribution"]) and own["baseline"] is not None:
        error = "" if own["standard_error"] is None else f" ± {own['standard_error']:.3f}"
        beyond = f"{own['value'] - own['baseline']:.3f}{error}"
        told.append(f"It adds {own['value']:.3f} to the next token's logit, {beyond} more than its companions")
    lists = []
    if rows := found["promotes"]:
        bars = [(_item("token", row["token"]), row["value"], row["baseline"], row["n"]) for row in rows]
        lists.append(_bars("Promotes the tokens", bars))
    for name, title, baseline, count in (
        ("nearest_by_output", "Experts with similar outputs (CKA)", None, "n"),
        ("nearest_by_weight", "Experts with similar weights (cosine)", "mean", None),
    ):
        if rows := found[name]:
            bars = [
                (_item("expert", str(row["other_expert"])), row["value"], row[baseline] if baseline else 0.0,
                 row[count] if count else None)
                for row in rows
            ]  # fmt: skip
            lists.append(_bars(title, bars))
    if not told and not lists:
        return ""
    sentence = f'<p class="quiet">{". ".join(told)}.</p>' if told else ""
    return f'{sentence}<div class="aspects">{"".join(lists)}</div>'


def _plane(run: Run, *, stack: str, layer: int, expert: int) -> str:
    """Draws the layer's map, if there is one, with the expert's outputs in front of the others."""
    if not run.has("maps"):
        return ""
    found = run.query("expert_map", stack=stack, layer=layer).project("method, expert, label, token, x, y").fetchall()
    methods = {method for method, *_ in found}
    if not methods:
        return ""
    method = min(methods, key=METHODS.index)
    own = [row for row in found if row[0] == method and row[1] == expert]
    others = [row for row in found if row[0] == method and row[1] != expert]
    others = others[:: max(1, len(others) // MOST_POINTS)]
    places = [row[4:] for row in (*own, *others)]
    left, low = (min(place[axis] for place in places) for axis in (0, 1))
    size = max(max(place[axis] for place in places) - start for axis, start in ((0, left), (1, low))) or 1.0

    def dot(row: tuple[Any, ...], kind: str) -> str:
        _, _, label, token, x, y = row
        told = html.escape(f"{pieces.visible(token or '')} ({label})")
        across, up = 300 * (x - left) / size, 300 - 300 * (y - low) / size
        return f'<circle class="{kind}" cx="{across:.1f}" cy="{up:.1f}" r="2.5"><title>{told}</title></circle>'

    dots = "".join([*(dot(row, "other") for row in others), *(dot(row, "own") for row in own)])
    return (
        f"<section><h3>Map of the layer's outputs ({method}), those of expert {expert} in colour</h3>"
        f'<svg class="map" viewBox="-5 -5 310 310" role="img" aria-label="Map of outputs">{dots}</svg></section>'
    )


def card_page(run: Run, *, stack: str, layer: int, expert: int) -> str:
    """Renders the card of an expert as a self-contained HTML page.

    Args:
        run: the run.
        stack: of the router.
        layer: of the router.
        expert: number of the expert.

    Raises:
        ValueError: the run has no such router.
    """
    found = frequencies(run, stack, layer)
    name = f"{stack} layer {layer} of {run.info['model']['id']}"
    shown = card(run, found, stack=stack, layer=layer, expert=expert, label="", name=name)
    still = re.sub(r"<button[^>]*>(.*?)</button>", r"<b>\1</b>", shown)  # there is nothing to choose here
    style = (Path(__file__).parent / "panel.css").read_text(encoding="utf-8")
    body = f'<main class="view explorer"><div data-part="card">{still}</div></main>'
    return page.shell(f"Expert {expert} in {name}", body, style)


def _bold(label: str, chosen: str) -> str:
    return f"<b>{html.escape(label)}</b>" if label == chosen else html.escape(label)


def _item(aspect: str, item: str) -> str:
    if aspect == "expert":
        return f'<button type="button" data-expert="{item}">{item}</button>'
    shown = pieces.spelled(pieces.visible(item)) if aspect == "token" else item
    return f"<bdi>{html.escape(shown)}</bdi>"


def _bars(title: str, rows: Sequence[tuple[str, float, float, int | None]]) -> str:
    """Renders a small table of items with bars, baselines and numbers of tokens."""
    highest = max((max(value, baseline) for _, value, baseline, _ in rows), default=1)
    lines = "".join(
        f'<tr><th scope="row">{item}</th><td>{value:.3f}</td><td class="bar">'
        f'<i style="width:{max(value, 0) / highest:.1%}"></i>'
        f'<s style="inset-inline-start:{baseline / highest:.1%}"></s>'
        f'</td><td class="n">{"" if n is None else f"{n:,}"}</td></tr>'
        for item, value, baseline, n in rows
    )
    table = f'<table class="bars"><tbody>{lines}</tbody></table>' if rows else '<p class="quiet">none</p>'
    return f'<section><h3>{title}</h3><div role="group" aria-label="{title}">{table}</div></section>'


def _contexts(found: Sequence[tuple[str, float]]) -> str:
    """Renders lines with the token in the middle, each in its reading direction."""
    lines = "".join(_context(item, weight) for item, weight in found)
    return f"<section><h3>Highest weights, one a document</h3>{lines}</section>" if found else ""


def _context(item: str, weight: float) -> str:
    before, token, after = re.split("[⟦⟧]", item, maxsplit=2)
    parts = pieces.in_context(before, token, after)
    direction = "rtl" if pieces.is_right_to_left("".join(parts)) else "ltr"
    left, middle, right = map(_words, parts)
    return (
        f'<div class="context" dir="{direction}"><span>{left}</span><mark>{middle}</mark><span>{right}</span>'
        f"<small>{weight:.2f}</small></div>"
    )


def _words(text: str) -> str:
    return html.escape(pieces.visible(text)) if text else ""
