"""The report in a real browser: it draws, the keyboard moves it, and it shuts nobody out."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import pytest
from browser import Browser
from report_runs import collect_pair
from selenium.webdriver.common.keys import Keys

from collector.report import write
from collector.warehouse import open_run


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_folder) -> tuple[Path, Path]:
    return collect_pair(tmp_path_factory.mktemp("report"), str(tiny_folder))


@pytest.fixture(scope="module")
def file(pair, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    write(str(pair[0]), out, compare=str(pair[1]))
    return out


@pytest.fixture
def report(browser: Browser, file: Path) -> Browser:
    """The report, drawn in light colours."""
    return opened(browser, file, "light")


def opened(browser: Browser, file: Path, scheme: str) -> Browser:
    browser.prefer(scheme)
    browser.open(file)
    browser.wait_for(f"html[data-drawn='{scheme}'][data-layer]")
    return browser


def test_every_figure_is_drawn_without_errors_or_requests(report):
    figures = report.find_all("figure[data-figure]")
    assert len(figures) == 12
    for figure in figures:
        drawing = figure.find_element("css selector", "svg")
        assert drawing.size["width"] > 100, figure.get_attribute("id")
        title = figure.find_element("css selector", "h3").text.partition(" · ")[0]
        assert drawing.get_attribute("aria-label").startswith(title)
    assert report.requests() == []
    assert report.console_errors() == []
    report.screenshot("report-light", whole=True)


def test_the_keyboard_moves_through_the_layers(report, pair):
    slider = report.find("#layer")
    assert slider.get_attribute("aria-valuetext") == "layer 1"
    slider.send_keys(Keys.ARROW_RIGHT)
    report.wait_for("html[data-layer='2']")
    assert slider.get_attribute("aria-valuetext") == report.find("#layer-name").text == "layer 2"
    assert "--layer 2" in report.find("#specialization [data-by-layer]").get_attribute("textContent")
    slider.send_keys(Keys.HOME)
    report.wait_for("html[data-layer='0']")
    shown = report.run("return [...document.querySelectorAll('#top-experts svg text')].map(t => t.textContent)")
    best = open_run(pair[0]).query("top_experts", layer=0, labels="ko", n=1).project("expert").fetchall()
    assert {str(expert) for (expert,) in best} <= set(shown)
    assert report.console_errors() == []


def test_the_drawing_follows_the_layer(report):
    cells = "return [...document.querySelectorAll('#specialization svg path')].map(p => p.getAttribute('fill')).join()"
    before = report.run(cells)
    report.find("#layer").send_keys(Keys.ARROW_LEFT)
    report.wait_for("html[data-layer='0']")
    assert report.run(cells) != before


def test_the_data_of_a_figure_is_a_csv_of_all_layers(report, pair):
    report.run(
        "window.saved = []; const make = URL.createObjectURL;"
        "URL.createObjectURL = blob => { window.saved.push(blob); return make(blob); };"
    )
    report.find("#specialization [data-csv]").click()
    text = report.run("return window.saved[0].text()")
    rows = list(csv.DictReader(io.StringIO(text)))
    wanted = open_run(pair[0]).query("domain_specialization").project("layer, label, expert, value").fetchall()
    found = {(int(row["layer"]), row["label"], int(row["expert"])): float(row["value"]) for row in rows}
    assert found == {(layer, label, e): pytest.approx(value, rel=5e-4) for layer, label, e, value in wanted}
    assert not [name for name in rows[0] if name.startswith("_")]


def test_languages_can_be_coloured_and_not(report):
    legend = "return [...document.querySelectorAll('#decisiveness .role-legend-label text')].map(t => t.textContent)"
    report.find(".choice summary").send_keys(Keys.ENTER)
    report.find("input[value='ko']").send_keys(Keys.SPACE)
    report.wait(lambda: "ko" not in report.run(legend), "a legend without ko")
    report.find("input[value='ko']").send_keys(Keys.SPACE)
    report.wait(lambda: "ko" in report.run(legend), "ko in the legend")


def test_the_scheme_is_the_system_s_until_the_button_is_pressed(browser, file):
    dark = opened(browser, file, "dark")
    background = "return getComputedStyle(document.body).backgroundColor"
    assert dark.run(background) == "rgb(18, 21, 26)"
    button = dark.find("#scheme")
    assert button.get_attribute("aria-pressed") == "true"
    dark.screenshot("report-dark", whole=True)
    button.send_keys(Keys.ENTER)
    dark.wait_for("html[data-drawn='light']")
    assert button.get_attribute("aria-pressed") == "false"
    assert dark.run(background) != "rgb(18, 21, 26)"
    assert dark.console_errors() == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nobody_is_shut_out(browser, file, scheme):
    page = opened(browser, file, scheme)
    page.run("for (const details of document.querySelectorAll('details')) details.open = true")
    assert page.barriers() == []
