"""Shows what experts cause: languages without their own experts, beside controls; what predicts an expert's worth."""

import marimo

__generated_with = "0.25.2"
app = marimo.App(width="medium", app_title="What experts cause", sql_output="pandas")

with app.setup:
    import tempfile
    from pathlib import Path

    import altair as alt
    import marimo as mo
    import torch

    from collector import collect_in_process, open_run, prepare_intervention
    from collector.config import CaptureConfig, DataConfig, ModelConfig, resolve

    _ = alt.data_transformers.disable_max_rows()


@app.cell(hide_code=True)
def _():
    mo.md(r"""
    # What experts cause

    An expert that a language chooses often need not be one that it needs: another expert may do as well. Switched off,
    it shows. But any edit costs something, so what counts is what it costs beyond other experts of the same layer that
    are chosen as often, and beyond what it costs other languages.

    Without arguments this notebook collects the demo model over a few sentences in each of 60 languages. Half of them
    say which two experts of each layer are most a language's own. The other half goes through the model without these,
    without random ones in their place, and without each expert of one layer in turn. To study a real model, do the
    same on a GPU and open the result:

    ```sh
    collector collect --out runs/olmoe --model allenai/OLMoE-1B-7B-0924 --data 'texts/*.jsonl' --label-column lang \
        --record outputs
    collector intervene runs/olmoe --arms language_experts --controls 99 --split --out runs/olmoe-without
    marimo edit notebooks/07_interventions.py -- --run runs/olmoe-without
    ```
    """)
    return


@app.cell
def _():
    given = mo.cli_args()
    per_label = int(given.get("per-label") or 16)
    languages = ["eng_Latn", "deu_Latn", "rus_Cyrl", "heb_Hebr", "jpn_Jpan", "kor_Hang"]
    return given, languages, per_label


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## Arms

    An arm is a set of edits with a name. Arms are rows of SQL over the run, which may also read the test of
    specialization: here two experts of each layer and language, those with the largest lift of the significant ones.
    """)
    return


@app.cell
def _(languages):
    named = ", ".join(f"'{label}'" for label in languages)
    arms = f"""
    select label as arm, stack, layer, expert, 'drop' as operation
    from specialization_test
    where significant and label in ({named})
    qualify row_number() over (partition by stack, layer, label order by lift desc, expert) <= 2
    """
    one_by_one = (
        "select 'expert ' || expert as arm, stack, layer, expert, 'drop' as operation from experts where layer = 4"
    )
    return arms, named, one_by_one


@app.cell
def _(arms, given, named, one_by_one, per_label):
    scratch = tempfile.TemporaryDirectory()
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def intervene(root, name, sql, **options):
        path = Path(scratch.name, f"{name}.sql")
        path.write_text(sql)
        found = prepare_intervention(root, str(path), documents=f"from documents where label in ({named})", **options)
        config = resolve(data=found.data, model=found.model, capture=found.capture, device=device)
        return open_run(collect_in_process(f"{scratch.name}/{name}", config, part_of=found.part_of).root)

    def collect():
        config = resolve(
            data=DataConfig(per_label=per_label), model=ModelConfig(), capture=CaptureConfig(record=("outputs",)),
            device=device,
        )  # fmt: skip
        root = collect_in_process(f"{scratch.name}/run", config).root
        return intervene(root, "without", arms, controls=9, split=True), intervene(root, "singly", one_by_one)

    run, singly = (open_run(given["run"]), None) if given.get("run") else collect()
    return run, singly


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## Who loses what

    How much worse the model predicts each language without the two experts of each layer that are most another's.
    """)
    return


@app.cell
def _(run):
    effects = run.query("expert_effect").df().query("metric == 'nats_per_token'")
    alt.Chart(effects).mark_rect().encode(
        x=alt.X("label:N", title="language that is predicted"),
        y=alt.Y("arm:N", title="without the experts of"),
        color=alt.Color("value:Q", title="nats per token", scale=alt.Scale(scheme="viridis")),
        tooltip=["arm", "label", *(alt.Tooltip(each, format=".3g") for each in ("value", "baseline", "floor")), "n"],
    ).properties(width=420, height=alt.Step(28))
    return (effects,)


@app.cell(hide_code=True)
def _():
    mo.md("""
    ## Beside other experts

    The coloured point is what a language loses without its own experts, with a 95 % interval over documents. The grey
    ones are its controls: as many other experts of the same layers, chosen about as often.
    """)
    return


@app.cell
def _(run):
    specific = run.query("effect_specificity").df()
    own = specific.query("metric == 'effect' and label == target")
    own = own.assign(low=own.value - 1.96 * own.standard_error, high=own.value + 1.96 * own.standard_error)
    targets = own[["arm", "label"]]
    controls = run.query("control_effects").df().query("control > 0").merge(targets, on=["arm", "label"])
    order = own.sort_values("value", ascending=False).arm.tolist()
    arm_axis = alt.Y("arm:N", sort=order, title=None)
    cloud = alt.Chart(controls).mark_circle(color="grey", opacity=0.5).encode(x="value:Q", y=arm_axis)
    interval = alt.Chart(own).mark_rule().encode(x=alt.X("low:Q", title="nats per token"), x2="high:Q", y=arm_axis)
    estimate = alt.Chart(own).mark_circle(size=90, opacity=1).encode(
        x="value:Q", y=arm_axis, tooltip=["arm", "label", alt.Tooltip("value", format=".3f"), "n", "controls"]
    )  # fmt: skip
    (cloud + interval + estimate).properties(width=520, height=alt.Step(24))
    return controls, own, specific


@app.cell
def _(specific):
    specificity = specific.query("metric == 'specificity'").sort_values("value", ascending=False)
    mo.ui.table(specificity[["arm", "value", "standard_error", "baseline", "controls", "p", "q"]].round(4))
    return (specificity,)


@app.cell(hide_code=True)
def _():
    mo.md("""
    Above: what an arm costs its own language beyond the others, against the same of its controls. With 9 controls no p
    is below 0.1; a real study takes 99 or more.

    ## Does anything predict it?

    Every expert of one layer is dropped alone. On the left, how much its layer's output it contributes; on the right,
    how often it is chosen; upwards, what the model loses without it.
    """)
    return


@app.cell
def _(run, singly):
    source = singly or run
    mo.stop(not source.has("label_outputs"), mo.md("The run did not record what experts put out: `--record outputs`."))
    agreement = source.query("importance_agreement", pooled=True).df().query("metric == 'spearman'")
    alt.Chart(agreement).mark_bar().encode(
        x=alt.X("value:Q", title="rank correlation with the loss without the expert"),
        y=alt.Y("observed:N", sort="-x", title=None),
        row=alt.Row("layer:N"),
        tooltip=["observed", alt.Tooltip("value", format=".2f"), alt.Tooltip("standard_error", format=".2f"), "n"],
    ).properties(width=420)
    return (agreement,)


@app.cell
def _(own, specificity):
    most = own.sort_values("value", ascending=False).iloc[0]
    beyond, error = int((specificity.value > specificity.baseline).sum()), 1.96 * most.standard_error
    answer = (
        f"Without its own experts {most.label} loses {most.value:.3f} ± {error:.3f} nats per token, without its "
        f"controls {most.baseline:.3f}. {beyond} of {len(specificity)} arms hurt their own language more "
        "than the others, beyond what controls do."
    )
    mo.callout(answer)
    return (answer,)


@app.cell
def _(answer, specificity):
    if mo.app_meta().mode == "script":
        print(specificity[["arm", "value", "standard_error", "baseline", "p"]].round(4).to_string(index=False))
        print(answer)
    return


if __name__ == "__main__":
    app.run()
