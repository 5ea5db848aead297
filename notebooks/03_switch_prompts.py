"""Compares a Switch encoder's routing of bare questions with that of the same questions after a context."""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="Prompts through a Switch encoder", sql_output="pandas")

with app.setup:
    import json
    import tempfile
    from pathlib import Path

    import altair as alt
    import marimo as mo
    import torch
    from transformers import AutoTokenizer, SwitchTransformersConfig, SwitchTransformersModel
    from transformers.utils import logging

    from collector import collect_in_process, open_run
    from collector.config import CaptureConfig, DataConfig, ModelConfig, resolve
    from collector.models.loading import DEMO_MODEL


@app.cell(hide_code=True)
def _():
    mo.md("""
    # Prompts through a Switch encoder

    Switch Transformers choose one expert per token, in every other layer, and give each expert a capacity: tokens
    beyond it are dropped. Does the encoder route a question differently if a context precedes it?

    For a real answer use `google/switch-base-8`, with your prompts as JSON lines of `text`, `label` (the prompt set)
    and `parallel_id` (the question):

    ```sh
    marimo edit notebooks/03_switch_prompts.py -- --model google/switch-base-8 --prompts prompts.jsonl
    ```

    Without arguments the model is a tiny Switch encoder with **random weights**: tables and figures are computed in the
    same way, but say nothing about language.
    """)
    return


@app.cell
def _():
    given = mo.cli_args()
    scratch = tempfile.TemporaryDirectory()
    return given, scratch


@app.cell
def _(given, scratch):
    def tiny_switch(folder):
        """Saves a Switch model of 4 + 4 layers with 8 experts, and the demo's tokenizer; returns the folder."""
        torch.manual_seed(0)
        config = SwitchTransformersConfig(
            vocab_size=8192, d_model=32, d_kv=8, d_ff=32, num_heads=4, num_experts=8, expert_capacity=16,
            num_layers=4, num_sparse_encoder_layers=2, num_decoder_layers=4, num_sparse_decoder_layers=2,
            pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
        )  # fmt: skip
        logging.disable_progress_bar()
        SwitchTransformersModel(config).save_pretrained(folder)
        AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
        return str(folder)

    model = given.get("model") or tiny_switch(Path(scratch.name, "switch"))
    return (model,)


@app.cell
def _(given, scratch):
    facts = {
        "Where does the river end?": "The Rhine rises in the Alps, runs north past Basel and Cologne, and meets the "
        "North Sea in the Netherlands.",
        "How many moons does the planet have?": "Mars is a small planet with a thin atmosphere. Two moons, Phobos and "
        "Deimos, go round it.",
        "Who wrote the symphony?": "The Ninth was first played in Vienna in 1824. Beethoven did not hear the applause.",
        "When was the bridge finished?": "Work on the bridge began in 1870 and took thirteen years, so that carts "
        "crossed it in 1883.",
        "What do the bees collect?": "In spring the bees fly to the orchard, and bring nectar and pollen to the hive.",
        "Which metal is the heaviest?": "Of these metals aluminium is the lightest, and osmium the heaviest.",
    }
    rules = "Answer from the context alone. If it does not tell, say that it does not."

    def rows():
        for number, (question, context) in enumerate(facts.items()):
            shared = {"parallel_id": f"q{number}"}
            yield {"id": f"base-{number}", "label": "base", "text": question} | shared
            text = f"{rules}\n\nContext: {context}\n\nQuestion: {question}"
            yield {"id": f"context-{number}", "label": "context", "text": text} | shared

    prompts = Path(given.get("prompts") or Path(scratch.name, "prompts.jsonl"))
    if not given.get("prompts"):
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows()), encoding="utf-8")
    return (prompts,)


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## Collect

    Only the encoder is recorded, so the decoder never runs. The run stores texts, to show which prompt is which, and
    full probabilities, to compare the same question in both sets.
    """)
    return


@app.cell
def _(model, prompts, scratch):
    settings = resolve(
        data=DataConfig(data=(str(prompts),)),
        model=ModelConfig(model=model),
        capture=CaptureConfig(stacks=("encoder",), store=("text", "probabilities")),
        device="cuda" if torch.cuda.is_available() else "cpu",
    )
    run = open_run(collect_in_process(f"{scratch.name}/run", settings).root)
    connection = run.connection
    return connection, run


@app.cell
def _(connection):
    texts = mo.sql(
        """
        select doc_id, label, tokens, text
        from documents
        order by parallel_id, label
        """,
        engine=connection,
    )
    return (texts,)


@app.cell
def _(run, texts):
    routers = [router["layer"] for router in run.info["layers"]]
    prompt = mo.ui.dropdown(texts.doc_id.tolist(), value=texts.doc_id[0], label="prompt")
    layer = mo.ui.dropdown({f"layer {n}": n for n in routers}, value=f"layer {routers[0]}", label="encoder")
    mo.hstack([prompt, layer], justify="start")
    return layer, prompt


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## Token by token

    The table shows the expert that each token chose, its probability (the softmax of the logits, which is also the
    weight of the expert's output), the entropy of the router's distribution in nats (ln 8 = 2.08 would mean no
    preference at all), and whether the capacity limit dropped the token.
    """)
    return


@app.cell
def _(layer, prompt, run):
    trace = run.query("token_trace", document=prompt.value, layer=layer.value, include_special=True).df()
    tokens = trace.assign(probability=trace.weights.str[0])[
        ["position", "token", "expert", "probability", "router_entropy", "dropped_picks"]
    ]
    tokens.astype({"probability": float, "router_entropy": float}).round(3)
    return (tokens,)


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## Base against context

    The bars show the share of each prompt set's tokens that goes to each expert. The dashed line is 1/E, the share for
    a router without preference.
    """)
    return


@app.cell
def _(run):
    shares = run.query("selection_frequency").df().query("metric == 'top1_frequency'")
    bars = (
        alt.Chart(shares)
        .mark_bar()
        .encode(
            x=alt.X("expert:O", axis=alt.Axis(labelAngle=0)),
            y=alt.Y("value:Q", title="share of tokens"),
            color=alt.Color("label:N", title="prompts"),
            xOffset="label:N",
        )
    )
    uniform = alt.Chart(shares).mark_rule(strokeDash=[4, 4]).encode(y="baseline:Q")
    panels = alt.layer(bars, uniform).properties(width=300, height=200)
    panels.facet(column=alt.Column("layer:N", title="encoder layer"))
    return (shares,)


@app.cell
def _(run):
    _decisive = "metric in ('router_entropy', 'topk_mass')"
    entropy = run.query("router_entropy").df().query(_decisive)
    quantiles = run.query("router_entropy_quantiles").df().query(_decisive)
    drops = run.query("dropped_tokens").df().query("metric == 'dropped_tokens'")
    divergence = run.query("routing_divergence", labels=["base", "context"]).df().query("label_a < label_b")
    mo.vstack(
        [
            mo.md("How decided the router is: the mean over a set's tokens, and the baseline of no preference."),
            entropy[["metric", "layer", "label", "value", "baseline", "n"]].round(3),
            mo.md("The median and the quartiles over tokens:"),
            quantiles[["metric", "layer", "label", "value", "first_quartile", "third_quartile"]].round(3),
            mo.md("The share of tokens that the capacity limit dropped:"),
            drops[["layer", "label", "value", "n"]].round(3),
            mo.md("Divergence of the same question between the sets: 0 if routed alike, 1 if no expert is shared."),
            divergence[["metric", "layer", "value", "n"]].round(3),
        ]
    )
    return divergence, drops, entropy, quantiles


@app.cell
def _(divergence, entropy, prompt, tokens):
    if mo.app_meta().mode == "script":
        print(f"prompt {prompt.value}")
        print(tokens.to_string(index=False))
        print(entropy[["metric", "layer", "label", "value", "n"]].to_string(index=False))
        print(divergence[["metric", "layer", "value", "n"]].to_string(index=False))
    return


if __name__ == "__main__":
    app.run()
