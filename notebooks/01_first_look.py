"""Shows which experts the router chooses for each token of a sentence in English, Korean and Japanese."""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="A first look at routing", sql_output="pandas")

with app.setup:
    import json
    import tempfile
    from pathlib import Path

    import altair as alt
    import marimo as mo
    import pandas as pd
    import torch

    from collector import collect_in_process, open_run
    from collector.config import CaptureConfig, DataConfig, ModelConfig, resolve

    _ = alt.data_transformers.disable_max_rows()


@app.cell(hide_code=True)
def _():
    mo.md("""
    # A first look at routing

    A Mixture-of-Experts layer has many experts and a router, which chooses a few of them for each token. This notebook
    takes one sentence in three languages, and shows how the router of one layer routes every token.

    The model is the embedded demo, a small OLMoE of 8 layers with 64 experts, 8 of them for each token. To use the real
    OLMoE, run the same notebook on a GPU (in 4 bits it needs 5 GB of its memory):

    ```sh
    marimo edit notebooks/01_first_look.py -- --model allenai/OLMoE-1B-7B-0924 --quantization nf4
    ```
    """)
    return


@app.cell
def _():
    given = mo.cli_args()
    model = ModelConfig(model=given.get("model") or "demo", quantization=given.get("quantization") or "none")
    return (model,)


@app.cell
def _():
    sentences = mo.ui.dictionary(
        {
            "eng_Latn": mo.ui.text("Tomorrow morning we are taking the train to the sea.", full_width=True),
            "kor_Hang": mo.ui.text("우리는 내일 아침 기차를 타고 바다로 간다.", full_width=True),
            "jpn_Jpan": mo.ui.text("私たちは明日の朝、電車で海へ行きます。", full_width=True),
        }
    )
    sentences
    return (sentences,)


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## Collect

    The sentences become documents with their language as label, and a run records every router's decision for every
    token. `probabilities` also stores each router's distribution over all its experts, which the heatmap below shows.
    """)
    return


@app.cell
def _(model, sentences):
    scratch = tempfile.TemporaryDirectory()
    documents = Path(scratch.name, "sentences.jsonl")
    lines = [json.dumps({"text": text, "label": label}) for label, text in sentences.value.items()]
    documents.write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = resolve(
        data=DataConfig(data=(str(documents),)),
        model=model,
        capture=CaptureConfig(store=("text", "probabilities")),
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    run = open_run(collect_in_process(f"{scratch.name}/run", config).root)
    connection = run.connection
    return connection, run


@app.cell
def _(run):
    routers = [router["layer"] for router in run.info["layers"]]
    layer = mo.ui.slider(steps=routers, value=routers[len(routers) // 2], label="layer", show_value=True)
    layer
    return (layer,)


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## Token × expert

    The heatmap shows the router's probability of each expert, before it takes the top 8. Languages that share experts
    have the same bright columns.
    """)
    return


@app.cell
def _(connection, layer):
    probabilities = mo.sql(
        f"""
        select
            label,
            printf('%02d  %s', position, token) as place,
            unnest(range(len(probabilities))) as expert,
            unnest(probabilities) as probability
        from token_decisions
        where layer = {layer.value} and not is_special
        order by label, position, expert
        """,
        output=False,
        engine=connection,
    )
    return (probabilities,)


@app.cell
def _(layer, probabilities, sentences):
    def heatmap(label):
        return (
            alt.Chart(probabilities)
            .transform_filter(alt.datum.label == label)
            .mark_rect()
            .encode(
                x=alt.X("expert:O", axis=alt.Axis(labelOverlap=True, labelAngle=0)),
                y=alt.Y("place:N", title=None),
                color=alt.Color("probability:Q", scale=alt.Scale(scheme="viridis")),
                tooltip=["label", "place", "expert", alt.Tooltip("probability", format=".3f")],
            )
            .properties(width=640, title=label)
        )

    alt.vconcat(*map(heatmap, sentences.value), title=f"Router probabilities, layer {layer.value}")
    return


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## The top expert of each token

    `token_trace` describes the routing of each token of a document: the expert with the highest weight, all chosen
    experts, and how decided the router was (entropy in nats; ln 64 = 4.16 would mean no preference at all).
    """)
    return


@app.cell
def _(layer, run, sentences):
    trace = pd.concat(
        [run.query("token_trace", layer=layer.value, labels=[label]).df() for label in sentences.value],
        ignore_index=True,
    )
    top_experts = trace[["label", "position", "token", "expert", "experts", "router_entropy", "topk_mass"]]
    top_experts.astype({"router_entropy": float, "topk_mass": float}).round(3)
    return (top_experts,)


@app.cell
def _(layer, run):
    favourites = run.query("top_experts", layer=layer.value, n=3).df().query("metric == 'top1'")
    mo.vstack([mo.md("The experts that most tokens of each sentence choose first:"), favourites.round(3)])
    return


@app.cell
def _(layer, top_experts):
    if mo.app_meta().mode == "script":
        print(f"layer {layer.value}")
        print(top_experts[["label", "token", "expert", "router_entropy"]].to_string(index=False))
    return


@app.cell(hide_code=True)
def _():
    mo.md("""
    Three sentences show what the data look like, not how a language is routed: that takes many documents, and the
    untrained model for comparison. Continue with `02_languages.py`.
    """)
    return


if __name__ == "__main__":
    app.run()
