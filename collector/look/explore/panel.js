
function render({ model, el }) {
  const view = el.appendChild(Object.assign(document.createElement("div"), { className: "view explorer" }));
  const refresh = () => {
    view.dataset.by = model.get("by");
    rove(view);
    mark(view, model.get("expert"));
  };
  for (const name of ["tokens", "experts", "card"]) {
    const part = view.appendChild(document.createElement("section"));
    part.dataset.part = name;
    part.innerHTML = model.get(name);
    model.on(`change:${name}`, () => {
      part.innerHTML = model.get(name);
      refresh();
    });
  }
  model.on("change:by", refresh);
  model.on("change:expert", refresh);
  attach(view, (expert) => {
    model.set("expert", expert);
    model.save_changes();
    mark(view, expert);
  });
  refresh();
}

export default { render };
