// The display of a session: inputs and outputs as lines or as text, and the state as a heat map, layer by layer.

import { colour, h, number, sizeOf, slotName } from "./dom.mjs";
import { drawHeat, drawLines, positionAt } from "./plot.mjs";
import { kindOf } from "./sources.mjs";

// Number of visible positions, and of lines of one kind.
const WIDE = 240,
  NARROW = 120,
  MOST_LINES = 4;
const CHARACTERS = 400;

export class Stage {
  constructor(model) {
    this.model = model;
    this.kind = kindOf(model);
    this.outputs = outputNames(model);
    const all = this.kind === "bytes" || this.outputs.length <= MOST_LINES;
    this.note = all ? "" : `${MOST_LINES} of ${this.outputs.length} outputs are drawn`;
    this.plot = h("canvas", { role: "img", "aria-label": "inputs and outputs by position" });
    this.legend = h("ul", { class: "legend" });
    this.heats = model.state
      .filter(({ kind }) => kind !== "static")
      .map((slot) => ({
        slot,
        canvas: h("canvas", { role: "img", "aria-label": `state, ${slotName(slot, model.state)}` }),
      }));
    this.scale = h(
      "p",
      { class: "scale soft" },
      h("i", { class: "ramp" }),
      h("span", {}, "negative to positive; layers above one another, a column per step"),
    );
    this.text =
      this.kind === "bytes"
        ? h("div", { class: "text", role: "region", tabindex: 0, "aria-label": "the text, shaded by surprise" })
        : null;
    this.next = this.kind === "bytes" ? h("div", { class: "next" }) : null;
    this.element = h(
      "div",
      { class: "card stage" },
      this.text,
      this.next,
      this.legend,
      this.plot,
      h("h2", { class: "heat-title" }, "Hidden state"),
      this.heats.map(({ canvas }) => canvas),
      this.scale,
    );
    for (const canvas of [this.plot, ...this.heats.map((heat) => heat.canvas)]) {
      canvas.addEventListener("pointermove", (event) => (this.hovered = positionAt(canvas, event, this.span)));
      canvas.addEventListener("pointerleave", () => (this.hovered = undefined));
    }
  }

  // traces: {main, fork?, forecast?}; marks: [{x, label}].
  draw({ main, fork, forecast }, marks) {
    const ends = [main, fork, forecast].filter(Boolean).map(({ position }) => position);
    const end = Math.max(...ends),
      wide = this.plot.clientWidth < 560 ? NARROW : WIDE;
    this.span = [Math.max(main.start, end - wide), Math.max(end, main.start + wide / 4)];
    const lines = this.lines(main, fork, forecast);
    const at = this.hovered;
    drawLines(this.plot, { lines, span: this.span, marks, at });
    this.describe(lines);
    for (const { slot, canvas } of this.heats) {
      const columns = main.columns.filter(([first, last]) => last > this.span[0] && first < this.span[1]);
      const scale = slot.kind === "h" ? 1 : largest(columns, slot);
      drawHeat(canvas, { columns, slot, span: this.span, scale, label: slotName(slot, this.model.state), at });
    }
    if (this.text) this.write(main, fork, forecast);
  }

  lines(main, fork, forecast) {
    if (this.kind === "bytes") {
      const surprise = (trace, name, style) => ({
        name,
        ...style,
        points: this.near(trace.inputs)
          .filter(([x]) => x < trace.position)
          .flatMap(([x, byte]) => bits(trace.outputs.get(x), byte).map((y) => [x, y])),
      });
      return [
        surprise(main, "surprise, bits", { colour: colour("accent") }),
        ...(fork ? [surprise(fork, "fork", { colour: colour("second") })] : []),
      ];
    }
    const inputs = features(this.model.inputs, this.kind).map(([name, read], i) => ({
      name,
      colour: colour("soft"),
      width: i ? 0.8 : 1.25,
      points: this.near(main.inputs)
        .filter(([x]) => x < main.position)
        .map(([x, values]) => [x, read(values)]),
    }));
    const outputs = (trace, prefix, style) => {
      const known = this.near(trace.outputs).filter(([x]) => x <= trace.position);
      return this.outputs.slice(0, MOST_LINES).map((name, i) => ({
        name: `${prefix}${name}`,
        ...style,
        points: known.map(([x, values]) => [x, values[i]]),
      }));
    };
    return [
      ...inputs,
      ...outputs(main, "", { colour: colour("accent") }),
      ...(fork ? outputs(fork, "fork: ", { colour: colour("second") }) : []),
      ...(forecast ? outputs(forecast, "forecast: ", { colour: colour("third"), dash: [5, 4] }) : []),
    ];
  }

  near(values) {
    return [...values].filter(([x]) => x >= this.span[0] - 1 && x <= this.span[1] + 1).sort(([a], [b]) => a - b);
  }

  describe(lines) {
    const items = lines.map(({ name, colour: shade, points, dash }) => {
      const value = this.hovered === undefined ? points.at(-1) : points.find(([x]) => x === this.hovered);
      const swatch = h("i", { class: dash ? "dashed" : "" });
      swatch.style.color = shade;
      return h("li", {}, swatch, name, h("b", {}, value ? number(value[1], 5) : "–"));
    });
    this.legend.replaceChildren(
      ...items,
      h("li", { class: "soft" }, this.note),
      h("li", { class: "soft" }, this.hovered === undefined ? "" : `position ${this.hovered}`),
    );
  }

  write(main, fork, forecast) {
    const spans = (trace, from, kind) => {
      const known = [...trace.inputs]
        .filter(([x]) => x >= from && x < trace.position)
        .sort(([a], [b]) => a - b)
        .slice(-CHARACTERS);
      return known.map(([x, byte]) => {
        const span = h(
          "span",
          {
            class: kind,
            title:
              bits(trace.outputs.get(x), byte)
                .map((value) => `${number(value, 2)} bits`)
                .join() || null,
          },
          character(byte),
        );
        if (!kind)
          span.style.setProperty("--surprise", `${Math.min(100, 9 * (bits(trace.outputs.get(x), byte)[0] ?? 0))}%`);
        return span;
      });
    };
    const other = forecast ?? fork;
    this.text.replaceChildren(
      ...spans(main, main.start, ""),
      h("i", { class: "caret" }),
      ...(other ? spans(other, other.start, forecast ? "forecast" : "fork") : []),
    );
    this.text.scrollTop = this.text.scrollHeight;
    const likely = [...probabilities(main.outputs.get(main.position) ?? [])]
      .map((p, byte) => [p, byte])
      .sort(([a], [b]) => b - a)
      .slice(0, 5);
    this.next.replaceChildren(
      h("span", { class: "soft" }, "next byte"),
      ...likely.map(([p, byte]) => h("span", {}, h("code", {}, visible(byte)), ` ${Math.round(100 * p)} %`)),
    );
  }
}

// The inputs to draw: a name and a reader function of each.
function features(inputs, kind) {
  if (kind >= 32)
    return [
      [
        `${inputs[0].name}, level`,
        (frame) => Math.sqrt(frame.reduce((sum, value) => sum + value * value, 0) / frame.length),
      ],
    ];
  if (typeof kind !== "number") return [];
  const count = Math.min(kind, MOST_LINES);
  return Array.from({ length: count }, (_, i) => [
    kind > 1 ? `${inputs[0].name} ${i}` : inputs[0].name,
    (values) => values[i],
  ]);
}

function outputNames(model) {
  return model.outputs.flatMap((output) => {
    const { name } = output, count = sizeOf(output);
    return count === 1 ? [name] : Array.from({ length: count }, (_, i) => `${name} ${i}`);
  });
}

function largest(columns, slot) {
  let scale = 1e-6;
  for (const [, , row] of columns)
    for (let i = 0; i < slot.size; i++) scale = Math.max(scale, Math.abs(row[slot.offset + i]));
  return scale;
}

const softmax = new WeakMap(); // by the logits of a step

export function probabilities(logits) {
  if (!softmax.has(logits)) softmax.set(logits, softmaxOf(logits));
  return softmax.get(logits);
}

function softmaxOf(logits) {
  const most = Math.max(...logits),
    weights = logits.map((value) => Math.exp(value - most));
  const sum = weights.reduce((total, weight) => total + weight, 0);
  return weights.map((weight) => weight / sum);
}

// How unexpected a byte was, as a list with one value or none.
const bits = (logits, byte) => (logits ? [-Math.log2(Math.max(probabilities(logits)[byte], 1e-12))] : []);
const character = (byte) => (byte === 10 ? "\n" : byte < 32 || byte > 126 ? "·" : String.fromCharCode(byte));
const visible = (byte) => ({ 10: "⏎", 32: "␣" })[byte] ?? character(byte);
