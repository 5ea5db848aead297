"""Shows whether languages have their own experts, by comparing the trained model with the untrained one."""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="Languages and their experts", sql_output="pandas")

with app.setup:
    import tempfile

    import altair as alt
    import marimo as mo
    import pandas as pd
    import torch

    from collector import collect_in_process, open_run
    from collector.config import CaptureConfig, DataConfig, ModelConfig, resolve

    _ = alt.data_transformers.disable_max_rows()


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # Languages and their experts

    A router has favourite experts even before any training. What it has learned about a language is the difference
    between the trained model and the same model with random weights, on the same documents.

    Without arguments this notebook collects both: the demo model over a few sentences in each of 60 languages. To study
    a real model, collect two runs and open them:

    ```sh
    collector collect --out runs/olmoe --model allenai/OLMoE-1B-7B-0924 --data 'texts/*.jsonl' --label-column lang
    collector collect --out runs/olmoe-random --model allenai/OLMoE-1B-7B-0924 --weights random \
        --data 'texts/*.jsonl' --label-column lang
    marimo edit notebooks/02_languages.py -- --run runs/olmoe --untrained runs/olmoe-random
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

    def collect(weights):
        config = resolve(
            data=DataConfig(per_label=per_label),
            model=ModelConfig(weights=weights),
            capture=CaptureConfig(),
            device="cuda" if torch.cuda.is_available() else "cpu",
        )
        return collect_in_process(f"{scratch.name}/{weights}", config).root

    runs = {
        "trained": open_run(given.get("run") or collect("pretrained")),
        "untrained": open_run(given.get("untrained") or collect("random")),
    }
    connection = runs["trained"].connection
    return connection, runs


@app.cell
def _(connection):
    languages = mo.sql(
        """
        select
            label,
            documents,
            tokens,
            round(tokens / characters, 3) as tokens_per_character
        from labels
        order by tokens desc
        """,
        engine=connection,
    )
    return (languages,)


@app.cell
def _(languages, runs):
    wanted = ["eng_Latn", "deu_Latn", "fra_Latn", "pol_Latn", "rus_Cyrl", "ukr_Cyrl", "bul_Cyrl", "ell_Grek",
              "arb_Arab", "hin_Deva", "tha_Thai", "kor_Hang", "jpn_Jpan", "zho_Hani"]  # fmt: skip
    known = sorted(languages.label)
    routers = [router["layer"] for router in runs["trained"].info["layers"]]
    shown = mo.ui.multiselect(known, value=[x for x in wanted if x in known] or known[:14], label="languages")
    layer = mo.ui.slider(steps=routers, value=routers[len(routers) // 2], label="layer", show_value=True)
    mo.hstack([shown, layer], justify="start")
    return layer, shown


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## Specialization

    Domain specialization is the share of a language's tokens that choose each expert. Experts are ordered by the
    language that uses them most, so a language with its own experts forms a block.
    """)
    return


@app.cell
def _(layer, runs, shown):
    specialization = pd.concat(
        run.query("domain_specialization", layer=layer.value, labels=shown.value).df().assign(weights=weights)
        for weights, run in runs.items()
    )
    strongest = specialization.query("weights == 'trained'").sort_values("value").groupby("expert").last()
    order = [shown.value.index(label) for label in strongest.label]
    experts = strongest.assign(place=order).sort_values(["place", "value"], ascending=[True, False]).index.tolist()
    blocks = (
        alt.Chart(specialization)
        .mark_rect()
        .encode(
            x=alt.X("expert:O", sort=experts, axis=alt.Axis(labels=False, ticks=False), title="experts"),
            y=alt.Y("label:N", sort=shown.value, title=None),
            color=alt.Color("value:Q", scale=alt.Scale(scheme="viridis", domain=[0, 1]), title="share of tokens"),
            column=alt.Column("weights:N", sort=["trained", "untrained"], title=None),
            tooltip=["label", "expert", alt.Tooltip("value", format=".3f"), alt.Tooltip("lift", format=".2f"), "n"],
        )
        .properties(width=380, title=f"Domain specialization, layer {layer.value}")
    )
    blocks
    return (specialization,)


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## Top experts

    For each language, the table lists the ten experts that are most often a token's first choice.
    """)
    return


@app.cell
def _(layer, runs, shown):
    top_experts = pd.concat(
        run.query("top_experts", layer=layer.value, labels=shown.value).df().assign(weights=weights)
        for weights, run in runs.items()
    ).query("metric == 'top1'")
    top_experts[["weights", "label", "rank", "expert", "count", "value", "n"]].round(3)
    return (top_experts,)


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## Do two languages use the same experts?

    The Jensen–Shannon divergence compares the experts of two languages, here for all pairs of the languages chosen
    above: 0 bits if both use the same experts equally often, 1 bit if they share none.
    """)
    return


@app.cell
def _(runs, shown):
    divergence = pd.concat(
        run.query("language_overlap", labels=shown.value).df().assign(weights=weights) for weights, run in runs.items()
    ).query("metric == 'jsd' and label_a < label_b")
    alt.Chart(divergence).mark_boxplot(extent="min-max").encode(
        x=alt.X("layer:O", axis=alt.Axis(labelAngle=0)),
        y=alt.Y("value:Q", title="divergence of two languages, bits"),
        color=alt.Color("weights:N", title=None),
        xOffset="weights:N",
    ).properties(width=640)
    return (divergence,)


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## The Korean question

    Does Korean use a smaller, more specific set of experts than English?

    *Smaller* is measured by the effective number of experts, the exponential of the entropy of a language's picks.
    *More specific* is measured by the lift of a language's most specialised expert: how many times more often its
    tokens choose that expert than the tokens of an average language do.
    """)
    return


@app.cell
def _(runs, shown):
    pair = ["eng_Latn", "kor_Hang"]
    korean = pd.concat(
        run.query("effective_experts", labels=pair).df().assign(weights=weights) for weights, run in runs.items()
    )
    compared = sorted({*shown.value, *pair})
    lifts = pd.concat(
        run.query("domain_specialization", labels=compared).df().assign(weights=weights)
        for weights, run in runs.items()
    ).query("label in @pair")
    highest = lifts.groupby(["weights", "layer", "label"], as_index=False).lift.max()
    return highest, korean


@app.cell
def _(highest, korean):
    def lines(rows, column, title):
        return (
            alt.Chart(rows)
            .mark_line(point=True)
            .encode(
                x=alt.X("layer:O", axis=alt.Axis(labelAngle=0)),
                y=alt.Y(f"{column}:Q", title=title, scale=alt.Scale(zero=False)),
                color=alt.Color("label:N", title=None),
                strokeDash=alt.StrokeDash("weights:N", title=None),
            )
            .properties(width=300, height=220)
        )

    lines(korean, "value", "effective experts") | lines(highest, "lift", "highest lift")
    return


@app.cell
def _(highest, korean):
    sides = korean.pivot(index=["weights", "layer"], columns="label", values="value").loc["trained"]
    lift = highest.pivot(index=["weights", "layer"], columns="label", values="lift").loc["trained"]
    tokens = korean.groupby("label").n.first()
    smaller, sharper = int((sides.kor_Hang < sides.eng_Latn).sum()), int((lift.kor_Hang > lift.eng_Latn).sum())
    answer = (
        f"Korean uses fewer effective experts than English in {smaller} of {len(sides)} layers, and its most "
        f"specialised expert is more specific in {sharper} of {len(lift)}. Korean has {tokens.kor_Hang:,} tokens here, "
        f"English {tokens.eng_Latn:,}: the effective number grows with the tokens, so a smaller one is only a finding "
        "for the language that has more of them."
    )
    mo.callout(answer)
    return (answer,)


@app.cell
def _(answer, top_experts):
    if mo.app_meta().mode == "script":
        first = top_experts[top_experts["rank"] == 1]
        print(first.pivot(index="label", columns="weights", values=["expert", "value"]).to_string())
        print(answer)
    return


@app.cell(hide_code=True)
def _():
    mo.md("""
    Languages also differ in script, topics and tokenization. `conditional_mutual_information` measures what the
    language adds beyond the tokens themselves, `routing_divergence` compares the same sentence in two languages, and
    `fertility` gives the number of tokens that each language needs.
    """)
    return


if __name__ == "__main__":
    app.run()
