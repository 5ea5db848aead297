"""Shows what experts do: contribution, similarity of outputs and weights, the tokens that they write, loss and cost."""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="What experts do", sql_output="pandas")

with app.setup:
    import tempfile

    import altair as alt
    import marimo as mo
    import torch

    from collector import collect_in_process, open_run
    from collector.config import CaptureConfig, DataConfig, ModelConfig, resolve
    from collector.store.run_directory import RunDirectory
    from collector.upkeep import maps, weights

    _ = alt.data_transformers.disable_max_rows()


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # What experts do

    The routing says which experts are chosen. It does not say what they compute: whether an expert that is chosen often
    matters for the layer's output, whether two experts do the same, what they write. None of this shows yet that the
    model needs an expert.

    Without arguments this notebook collects the demo model over a few sentences in each of 60 languages, compares its
    weights and maps one layer. To study a real model, do the same on a GPU and open the run:

    ```sh
    collector collect --out runs/olmoe --model allenai/OLMoE-1B-7B-0924 --data 'texts/*.jsonl' --label-column lang \
        --record outputs loss similarity vocabulary
    collector weights runs/olmoe --device cuda
    collector map runs/olmoe --layer 8
    marimo edit notebooks/06_what_experts_do.py -- --run runs/olmoe
    ```
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

    def collect():
        config = resolve(
            data=DataConfig(per_label=per_label),
            model=ModelConfig(),
            capture=CaptureConfig(record=("outputs", "loss", "similarity", "vocabulary"), sample_tokens=400),
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        root = collect_in_process(f"{scratch.name}/run", config).root
        weights.make(RunDirectory(root), match=False)
        maps.make(RunDirectory(root), layer=4, method="pca")
        return root

    run = open_run(given.get("run") or collect())
    return (run,)


@app.cell
def _(run):
    routers = [router["layer"] for router in run.info["layers"]]
    layer = mo.ui.slider(steps=routers, value=routers[len(routers) // 2], label="layer", show_value=True)
    layer
    return (layer,)


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## How often is not how much

    The contribution of a pick is the part of the layer's output that lies in its direction: over the experts of a token
    contributions add up to 1. On the dashed line, an expert contributes as much as it is chosen.
    """)
    return


@app.cell
def _(layer, run):
    pooled = run.query("expert_contribution", layer=layer.value, pooled=True).df()
    load = run.query("expert_load", layer=layer.value).df()[["expert", "value"]].rename(columns={"value": "frequency"})
    contribution = pooled.query("metric == 'contribution'").merge(load, on="expert")
    top_k = next(router["top_k"] for router in run.info["layers"] if router["layer"] == layer.value)
    agreement = contribution.frequency.corr(contribution.value, method="spearman")
    points = alt.Chart(contribution.assign(even=contribution.frequency / top_k)).encode(
        x=alt.X("frequency:Q", title="share of tokens that choose it", scale=alt.Scale(zero=False))
    )
    points.mark_line(strokeDash=[4, 4], color="grey").encode(y="even:Q") + points.mark_circle(size=60).encode(
        y=alt.Y("value:Q", title="share of the layer's output"),
        tooltip=["expert", alt.Tooltip("frequency", format=".3f"), alt.Tooltip("value", format=".3f"), "n"],
    ).properties(width=420, height=300)
    return agreement, contribution


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## Which experts do the same?

    A sample of tokens went through all experts. Debiased CKA compares two experts' outputs up to a rotation: 0 for
    independent outputs, 1 for the same. Beside it, the cosine of the two experts' weights.
    """)
    return


@app.cell
def _(layer, run):
    keys = ["expert", "other_expert"]
    outputs = run.query("expert_similarity", layer=layer.value).df()
    measures = {name for (name,) in run.sql("select distinct measure from weights").fetchall()}
    measure = "matched" if "matched" in measures else "cosine"
    alike = run.query("weight_similarity", layer=layer.value, measure=measure).df()[[*keys, "value"]]
    pairs = outputs.merge(alike.rename(columns={"value": "weights"}), on=keys)
    shared = pairs.value.corr(pairs.weights, method="spearman")
    alt.Chart(pairs).mark_rect().encode(
        x=alt.X("other_expert:O", title="expert", axis=alt.Axis(labelOverlap=True)),
        y=alt.Y("expert:O", axis=alt.Axis(labelOverlap=True)),
        color=alt.Color("value:Q", title="CKA", scale=alt.Scale(scheme="viridis")),
        tooltip=[*keys, alt.Tooltip("value", format=".2f"), alt.Tooltip("standard_error", format=".2f"), "n"],
    ).properties(width=420, height=420)
    return pairs, shared


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## A map of outputs

    What the chosen experts put out for sampled tokens, in two dimensions. The demo's map shows the two principal
    components; `collector map --method umap` separates clusters better, and its distances mean less.
    """)
    return


@app.cell
def _(run):
    places = run.query("expert_map").df()
    trusted = places.groupby(["method", "layer"]).trustworthiness.first()
    alt.Chart(places).mark_circle(size=14).encode(
        x=alt.X("x:Q", axis=None),
        y=alt.Y("y:Q", axis=None),
        color=alt.Color("expert:Q", scale=alt.Scale(scheme="sinebow")),
        column=alt.Column("method:N", title=None),
        row=alt.Row("layer:N"),
        tooltip=["expert", "label", "token"],
    ).properties(width=420, height=420)
    return (trusted,)


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## What an expert reads and what it writes

    On the left the tokens that choose the expert most of all experts, on the right the tokens whose logits its output
    raises most, through the final norm and the output embedding.
    """)
    return


@app.cell
def _(contribution):
    strongest = contribution.sort_values("value", ascending=False).expert.tolist()
    expert = mo.ui.dropdown([str(each) for each in sorted(strongest)], value=str(strongest[0]), label="expert")
    expert
    return (expert,)


@app.cell
def _(expert, layer, run):
    reads = run.query("expert_tokens", layer=layer.value, n=10).df().query(f"expert == {expert.value}")
    writes = run.query("output_vocabulary", layer=layer.value, expert=int(expert.value)).df()
    columns = ["token", "value", "baseline", "n"]
    mo.hstack([mo.ui.table(reads[columns].round(3)), mo.ui.table(writes[columns].round(3))], justify="start")
    return reads, writes


@app.cell
def _(layer, run):
    attribution = run.query("direct_attribution", layer=layer.value, pooled=True).df()
    attribution = attribution.assign(beyond=attribution.value - attribution.baseline)
    helpful = attribution[attribution.beyond > 2 * attribution.standard_error].sort_values("beyond", ascending=False)
    helpful[["expert", "value", "baseline", "beyond", "standard_error", "n"]].round(3)
    return (helpful,)


@app.cell(hide_code=True)
def _():
    mo.md("""
    Above: the experts whose outputs raise the logit of the token that really came next more than their companions' do,
    by more than two standard errors.

    ## How well the model predicts, and what it costs

    Bits per character compare languages whose tokens are of different length. The cost of a character is the cost of a
    token times the tokens that it takes.
    """)
    return


@app.cell
def _(run):
    loss = run.query("loss").df().query("metric == 'bits_per_character'")[["label", "value"]]
    cost = (
        run.query("compute").df().query("metric == 'flops_per_character' and component == 'total'")[["label", "value"]]
    )
    languages = loss.merge(cost, on="label", suffixes=("", "_cost"))
    alt.Chart(languages).mark_circle(size=60).encode(
        x=alt.X("value_cost:Q", title="operations per character", scale=alt.Scale(type="log", nice=False)),
        y=alt.Y("value:Q", title="bits per character", scale=alt.Scale(zero=False)),
        tooltip=["label", alt.Tooltip("value", format=".2f"), alt.Tooltip("value_cost", format=".3~s")],
    ).properties(width=520, height=320)
    return (languages,)


@app.cell
def _(agreement, layer, shared, trusted):
    answer = (
        f"In layer {layer.value}, how often an expert is chosen and how much it contributes correlate at "
        f"{agreement:.2f} (Spearman); similarity of outputs and of weights, over pairs, at {shared:.2f}. "
        + ". ".join(f"Layer {at}, {method}: trustworthiness {value:.2f}" for (method, at), value in trusted.items())
        + "."
    )
    mo.callout(answer)
    return (answer,)


@app.cell
def _(answer, writes):
    if mo.app_meta().mode == "script":
        print(writes[["expert", "rank", "token", "value", "baseline"]].round(3).to_string(index=False))
        print(answer)
    return


if __name__ == "__main__":
    app.run()
