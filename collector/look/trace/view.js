// Interactive tokens and experts: the one under the pointer or in focus is described in full, and a click or Enter
// chooses its expert. A group is one stop of the Tab key; arrow keys move inside it. Nothing leaves the page.

/**
 * @param {Element} view contains groups (`[role=group]`) of buttons with `data-expert`, and shows the descriptions.
 * @param {(expert: number, group: Element) => void} choose is called with the chosen expert.
 */
export function attach(view, choose) {
  const tip = view.appendChild(Object.assign(document.createElement("div"), { className: "tip", id: "tip", hidden: true }));
  tip.setAttribute("role", "tooltip");
  const buttonOf = (event) => event.target.closest?.("button[data-expert]");
  const hide = () => {
    tip.hidden = true;
    view.querySelector("[aria-describedby=tip]")?.removeAttribute("aria-describedby");
  };
  const tell = (event) => {
    const button = buttonOf(event);
    if (!button?.dataset.token) return hide();
    hide();
    fill(tip, button);
    place(tip, button, view);
    button.setAttribute("aria-describedby", "tip");
  };
  view.addEventListener("pointerover", tell);
  view.addEventListener("pointerleave", hide);
  view.addEventListener("focusin", tell);
  view.addEventListener("focusout", hide);
  view.addEventListener("click", (event) => {
    const button = buttonOf(event);
    if (button) choose(Number(button.dataset.expert), button.closest("[role=group]"));
  });
  view.addEventListener("keydown", (event) => {
    if (event.key === "Escape") hide();
    const next = buttonOf(event) && neighbour(buttonOf(event), event.key);
    if (!next) return;
    event.preventDefault();
    enter(next);
    next.focus();
  });
}

/** Marks the buttons that have the expert: as the first, or among the k chosen. */
export function mark(view, expert) {
  for (const button of view.querySelectorAll("button[data-expert]")) {
    const first = Number(button.dataset.expert) === expert;
    const among = picksOf(button).some((pick) => pick.expert === expert);
    button.dataset.is = first ? "first" : among ? "among" : "";
    button.setAttribute("aria-pressed", first);
  }
}

/** Makes each group one stop of the Tab key. */
export function rove(view) {
  for (const group of view.querySelectorAll("[role=group]")) {
    const buttons = [...group.querySelectorAll("button[data-expert]")];
    if (buttons.length) enter(buttons.find((button) => button.tabIndex === 0) ?? buttons[0]);
  }
}

function enter(button) {
  for (const each of button.closest("[role=group]").querySelectorAll("button[data-expert]")) each.tabIndex = -1;
  button.tabIndex = 0;
}

function neighbour(button, key) {
  const group = button.closest("[role=group]");
  const buttons = [...group.querySelectorAll("button[data-expert]")];
  const here = buttons.indexOf(button);
  const ahead = getComputedStyle(group).direction === "rtl" ? "ArrowLeft" : "ArrowRight";
  if (key === "Home") return buttons[0];
  if (key === "End") return buttons.at(-1);
  if (key === "ArrowLeft" || key === "ArrowRight") return buttons[here + (key === ahead ? 1 : -1)];
  if (key === "ArrowUp" || key === "ArrowDown") return inNextLine(button, buttons, key === "ArrowDown" ? 1 : -1);
  return undefined;
}

/** Returns the nearest button in the next or the previous line. */
function inNextLine(button, buttons, step) {
  const here = button.getBoundingClientRect();
  const beyond = buttons
    .map((each) => ({ each, box: each.getBoundingClientRect() }))
    .filter(({ box }) => (box.top - here.top) * step > here.height / 2);
  const line = Math.min(...beyond.map(({ box }) => box.top * step));
  const away = ({ box }) => Math.abs(box.left - here.left);
  return beyond.filter(({ box }) => Math.abs(box.top * step - line) < 2).sort((a, b) => away(a) - away(b))[0]?.each;
}

/** Parses `61:0.67 4:0.21` into objects. */
function picksOf(button) {
  const pairs = button.dataset.picks ? button.dataset.picks.split(" ") : [];
  return pairs.map((pair) => ({ expert: Number(pair.split(":")[0]), weight: Number(pair.split(":")[1]) }));
}

function fill(tip, button) {
  const add = (parent, name, text) => Object.assign(parent.appendChild(document.createElement(name)), { textContent: text });
  tip.replaceChildren();
  add(tip, "strong", button.dataset.token);
  const picks = picksOf(button).sort((a, b) => b.weight - a.weight);
  for (const { expert, weight } of picks) {
    const line = add(tip, "div", "");
    add(line, "span", expert);
    add(line, "span", weight.toFixed(3));
    add(line, "i", "").style.width = `${(100 * weight) / picks[0].weight}%`;
  }
  add(tip, "p", button.dataset.about);
}

/** Places the description below the button, within the view. */
function place(tip, button, view) {
  tip.hidden = false;
  const box = button.getBoundingClientRect();
  const around = view.getBoundingClientRect();
  const left = Math.min(box.left - around.left, around.width - tip.offsetWidth);
  tip.style.left = `${Math.max(0, left)}px`;
  tip.style.top = `${box.bottom - around.top + 6}px`;
}
