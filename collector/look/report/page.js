// Draws the figures of the report: decodes the data and passes each drawing the rows of the chosen layer.
// No metric is computed here. The page contains everything: its content security policy forbids requests.
"use strict";

(async () => {
  const report = await decode(document.getElementById("data").textContent);
  const slider = document.getElementById("layer");
  const schemeButton = document.getElementById("scheme");
  const root = document.documentElement;
  const coloured = new Set(report.coloured);
  const views = new Map();

  async function decode(base64) {
    const bytes = Uint8Array.from(atob(base64.trim()), (character) => character.charCodeAt(0));
    return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
  }

  const router = () => report.routers[Number(slider.value)];

  function rowsOf(columns) {
    const names = Object.keys(columns);
    const length = names.length ? columns[names[0]].length : 0;
    const rows = [];
    for (let i = 0; i < length; i++) {
      const row = {};
      for (const name of names) row[name] = columns[name][i];
      if ("label" in row) row._coloured = coloured.has(row.label);
      rows.push(row);
    }
    return rows;
  }

  // A table is an object of columns, or, if it is drawn layer by layer, a list of them in the order of the routers.
  const shown = (table) => rowsOf(Array.isArray(table) ? table[Number(slider.value)] : table);

  async function draw(figure) {
    const element = document.querySelector(`[data-figure="${figure.name}"] .chart`);
    const datasets = {};
    for (const [name, table] of Object.entries(figure.tables)) datasets[name] = shown(report.tables[table]);
    views.get(figure.name)?.finalize();
    const scheme = root.dataset.scheme;
    const result = await vegaEmbed(element, { ...figure.spec, datasets }, {
      mode: "vega-lite", actions: false, renderer: "svg", ast: true, config: report.themes[scheme],
      tooltip: { theme: scheme === "dark" ? "dark" : "custom" },
    });
    views.set(figure.name, result);
    element.dataset.drawn = scheme;
  }

  async function update(figure) {
    const { view } = views.get(figure.name);
    for (const [name, table] of Object.entries(figure.tables)) view.data(name, shown(report.tables[table]));
    await view.resize().runAsync();
  }

  function nameLayer() {
    const { name, stack, layer } = router();
    slider.setAttribute("aria-valuetext", name);
    document.getElementById("layer-name").textContent = name;
    for (const element of document.querySelectorAll("[data-layer-name]")) element.textContent = ` · ${name}`;
    for (const element of document.querySelectorAll("[data-by-layer]")) {
      const ofStack = report.stacks > 1 ? ` --stack ${stack}` : "";
      element.textContent = `${element.dataset.command}${ofStack} --layer ${layer}`;
    }
  }

  const distance = ({ name }) => {
    const { top, bottom } = document.getElementById(name).getBoundingClientRect();
    return Math.max(top - window.innerHeight, -bottom, 0);
  };

  // Visible figures are drawn first; another move of the slider cancels drawings that are out of date.
  let moving = null;
  let wanted = false;
  async function showLayer() {
    nameLayer();
    wanted = true;
    if (moving) return moving;
    moving = (async () => {
      while (wanted) {
        wanted = false;
        const figures = report.figures.filter((figure) => figure.by_layer);
        for (const figure of figures.sort((a, b) => distance(a) - distance(b))) {
          if (wanted) break;
          await update(figure);
        }
      }
      root.dataset.layer = slider.value;
      moving = null;
    })();
    return moving;
  }

  async function setScheme(scheme) {
    root.dataset.scheme = scheme;
    schemeButton.setAttribute("aria-pressed", String(scheme === "dark"));
    for (const figure of report.figures) await draw(figure);
    root.dataset.drawn = scheme;
  }

  function download(name, blob) {
    const link = document.createElement("a");
    link.href = URL.createObjectURL(blob);
    link.download = name;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10000);
  }

  const quote = (cell) => (/[",\r\n]/.test(cell) ? `"${cell.replaceAll('"', '""')}"` : cell);

  function csv(table) {
    const parts = Array.isArray(table)
      ? table.map((columns, i) => [columns, { stack: report.routers[i].stack, layer: report.routers[i].layer }])
      : [[table, {}]];
    const lines = [];
    for (const [columns, given] of parts) {
      const names = Object.keys(columns).filter((name) => !name.startsWith("_"));
      if (!lines.length) lines.push([...Object.keys(given), ...names].join(","));
      const length = names.length ? columns[names[0]].length : 0;
      for (let i = 0; i < length; i++) {
        lines.push([...Object.values(given), ...names.map((name) => columns[name][i] ?? "")].map(String).map(quote).join(","));
      }
    }
    return lines.join("\n") + "\n";
  }

  const figureOf = (element) => {
    const name = element.closest("[data-figure]").dataset.figure;
    return report.figures.find((figure) => figure.name === name);
  };

  document.addEventListener("click", async (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    if (button === schemeButton) await setScheme(root.dataset.scheme === "dark" ? "light" : "dark");
    if ("csv" in button.dataset) {
      const figure = figureOf(button);
      download(`${figure.name}.csv`, new Blob([csv(report.tables[figure.tables.rows])], { type: "text/csv" }));
    }
    if ("svg" in button.dataset) {
      const figure = figureOf(button);
      const svg = await views.get(figure.name).view.toSVG();
      download(`${figure.name}.svg`, new Blob([svg], { type: "image/svg+xml" }));
    }
  });

  document.addEventListener("change", async (event) => {
    if (event.target.name !== "coloured") return;
    if (event.target.checked && coloured.size >= report.max_coloured) {
      event.target.checked = false;
      return;
    }
    coloured[event.target.checked ? "add" : "delete"](event.target.value);
    for (const figure of report.figures) if (figure.coloured) await update(figure);
    root.dataset.coloured = coloured.size;
  });

  slider.addEventListener("input", showLayer);
  const preferred = window.matchMedia("(prefers-color-scheme: dark)");
  preferred.addEventListener("change", () => setScheme(preferred.matches ? "dark" : "light"));
  nameLayer();
  await setScheme(preferred.matches ? "dark" : "light");
  root.dataset.layer = slider.value;
})();
