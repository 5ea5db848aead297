"""The explorer: what its views say is what the queries answer, and a browser can find its way through it."""

from __future__ import annotations

import dataclasses
import html.parser
import re
import socket
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import psutil
import pytest

from collector import __main__ as cli
from collector.config import DataConfig, ModelConfig
from collector.look import profile
from collector.look.explore import advice, serving, views
from collector.query.rollup import making
from collector.query.warehouse import Run, open_run
from collector.store.run_directory import RunDirectory
from collector.store.tables import Layer
from tests.helpers.browser import Browser
from tests.helpers.runs import collect_here, run_config, write_jsonl
from tests.helpers.synthetic import random_shard, write_run

LAYERS = (Layer(layer=0, n_experts=6, top_k=2), Layer(layer=3, n_experts=6, top_k=2))


class Texts(html.parser.HTMLParser):
    """The text of a fragment, tag by tag."""

    def __init__(self, fragment: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.buttons: list[dict[str, str | None]] = []
        self.feed(fragment)
        self.close()

    def handle_starttag(self, tag, attrs):
        if tag == "button":
            self.buttons.append(dict(attrs))

    def handle_data(self, data):
        self.found.append(data)


@pytest.fixture(scope="module")
def synthetic_run(tmp_path_factory) -> Run:
    rng = np.random.default_rng(3)
    shards = [random_shard(rng, LAYERS, [("en", 30), ("o'brien", 20 + n)], special=0, vocabulary=40) for n in range(4)]
    return open_run(write_run(tmp_path_factory.mktemp("explore") / "run", LAYERS, shards))


# ---- what the views say ----


def test_documents_are_those_of_the_label_for_which_the_condition_holds(synthetic_run):
    assert [(each.key, each.tokens) for each in views.documents(synthetic_run, "o'brien", "tokens > 21")] == [
        ("2.1", 22), ("3.1", 23),
    ]  # fmt: skip
    everything = views.documents(synthetic_run, "en", "  ")
    assert [each.doc_id for each in everything] == [f"synthetic#{n}-0" for n in range(4)]
    said = "(shard, doc) in (select shard, doc from labelled_tokens where position > 21) -- a comment"
    assert [each.key for each in views.documents(synthetic_run, "o'brien", said)] == ["3.1"]


@pytest.mark.parametrize(
    "condition",
    [
        "tokens >",
        "no_such_column = 1",
        "true); create table x as select 1; --",
        "shard in (from read_csv('/etc/passwd'))",
        "doc_id = getenv('HOME')",
    ],
)
def test_a_condition_reads_the_run_and_nothing_else(synthetic_run, condition):
    with pytest.raises(ValueError, match=r"\w"):
        views.documents(synthetic_run, "en", condition)


def test_the_experts_are_coloured_by_the_querys_numbers(synthetic_run):
    found = views.frequencies(synthetic_run, "decoder", 3)
    rows = synthetic_run.query("domain_specialization", layer=3).project("label, expert, value, baseline, n").fetchall()
    assert [dataclasses.astuple(each) for each in found] == rows
    shown = Texts(views.experts(found, "en", "layer 3"))
    own = [row for row in rows if row[0] == "en"]
    assert [int(button["data-expert"]) for button in shown.buttons] == [0, 1, 2, 3, 4, 5]
    for button, (_, expert, value, baseline, n) in zip(shown.buttons, own, strict=True):
        assert button["data-about"] == (f"chosen by {value:.3f} of the {n:,} tokens of en; by chance {baseline:.3f}"), (
            expert
        )


def test_a_card_says_what_the_queries_say(synthetic_run):
    found = views.frequencies(synthetic_run, "decoder", 3)
    given = {"stack": "decoder", "layer": 3, "expert": 2}
    said = " ".join(Texts(views.card(synthetic_run, found, label="en", name="layer 3", **given)).found)
    assert "Expert 2 in layer 3" in said
    for aspect, item, value in (
        synthetic_run.query("expert_profile", width=12, **given).project("aspect, item, value").fetchall()
    ):
        if aspect == "context":
            assert f"{item.replace('⟦', ' ').replace('⟧', ' ').strip()} {value:.2f}" in said
        else:
            assert re.search(rf"{re.escape(item)} {value:.3f}\b", said), (aspect, item)
    outputs = profile.outputs(synthetic_run, stack="decoder", layer=3, expert=2, n=10)
    for row in outputs["promotes"]:
        assert f"{row['token']} {row['value']:.3f} {row['n']:,}" in said
    for row in outputs["nearest_by_output"]:
        assert f"{row['other_expert']} {row['value']:.3f} {row['n']:,}" in said
    assert f"contributes {outputs['contribution']['contribution']['value']:.3f} of the layer's output" in said
    assert f"adds {outputs['direct_attribution']['value']:.3f} to the next token's logit" in said
    with pytest.raises(ValueError, match="layer 7"):
        views.card(synthetic_run, found, stack="decoder", layer=7, expert=2, label="en", name="layer 7")


def test_a_card_shows_the_expert_on_the_layer_s_map(tmp_path):
    shard = random_shard(np.random.default_rng(3), LAYERS, [("en", 30)], special=0, vocabulary=40)
    points = [
        {"stack": "decoder", "layer": 3, "method": method, "shard": 0, "tok": tok, "expert": tok % 3, "x": tok, "y": 2,
         "seed": 0, "trustworthiness": 0.5}
        for method in ("pca", "umap") for tok in range(9)
    ]  # fmt: skip
    run = open_run(write_run(tmp_path / "run", LAYERS, [shard], maps=points))
    given = {"stack": "decoder", "expert": 2, "label": "en", "name": "x"}
    shown = views.card(run, views.frequencies(run, "decoder", 3), layer=3, **given)
    assert "Map of the layer's outputs (umap), those of expert 2 in colour" in shown
    assert (shown.count('class="own"'), shown.count('class="other"')) == (3, 6)
    assert "<svg" not in views.card(run, views.frequencies(run, "decoder", 0), layer=0, **given)


def test_a_card_says_nothing_of_what_was_not_recorded(tmp_path):
    shard = random_shard(np.random.default_rng(3), LAYERS, [("en", 30)], special=0, vocabulary=40)
    run = open_run(write_run(tmp_path / "run", LAYERS, [shard], record=(), weights=None, maps=None))
    found = views.frequencies(run, "decoder", 3)
    said = " ".join(Texts(views.card(run, found, stack="decoder", layer=3, expert=2, label="en", name="x")).found)
    assert "Receives the tokens" in said
    for words in ("contributes", "Promotes", "similar", "logit"):
        assert words not in said


def test_a_card_of_a_large_run_is_made_from_shards_all_over_it(synthetic_run, monkeypatch):
    assert views.sampling(synthetic_run) == 1
    monkeypatch.setattr(views, "SAMPLE", 100)
    assert views.sampling(synthetic_run) == 2
    found = views.frequencies(synthetic_run, "decoder", 0)
    card = views.card(synthetic_run, found, stack="decoder", layer=0, expert=2, label="en", name="layer 0")
    assert "102 tokens, of one shard in 2;" in card
    monkeypatch.setattr(views, "SAMPLE", 1)
    assert views.sampling(synthetic_run) == 4, "one shard at least"


def test_a_large_run_without_a_rollup_is_told_to_make_one(tmp_path, monkeypatch):
    shard = random_shard(np.random.default_rng(5), LAYERS, [("en", 30)], special=0, vocabulary=40)
    root = str(write_run(tmp_path / "a run", LAYERS, [shard]))
    assert advice.slow(root) == "", "30 tokens are counted at once"
    monkeypatch.setattr(advice, "LARGE", 30)
    assert "30 tokens and no current rollup" in advice.slow(root)
    assert f"`collector rollup '{root}'`" in advice.slow(root)
    making.make(RunDirectory(root))
    assert advice.slow(root) == ""


def row_groups(run: Run, name: str, **params: object) -> list[tuple[int, int]]:
    """(read, there) of each Parquet scan of a query."""
    from collector.query.catalog import find_query

    query = find_query(name)
    profile = run.connection.cursor().sql(f"explain analyze {query.sql}", params=query.bind(params)).fetchall()[0][1]
    return [(int(a), int(b)) for a, b in re.findall(r"Row Groups Scanned: (\d+) / (\d+)", profile)]


@pytest.fixture(scope="module")
def many_shards(tmp_path_factory) -> Run:
    rng = np.random.default_rng(4)
    shard = random_shard(rng, LAYERS, [("en", 8), ("ko", 8)], special=0, vocabulary=40)
    return open_run(write_run(tmp_path_factory.mktemp("many") / "run", LAYERS, [shard] * 24))


def test_a_document_is_read_from_its_own_row_groups(many_shards):
    read = row_groups(many_shards, "token_trace", stack="decoder", layer=3, shard=17, doc=1)
    routing = [scan for scan in read if scan[1] == 48]
    assert routing == [(1, 48)]
    assert {scan for scan in read if scan[1] == 24} == {(1, 24)}


def test_a_sample_is_read_from_its_own_row_groups(many_shards):
    read = row_groups(many_shards, "expert_profile", stack="decoder", layer=3, expert=2, every=6)
    assert (4, 48) in read, "routing"
    assert {scan for scan in read if scan[1] == 24} >= {(4, 24)}, "tokens"


# ---- the server ----


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_folder, tiny_model) -> Path:
    folder = tmp_path_factory.mktemp("explored")
    data = DataConfig(data=(str(write_jsonl(folder / "texts.jsonl", 24, labels=("en", "ko", "he"))),), docs_per_shard=8)
    collect_here(folder / "run", run_config(data, ModelConfig(model=str(tiny_folder))), loaded=tiny_model)
    return folder / "run"


@pytest.fixture(scope="module")
def server(run_folder):
    with serving.served(str(run_folder)) as (url, process):
        yield url, process


@pytest.mark.slow
def test_only_this_machine_and_only_with_the_token(server):
    url, process = server
    parts = urlsplit(url)
    token = parse_qs(parts.query)["access_token"][0]
    assert len(token) >= 20
    family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    listening = {c.laddr for each in family for c in each.net_connections("inet") if c.status == psutil.CONN_LISTEN}
    assert {address.ip for address in listening} == {"127.0.0.1"}
    assert not any(token in argument for each in family for argument in each.cmdline())
    for path in ("/", "/?access_token=wrong"):
        with urllib.request.urlopen(f"http://{parts.netloc}{path}") as answer:
            assert "/auth/login" in answer.url
    with pytest.raises(urllib.error.HTTPError, match=r"401|403"):
        urllib.request.urlopen(urllib.request.Request(f"http://{parts.netloc}/api/status", method="GET"))


def test_what_cannot_be_served_is_refused(tmp_path, run_folder):
    with pytest.raises(FileNotFoundError, match="no run"), serving.served(str(tmp_path)):
        pass
    write_run(tmp_path / "empty", LAYERS, [], complete=False)
    with pytest.raises(ValueError, match="no document yet"), serving.served(str(tmp_path / "empty")):
        pass
    with socket.socket() as taken:
        taken.bind((serving.HOST, 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValueError, match=f"--port {port}"), serving.served(str(run_folder), port):
            pass


def test_the_command_is_there():
    assert cli.parse(["explore", "runs/demo", "--port", "8000", "--no-browser"]) == cli.Explore(
        run_="runs/demo", port=8000, browser=False
    )


# ---- in a browser ----

# marimo preloads pictures that it shows only when the server is gone.
OF_MARIMO = re.compile(r"was preloaded using link preload but not used")
# The menu button of marimo's own frame has no name.
FRAME = re.compile(r"button-name .*aria-haspopup=\"menu\"")


def at(browser: Browser, url: str) -> None:
    browser.open(url)
    browser.page.locator("[data-part=card] h2").wait_for(timeout=60_000)


def state(browser: Browser) -> dict[str, str]:
    return {key: values[0] for key, values in parse_qs(urlsplit(browser.page.url).query).items()}


def chosen(browser: Browser, expert: int, layer: int) -> None:
    """Waits for the card of this expert."""
    browser.page.locator("[data-part=card] h2", has_text=f"Expert {expert} in layer {layer}").wait_for(timeout=30_000)


@pytest.mark.slow
def test_a_researcher_finds_the_tokens_behind_an_expert(server, run_folder, browser):
    run = open_run(run_folder)
    url, _ = server
    at(browser, f"{url}&language=ko&layer=0&document=1.2")
    page = browser.page
    traced = run.query("token_trace", layer=0, shard=1, doc=2, include_special=True).project("expert").fetchall()
    shown = page.locator(".tokens button")
    assert [int(each.get_attribute("data-expert")) for each in shown.all()] == [expert for (expert,) in traced]
    browser.screenshot("explorer-light", whole=True)

    page.get_by_role("slider").press("ArrowRight")
    page.locator("h2", has_text="Experts of layer 1").wait_for()
    page.get_by_role("group", name="Experts", exact=True).get_by_role("button").nth(4).click()
    chosen(browser, 4, 1)
    page.wait_for_function("location.search.includes('expert=4')")
    wanted = {"language": "ko", "stack": "decoder", "layer": "1", "by": "expert", "document": "1.2", "expert": "4"}
    assert state(browser) == wanted
    shown.nth(3).hover()
    assert page.get_by_role("tooltip").locator("div").count() == 2, "the k experts"
    marked = page.locator(".tokens button[aria-pressed=true]").all()
    assert {each.get_attribute("data-expert") for each in marked} <= {"4"}

    at(browser, f"{url}&{urlsplit(page.url).query}")
    chosen(browser, 4, 1)
    assert state(browser)["document"] == "1.2"
    assert all(urlsplit(asked).hostname == "127.0.0.1" for asked in browser.requests())
    assert [said for said in browser.errors if not OF_MARIMO.search(said)] == []


@pytest.mark.slow
def test_a_keyboard_is_enough(server, browser):
    url, _ = server
    at(browser, f"{url}&language=en&layer=1")
    page = browser.page
    tokens = page.locator(".tokens button")
    assert sum(each.get_attribute("tabindex") == "0" for each in tokens.all()) == 1
    tokens.first.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    expert = tokens.nth(2).get_attribute("data-expert")
    tip = page.get_by_role("tooltip")
    picks = tokens.nth(2).get_attribute("data-picks").split()
    assert [int(row.split()[0]) for row in tip.locator("div").all_inner_texts()] == [
        int(pick.split(":")[0]) for pick in sorted(picks, key=lambda pick: -float(pick.split(":")[1]))
    ]
    page.keyboard.press("Escape")
    assert tip.count() == 0 or not tip.is_visible()
    page.keyboard.press("Enter")
    chosen(browser, int(expert), 1)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_no_barriers_but_those_of_the_frame(server, browser, scheme):
    browser.prefer(scheme)
    url, _ = server
    at(browser, f"{url}&language=he&layer=2&by=entropy")
    assert browser.page.locator(".tokens[dir=rtl]").count() == 1
    assert [found for found in browser.barriers() if not FRAME.search(found)] == []
    browser.screenshot(f"explorer-{scheme}", whole=True)


@pytest.mark.slow
def test_documents_are_filtered_and_mistakes_told(server, browser):
    url, _ = server
    at(browser, f"{url}&language=en&where=doc+%3D+2+and+shard+%3D+2")
    assert state(browser)["document"] == "2.2"
    at(browser, f"{url}&language=en&where=tokens+%3E")
    assert "yntax" in browser.page.get_by_role("alert").inner_text()
