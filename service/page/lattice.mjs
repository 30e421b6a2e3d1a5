// Layer by layer, or step by step: the layers of a real model over a few steps, in both orders.

import { button, explain, figure, h, modelChoice, number, slotName, table } from "./dom.mjs";
import { kindOf, signal } from "./sources.mjs";
import { joinSteps } from "./trace.mjs";

const STEPS = 8;
const SVG = "http://www.w3.org/2000/svg";
const GAP = 52,
  MARGIN = 30,
  RADIUS = 13;
const PAUSE = 330; // milliseconds

// The cells in the order of computation: [layer, step].
const ORDERS = {
  "Layer by layer": (layers) => grid(layers, STEPS, (layer, step) => [layer, step]),
  "Step by step": (layers) => grid(STEPS, layers, (step, layer) => [layer, step]),
};
const grid = (outer, inner, cell) =>
  Array.from({ length: outer }, (_, i) => Array.from({ length: inner }, (_, j) => cell(i, j))).flat();

export class LatticeView {
  constructor(section, client) {
    this.section = section;
    this.client = client;
  }

  async show(wanted) {
    const models = await this.client.models();
    const model =
      models.find(({ name }) => name === wanted) ?? models.find(({ name }) => name === "bytes") ?? models[0];
    if (!model) throw new Error("This server has no models.");
    this.layers = layersOf(model);
    this.model = model;
    this.slider = h("input", {
      type: "range",
      min: 0,
      max: this.layers.length * STEPS,
      value: 0,
      "aria-label": "Cells computed",
      oninput: () => (this.stop(), this.draw()),
    });
    this.play = button("Play", () => (this.timer ? this.stop() : this.start()), { class: "primary" });
    this.count = h("output", { class: "figure" });
    this.panels = Object.entries(ORDERS).map(
      ([title, order]) => new Panel(title, order(this.layers.length), this.layers),
    );
    this.section.replaceChildren(
      h("div", { class: "title" }, h("h1", {}, "Layer by layer, or step by step?"), modelChoice(models, model, "lattice")),
      h(
        "p",
        { class: "lead" },
        "A cell needs the same layer one step earlier, and the layer below at the same step. Both orders respect that, so both compute the same cells, with the same numbers.",
      ),
      h(
        "div",
        { class: "card" },
        h(
          "div",
          { class: "controls" },
          this.play,
          button("One cell", () => (this.stop(), this.move(1))),
          this.slider,
          this.count,
        ),
      ),
      h(
        "div",
        { class: "charts" },
        this.panels.map(({ element }) => element),
      ),
      h("div", { class: "card" }, h("h2", {}, "The same numbers"), this.explanation(), this.proof()),
    );
    this.draw();
    if (!matchMedia("(prefers-reduced-motion: reduce)").matches) this.start();
  }

  hide() {
    this.stop();
  }

  explanation() {
    return h(
      "p",
      {},
      `A whole sequence runs layer by layer, all ${STEPS} steps of one before the next. A session runs step by step, because its next input does not exist yet. `,
      "Between two steps only the state of every layer is kept, the dashed line: ",
      h("b", {}, `${number(this.model.state_size)} values`),
      " for this model, however long the stream is.",
    );
  }

  proof() {
    const found = h("div", { role: "status" });
    if (!this.model.streamable)
      return h("p", { class: "notice" }, `This model runs whole sequences only: ${this.model.not_streamable_because}`);
    if (this.model.static.length)
      return h("p", { class: "soft" }, "This model has inputs that are given once: try it in the playground.");
    const run = button("Run both on this server", async () => {
      run.disabled = true;
      found.replaceChildren(await this.compare().catch((error) => h("p", { class: "notice error" }, explain(error))));
      run.disabled = false;
    });
    return h("div", {}, h("div", { class: "controls" }, run), found);
  }

  // The same steps as one sequence, and as a session that is stepped.
  async compare() {
    const { model } = this,
      source = signal(model),
      reference = `${model.name}:${model.version}`;
    const steps = Array.from({ length: STEPS }, (_, i) =>
      kindOf(model) === "bytes" ? "layer by".charCodeAt(i) : source.next(i),
    );
    const [whole] = await this.client.sequences(reference, [joinSteps(model, steps)]);
    const session = await this.client.session(reference);
    const stepped = [];
    for (const step of steps) stepped.push(await session.step(step));
    await session.close();
    const first = model.outputs[0],
      of = (outputs) => (model.outputs.length === 1 ? outputs : outputs[first.name]);
    const last = Array.from(of(stepped.at(-1)), Number),
      size = last.length;
    const sequence = Array.from(of(whole), Number);
    const parts = first.time
      ? stepped.map((outputs, i) => [Array.from(of(outputs), Number), sequence.slice(i * size, (i + 1) * size)])
      : [[last, sequence]];
    const apart = Math.max(...parts.flatMap(([a, b]) => a.map((value, i) => Math.abs(value - b[i]))));
    const row = ([a, b], i) => [first.time ? `step ${i}` : "last step", figure(number(b[0], 9)), figure(number(a[0], 9))];
    const head = [size > 1 ? `${first.name} 0` : first.name, "one sequence", "step by step"];
    return h(
      "div",
      {},
      h(
        "p",
        { class: "verdict" },
        apart === 0
          ? `Equal, bit for bit: all ${parts.length * size} numbers of ${first.name}.`
          : `The largest difference of ${parts.length * size} numbers is ${number(apart)}; parity allows ${number(model.tolerance[first.name])}.`,
      ),
      table(parts.map(row), head, { class: "narrow" }),
    );
  }

  start() {
    if (Number(this.slider.value) === Number(this.slider.max)) this.slider.value = 0;
    this.play.textContent = "Pause";
    this.timer = setInterval(() => (this.move(1) ? null : this.stop()), PAUSE);
  }

  stop() {
    clearInterval(this.timer);
    this.timer = undefined;
    if (this.play) this.play.textContent = "Play";
  }

  move(by) {
    const before = this.slider.value;
    this.slider.value = Number(before) + by;
    this.draw();
    return this.slider.value !== before;
  }

  draw() {
    const computed = Number(this.slider.value);
    this.count.textContent = `${computed} of ${this.slider.max} cells`;
    for (const panel of this.panels) panel.draw(computed);
  }
}

// The recurrent layers of a model, the lowest first.
function layersOf(model) {
  const seen = new Map();
  for (const slot of model.state) {
    const key = [slot.module, slot.call, slot.layer, slot.direction].join("/");
    if (slot.kind === "static" || slot.kind === "count") continue;
    seen.set(key, [...(seen.get(key) ?? []), slot]);
  }
  return [...seen.values()].map((slots) => ({
    name: slotName(slots[0], model.state).replace(/ · [^·]*$/, ""),
    kinds: slots.map(({ kind }) => kind).join(", "),
    size: slots[0].size,
  }));
}

class Panel {
  constructor(title, order, layers) {
    this.order = order;
    const width = 2 * MARGIN + 60 + (STEPS - 1) * GAP,
      height = 2 * MARGIN + layers.length * GAP;
    const x = (step) => MARGIN + 60 + step * GAP,
      y = (layer) => height - MARGIN - (layer + 1) * GAP + 16;
    const svg = draw("svg", {
      viewBox: `0 0 ${width} ${height}`,
      role: "img",
      "aria-label": `${title}: ${layers.length} layers over ${STEPS} steps`,
    });
    this.cells = new Map();
    const input = height - MARGIN + 6;
    for (let step = 0; step < STEPS; step++) {
      svg.append(draw("text", { x: x(step), y: input + 18, class: "axis" }, `x${step}`));
      layers.forEach((_, layer) => {
        svg.append(
          draw("line", {
            x1: x(step),
            y1: layer ? y(layer - 1) - RADIUS : input,
            x2: x(step),
            y2: y(layer) + RADIUS,
            class: "edge",
          }),
        );
        if (step)
          svg.append(
            draw("line", { x1: x(step - 1) + RADIUS, y1: y(layer), x2: x(step) - RADIUS, y2: y(layer), class: "edge" }),
          );
      });
    }
    layers.forEach(({ name, kinds, size }, layer) => {
      svg.append(
        draw("text", { x: 2, y: y(layer) - 3, class: "layer" }, name),
        draw("text", { x: 2, y: y(layer) + 12, class: "axis start" }, `${kinds}: ${size}`),
      );
      for (let step = 0; step < STEPS; step++) {
        const cell = draw(
          "g",
          { class: "cell" },
          draw("circle", { cx: x(step), cy: y(layer), r: RADIUS }),
          draw("text", { x: x(step), y: y(layer) + 4 }),
        );
        this.cells.set(`${layer},${step}`, cell);
        svg.append(cell);
      }
    });
    this.cut = draw("line", { y1: y(layers.length - 1) - 24, y2: y(0) + 24, class: "cut" });
    this.x = x;
    svg.append(this.cut);
    this.element = h("div", { class: "card" }, h("h2", {}, title), svg);
  }

  draw(computed) {
    this.order.forEach(([layer, step], i) => {
      const cell = this.cells.get(`${layer},${step}`);
      cell.setAttribute("class", `cell${i < computed ? " done" : ""}${i === computed - 1 ? " now" : ""}`);
      cell.lastChild.textContent = i < computed ? i + 1 : "";
    });
    const whole = Array.from({ length: STEPS }, (_, step) => step).filter((step) =>
      this.order.every(([, of], i) => of > step || i < computed),
    ).length;
    const at = whole && whole < STEPS ? this.x(whole - 1) + GAP / 2 : undefined;
    this.cut.setAttribute("visibility", at === undefined ? "hidden" : "visible");
    if (at !== undefined) for (const end of ["x1", "x2"]) this.cut.setAttribute(end, at);
  }
}

function draw(tag, attributes, ...children) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
