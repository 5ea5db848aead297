"""Shows when specialization appears in training, and when routing settles: curves over the checkpoints of a sweep."""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="Over training", sql_output="pandas")

with app.setup:
    from pathlib import Path

    import altair as alt
    import marimo as mo

    from collector import open_run, open_sweep

    _ = alt.data_transformers.disable_max_rows()


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # Over training

    When in training do languages get experts of their own, and when do routers settle? A sweep collects checkpoints of
    one training over the same documents, one run each, and every query answers for all of them.

    `make sweep-demo` trains a small model in a few minutes and sweeps over its checkpoints, which this notebook then
    shows. OLMoE's checkpoints are branches of its repository:

    ```sh
    collector sweep --out runs/olmoe-sweep --model allenai/OLMoE-1B-7B-0924 --revisions 'step*' --every 10 \
        --data 'texts/*.jsonl' --label-column lang --delete-after-use
    marimo edit notebooks/08_over_training.py -- --sweep runs/olmoe-sweep
    ```
    """)
    return


@app.cell
def _():
    root = Path(mo.cli_args().get("sweep") or "runs/sweep-demo")
    mo.stop(not root.exists(), mo.callout(f"There is no sweep at {root}: run make sweep-demo, or give --sweep FOLDER"))
    sweep = open_sweep(root)
    checkpoints = alt.X("checkpoint:O", sort=[run.name for run in sweep.runs], title=None)
    mo.md(f"{len(sweep.runs)} checkpoints, from {sweep.runs[0].name} to {sweep.last.name}.")
    return checkpoints, sweep


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## Specialization

    Mutual information of expert and language as a share of the languages' entropy: 0 if all languages choose the same
    experts. `bias` is what languages that say nothing would give.
    """)
    return


@app.cell
def _(checkpoints, sweep):
    specialization = sweep.query("mutual_information").df().query("metric == 'normalized_mutual_information'")
    alt.Chart(specialization).mark_line(point=True).encode(
        x=checkpoints,
        y=alt.Y("value:Q", title="normalized mutual information"),
        color=alt.Color("layer:O", scale=alt.Scale(scheme="viridis")),
        detail="stack:N",
        tooltip=["checkpoint", "step", "tokens_seen", "layer", alt.Tooltip("value", format=".3f"), "bias"],
    ).properties(width=560, height=260)
    return (specialization,)


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## Saturation

    Of the experts that a token chooses, the share that it also chooses at the last checkpoint (OLMoE, arXiv 2409.02060,
    section 5).
    """)
    return


@app.cell
def _(checkpoints, sweep):
    saturation = sweep.query("router_saturation", pooled=True).df()
    alt.Chart(saturation).mark_line(point=True).encode(
        x=checkpoints,
        y=alt.Y("value:Q", title="share of experts in common", scale=alt.Scale(domain=[0, 1])),
        color=alt.Color("layer:O", scale=alt.Scale(scheme="viridis")),
        detail="stack:N",
        tooltip=["checkpoint", "step", "layer", alt.Tooltip("value", format=".3f"), "baseline", "n"],
    ).properties(width=560, height=260)
    return (saturation,)


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## One language at a time

    How many times as often as languages do on average a language chooses its favourite expert (lift).
    """)
    return


@app.cell
def _(sweep):
    last = open_run(sweep.last.root)
    layers = sorted({router["layer"] for router in last.info["layers"]})
    labels = [label for (label,) in last.sql("select label from labels order by tokens desc, label").fetchall()]
    layer = mo.ui.dropdown([str(number) for number in layers], value=str(layers[len(layers) // 2]), label="layer")
    languages = mo.ui.multiselect(labels, value=labels[:6], label="languages")
    mo.hstack([layer, languages], justify="start")
    return languages, layer


@app.cell
def _(checkpoints, languages, layer, sweep):
    mo.stop(not languages.value)
    chosen = sweep.query("domain_specialization", layer=int(layer.value)).df()
    favourites = chosen.loc[chosen.groupby(["checkpoint", "stack", "label"]).value.idxmax()]
    shown = favourites[favourites.label.isin(languages.value)]
    alt.Chart(shown).mark_line(point=True).encode(
        x=checkpoints,
        y=alt.Y("lift:Q", title="lift of the favourite expert"),
        color="label:N",
        detail="stack:N",
        tooltip=[
            "checkpoint",
            "label",
            "expert",
            alt.Tooltip("lift", format=".2f"),
            alt.Tooltip("value", format=".3f"),
        ],
    ).properties(width=560, height=260)
    return (favourites,)


@app.cell
def _(saturation, specialization, sweep):
    names = [run.name for run in sweep.runs]
    by_checkpoint = specialization.groupby("checkpoint").value.mean().reindex(names)
    early = by_checkpoint.index[(by_checkpoint >= by_checkpoint.iloc[-1] / 2).argmax()]
    settled = saturation.groupby("checkpoint").value.mean().reindex(names[:-1])
    answer = (
        f"Mean over layers: specialization first reaches half of its last value at {early} "
        f"({by_checkpoint[early]:.2f} of {by_checkpoint.iloc[-1]:.2f}). At {names[-2]} a token shares "
        f"{settled.iloc[-1]:.0%} of its experts with the last checkpoint, at {names[0]} {settled.iloc[0]:.0%}."
    )
    mo.callout(answer)
    return answer, by_checkpoint, settled


@app.cell
def _(answer, by_checkpoint, settled):
    if mo.app_meta().mode == "script":
        print(by_checkpoint.to_frame("specialization").join(settled.rename("saturation")).round(3).to_string())
        print(answer)
    return


if __name__ == "__main__":
    app.run()
