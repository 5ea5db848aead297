"""The report: its numbers are the queries', it stands alone, any run has one. test_report_page opens it."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
import struct
import subprocess
import sys
from html import unescape
from pathlib import Path

import numpy as np
import pytest

from collector.look.report import write
from collector.query import inference
from collector.query.document_counts import document_counts
from collector.query.warehouse import list_queries, open_run
from collector.store.run_directory import SUCCESS, RunDirectory
from collector.store.tables import Layer
from tests.helpers.query_runs import opened_once
from tests.helpers.report_runs import LABELS, collect_pair, payload, synthetic_run
from tests.helpers.synthetic import Shard, random_shard

FIGURES = {
    "specialization", "specialization-compared", "top-experts", "divergence-by-layer", "overlap", "decisiveness",
    "effective-experts", "load", "load-by-layer", "coactivation", "vocabulary-by-layer", "vocabulary",
    "contribution", "output-similarity", "weight-similarity", "map",
}  # fmt: skip
RESAMPLES = 20
TEXT_WIDTH, COLUMN_WIDTH = 6.75 * 72, 3.3 * 72
"""Points: the text of a page of two columns, and one of these."""
ONE_PANEL = {"divergence-by-layer", "effective-experts", "contribution", "loss"}


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_folder) -> tuple[Path, Path]:
    return collect_pair(tmp_path_factory.mktemp("report"), str(tiny_folder))


@pytest.fixture(scope="module")
def page(pair, tmp_path_factory) -> str:
    out = tmp_path_factory.mktemp("page") / "report.html"
    assert write(str(pair[0]), out, compare=str(pair[1]), resamples=RESAMPLES) == [out]
    return out.read_text(encoding="utf-8")


# ---- the numbers ----


@pytest.mark.parametrize(
    ("figure", "query", "keys", "where"),
    [
        ("specialization", "domain_specialization", ("label", "expert"), "true"),
        ("overlap", "language_overlap", ("label_a", "label_b"), "metric = 'jsd'"),
        ("coactivation", "coactivation", ("expert", "other_expert"), "true"),
        ("output-similarity", "expert_similarity", ("expert", "other_expert"), "true"),
    ],
)
def test_every_cell_is_the_query_s(page, pair, figure, query, keys, where):
    data = payload(page)
    tables = data["tables"][f"{figure}/rows"]
    shown = {
        (router["layer"], *cells): value
        for router, columns in zip(data["routers"], tables, strict=True)
        for *cells, value in zip(*(columns[key] for key in keys), columns["value"], strict=True)
    }
    rows = opened_once(pair[0]).query(query).filter(where).project(f"layer, {', '.join(keys)}, value").fetchall()
    assert len(shown) == len(rows) > 0
    for *cells, value in rows:
        assert shown[tuple(cells)] == pytest.approx(value, rel=5e-4)


def test_both_runs_are_told_apart(page, pair):
    columns = payload(page)["tables"]["divergence-by-layer/rows"]
    assert set(columns["run"]) == {"pretrained weights", "random weights"}
    for run, folder in zip(("pretrained weights", "random weights"), pair, strict=True):
        shown = [value for name, value in zip(columns["run"], columns["value"], strict=True) if name == run]
        wanted = [value for (value,) in open_run(folder).query("language_divergence").project("value").fetchall()]
        assert shown == pytest.approx(wanted, rel=5e-4)


def test_intervals_and_q_values_are_those_of_the_inference(page, pair):
    tables, run = payload(page)["tables"], open_run(pair[0])
    for figure, query, metrics in (
        ("effective-experts", "effective_experts", ["effective_experts"]),
        ("decisiveness", "router_entropy", ["router_entropy", "topk_mass"]),
    ):
        columns = tables[f"{figure}/rows"]
        rows = inference.intervals(run, query, resamples=RESAMPLES).to_pylist()
        main = [name == "pretrained weights" for name in columns["run"]]
        for name in ("low", "high"):
            wanted = [row[name] for row in rows if row["metric"] in metrics]
            assert [cell for cell, own in zip(columns[name], main, strict=True) if own] == pytest.approx(
                wanted, rel=5e-4
            )
            assert {cell for cell, own in zip(columns[name], main, strict=True) if not own} == {None}
    test = inference.specialization_test(document_counts(run), resamples=RESAMPLES)
    keys = zip(*(test[name].to_pylist() for name in ("layer", "label", "expert")), strict=True)
    q = dict(zip(keys, test["q"].to_pylist(), strict=True))
    for layer, part in enumerate(tables["specialization/rows"]):
        cells = zip(part["label"], part["expert"], part["q"], strict=True)
        assert all(value == pytest.approx(q[layer, label, expert], rel=5e-4) for label, expert, value in cells)
    assert f"collector test {pair[0]} --resamples {RESAMPLES}" in page
    assert f"--interval 95 --resamples {RESAMPLES}" in page


def test_languages_and_experts_keep_their_rows_whatever_the_order(page):
    for columns in payload(page)["tables"]["specialization/rows"]:
        for name, place in (("label", "_row"), ("expert", "_column")):
            pairs = set(zip(columns[name], columns[place], strict=True))
            assert len(pairs) == len({item for item, _ in pairs}) == len({at for _, at in pairs})
            assert sorted(at for _, at in pairs) == list(range(len(pairs)))


def test_contribution_stands_beside_frequency(page, pair):
    data, run = payload(page), open_run(pair[0])
    chosen = {row[:2]: row[2] for row in run.query("expert_load").project("layer, expert, value").fetchall()}
    pooled = run.query("expert_contribution", pooled=True).filter("metric = 'contribution'")
    given = {row[:2]: row[2] for row in pooled.project("layer, expert, value").fetchall()}
    for router, columns in zip(data["routers"], data["tables"]["contribution/rows"], strict=True):
        for expert, frequency, value in zip(*(columns[x] for x in ("expert", "frequency", "value")), strict=True):
            assert frequency == pytest.approx(chosen[router["layer"], expert], rel=5e-4)
            assert value == pytest.approx(given[router["layer"], expert], rel=5e-4)


def test_weights_are_in_the_order_of_outputs(page):
    data = payload(page)
    for outputs, weights in zip(
        *(data["tables"][f"{name}-similarity/rows"] for name in ("output", "weight")), strict=True
    ):
        places = [set(zip(table["expert"], table["_row"], strict=True)) for table in (outputs, weights)]
        assert places[0] == places[1]


def test_only_the_mapped_layer_has_a_map(page):
    data = payload(page)
    columns = data["tables"]["map/rows"]
    assert set(columns["layer"]) == {2}
    assert len(columns["x"]) > 20
    assert f"layer 2: principal components, {len(columns['x'])} outputs, trustworthiness 0." in page


@pytest.fixture(scope="module")
def intervened(tmp_path_factory, pair):
    """A run with arms, some of them with controls, and its report."""
    layers = [Layer(layer=0, n_experts=40, top_k=2), Layer(layer=1, n_experts=40, top_k=2)]
    documents = [(label, 20) for label in ("en", "ko", "bg") for _ in range(4)]
    shard = random_shard(np.random.default_rng(0), layers, documents=documents)
    folder = tmp_path_factory.mktemp("intervened") / "run"
    text, data = report_of(synthetic_run(folder, layers, [shard], card=pair[0]))
    return open_run(folder), text, data


def test_effects_are_the_query_s(intervened):
    run, text, data = intervened
    columns = data["tables"]["effects/rows"]
    rows = run.query("expert_effect").filter("metric = 'nats_per_token'").project("arm, label, value, baseline, q")
    wanted = {row[:2]: row[2:] for row in rows.fetchall()}
    shown = list(zip(*(columns[name] for name in ("arm", "label", "value", "baseline", "q")), strict=True))
    assert len(shown) == len(wanted) == 3 * 26
    for arm, label, value, baseline, q in shown:
        assert (value, baseline) == pytest.approx(wanted[arm, label][:2], rel=5e-4)
        assert q == (None if wanted[arm, label][2] is None else pytest.approx(wanted[arm, label][2], rel=5e-4))
    assert "A dot marks effects that differ from those" in text
    assert "What experts cause" in text


def test_controls_stand_beside_their_arm(intervened):
    run, text, data = intervened
    rows, cloud = (data["tables"][f"controls/{name}"] for name in ("rows", "cloud"))
    of = {("ko", "ko"), *(pair for pair in zip(rows["arm"], rows["label"], strict=True) if pair[0] == "no-1")}
    found = run.query("control_effects").filter("control > 0").project("arm, label, control, value").fetchall()
    wanted = {row[:3]: row[3] for row in found if row[:2] in of}
    shown = dict(
        zip(zip(*(cloud[name] for name in ("arm", "label", "control")), strict=True), cloud["value"], strict=True)
    )
    assert shown == pytest.approx(wanted, rel=5e-4)
    assert len(shown) == 6
    places = dict(zip(rows["arm"], rows["_row"], strict=True))
    assert {places[arm] for arm in cloud["arm"]} == set(cloud["_row"])
    assert "up to 4 controls of each arm" in text


def test_agreement_is_the_query_s(intervened):
    run, _, data = intervened
    columns = data["tables"]["agreement/rows"]
    rows = (
        run.query("importance_agreement", pooled=True).filter("metric = 'spearman'").project("observed, layer, value")
    )
    wanted = {row[:2]: row[2] for row in rows.fetchall()}
    keys = zip(columns["observed"], map(int, columns["router"]), strict=True)
    assert dict(zip(keys, columns["value"], strict=True)) == pytest.approx(wanted, rel=5e-4)


def test_a_run_without_controls_says_so(tmp_path, pair):
    layers = [Layer(layer=0, n_experts=4, top_k=2)]
    shard = random_shard(np.random.default_rng(0), layers, documents=[("en", 20), ("bg", 9), ("en", 9), ("bg", 12)])
    shard = dataclasses.replace(shard, arms=[row for row in shard.arms if row["control"] == 0])
    text, data = report_of(synthetic_run(tmp_path / "run", layers, [shard], card=pair[0]))
    assert "The run has no controls" in text
    assert len(data["tables"]["controls/cloud"]["value"]) == 0
    assert "A dot marks effects" not in text


def test_the_loss_is_the_query_s_from_the_best_to_the_worst(tmp_path, pair):
    layers = [Layer(layer=0, n_experts=4, top_k=2)]
    shard = random_shard(np.random.default_rng(0), layers, [(label, 9) for label in ("en", "ko", "th") * 3])
    _, data = report_of(synthetic_run(tmp_path / "run", layers, [shard], card=pair[0]), resamples=20)
    columns = data["tables"]["loss/rows"]
    rows = open_run(tmp_path / "run").query("loss").filter("metric = 'bits_per_character'").project("label, value")
    assert dict(zip(columns["label"], columns["value"], strict=True)) == pytest.approx(dict(rows.fetchall()), rel=5e-4)
    order = sorted(zip(columns["_row"], columns["value"], strict=True))
    assert [value for _, value in order] == sorted(columns["value"])
    assert all(low <= high for low, high in zip(columns["low"], columns["high"], strict=True))


def test_each_figure_has_its_sql_and_a_command_that_runs(page, pair):
    queries = {query.name: query for query in list_queries()}
    commands = re.findall(r'data-command="collector query \S+ (\w+)([^"]*)"( data-by-layer)?', page)
    assert len(commands) >= len(FIGURES)
    for name, options, by_layer in set(commands):
        assert queries[name].sql in unescape(page)
        given = dict(re.findall(r"--(\S+) (\S+)", re.sub(r"--interval.*", "", unescape(options))))
        rows = opened_once(pair[0]).query(name, **given, **({"layer": 2} if by_layer else {}))
        assert rows.limit(1).fetchall(), name


def test_the_card_says_what_was_run(page, tiny_folder):
    for fact in (
        str(tiny_folder),
        "padding efficiency",
        "in float32",
        "torch 2",
        "fingerprint",
        "3 layers, top-2 of 6",
    ):
        assert fact in unescape(page), fact
    for label in LABELS:
        assert re.search(rf'<th scope="row">{label}</th><td>10</td>', page)


def test_what_two_runs_share_is_said_once(page):
    cells = dict(re.findall(r'<tr><th scope="row">([\w -]+)</th>(<td.*?)</tr>', page))
    assert re.findall(r"<td[^>]*>", cells["documents"]) == ['<td colspan="2">']
    assert re.findall(r">(\w+), fingerprint", cells["weights"]) == ["pretrained", "random"]


def test_words_stand_in_the_row_of_their_expert(page, pair):
    tables = payload(page)["tables"]
    for layer, (bars, words) in enumerate(zip(tables["vocabulary/rows"], tables["vocabulary/words"], strict=True)):
        row_of = dict(zip(bars["expert"], bars["_row"], strict=True))
        assert set(words["expert"]) == set(row_of)
        assert words["_row"] == [row_of[expert] for expert in words["expert"]]
        wanted = open_run(pair[0]).query("expert_tokens", layer=layer, n=1).project("expert, token").fetchall()
        first = [place == 0 for place in words["_place"]]
        found = zip(words["expert"], words["token"], strict=True)
        assert [cells for cells, own in zip(found, first, strict=True) if own] == wanted


def test_a_dead_expert_has_a_panel_and_none_has_a_sentence(tmp_path, page, pair):
    assert "No expert of any layer is dead" in page
    layers = [Layer(layer=0, n_experts=4, top_k=1)]
    shard = random_shard(np.random.default_rng(7), layers, [("en", 40), ("ko", 30)])
    for picks in shard.experts.values():
        picks[:] = 2
    text, data = report_of(synthetic_run(tmp_path / "run", layers, [shard], card=pair[0]))
    assert "No expert of any layer is dead" not in text
    spec = next(figure["spec"] for figure in data["figures"] if figure["name"] == "load-by-layer")
    assert "dead_share" in str(spec)


# ---- it stands alone ----


def test_nothing_in_the_page_points_outside(page):
    outside_script = re.sub(r"<script>.*?</script>", "", page, flags=re.DOTALL)
    assert not re.findall(r'(?:src|href|action|srcset)="(?!#|data:)[^"]*"', outside_script)
    assert not re.findall(r"@import|url\(", outside_script)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)
    assert policy
    assert unescape(policy[1]).startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe-eval" not in policy[1]


def test_a_label_cannot_break_out_of_the_page(tmp_path, pair):
    evil = '</script><img src=x onerror="alert(1)">'
    layers = [Layer(layer=0, n_experts=3, top_k=2)]
    shard = random_shard(np.random.default_rng(0), layers, [(evil, 9), ("o'brien", 9)])
    run = synthetic_run(tmp_path / "run", layers, [shard], card=pair[0])
    write(str(run), tmp_path / "report.html", resamples=0)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<img src=x" not in text
    assert evil in payload(text)["tables"]["specialization/rows"][0]["label"]


# ---- figures for a paper ----


@pytest.fixture(scope="module")
def printed(pair, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("figures")
    write(
        str(pair[0]),
        folder / "report.html",
        compare=str(pair[1]),
        figures=folder / "figures",
        layer=2,
        resamples=RESAMPLES,
    )
    return folder / "figures"


def test_every_figure_is_there_in_three_formats(printed):
    assert {path.stem.removesuffix("-decoder-2") for path in printed.iterdir()} == FIGURES
    assert len(list(printed.iterdir())) == 3 * len(FIGURES)


def test_they_fit_the_text_of_a_paper_and_agree_in_size(printed):
    for svg in printed.glob("*.svg"):
        size = re.search(r'<svg [^>]*width="([\d.]+)" height="([\d.]+)"', svg.read_text())
        assert size
        width, height = float(size[1]), float(size[2])
        assert width <= (COLUMN_WIDTH if svg.stem in ONE_PANEL else TEXT_WIDTH), svg.name
        box = re.search(rb"/MediaBox\s*\[\s*0 0 ([\d.]+) ([\d.]+)", svg.with_suffix(".pdf").read_bytes())
        assert box
        assert (float(box[1]), float(box[2])) == pytest.approx((width, height), abs=1.5), svg.name
        pixels = struct.unpack(">II", svg.with_suffix(".png").read_bytes()[16:24])
        assert pixels == pytest.approx((width * 300 / 72, height * 300 / 72), abs=4), svg.name


# ---- any run has one ----


def report_of(run: Path, resamples: int = 0, **options: object) -> tuple[str, dict]:
    out = run.parent / "report.html"
    write(str(run), out, resamples=resamples, **options)
    text = out.read_text(encoding="utf-8")
    return unescape(text), payload(text)


def test_layers_and_stacks_that_differ(tmp_path, pair):
    layers = [
        Layer(stack="encoder", layer=1, n_experts=3, top_k=1),
        Layer(stack="decoder", layer=1, n_experts=7, top_k=2),
    ]
    shard = random_shard(np.random.default_rng(2), layers, [("en", 40), ("ko", 30), ("th", 20)], vocabulary=2)
    text, data = report_of(synthetic_run(tmp_path / "run", layers, [shard], card=pair[0]), figures=tmp_path / "figures")
    assert [router["name"] for router in data["routers"]] == ["encoder layer 1", "decoder layer 1"]
    assert [len(columns["value"]) for columns in data["tables"]["specialization/rows"]] == [3 * 3, 3 * 7]
    assert data["tables"]["coactivation/rows"][0]["value"] == [], "k = 1 there"
    assert '<output id="layer-name" for="layer">decoder layer 1</output>' in text


def test_one_expert_per_token_has_no_co_activation(tmp_path, pair):
    layers = [Layer(layer=0, n_experts=4, top_k=1)]
    shard = random_shard(np.random.default_rng(3), layers, [("en", 40), ("ko", 30)])
    text, data = report_of(synthetic_run(tmp_path / "run", layers, [shard], card=pair[0]))
    assert "coactivation" not in {figure["name"] for figure in data["figures"]}
    assert "k = 1" in text


def test_one_language_has_no_divergence(tmp_path, pair):
    layers = [Layer(layer=0, n_experts=4, top_k=2)]
    shard = random_shard(np.random.default_rng(4), layers, [("en", 40), ("en", 30)])
    text, data = report_of(synthetic_run(tmp_path / "run", layers, [shard], card=pair[0]))
    assert {"overlap", "divergence-by-layer"}.isdisjoint(figure["name"] for figure in data["figures"])
    assert "one language only" in text


@pytest.mark.parametrize("documents", [[("en", 40), ("en", 30)], [("en", 40), ("en", 29), ("ko", 1)]])
def test_tokens_of_one_language_have_intervals_and_no_test_of_significance(tmp_path, pair, documents):
    layers = [Layer(layer=0, n_experts=4, top_k=2), Layer(layer=1, n_experts=4, top_k=2)]
    shard = random_shard(np.random.default_rng(7), layers, documents, special=0)
    shard = dataclasses.replace(shard, is_special=shard.labels == "ko")
    text, data = report_of(synthetic_run(tmp_path / "run", layers, [shard], card=pair[0]), resamples=RESAMPLES)
    assert "No test of significance: it compares a language with the others" in text
    assert all("q" not in columns for columns in data["tables"]["specialization/rows"])
    assert None not in data["tables"]["decisiveness/rows"]["low"]


def test_a_run_without_token_ids_says_so(tmp_path, pair):
    layers = [Layer(layer=0, n_experts=4, top_k=2)]
    shard = random_shard(np.random.default_rng(5), layers, [("en", 40), ("ko", 30)])
    shard = Shard(**{**vars(shard), "token_ids": np.ma.masked_all(70, int)})
    text, data = report_of(synthetic_run(tmp_path / "run", layers, [shard], card=pair[0]))
    assert {"vocabulary", "vocabulary-by-layer"}.isdisjoint(figure["name"] for figure in data["figures"])
    assert "no token ids" in text


def test_an_incomplete_run_says_so(tmp_path, pair):
    shutil.copytree(pair[0], tmp_path / "run")
    for name in ("commits/000001.json", SUCCESS, "_MANIFEST.parquet"):
        RunDirectory(tmp_path / "run").store.delete(name)
    text, _ = report_of(tmp_path / "run")
    assert "2 of 3 shards are committed" in text


def test_more_languages_and_experts_than_fit_are_capped_and_told(tmp_path, pair):
    layers = [Layer(layer=number, n_experts=400, top_k=2) for number in range(2)]
    documents = [(f"l{number:02}", 20 + number) for number in range(62)]
    shard = random_shard(np.random.default_rng(6), layers, documents)
    run = synthetic_run(tmp_path / "run", layers, [shard], card=pair[0])
    text, data = report_of(run)
    columns = data["tables"]["specialization/rows"][0]
    assert "Of 62 languages the 60 with the most tokens are shown" in text
    assert "l00" not in columns["label"]
    assert len(set(columns["expert"])) == 353
    assert "Only the 353 most specialised of up to 400 experts are shown" in text
    assert run.parent.joinpath("report.html").stat().st_size < 5e6


def test_languages_with_few_documents_are_marked(tmp_path, pair, page):
    marked = {
        figure["name"]
        for figure in payload(page)["figures"]
        if "\u2020" in json.dumps(figure["spec"], ensure_ascii=False)
    }
    assert {"specialization", "top-experts"} <= marked
    assert "† marks 4 of the languages, which have fewer than 20 documents" in page
    write(str(pair[0]), tmp_path / "report.html", resamples=0, min_documents=10)
    assert "†" not in (tmp_path / "report.html").read_text()


def test_what_cannot_be_reported_is_refused(tmp_path, pair):
    with pytest.raises(ValueError, match="layer 9 is not recorded"):
        write(str(pair[0]), tmp_path / "x.html", layer=9)
    with pytest.raises(ValueError, match="has the label 'xx'; it has bg, en, ko, th"):
        write(str(pair[0]), tmp_path / "x.html", labels=("xx",))
    empty = synthetic_run(tmp_path / "empty", [Layer(layer=0, n_experts=2, top_k=1)], [], card=pair[0])
    with pytest.raises(ValueError, match=r"holds no document to report on: collector status .*empty says why"):
        write(str(empty), tmp_path / "x.html")
    assert not (tmp_path / "x.html").exists()


def test_the_command(pair, tmp_path):
    command = [sys.executable, "-m", "collector", "report", str(pair[0]), "--resamples", "0"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (0, "report.html\n"), done.stderr
    assert (tmp_path / "report.html").stat().st_size > 1e5
