"""The report in a real browser: it draws, the keyboard moves it, and it shuts nobody out."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from collector.look.report import write
from collector.query.warehouse import open_run
from tests.helpers.browser import Browser
from tests.helpers.report_runs import collect_pair


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_folder) -> tuple[Path, Path]:
    return collect_pair(tmp_path_factory.mktemp("report"), str(tiny_folder))


@pytest.fixture(scope="module")
def file(pair, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    write(str(pair[0]), out, compare=str(pair[1]), resamples=20)
    return out


@pytest.fixture
def report(browser: Browser, file: Path) -> Browser:
    """The report, drawn in light colours."""
    return opened(browser, file, "light")


def opened(browser: Browser, file: Path, scheme: str) -> Browser:
    browser.prefer(scheme)
    browser.open(file)
    browser.page.wait_for_selector(f"html[data-drawn='{scheme}'][data-layer]")
    return browser


def test_every_figure_is_drawn_without_errors_or_requests(report):
    figures = report.page.locator("figure[data-figure]")
    assert figures.count() == 16
    for figure in figures.all():
        drawing, title = figure.locator(".chart"), figure.locator("h3").inner_text().partition(" · ")[0]
        assert drawing.locator("svg").bounding_box()["width"] > 100, title
        assert drawing.get_attribute("role") == "graphics-document"
        assert drawing.get_attribute("aria-label").startswith(f"{title}. ")
    assert report.requests() == []
    assert report.errors == []
    report.screenshot("report-light", whole=True)


def test_the_keyboard_moves_through_the_layers(report, pair):
    slider = report.page.locator("#layer")
    assert slider.get_attribute("aria-valuetext") == "layer 1"
    slider.press("ArrowRight")
    report.page.wait_for_selector("html[data-layer='2']")
    assert slider.get_attribute("aria-valuetext") == report.page.locator("#layer-name").inner_text() == "layer 2"
    assert "--layer 2" in report.page.locator("#specialization [data-by-layer]").text_content()
    slider.press("Home")
    report.page.wait_for_selector("html[data-layer='0']")
    shown = report.page.locator("#top-experts svg text").all_text_contents()
    best = open_run(pair[0]).query("top_experts", layer=0, labels="ko", n=1).project("expert").fetchall()
    assert {str(expert) for (expert,) in best} <= set(shown)
    assert report.errors == []


def test_the_drawing_follows_the_layer(report):
    cells = "[...document.querySelectorAll('#specialization svg path')].map(p => p.getAttribute('fill')).join()"
    before = report.page.evaluate(cells)
    report.page.locator("#layer").press("ArrowLeft")
    report.page.wait_for_selector("html[data-layer='0']")
    assert report.page.evaluate(cells) != before


def test_the_data_of_a_figure_is_a_csv_of_all_layers(report, pair):
    with report.page.expect_download() as download:
        report.page.locator("#specialization [data-csv]").press("Enter")
    assert download.value.suggested_filename == "specialization.csv"
    rows = list(csv.DictReader(download.value.path().open(encoding="utf-8")))
    wanted = open_run(pair[0]).query("domain_specialization").project("layer, label, expert, value").fetchall()
    found = {(int(row["layer"]), row["label"], int(row["expert"])): float(row["value"]) for row in rows}
    assert found == {(layer, label, e): pytest.approx(value, rel=5e-4) for layer, label, e, value in wanted}
    assert not [name for name in rows[0] if name.startswith("_")]


def test_the_drawing_of_a_figure_is_an_svg(report):
    with report.page.expect_download() as download:
        report.page.locator("#overlap [data-svg]").click()
    assert download.value.path().read_text(encoding="utf-8").startswith("<svg")


def test_languages_can_be_coloured_and_not(report):
    names = report.page.locator("#decisiveness .role-legend-label text")
    assert "ko" in names.all_text_contents()
    report.page.locator(".choice summary").press("Enter")
    report.page.locator("input[value='ko']").press("Space")
    report.page.wait_for_selector("html[data-coloured='3']")
    assert "ko" not in names.all_text_contents()
    report.page.locator("input[value='ko']").press("Space")
    report.page.wait_for_selector("html[data-coloured='4']")
    assert "ko" in names.all_text_contents()


def test_the_scheme_is_the_system_s_until_the_button_is_pressed(browser, file):
    dark = opened(browser, file, "dark")
    background, button = "getComputedStyle(document.body).backgroundColor", dark.page.locator("#scheme")
    assert dark.page.evaluate(background) == "rgb(18, 21, 26)"
    assert button.get_attribute("aria-pressed") == "true"
    dark.screenshot("report-dark", whole=True)
    button.press("Enter")
    dark.page.wait_for_selector("html[data-drawn='light']")
    assert button.get_attribute("aria-pressed") == "false"
    assert dark.page.evaluate(background) == "rgb(252, 252, 251)"
    assert dark.errors == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nobody_is_shut_out(browser, file, scheme):
    report = opened(browser, file, scheme)
    report.page.evaluate("for (const each of document.querySelectorAll('details')) each.open = true")
    assert report.barriers() == []
