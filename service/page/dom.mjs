// Elements, and formatting of values.

// An element. Attributes that are functions become listeners; children that are null are omitted.
export function h(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else if (typeof value === "boolean") element.toggleAttribute(name, value);
    else if (value != null) element.setAttribute(name, value);
  }
  element.append(...children.flat().filter((child) => child != null));
  return element;
}

export const button = (label, onclick, attributes = {}) =>
  h("button", { type: "button", onclick, ...attributes }, label);

// A select element with some names; onchange receives the name.
export function choice(label, names, onchange) {
  const select = h(
    "select",
    { "aria-label": label, onchange: () => onchange?.(select.value) },
    names.map((name) => h("option", {}, name)),
  );
  return select;
}

// The select element for a view's model.
export function modelChoice(models, model, view) {
  const names = models.map(({ name }) => name);
  const select = choice("Model", names, (name) => (location.hash = `#${view}/${encodeURIComponent(name)}`));
  select.value = model.name;
  return select;
}

// A number in a table.
export const figure = (text, kind = "") => h("td", { class: `figure ${kind}` }, text);

// A table. Cells are text, elements, or figures. head: titles of the first column and of the figures.
export function table(rows, head, attributes) {
  const row = (cells) =>
    h("tr", {}, cells.map((cell) => (cell instanceof HTMLTableCellElement ? cell : h("td", {}, cell))));
  const title = (name, i) => h("th", { scope: "col", class: i ? "figure" : null }, name);
  return h("table", attributes, head && h("thead", {}, row(head.map(title))), h("tbody", {}, rows.map(row)));
}

// The content of a list of facts: {name: value}.
export const facts = (list) =>
  Object.entries(list).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value)));

// A colour of the style sheet in the current scheme, light or dark.
export const colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

const UNITS = ["bytes", "kB", "MB", "GB"];

export function size(bytes) {
  const power = Math.min(Math.floor(Math.log10(Math.max(bytes, 1)) / 3), UNITS.length - 1);
  return `${(bytes / 1000 ** power).toLocaleString("en", { maximumFractionDigits: power ? 1 : 0 })} ${UNITS[power]}`;
}

export function number(value, digits = 4) {
  if (value === 0 || !Number.isFinite(value)) return String(value);
  const magnitude = Math.abs(value);
  if (magnitude < 1e-3 || magnitude >= 1e7) return value.toExponential(1);
  return value.toLocaleString("en", { maximumSignificantDigits: Math.max(digits, Math.ceil(Math.log10(magnitude))) });
}

export function duration(seconds) {
  if (!Number.isFinite(seconds)) return "–";
  if (seconds < 1e-3) return `${number(seconds * 1e6, 3)} µs`;
  return seconds < 1 ? `${number(seconds * 1e3, 3)} ms` : `${number(seconds, 3)} s`;
}

// Number of values in one time step of a tensor.
export const sizeOf = (tensor) => tensor.shape.reduce((product, length) => product * length, 1);

export const shape = (tensor) => `${tensor.dtype}${tensor.shape.length ? ` [${tensor.shape.join(", ")}]` : ""}`;

// The label of a layer's slice of the state: "layer 0 · h".
export function slotName(slot, slots) {
  const same = slots.filter(({ kind }) => "hc".includes(kind));
  const modules = new Set(same.map(({ module }) => module));
  const parts = [];
  if (modules.size > 1 || !"hc".includes(slot.kind)) parts.push(slot.module || "model");
  if ("hc".includes(slot.kind)) parts.push(`layer ${slot.layer}`);
  if (slot.direction === "reverse") parts.push("reverse");
  if (slot.call) parts.push(`call ${slot.call}`);
  return [...parts, slot.kind].join(" · ");
}

// A status region, also announced to screen readers. `busy` runs a task and shows its error.
export class Messages {
  constructor() {
    this.element = h("ol", { class: "messages", role: "log", "aria-label": "What happened" });
  }

  say(text, kind = "") {
    this.element.prepend(h("li", { class: kind }, text));
    while (this.element.children.length > 6) this.element.lastChild.remove();
  }

  async attempt(task) {
    try {
      return await task();
    } catch (error) {
      this.say(explain(error), "error");
      return undefined;
    }
  }
}

// The text of an error: the server's code and detail if there are any.
export function explain(error) {
  return error.code ? `${error.detail} (${error.code})` : error.message;
}
