"""One text token by token: what is told is what the model did, and it can be read wherever it is shown."""

from __future__ import annotations

import html.parser
import io
import itertools
import math
import re
import subprocess
import sys
import unicodedata

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from collector import __main__ as cli
from collector.config import CaptureConfig, ModelConfig
from collector.look.trace import Decision, Router, Token, Trace, collecting, page, palette, pieces, printing, read
from tests.helpers.command_line import collector

HEBREW = "שלום עולם"
HINDI = "क्षमा कीजिए"
NOTHING_HIDDEN = re.compile(r"[^\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]*")


def traced(text: str, model: ModelConfig, loaded=None, **capture: object) -> Trace:
    with collecting.collected(text, model, CaptureConfig(**capture), "cpu", loaded=loaded) as run:
        return read(run)


def made(texts: list[str], experts: list[int], layer: int = 3) -> Router:
    """A router over 64 experts that chose two for each token: the given one and the next."""
    return Router(
        stack="decoder", layer=layer, n_experts=64,
        tokens=tuple(Token(position=i, piece=pieces.visible(t), text=pieces.visible(t), is_special=False)
                     for i, t in enumerate(texts)),
        decisions=tuple(
            Decision(expert=e, experts=((e + 1) % 64, e), weights=(0.2, 0.6), entropy=0.5 + i, dropped=0)
            for i, e in enumerate(experts)
        ),
    )  # fmt: skip


def printed(trace: Trace, width: int = 80, **console: object) -> str:
    out = io.StringIO()
    printing.show(trace, Console(file=out, width=width, highlight=False, **console), "title")
    return out.getvalue()


# ---- what is told is what the model did ----


def test_a_trace_is_what_the_model_routes(tiny_folder, tiny_model):
    text = "The quick brown fox 여우"
    trace = traced(text, ModelConfig(model=str(tiny_folder)), tiny_model)
    ids = tiny_model.tokenizer(text)["input_ids"]
    with torch.no_grad():
        logits = tiny_model.model(torch.tensor([ids]), output_router_logits=True).router_logits
    assert [router.layer for router in trace.routers] == [0, 1, 2]
    for router, layer_logits in zip(trace.routers, logits, strict=True):
        p_te = layer_logits.float().softmax(-1).numpy()
        assert len(router.tokens) == len(ids)
        assert [token.position for token in router.tokens] == list(range(len(ids)))
        assert [token.is_special for token in router.tokens] == [True] + [False] * (len(ids) - 1)
        assert [each.expert for each in router.decisions] == p_te.argmax(1).tolist()
        np.testing.assert_allclose([each.weight for each in router.decisions], p_te.max(1), rtol=1e-5)
        entropy = -(p_te * np.log(p_te)).sum(1)
        np.testing.assert_allclose([each.entropy for each in router.decisions], entropy, rtol=1e-3)
        top2 = [set(each.experts) for each in router.decisions]
        assert top2 == [set(row) for row in np.argsort(-p_te, axis=1)[:, :2].tolist()]


def test_layers_are_chosen_and_long_texts_cut(tiny_folder, tiny_model):
    model = ModelConfig(model=str(tiny_folder))
    trace = traced("one two three", model, tiny_model, layers=(1,), max_length=3)
    assert [(router.layer, len(router.tokens)) for router in trace.routers] == [(1, 3)]
    for words, cut in (("one", False), ("one two three", True)):
        with collecting.collected(words, model, CaptureConfig(max_length=3), "cpu", loaded=tiny_model) as run:
            assert collecting.was_cut(run) is cut


@pytest.mark.parametrize(("text", "reason"), [("", "empty text"), (" \n", "empty text"), ("\udcff", "invalid UTF-8")])
def test_what_is_no_text_is_refused(text, reason, tiny_folder, tiny_model):
    with pytest.raises(ValueError, match=reason):
        traced(text, ModelConfig(model=str(tiny_folder)), tiny_model)


def test_a_layer_that_the_model_lacks_is_refused(tiny_folder, tiny_model):
    with pytest.raises(ValueError, match="9"):
        traced("one", ModelConfig(model=str(tiny_folder)), tiny_model, layers=(9,))


# ---- pieces ----


@pytest.mark.parametrize(
    ("token", "shown"),
    [
        (" fox", " fox"),
        ("<E3><81>", "<E3><81>"),
        ("\n", "⏎"),
        ("\t\r", "⇥␍"),
        ("\x1b[31m", "<U+001B>[31m"),
        ("\u202e", "<U+202E>"),
        ("\u00a0", "<U+00A0>"),
        ("ि", "◌ि"),
        ("क्\u200dष", "क्\u200dष"),
        ("\u200d", "<U+200D>"),
        ("", "#17"),
        (None, "#17"),
    ],
)
def test_a_piece_is_shown_as(token, shown):
    assert pieces.visible(token, 17) == shown


def test_bytes_are_read_on_until_they_are_a_character():
    spelled = [" ab", "<20><EC><97>", "<AC>", "<D7><90><D7>", "<A0>c", None, "<AC>", "<EC>", "x", "<EC>"]
    assert list(pieces.read_on(spelled)) == [
        " ab",
        " ‥",
        "여",
        "א‥",
        "\ufffd<A0>c",
        None,
        "\ufffd",
        "‥",
        "\ufffdx",
        "‥",
    ]
    assert pieces.in_context("<AC>a<EC>", "<97><AC>", "<20>b<EC>") == ("‥a‥", "여", " b‥")


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(alphabet=st.characters(exclude_categories=["Cs"])), st.data())
def test_cut_anywhere_a_text_reads_on_to_itself(text, data):
    raw = text.encode()
    cuts = sorted(data.draw(st.sets(st.integers(1, max(1, len(raw) - 1)))) & set(range(1, len(raw))))
    spelled = ["".join(f"<{b:02X}>" for b in raw[a:b]) for a, b in itertools.pairwise([0, *cuts, len(raw)]) if a < b]
    assert "".join(piece.removesuffix("‥") for piece in pieces.read_on(spelled)) == text.removesuffix("‥")
    assert "".join(pieces.in_context("", "".join(spelled), "")).replace("‥", "") == text.replace("‥", "")


def test_a_piece_without_spelling_and_id_is_shown_as_nothing():
    assert pieces.visible(None) == "∅"


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.text(min_size=1))
@example("\u2067א")
def test_no_piece_acts_on_what_is_around_it(token):
    shown = pieces.visible(token)
    assert NOTHING_HIDDEN.fullmatch(shown)
    assert cell_len(shown) > 0
    assert not unicodedata.category(shown[0]).startswith("M")


@pytest.mark.parametrize(
    ("text", "expected"), [("12 שלום a", True), ("שלום Wikipedia", False), ("12", False), ("مرحبا", True)]
)
def test_most_letters_give_the_direction(text, expected):
    assert pieces.is_right_to_left(text) is expected


@pytest.mark.parametrize(("piece", "name"), [(" a b", "␣a b"), ("  ", "␣␣"), ("a ", "a␣"), ("a", "a")])
def test_spaces_at_the_ends_are_spelled(piece, name):
    assert pieces.spelled(piece) == name


# ---- colours ----


def linear(colour: str) -> np.ndarray:
    s = np.array(list(bytes.fromhex(colour[1:]))) / 255
    return np.where(s <= 0.04045, s / 12.92, ((s + 0.055) / 1.055) ** 2.4)


def lab(rgb: np.ndarray) -> np.ndarray:
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ rgb
    f = np.cbrt(np.clip(xyz / [0.9505, 1, 1.089], 216 / 24389, None))
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


# Machado, Oliveira and Fernandes 2009, severity 1
DEFICIENCIES = {
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "none": np.eye(3),
}


@pytest.mark.parametrize("matrix", DEFICIENCIES.values(), ids=DEFICIENCIES.keys())
def test_the_experts_colours_differ_for_all_eyes(matrix):
    seen = [lab(np.clip(np.array(matrix) @ linear(colour), 0, 1)) for colour in (*palette.EXPERTS, palette.OTHERS)]
    assert min(np.linalg.norm(a - b) for a, b in itertools.combinations(seen, 2)) > 7


def test_letters_can_be_read_on_every_colour():
    for colour in (*palette.EXPERTS, palette.OTHERS, *(palette.along(x, 0, 1) for x in np.linspace(0, 1, 21))):
        luminance = linear(colour) @ [0.2126, 0.7152, 0.0722]
        assert (luminance + 0.05) / 0.05 >= 7, colour


def test_the_most_frequent_experts_have_the_colours():
    colours = palette.by_frequency([5, 5, 5, 2, 2, 9, 9, *range(20, 40)])
    assert [colours[expert] for expert in (5, 2, 9)] == list(palette.EXPERTS[:3])
    assert [colours[expert] for expert in (24, 25, 39)] == [palette.EXPERTS[7], palette.OTHERS, palette.OTHERS]


def test_the_ramp_ends_where_the_values_do():
    assert palette.along(1, 1, 3) == "#FFFFE5"
    assert palette.along(3, 1, 3) == palette.along(9, 1, 3) == palette.along(2, 2, 2) == "#FB9A29"
    darkness = [sum(bytes.fromhex(palette.along(x, 0, 1)[1:])) for x in np.linspace(0, 1, 9)]
    assert darkness == sorted(darkness, reverse=True)


# ---- in the terminal ----


def test_without_colours_the_numbers_stand_in_brackets():
    router = made(["The", " fox", "es", "\n", "run"], [7, 61, 7, 0, 3])
    text = printed(Trace(document="d", label="x", routers=(router,)))
    assert "layer 3\nThe[7] fox[61]es[7]⏎[0]\nrun[3]\n" in text
    assert re.search(r"1 +␣fox +61 0\.60 1\.50 *\n", text)
    assert "\x1b" not in text


def test_with_colours_tokens_with_the_same_expert_have_the_same():
    trace = Trace(document="d", label="x", routers=(made(["The", " fox", "es"], [7, 61, 7]),))
    text = printed(trace, force_terminal=True, color_system="truecolor", no_color=False)
    first, second = (";".join(map(str, bytes.fromhex(c[1:]))) for c in palette.EXPERTS[:2])
    between = r"\x1b\[0m\x1b\[[\d;]*48;2;"
    assert re.search(rf"48;2;{first}mThe₇{between}{second}m fox₆₁{between}{first}mes₇", text)


def test_a_line_is_broken_between_tokens_and_never_inside():
    texts = [f"성{i}" for i in range(40)]
    trace = Trace(document="d", label="x", routers=(made(texts, [i % 64 for i in range(40)]),))
    lines = printed(trace, 30).splitlines()
    shown = lines[lines.index("layer 3") + 1 : lines.index("", lines.index("layer 3"))]
    assert all(cell_len(line) <= 30 and line.endswith("]") for line in shown)
    assert "".join(shown) == "".join(f"{t}[{i % 64}]" for i, t in enumerate(texts))


def test_a_narrow_terminal_gets_the_routers_in_several_tables():
    routers = tuple(made(["a", "b"], [1, 2], layer=layer) for layer in range(6))
    text = printed(Trace(document="d", label="x", routers=routers), 50)
    rows = [line.split() for line in text.splitlines() if re.match(r" *0 +a ", line)]
    assert len(rows) > 1
    assert sum(row.count("1") for row in rows) == 6
    assert max(map(cell_len, text.splitlines())) <= 90


def test_numbers_beside_a_word_from_right_to_left_stay_where_they_are():
    text = printed(Trace(document="d", label="x", routers=(made(HEBREW.split(), [1, 2]),)))
    assert re.search(r"0 +שלום\u200e +1 0\.60", text)


@pytest.mark.parametrize("words", [HEBREW, HINDI, "ဟယ်လို 😀 \x1b[31m\u202e 좋아요"])
def test_every_script_comes_through_the_demo_model(words, demo_model):
    trace = traced(words, ModelConfig(dtype="float32"), demo_model, layers=(4,))
    text = printed(trace)
    assert NOTHING_HIDDEN.fullmatch(text.replace("\n", ""))
    numbers = [int(n) for n in re.findall(r"\[(\d+)\]", text.split("layer 4")[1].split("\n\n")[0])]
    assert numbers == [each.expert for each in trace.routers[0].decisions]


# ---- the command ----


@pytest.mark.slow
def test_the_command_prints_the_trace_and_writes_the_page(tmp_path, tiny_folder):
    """In a process of its own, where nothing else may speak."""
    done = subprocess.run(
        [sys.executable, "-m", "collector", "trace", "Hello world", "--model", str(tiny_folder), "--layers", "1",
         "--html", str(tmp_path / "trace.html"), "--device", "cpu"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "top-2 of 6" in done.stdout
    line = done.stdout.split("\nlayer 1\n")[1].split("\n")[0]
    assert re.sub(r"\[\d\]", "", line) == "<|bos|>Hello world"
    assert "layer 0" not in done.stdout
    assert "\x1b" not in done.stdout
    tokens = Page((tmp_path / "trace.html").read_text(encoding="utf-8")).with_attribute("data-token")
    assert "".join(each["data-token"].split("  ", 1)[1] for each in tokens) == "<|bos|>Hello world"


def test_the_command_reads_standard_input_and_is_bold_without_colour_where_colour_is_unwanted(tiny_folder, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    forced = collector("trace", "-", "--model", str(tiny_folder), "--device", "cpu", stdin="Hello")
    assert re.search(r"\n<\|bos\|>\[\d\]", forced.stdout)
    assert ";2;" not in forced.stdout, "no colour, though bold"


def test_the_command_refuses_in_one_line(tiny_folder):
    done = collector("trace", "", "--model", str(tiny_folder), "--device", "cpu")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1] == "collector: nothing to trace in '': empty text"
    assert "Traceback" not in done.stderr


def test_the_command_takes_the_model_flags_of_collect():
    command = cli.parse(["trace", "a text", "--weights", "random", "--seed", "3", "--quantization", "nf4"])
    assert command.model == ModelConfig(weights="random", seed=3, quantization="nf4")


# ---- the page ----


class Page(html.parser.HTMLParser):
    """What a page holds."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def with_attribute(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.tags if name in attributes]


def test_the_page_holds_every_token_with_its_experts_and_loads_nothing():
    texts = ["<script>alert(1)</script>", ' "quoted"', HEBREW, "&amp;"]
    routers = (made(texts, [7, 61, 7, 3]), made(texts, [1, 2, 3, 4], layer=5))
    written = page.page(Trace(document="d", label="x", routers=routers), "a <title>")
    found = Page(written)
    tokens = found.with_attribute("data-token")
    assert [each["data-token"] for each in tokens] == [f"{i}  {text}" for i, text in enumerate(texts)] * 2
    assert [int(each["data-expert"]) for each in tokens] == [7, 61, 7, 3, 1, 2, 3, 4]
    assert tokens[0]["data-picks"] == "8:0.2 7:0.6"
    assert "&lt;script&gt;alert" in written
    assert sum(tag == "script" for tag, _ in found.tags) == 1
    assert not found.with_attribute("src")
    assert not found.with_attribute("href")
    assert "://" not in written.replace("http://www.w3.org", "")


def test_the_page_runs_in_the_direction_of_the_text():
    for text, direction in ((HEBREW, "rtl"), ("a long word " + HEBREW, "ltr")):
        trace = Trace(document="d", label="x", routers=(made([text], [1]),))
        assert [each["dir"] for each in Page(page.page(trace, "t")).with_attribute("dir")] == [direction]


def test_scales_reach_from_the_lowest_to_the_highest_of_all_routers():
    trace = Trace(document="d", label="x", routers=(made(["a", "b"], [1, 2]), made(["a", "b"], [1, 2], layer=4)))
    assert page.Scales.of(trace) == page.Scales(weight=(0.6, 0.6), entropy=(0.5, 1.5))
    assert math.isclose(0.6, trace.routers[0].decisions[0].weight)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_can_be_used_by_everybody(tmp_path, browser, scheme):
    texts = ["The", " fox", "es", "\n", " run"]
    routers = (made(texts, [7, 61, 7, 0, 3]), made(texts, [1, 2, 3, 4, 5], layer=5))
    file = tmp_path / "trace.html"
    file.write_text(page.page(Trace(document="d", label="x", routers=routers), "a model"), encoding="utf-8")
    browser.prefer(scheme)
    browser.open(file)
    first = browser.page.get_by_role("group", name="Tokens of layer 3").get_by_role("button")
    first.first.focus()
    browser.page.keyboard.press("End")
    browser.page.keyboard.press("ArrowUp")
    browser.page.keyboard.press("ArrowRight")
    browser.page.keyboard.press("ArrowRight")
    browser.page.keyboard.press("Enter")
    assert [each.get_attribute("aria-pressed") == "true" for each in first.all()] == [True, False, True, False, False]
    assert [each.get_attribute("data-is") for each in first.all()] == ["first", "", "first", "", ""]
    told = " ".join(browser.page.get_by_role("tooltip").inner_text().split())
    assert told == "2 es 7 0.600 8 0.200 router entropy 2.50 of 4.16 nats"
    browser.page.get_by_label("entropy", exact=True).check()
    background = "getComputedStyle(document.querySelector('.tokens button')).backgroundColor"
    assert browser.page.evaluate(background) == "rgb(255, 255, 229)", "the lowest entropy of the page"
    assert browser.barriers() == []
    assert browser.errors == []
    assert browser.requests() == []
    browser.screenshot(f"trace-{scheme}", whole=True)
