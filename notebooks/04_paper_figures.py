"""Draws the figures for a paper about routing: specialization, saturation, co-activation, vocabulary."""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="Figures for a paper", sql_output="pandas")

with app.setup:
    import tempfile
    from pathlib import Path

    import altair as alt
    import marimo as mo
    import pandas as pd
    import torch

    from collector import collect_in_process, open_run, open_runs
    from collector.config import CaptureConfig, DataConfig, ModelConfig, resolve

    _ = alt.data_transformers.disable_max_rows()


@app.cell(hide_code=True)
def _():
    mo.md("""
    # Figures for a paper

    These are the analyses of section 5 of OLMoE ([arXiv 2409.02060](https://arxiv.org/abs/2409.02060)), each one query.

    Without arguments they show the demo model, trained and untrained, on a few sentences per language. To study a real
    model, give two runs (`02_languages.py` shows how to collect them) and a folder for the figures:

    ```sh
    python notebooks/04_paper_figures.py --run runs/olmoe --untrained runs/olmoe-random --layer 7 --figures figures
    ```

    This writes each one as SVG. `collector query runs/olmoe domain_specialization --layer 7 --format csv` gives the
    numbers.
    """)
    return


@app.cell
def _():
    given = mo.cli_args()
    per_label = int(given.get("per-label") or 10)
    return given, per_label


@app.cell
def _(given, per_label):
    scratch = tempfile.TemporaryDirectory()

    def collect(weights):
        config = resolve(
            data=DataConfig(per_label=per_label),
            model=ModelConfig(weights=weights),
            capture=CaptureConfig(),
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        return collect_in_process(f"{scratch.name}/{weights}", config).root

    roots = {
        "trained": given.get("run") or collect("pretrained"),
        "untrained": given.get("untrained") or collect("random"),
    }
    runs = {weights: open_run(root) for weights, root in roots.items()}
    connection = runs["trained"].connection
    return connection, roots, runs


@app.cell
def _(connection):
    geometry = mo.sql(
        """
        select layer, n_experts, top_k
        from layers
        order by layer
        """,
        output=False,
        engine=connection,
    )
    labels = mo.sql(
        """
        select label, tokens
        from labels
        order by tokens desc
        """,
        output=False,
        engine=connection,
    )
    return geometry, labels


@app.cell
def _(geometry, given, labels):
    middle = int(geometry.layer[len(geometry) // 2])
    layer = mo.ui.slider(steps=geometry.layer.tolist(), value=int(given.get("layer") or middle), label="layer")
    wanted = [x for x in ("eng_Latn", "rus_Cyrl", "kor_Hang", "jpn_Jpan") if x in set(labels.label)]
    shown = mo.ui.multiselect(sorted(labels.label), value=wanted or labels.label[:4].tolist(), label="languages")
    mo.hstack([layer, shown], justify="start")
    return layer, shown


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## Specialization

    The bars show the share of a language's tokens that chooses each expert. The dashed line is k/E, the share for a
    router without preference.
    """)
    return


@app.cell
def _(layer, runs, shown):
    specialization = pd.concat(
        run.query("domain_specialization", layer=layer.value, labels=shown.value).df().assign(weights=weights)
        for weights, run in runs.items()
    )
    bars = (
        alt.Chart()
        .mark_bar()
        .encode(
            x=alt.X("expert:O", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y("value:Q", title="share of tokens"),
            color=alt.Color("weights:N", title=None),
            tooltip=["label", "weights", "expert", alt.Tooltip("value", format=".3f"), "n"],
        )
    )
    uniform = alt.Chart().mark_rule(strokeDash=[4, 4]).encode(y="baseline:Q")
    specialization_figure = (
        alt.layer(bars, uniform, data=specialization)
        .properties(width=320, height=90)
        .facet(row=alt.Row("label:N", title=None), column=alt.Column("weights:N", title=None))
        .properties(title=f"Domain specialization, layer {layer.value}")
    )
    specialization_figure
    return specialization, specialization_figure


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## Saturation

    Router saturation is the share of a token's k experts on which two runs agree. Between an intermediate and the final
    checkpoint it shows when routing settles (`collector collect --revision` selects a checkpoint); here the other run
    is the untrained model. The dashed line is k/E, the value for two routers that choose at random.
    """)
    return


@app.cell
def _(roots):
    saturation = open_runs(roots["trained"], roots["untrained"]).query("router_saturation", pooled=True).df()
    agreement = (
        alt.Chart(saturation)
        .mark_line(point=True)
        .encode(
            x=alt.X("layer:O", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("value:Q", title="router saturation", scale=alt.Scale(domain=[0, 1])),
            tooltip=["layer", alt.Tooltip("value", format=".3f"), "n"],
        )
    )
    at_random = alt.Chart(saturation).mark_rule(strokeDash=[4, 4]).encode(y="baseline:Q")
    saturation_figure = (agreement + at_random).properties(width=440, height=220)
    saturation_figure
    return (saturation_figure,)


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## Co-activation

    The matrix shows how often expert j is chosen for a token if expert i is. Experts chosen at random would give
    (k − 1)/(E − 1) everywhere.
    """)
    return


@app.cell
def _(layer, runs):
    coactivation = runs["trained"].query("coactivation", layer=layer.value).df()
    coactivation_figure = (
        alt.Chart(coactivation)
        .mark_rect()
        .encode(
            x=alt.X("other_expert:O", title="expert j", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
            y=alt.Y("expert:O", title="expert i", axis=alt.Axis(labelOverlap=True)),
            color=alt.Color("value:Q", scale=alt.Scale(scheme="viridis"), title="P(j given i)"),
            tooltip=["expert", "other_expert", alt.Tooltip("value", format=".3f"), "count", "n"],
        )
        .properties(width=440, height=440, title=f"Co-activation, layer {layer.value}")
    )
    coactivation_figure
    return coactivation, coactivation_figure


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## Vocabulary specialization

    This measures how far a token's identity alone determines its expert: the share of a token id's occurrences that
    choose its most frequent expert, averaged over ids. The dashed line is the share of an expert by chance.
    """)
    return


@app.cell
def _(runs):
    vocabulary = pd.concat(
        run.query("vocabulary_specialization").df().query("metric == 'layer_topk'").assign(weights=weights)
        for weights, run in runs.items()
    )
    curves = (
        alt.Chart(vocabulary)
        .mark_line(point=True)
        .encode(
            x=alt.X("layer:O", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("value:Q", title="vocabulary specialization", scale=alt.Scale(domain=[0, 1])),
            color=alt.Color("weights:N", title=None),
            tooltip=["weights", "layer", alt.Tooltip("value", format=".3f"), "n"],
        )
    )
    chance = alt.Chart(vocabulary).mark_rule(strokeDash=[4, 4]).encode(y="baseline:Q")
    vocabulary_figure = (curves + chance).properties(width=440, height=220)
    vocabulary_figure
    return vocabulary, vocabulary_figure


@app.cell
def _(layer, runs):
    by_expert = runs["trained"].query("vocabulary_specialization", layer=layer.value).df()
    clearest = by_expert.query("metric == 'expert_topk' and n >= 3").nlargest(8, "value").expert.astype(int)
    profiles = pd.concat(
        runs["trained"].query("expert_profile", layer=layer.value, expert=expert, n=8).df() for expert in clearest
    )
    tokens = profiles.query("aspect == 'token'").groupby("expert", sort=False).item
    examples = tokens.agg("  ".join).reset_index(name="tokens")
    mo.vstack([mo.md("The most specialised experts, with the tokens that choose them most often:"), examples])
    return (examples,)


@app.cell
def _(coactivation_figure, examples, given, saturation_figure, specialization_figure, vocabulary_figure):
    figures = {
        "specialization": specialization_figure,
        "saturation": saturation_figure,
        "coactivation": coactivation_figure,
        "vocabulary": vocabulary_figure,
    }
    written = []
    if given.get("figures"):
        folder = Path(given.get("figures"))
        folder.mkdir(parents=True, exist_ok=True)
        for name, figure in figures.items():
            figure.save(folder / f"{name}.svg")
            written.append(folder / f"{name}.svg")
    if mo.app_meta().mode == "script":
        print(examples.to_string(index=False))
        print("\n".join(map(str, written)))
    return


if __name__ == "__main__":
    app.run()
