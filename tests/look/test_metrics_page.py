"""docs/metrics.md says what the queries' headers say and what the demo gives."""

from __future__ import annotations

import math
import shlex
from itertools import pairwise
from pathlib import Path

import pytest

from collector import __main__ as cli
from collector.look import metrics_page
from collector.query.catalog import list_comparisons, list_queries
from tests.helpers.paths import ROOT

PAGE = ROOT / "docs" / "metrics.md"
REMEDY = "write docs/metrics.md again, by the commands that it begins with"
QUERIES = (*list_queries(), *list_comparisons())


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def is_number(text: str) -> bool:
    return text.replace(".", "", 1).replace("e-", "", 1).removeprefix("-").isdecimal()


def about(cell: str, other: str) -> bool:
    """Whether two cells say the same, numbers up to what another order of sums changes."""
    if is_number(cell) and is_number(other):
        return math.isclose(float(cell), float(other), rel_tol=0.01, abs_tol=1e-4)
    return cell == other


def test_the_page_is_current(demo_runs: dict[str, Path]) -> None:
    """Words exactly, numbers to a hundredth; a near tie of two experts may fall otherwise on another CPU."""
    written = metrics_page.page((str(demo_runs["pretrained"]), str(demo_runs["random"]))).splitlines()
    stored = PAGE.read_text(encoding="utf-8").splitlines()
    words = [[line for line in page if not line.startswith("|")] for page in (written, stored)]
    assert words[0] == words[1], REMEDY
    tables = [[cell for line in page if line.startswith("|") for cell in cells(line)] for page in (written, stored)]
    assert len(tables[0]) == len(tables[1]), REMEDY
    different = [pair for pair in zip(*tables, strict=True) if not about(*pair)]
    assert len(different) <= 0.01 * len(tables[0]), (REMEDY, different)


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.name)
def test_the_page_tells_all_there_is_in_a_header(query) -> None:
    head, _, rest = PAGE.read_text(encoding="utf-8").partition(f"\n## {query.name}\n")
    section = rest.partition("\n## ")[0]
    assert f"[`{query.name}`](#{query.name})" in head
    for text in (query.question, query.formula, " ".join(query.source.split()), " ".join(query.grain.split())):
        assert text in section
    common = head.partition("## Parameters of most queries")[2].partition("\n## ")[0]
    for param in query.params:
        assert f"| `{param.name}` | {param.type} |" in section + common


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.name)
def test_an_example_is_a_command_line(query) -> None:
    command = cli.parse(["query", "runs/small", query.name, *shlex.split(query.example)])
    assert command.name == query.name
    assert query.bind(dict(command.params))


def test_without_runs_the_page_has_commands_and_no_rows() -> None:
    page = metrics_page.page(None)
    assert "collector query runs/small router_saturation --beside runs/small-random --layer 4" in page
    assert "| metric |" not in page


def test_numbers_are_told_from_words() -> None:
    numbers = ["1", "0.5", "-3.2e-05", "17"]
    assert all(is_number(text) for text in numbers)
    assert not any(is_number(text) for text in ("", "topk", "1-2", "[1, 2]"))
    assert about("0.501", "0.502")
    assert not any(about(*pair) for pair in pairwise(("55", "56", "topk", "")))
