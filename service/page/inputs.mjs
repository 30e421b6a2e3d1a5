// The choice of a source, and the panel of each: a file, a curve, a text.

import { button, choice, colour, h } from "./dom.mjs";
import { fresh } from "./plot.mjs";
import { co2, fromCsv, fromText, kindOf, listed, microphone, signal } from "./sources.mjs";

const TEXT = `import os

def main(path):
    with open(path) as file:
        return [line.strip() for line in file if line]

if __name__ == "__main__":
    print(main(os.environ["HOME"]))
`;
const SHAPES = {
  "a sine": (t) => Math.sin(6 * Math.PI * t),
  "a step": (t) => (t < 0.5 ? -0.6 : 0.6),
  "a pulse": (t) => 1.8 * Math.exp(-(((t - 0.5) / 0.05) ** 2)) - 0.8,
  "a saw": (t) => 2 * ((4 * t) % 1) - 1,
};
// Points of a drawn curve, one per step.
const POINTS = 200;

// The sources that fit a model: label -> function that creates the panel.
function offers(model) {
  const kind = kindOf(model),
    found = {};
  if (model.name === "co2" && kind === 1) found["CO₂ at Mauna Loa"] = example;
  if (kind === "bytes") found.Text = text;
  if (typeof kind === "number" && model.inputs[0].rate) found.Microphone = ears;
  found["A generated signal"] = generated;
  if (typeof kind === "number") found["A CSV file"] = file;
  if (typeof kind === "number" && kind < 32) found["A drawn curve"] = (inputs) => new Curve(inputs);
  return found;
}

// Calls onSource(source) whenever the source changes.
export class Inputs {
  constructor(model, onSource, messages) {
    Object.assign(this, { model, onSource, messages });
    const found = offers(model);
    const select = choice("Input", Object.keys(found), (name) => this.choose(found[name]));
    this.panel = h("div", { class: "panel" });
    this.element = h("div", {}, h("label", {}, "Input", select), this.panel);
    this.first = found[select.value];
  }

  begin() {
    return this.choose(this.first);
  }

  choose(makePanel) {
    this.use(undefined);
    const panel = makePanel(this);
    this.panel.replaceChildren(...(panel.element ? [panel.element] : []));
    return this.messages.attempt(() => panel.begin?.());
  }

  use(source) {
    this.source?.stop?.();
    this.source = source;
    this.onSource(source);
  }

  // A file that was dropped on the page.
  async drop(file) {
    await this.messages.attempt(async () => {
      const kind = kindOf(this.model),
        text = await file.text();
      if (kind === "bytes") return this.use({ ...fromText(text), name: file.name });
      if (typeof kind !== "number") throw new Error("A file can be played for models with one input of numbers only.");
      this.use(fromCsv(file.name, text, kind));
      this.messages.say(`${file.name}: ${this.source.length} steps.`);
    });
  }
}

// A panel: its elements, and a function that starts it.
const example = (inputs) => ({ begin: async () => inputs.use(await co2()) });
const generated = (inputs) => ({ begin: () => inputs.use(signal(inputs.model)) });

function text(inputs) {
  const element = h("textarea", { "aria-label": "Text to read, byte by byte", spellcheck: "false" });
  const begin = () => inputs.use(fromText(element.value));
  element.value = TEXT;
  element.addEventListener("input", begin);
  return { element, begin };
}

function file(inputs) {
  const onchange = () => chosen.files[0] && inputs.drop(chosen.files[0]);
  const chosen = h("input", { type: "file", accept: ".csv,.tsv,.txt,text/csv", onchange });
  return { element: h("label", { class: "drop" }, "Choose a file, or drop one anywhere on this page.", chosen) };
}

function ears(inputs) {
  const { model, messages } = inputs;
  const listen = async () => inputs.use(await microphone(kindOf(model), model.inputs[0].rate));
  return { element: button("Listen", () => messages.attempt(listen)) };
}

class Curve {
  constructor(inputs) {
    this.inputs = inputs;
    const range = inputs.model.name === "co2" ? [320, 360] : [-1, 1];
    this.canvas = h("canvas", {
      class: "drawing",
      role: "img",
      "aria-label": "A curve: draw it with the pointer, or fill it with a shape",
    });
    const value = (label, start) =>
      h("input", { type: "number", step: "any", value: start, "aria-label": label, onchange: () => this.changed() });
    [this.low, this.high] = [value("lowest value", range[0]), value("highest value", range[1])];
    const shapes = choice("Fill the curve with", Object.keys(SHAPES), (name) => this.fill(SHAPES[name]));
    this.element = h(
      "div",
      {},
      this.canvas,
      h("div", { class: "controls" }, shapes, h("label", {}, "from", this.low), h("label", {}, "to", this.high)),
    );
    this.canvas.addEventListener("pointerdown", (event) => {
      this.canvas.setPointerCapture(event.pointerId);
      this.last = null;
      this.draw(event);
    });
    this.canvas.addEventListener("pointermove", (event) => event.buttons && this.draw(event));
    this.canvas.addEventListener("pointerup", () => this.changed());
    this.begin = () => this.fill(SHAPES["a sine"]);
  }

  fill(shape) {
    this.values = Array.from({ length: POINTS }, (_, i) => shape(i / POINTS));
    this.changed();
  }

  draw(event) {
    const box = this.canvas.getBoundingClientRect();
    const at = Math.max(0, Math.min(POINTS - 1, Math.floor(((event.clientX - box.left) / box.width) * POINTS)));
    const value = Math.max(-1, Math.min(1, 1 - (2 * (event.clientY - box.top)) / box.height));
    const [from, before] = this.last ?? [at, value];
    for (let i = Math.min(from, at); i <= Math.max(from, at); i++) {
      this.values[i] = at === from ? value : before + ((value - before) * (i - from)) / (at - from);
    }
    this.last = [at, value];
    this.paint();
  }

  paint() {
    const area = fresh(this.canvas, 120);
    if (!area) return;
    area.context.strokeStyle = colour("accent");
    area.context.lineWidth = 2;
    area.context.beginPath();
    this.values.forEach((value, i) => area.context.lineTo((i / (POINTS - 1)) * area.width, (1 - value) * 58 + 2));
    area.context.stroke();
  }

  changed() {
    this.paint();
    const low = Number(this.low.value),
      high = Number(this.high.value),
      width = kindOf(this.inputs.model);
    const steps = this.values.map((value) => Array(width).fill(low + ((value + 1) / 2) * (high - low)));
    this.inputs.use(listed("a drawn curve", steps));
  }
}
