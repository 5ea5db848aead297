"""Every notebook runs from top to bottom, as a script too, and shows what the queries and the model itself say."""

from __future__ import annotations

import importlib.util
import re
import runpy
import shlex
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from collector import __main__ as cli
from collector import open_run, open_runs
from collector.config import DataConfig, ModelConfig
from tests.helpers.paths import ROOT
from tests.helpers.runs import collect_here, run_config

pytest.importorskip("marimo")
altair = pytest.importorskip("altair")
vl_convert = pytest.importorskip("vl_convert")

NOTEBOOKS = ROOT / "notebooks"
NAMES = sorted(path.stem for path in NOTEBOOKS.glob("0*.py"))


def run(name: str, *arguments: str) -> dict[str, Any]:
    """Runs a notebook in this process with these arguments; returns what its cells define.

    Draws each of its figures, as a browser would.
    """
    path = NOTEBOOKS / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"notebook_{name}", path)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *arguments])
        spec.loader.exec_module(module)
        outputs, definitions = module.app.run()
    for figure in (output for output in outputs if isinstance(output, altair.TopLevelMixin)):
        svg = vl_convert.vegalite_to_svg(figure.to_dict())
        assert int(re.search(r'width="(\d+)"', svg)[1]) > 300, f"{name}: a figure is not drawn"
    return dict(definitions)


def script(capsys, name: str, *arguments: str) -> str:
    """Runs a notebook as `python FILE` does; returns what it prints."""
    path = NOTEBOOKS / f"{name}.py"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(path), *arguments])
        runpy.run_path(str(path), run_name="__main__")
    return capsys.readouterr().out


def test_the_index_tells_of_every_notebook():
    index = (NOTEBOOKS / "README.md").read_text()
    assert len(NAMES) == 8
    for path in NOTEBOOKS.glob("*.py"):
        assert f"[`{path.name}`]({path.name})" in index


def test_marimo_finds_nothing_to_complain_about():
    paths = [str(NOTEBOOKS / f"{name}.py") for name in NAMES]
    done = subprocess.run([sys.executable, "-m", "marimo", "check", "--strict", *paths], capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_command_in_a_notebook_can_be_parsed():
    blocks = [
        block
        for name in NAMES
        for block in re.findall(r"```sh\n(.*?)```", (NOTEBOOKS / f"{name}.py").read_text(), re.DOTALL)
    ]
    lines = [line.strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [line[line.index("collector ") :] for line in lines if re.search(r"(^|-- )collector ", line)]
    assert len(commands) >= 4
    for command in commands:
        cli.parse(shlex.split(command)[1:])


# ---- what they show ----


def test_first_look_shows_the_routers_own_choice():
    shown = run("01_first_look")
    rows, top = shown["probabilities"], shown["top_experts"]
    assert set(rows.label) == set(top.label) == {"eng_Latn", "kor_Hang", "jpn_Jpan"}
    assert rows.groupby(["label", "place"]).probability.sum().to_numpy() == pytest.approx(1, abs=1e-5)
    best = rows.loc[rows.groupby(["label", "place"]).probability.idxmax()].sort_values(["label", "place"])
    assert best.expert.tolist() == top.sort_values(["label", "position"]).expert.tolist()
    assert all(expert in chosen for expert, chosen in zip(top.expert, top.experts, strict=True))


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> list[str]:
    """The demo model over three sentences of each language, trained and untrained, as arguments of a notebook."""
    folder = tmp_path_factory.mktemp("notebooks")
    for weights in ("pretrained", "random"):
        collect_here(folder / weights, run_config(DataConfig(per_label=3), ModelConfig(weights=weights)))
    return ["--run", str(folder / "pretrained"), "--untrained", str(folder / "random")]


@pytest.fixture(scope="module")
def languages(runs):
    return run("02_languages", *runs)


def effective(run, layer: int, label: str) -> float:
    """The exponential of the entropy of a label's picks, counted by numpy."""
    picks = run.sql(f"select columns('^e[0-9]+$') from routing where layer = {layer} and label = '{label}' "
                    "and not is_special").fetchnumpy()  # fmt: skip
    shares = np.bincount(np.concatenate(list(picks.values()))) / sum(map(len, picks.values()))
    return float(np.exp(-sum(s * np.log(s) for s in shares if s)))


def test_the_korean_question_is_answered_by_what_was_recorded(languages):
    trained = languages["runs"]["trained"]
    layers = [router["layer"] for router in trained.info["layers"]]
    smaller = sum(effective(trained, layer, "kor_Hang") < effective(trained, layer, "eng_Latn") for layer in layers)
    assert f"Korean uses fewer effective experts than English in {smaller} of 8 layers" in languages["answer"]
    korean = languages["korean"].set_index(["weights", "layer", "label"]).value
    for weights, run in languages["runs"].items():
        assert korean[weights, 5, "kor_Hang"] == pytest.approx(effective(run, 5, "kor_Hang"))


def test_top_experts_are_counted_in_both_models(languages):
    layer, tops = languages["layer"].value, languages["top_experts"].set_index(["weights", "label"])
    for weights, run in languages["runs"].items():
        first = run.sql(
            f"select expert, count(*) from decisions where layer = {layer} and label = 'kor_Hang' and not is_special "
            "group by expert order by 2 desc, 1 limit 10"
        ).fetchall()
        rows = tops.loc[(weights, "kor_Hang")]
        assert list(zip(rows.expert, rows["count"], strict=True)) == first
    models = [run.info["model"]["weights"] for run in languages["runs"].values()]
    assert models == ["pretrained", "random"]


def test_the_table_of_a_prompt_is_what_transformers_returns():
    from transformers import AutoTokenizer, SwitchTransformersEncoderModel

    shown = run("03_switch_prompts")
    prompt, layer, table = shown["prompt"].value, shown["layer"].value, shown["tokens"]
    text = shown["texts"].set_index("doc_id").text[prompt]
    model = SwitchTransformersEncoderModel.from_pretrained(shown["model"]).eval()
    ids = AutoTokenizer.from_pretrained(shown["model"])(text, return_tensors="pt")
    with torch.no_grad():
        logits = model(**ids, output_router_logits=True).router_logits
    index = [router["layer"] for router in shown["run"].info["layers"]].index(layer)
    p = torch.softmax(logits[index].reshape(len(table), -1).double(), -1).numpy()
    assert table.expert.tolist() == p.argmax(1).tolist()
    assert table.probability.to_numpy() == pytest.approx(p.max(1), rel=1e-4)
    assert table.router_entropy.to_numpy() == pytest.approx(-(p * np.log(p)).sum(1), rel=1e-3)
    assert set(shown["shares"].label) == {"base", "context"}
    assert shown["divergence"].n.tolist() == [6, 6]


def test_the_figures_of_a_paper_are_written(runs, tmp_path):
    shown = run("04_paper_figures", *runs, "--layer", "5", "--figures", str(tmp_path / "figures"))
    names = {"specialization", "saturation", "coactivation", "vocabulary"}
    assert {path.stem for path in (tmp_path / "figures").glob("*.svg")} == names
    drawn = shown["coactivation_figure"].to_dict()
    (data,) = drawn["datasets"].values()
    assert len(data) == len(shown["runs"]["trained"].query("coactivation", layer=5).fetchall())
    # k - 1 other experts beside each one that was chosen
    assert shown["coactivation"].groupby("expert").value.sum().to_numpy() == pytest.approx(7)
    assert shown["specialization"].groupby(["weights", "label"]).value.sum().to_numpy() == pytest.approx(8)
    assert not shown["examples"].empty


def test_what_experts_do_is_what_the_queries_say():
    shown = run("06_what_experts_do", "--per-label", "2")
    layer, opened = shown["layer"].value, shown["run"]
    given = opened.query("expert_contribution", layer=layer, pooled=True).filter("metric = 'contribution'")
    values = dict(given.project("expert, value").fetchall())
    load = dict(opened.query("expert_load", layer=layer).project("expert, value").fetchall())
    experts = sorted(values)
    pairs = [[source[expert] for expert in experts] for source in (load, values)]
    assert shown["agreement"] == pytest.approx(spearmanr(*pairs).statistic)
    assert sum(values.values()) == pytest.approx(1, abs=1e-3)
    first = max(values, key=lambda expert: values[expert])
    assert shown["expert"].value == str(first)
    written = opened.query("output_vocabulary", layer=layer, expert=first).project("token").fetchall()
    assert [(token,) for token in shown["writes"].token] == written
    assert set(shown["languages"].label) == {row[0] for row in opened.sql("select label from labels").fetchall()}
    assert (shown["helpful"].beyond > 0).all()
    assert f"correlate at {shown['agreement']:.2f}" in shown["answer"]


def test_what_experts_cause_is_what_the_queries_say():
    shown = run("07_interventions", "--per-label", "6")
    opened, singly = shown["run"], shown["singly"]
    labels = {label for (label,) in opened.sql("select label from labels").fetchall()}
    assert labels == set(shown["languages"])
    ((documents,),) = opened.sql("select count(*) from documents").fetchall()
    assert documents == 3 * len(labels), "half of them chose the experts"
    assert set(shown["own"].arm) <= labels
    assert (shown["own"].arm == shown["own"].label).all()
    assert shown["controls"].groupby("arm").control.nunique().max() == 9
    edited = opened.sql("select arm, layer, count(*) from arms where control = 0 group by all").fetchall()
    assert max(count for *_, count in edited) == 2
    best = shown["own"].set_index("arm").value.max()
    given = (
        opened.query("expert_effect").filter("metric = 'nats_per_token' and arm = label").project("value").fetchall()
    )
    assert best == pytest.approx(max(value for (value,) in given))
    assert f"loses {best:.3f} ± " in shown["answer"]
    ((experts,),) = singly.sql("select count(distinct arm) from arms").fetchall()
    assert experts == 64
    assert set(shown["agreement"].n) <= set(range(20, 65))


def test_curves_over_training_are_the_answers_of_each_checkpoint(tiny_sweep):
    shown = run("08_over_training", "--sweep", str(tiny_sweep))
    sweep = shown["sweep"]
    names = [each.name for each in sweep.runs]
    layer = int(shown["layer"].value)
    favourites = shown["favourites"].set_index(["checkpoint", "label"])
    for each in sweep.runs:
        opened = open_run(each.root)
        given = opened.query("mutual_information").filter("metric = 'normalized_mutual_information'")
        values = [value for (value,) in given.project("value").fetchall()]
        assert shown["by_checkpoint"][each.name] == pytest.approx(np.mean(values))
        top = (
            opened.query("top_experts", layer=layer, n=1).filter("metric = 'topk'").project("label, expert").fetchall()
        )
        assert [favourites.expert[each.name, label] for label, _ in top] == [expert for _, expert in top]
    pair = open_runs(sweep.runs[0].root, sweep.last.root).query("router_saturation", pooled=True)
    first = np.mean([value for (value,) in pair.project("value").fetchall()])
    assert shown["settled"][names[0]] == pytest.approx(first)
    assert f"at {names[0]} {first:.0%}." in shown["answer"]


# ---- as scripts ----


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "arguments", "says"),
    [
        ("01_first_look", [], ["layer 4", "kor_Hang", "router_entropy"]),
        ("02_languages", ["--per-label", "2"], ["eng_Latn", "untrained", "Korean uses fewer effective experts"]),
        ("03_switch_prompts", [], ["prompt base-0", "probability", "routing_divergence"]),
        ("04_paper_figures", ["--per-label", "2"], ["expert", "tokens"]),
    ],
)
def test_a_notebook_is_a_script(capsys, name, arguments, says):
    out = script(capsys, name, *arguments)
    for words in says:
        assert words in out


@pytest.mark.ray
@pytest.mark.slow
def test_from_launch_to_query(capsys, tmp_path):
    out = script(capsys, "05_scale", "--out", str(tmp_path / "run"))
    assert "documents  240 of 240 planned" in out
    assert "sound: all of 4 committed shards" in out
    top = open_run(tmp_path / "run").query("top_experts", layer=4, labels=["eng_Latn", "kor_Hang"], n=3).fetchall()
    printed = out.splitlines()[-len(top) :]
    assert [line.split()[5] for line in printed] == [str(row[5]) for row in top]
