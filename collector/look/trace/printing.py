"""Prints a trace in the terminal: the text once per router, with tokens in their expert's colour, then a table.

The number of the expert always follows the token: as a subscript if there are colours; otherwise (a pipe, NO_COLOR) in
brackets, which then also separate the tokens.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.style import Style
from rich.table import Table
from rich.text import Text

from collector.look.trace import palette, pieces

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from rich.console import Console

    from collector.look.trace.intervening import Outcome
    from collector.look.trace.reading import Decision, Router, Token, Trace

_SMALL = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
_LEFT_TO_RIGHT_MARK = "\u200e"
_LONGEST = 24
"""Maximum width of a token in the table, in cells; longer ones are cut with an ellipsis."""


def show(trace: Trace, out: Console, title: str) -> None:
    """Prints the text by router, then the table.

    Args:
        trace: the trace to show.
        out: console to print to, with or without colours.
        title: description of the model.
    """
    out.print(Text(title), soft_wrap=True)
    out.print()
    coloured = out.color_system is not None and not out.no_color
    for router in trace.routers:
        out.print(Text(trace.name(router), "bold"))
        for line in _lines(router, out.width, coloured=coloured):
            out.print(line, soft_wrap=True)
        out.print()
    for table in _tables(trace, out.width, coloured=coloured):
        out.print(table)
        out.print()
    out.print(Text("Expert with the highest weight, its weight, and the router's entropy in nats"), soft_wrap=True)
    out.print(Text(_scales(trace)), soft_wrap=True)


def show_outcome(outcome: Outcome, edits: str, out: Console, title: str) -> None:
    """Prints a text's routing before and after edits, and what comes next.

    Args:
        outcome: of `intervening.compare`.
        edits: the edits, in words.
        out: console to print to.
        title: description of the model.
    """
    show(outcome.before, out, title)
    out.print()
    show(outcome.after, out, f"With {edits}")
    out.print()
    out.print(Text(outcome.changes), soft_wrap=True)
    if outcome.divergence is None:
        out.print(Text(outcome.silence), soft_wrap=True)
        return
    table = Table(
        "", "as it is", "p", "with the edits", "p", "was", box=None, padding=(0, 2, 0, 0), pad_edge=False,
        header_style="bold", title="Most probable next tokens", title_justify="left",
    )  # fmt: skip
    for at in (0, 2, 4, 5):
        table.columns[at].justify = "right"
    for rank, (old, new) in enumerate(zip(outcome.first_before, outcome.first_after, strict=True), start=1):
        table.add_row(
            str(rank), Text(pieces.spelled(old.token)), f"{old.before:.4f}",
            Text(pieces.spelled(new.token)), f"{new.after:.4f}", f"{new.before:.4f}",
        )  # fmt: skip
    out.print(table)
    out.print(Text(f"KL(as it is ‖ with the edits) = {outcome.divergence:.4f} nats"), soft_wrap=True)


def _scales(trace: Trace) -> str:
    sizes = sorted({router.n_experts for router in trace.routers})
    told = ", ".join(f"{math.log(size):.2f} over {size} experts" for size in sizes)
    drops = any(each.dropped for router in trace.routers for each in router.decisions)
    mark = "; -n: a capacity limit kept n of the chosen experts from the token" if drops else ""
    return f"(0: decided, {told}: undecided){mark}."


# -- the text ----------------------------------------------------------------------------------------


def _lines(router: Router, width: int, *, coloured: bool) -> Iterator[Text]:
    """Yields the text in lines, broken between tokens and after tokens that end with a line break."""
    colours = palette.by_frequency(each.expert for each in router.decisions)
    line = Text()
    for token, decision in zip(router.tokens, router.decisions, strict=True):
        number = str(decision.expert)
        shown = token.text + (number.translate(_SMALL) if coloured else f"[{number}]")
        if line and line.cell_len + cell_len(shown) > width:
            yield line
            line = Text()
        line.append(shown, _style(colours[decision.expert]) if coloured else None)
        if token.text.endswith("⏎"):
            yield line
            line = Text()
    if line:
        yield line


def _style(colour: str) -> Style:
    return Style(color=palette.INK, bgcolor=colour)


# -- the table ---------------------------------------------------------------------------------------


def _tables(trace: Trace, width: int, *, coloured: bool) -> Iterator[Table]:
    """Yields tables with tokens as rows and routers as columns, as many columns as fit the width."""
    for stack in dict.fromkeys(router.token_stack for router in trace.routers):
        routers = [router for router in trace.routers if router.token_stack == stack]
        tokens = [_name(token) for token in routers[0].tokens]
        columns = [_column(router, coloured=coloured) for router in routers]
        room = width - len(str(routers[0].tokens[-1].position)) - max(map(cell_len, tokens)) - 2
        wide = max(
            max(column[0].cell_len, len(trace.name(router))) for router, column in zip(routers, columns, strict=True)
        )
        beside = max(1, room // (wide + 2))
        for first in range(0, len(routers), beside):
            yield _table(trace, routers[first : first + beside], tokens, columns[first : first + beside])


def _table(trace: Trace, routers: Sequence[Router], tokens: Sequence[str], columns: Sequence[Sequence[Text]]) -> Table:
    table = Table(
        "", "token", *map(trace.name, routers), box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="bold"
    )
    table.columns[0].justify = "right"
    for column in table.columns:
        column.no_wrap = True
    for token, name, *cells in zip(routers[0].tokens, tokens, *columns, strict=True):
        table.add_row(str(token.position), Text(name, "dim" if token.is_special else ""), *cells)
    return table


def _name(token: Token) -> str:
    """Formats a token for its column; a right-to-left token gets a mark, so that the numbers after it stay in order."""
    name = pieces.spelled(token.piece)
    if cell_len(name) > _LONGEST:
        name = set_cell_size(name, _LONGEST - 1).rstrip() + "…"
    return name + _LEFT_TO_RIGHT_MARK if pieces.is_right_to_left(name) else name


def _column(router: Router, *, coloured: bool) -> list[Text]:
    """Returns a router's cells: expert, weight, entropy."""
    digits = len(str(router.n_experts - 1))
    colours = palette.by_frequency(each.expert for each in router.decisions)
    drops = any(each.dropped for each in router.decisions)
    return [_cell(each, digits, colours[each.expert] if coloured else None, drops=drops) for each in router.decisions]


def _cell(decision: Decision, digits: int, colour: str | None, *, drops: bool) -> Text:
    cell = Text(f"{decision.expert:>{digits}}", _style(colour) if colour else "")
    cell.append(f" {decision.weight:.2f} {decision.entropy:.2f}", Style())
    if drops:
        cell.append(f" -{decision.dropped}" if decision.dropped else "   ", Style())
    return cell
