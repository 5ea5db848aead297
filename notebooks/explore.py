"""The explorer app: `collector explore RUN` starts it, and `collector.look.explore` contains its parts."""

# /// script
# [tool.marimo.display]
# theme = "system"
# ///

import marimo

app = marimo.App(width="full", app_title="Routing explorer")


@app.cell
def _():
    import marimo as mo

    from collector import open_run
    from collector.look import terminal
    from collector.look.explore import advice, views
    from collector.look.explore.panel import Panel
    from collector.look.trace import page, read

    def still(element):
        """Returns a control's HTML: a cell that refers to it, not to the control, does not re-run on a choice."""
        return mo.Html(element.text)

    return Panel, advice, mo, open_run, page, read, still, terminal, views


@app.cell
def _(advice, mo, open_run):
    _root = mo.cli_args()["run"]
    run, slow = open_run(_root), advice.slow(_root)
    # The choices in the link; each is used once as the initial value of its control.
    asked = dict(mo.query_params().to_dict())
    return asked, run, slow


@app.cell
def _(asked, mo, run, still):
    _labels = [row[0] for row in run.sql("select label from labels order by label").fetchall()]
    _stacks = list(dict.fromkeys(one["stack"] for one in run.info["layers"]))
    language = mo.ui.dropdown(
        _labels, value=asked["language"] if asked.get("language") in _labels else _labels[0], label="Language"
    )
    stack = mo.ui.dropdown(
        _stacks, value=asked["stack"] if asked.get("stack") in _stacks else _stacks[0], label="Stack"
    )
    several_stacks = len(_stacks) > 1
    of_language, of_stack = still(language), still(stack)
    return language, of_language, of_stack, several_stacks, stack


@app.cell
def _(asked, mo, run, stack, still):
    _layers = sorted(one["layer"] for one in run.info["layers"] if one["stack"] == stack.value)
    _wanted = int(asked["layer"]) if str(asked.get("layer", "")).isdecimal() else _layers[len(_layers) // 2]
    layer = mo.ui.slider(
        steps=_layers, value=_wanted if _wanted in _layers else _layers[0], label="Layer", show_value=True
    )
    of_layer = still(layer)
    return layer, of_layer


@app.cell
def _(asked, mo, page, still):
    by = mo.ui.radio(
        page.BY, value=asked["by"] if asked.get("by") in page.BY else "expert", label="Colour by", inline=True
    )
    condition = mo.ui.text(
        value=asked.get("where", ""), label="Documents where", placeholder="tokens > 40 and doc_id like '%7'",
        full_width=True,
    )  # fmt: skip
    of_colour, of_condition = still(by), still(condition)
    return by, condition, of_colour, of_condition


@app.cell
def _(asked, condition, language, mo, run, still, views):
    try:
        _found, refused = views.documents(run, language.value, condition.value), ""
    except ValueError as error:
        _found, refused = [], str(error)
    _options = {f"{each.doc_id} · {each.tokens} tokens": each for each in _found}
    _wanted = next((name for name, each in _options.items() if each.key == asked.get("document")), None)
    document = mo.ui.dropdown(
        _options, value=_wanted or next(iter(_options), None), label="Document", searchable=True, full_width=True
    )
    of_document = still(document)
    return document, of_document, refused


@app.cell
def _(Panel, asked, mo, still):
    widget = Panel(expert=int(asked["expert"]) if str(asked.get("expert", "")).isdecimal() else None)
    panel = mo.ui.anywidget(widget)
    of_panel = still(panel)
    return of_panel, panel, widget


@app.cell
def _(by, widget):
    widget.by = by.value
    return


@app.cell
def _(layer, several_stacks, stack):
    name = f"{stack.value} layer {layer.value}" if several_stacks else f"layer {layer.value}"
    return (name,)


@app.cell
def _(layer, run, stack, views):
    found = views.frequencies(run, stack.value, layer.value)
    return (found,)


@app.cell
def _(asked, found, language, name, views, widget):
    widget.experts = views.experts(found, language.value, name)
    _own = [each for each in found if each.label == language.value]
    if not asked.pop("expert", None) and _own:
        # Experts of different layers are unrelated, so start with the most chosen one.
        widget.expert = max(_own, key=lambda each: each.value).expert
    favourite = widget.expert
    return (favourite,)


@app.cell
def _(document, layer, name, page, read, refused, run, stack, views, widget):
    if document.value is None:
        widget.tokens = views.message(refused or "No document of this language meets the condition.")
    elif run.lacks & {"weights", "entropy"}:
        widget.tokens = views.message("Tokens are shown by weight and entropy, which this imported run does not have.")
    else:
        _place = {"shard": document.value.shard, "doc": document.value.doc}
        _trace = read(run, stack=stack.value, layer=layer.value, **_place)
        _router, _scales = _trace.routers[0], page.Scales.of(_trace)
        widget.tokens = page.legend(_router, _scales) + page.tokens(_router, name, _scales) + views.MARKS
    return


@app.cell
def _(favourite, found, language, layer, name, panel, run, stack, views, widget):
    expert = panel.value["expert"] if panel.value["expert"] is not None else favourite
    widget.card = views.card(
        run, found, stack=stack.value, layer=layer.value, expert=expert, label=language.value, name=name
    )
    return (expert,)


@app.cell
def _(by, condition, document, expert, language, layer, mo, stack):
    _view = {
        "language": language.value, "stack": stack.value, "layer": str(layer.value), "by": by.value,
        "where": condition.value, "document": document.value.key if document.value else "", "expert": str(expert),
    }  # fmt: skip
    for _key, _value in _view.items():
        if mo.query_params().get(_key) != _value:
            mo.query_params()[_key] = _value
    return


@app.cell
def _(
    mo,
    of_colour,
    of_condition,
    of_document,
    of_language,
    of_layer,
    of_panel,
    of_stack,
    run,
    several_stacks,
    slow,
    terminal,
):
    _choices = [of_language, *([of_stack] if several_stacks else []), of_layer, of_colour]
    mo.vstack(
        [
            mo.md(f"**Routing explorer** &nbsp; {terminal.model(run.info)}: {terminal.routers(run.info['layers'])}"),
            *([mo.md(f"<small>{slow}</small>")] if slow else []),
            mo.hstack(_choices, justify="start", gap=2, wrap=True),
            mo.hstack([of_document, of_condition], widths=[1, 1], gap=2),
            of_panel,
        ]
    )
    return


if __name__ == "__main__":
    app.run()
