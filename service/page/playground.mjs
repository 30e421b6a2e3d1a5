// The playground: a session of a model, stepped over a stream, with its state as it evolves.

import { Messages, button, duration, h, number } from "./dom.mjs";
import { Inputs } from "./inputs.mjs";
import { quantile, scrape, since } from "./prometheus.mjs";
import { kindOf } from "./sources.mjs";
import { Stage, probabilities } from "./stage.mjs";
import { Trace } from "./trace.mjs";

// Steps of one message, and messages a second.
const SPEEDS = { "5 steps a second": [1, 5], "20 steps a second": [1, 20], "60 steps a second": [1, 60], "chunks of 16 steps": [16, 30] };
const DURABILITY = {
  memory: "in the memory of this server: lost when the process ends, and then reported as unknown",
  stored: "in the store: it survives a restart, and another server with the same store can continue it",
};

export class PlaygroundView {
  constructor(section, client) {
    this.section = section;
    this.client = client;
    this.messages = new Messages();
    for (const type of ["dragover", "drop"]) {
      section.addEventListener(type, (event) => {
        event.preventDefault();
        if (type === "drop" && event.dataTransfer.files[0]) this.inputs?.drop(event.dataTransfer.files[0]);
      });
    }
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.paint());
    addEventListener("resize", () => this.paint());
  }

  async show(wanted) {
    const models = (await this.client.models()).filter(({ streamable }) => streamable);
    const model = models.find(({ name }) => name === wanted) ?? (wanted ? undefined : (models.find(({ name }) => name === "co2") ?? models[0]));
    if (!model) throw new Error(wanted ? `There is no model ${wanted} that streams.` : "No model of this server streams.");
    if (this.model?.digest !== model.digest) await this.use(model, models);
    this.visible = true;
    this.animate();
  }

  hide() {
    this.visible = false;
    this.pause();
  }

  // ── the page ───────────────────────────────────────────────────────────────────────────────────

  async use(model, models) {
    await this.end();
    this.model = model;
    const select = h("select", { "aria-label": "Model", onchange: () => (location.hash = `#playground/${encodeURIComponent(select.value)}`) }, models.map(({ name }) => h("option", { selected: name === model.name }, name)));
    this.stage = new Stage(model);
    this.inputs = new Inputs(model, (source) => this.setSource(source), this.messages);
    this.durability = h("select", {}, h("option", { value: "" }, "the server's default"), h("option", {}, "memory"), h("option", {}, "stored"));
    this.badge = h("p", { class: "badge" });
    this.facts = h("dl", { class: "facts" });
    this.section.replaceChildren(
      h("div", { class: "title" }, h("h1", {}, "Playground"), select),
      h(
        "div",
        { class: "playground" },
        h("div", { class: "shown" }, this.stage.element, h("div", { class: "below" }, this.sessionCard(), h("div", { class: "card" }, h("h2", {}, "What happened"), this.messages.element))),
        h("div", { class: "asked" }, this.transport(), this.experiments()),
      ),
    );
    await this.alone(async () => {
      await this.inputs.begin();
      await this.restart();
    });
  }

  transport() {
    this.play = button("Play", () => (this.playing ? this.pause() : this.start()), { class: "primary" });
    this.speed = h("select", { "aria-label": "Speed" }, Object.keys(SPEEDS).map((name) => h("option", {}, name)));
    this.speed.value = "20 steps a second";
    const one = button("Step", () => this.messages.attempt(() => this.advance(1)));
    return h("div", { class: "card transport" }, h("div", { class: "controls" }, this.play, one, this.speed), this.inputs.element);
  }

  experiments() {
    const ask = (task) => () => this.messages.attempt(() => this.alone(() => (this.required(), task())));
    this.offset = h("input", { type: "number", step: "any", value: this.model.name === "co2" ? 1 : 0.5, "aria-label": "What is added to the fork's input" });
    this.horizon = h("input", { type: "number", min: 1, max: 400, value: 52, "aria-label": "Steps of the forecast" });
    this.rewindButton = button("Rewind", ask(() => this.rewind()), { disabled: true });
    const lines = [
      [[button("Fork", ask(() => this.fork())), typeof kindOf(this.model) === "number" ? h("label", {}, "its input +", this.offset) : null], "A second session from the same state"],
      [[button("Snapshot", ask(() => this.snapshot())), this.rewindButton], "Keep the state; return to it"],
      [[button("Send the last step again", ask(() => this.repeat()))], "As after a lost answer: nothing changes"],
    ];
    if (this.feedsBack()) lines.push([[button("Forecast", () => (this.pause(), ask(() => this.forecast())())), h("label", {}, "steps", this.horizon)], "Outputs fed back as inputs, in a copy of the session"]);
    return h("div", { class: "card experiments" }, h("h2", {}, "Try"), lines.map(([controls, what]) => h("div", {}, h("div", { class: "controls" }, controls), h("p", { class: "soft" }, what))));
  }

  sessionCard() {
    const fresh = button("New session", () => this.messages.attempt(() => this.alone(() => this.restart())));
    return h("div", { class: "card" }, h("h2", {}, "Session"), this.facts, this.badge, h("div", { class: "controls" }, fresh, h("label", {}, "kept in", this.durability)));
  }

  // ── the session ────────────────────────────────────────────────────────────────────────────────

  async restart() {
    const stream = await this.client.stream(`${this.model.name}:${this.model.version}`);
    let main;
    try {
      main = await Trace.open(stream, { durability: this.durability.value || undefined, static: zeros(this.model.static) });
    } catch (error) {
      stream.disconnect();
      throw error;
    }
    await this.end();
    Object.assign(this, { stream, main });
    this.marks = [];
    this.saved = undefined;
    this.rewindButton.disabled = true;
    this.setSource(this.inputs.source);
    this.badge.replaceChildren(h("b", {}, this.main.session.durability), ` ${DURABILITY[this.main.session.durability] ?? ""}`);
    this.paint();
  }

  // Close what is open here; a stream that cannot be closed is left to its idle timeout.
  async end() {
    this.pause();
    const stream = this.stream;
    this.main = this.other = this.ahead = this.stream = undefined;
    await stream?.close().catch(() => {});
  }

  setSource(source) {
    if (!this.main) return;
    this.base = this.main.position;
    for (const position of [...this.main.inputs.keys()]) if (position >= this.base) this.main.inputs.delete(position);
    this.paint();
  }

  async inputsAt(position) {
    return this.main.inputs.get(position) ?? (await this.inputs.source?.next(position - this.base)) ?? null;
  }

  // ── time ───────────────────────────────────────────────────────────────────────────────────────

  async start() {
    this.playing = true;
    this.play.textContent = "Pause";
    await this.messages.attempt(async () => {
      while (this.playing && this.visible) {
        const [steps, rate] = SPEEDS[this.speed.value], began = performance.now();
        if (!(await this.advance(this.inputs.source?.live ? 1 : steps))) break;
        const rest = this.inputs.source?.live ? 0 : 1000 / rate - (performance.now() - began);
        if (rest > 0) await new Promise((resolve) => setTimeout(resolve, rest));
      }
    });
    this.pause();
  }

  pause() {
    this.playing = false;
    if (this.play) this.play.textContent = "Play";
  }

  // Apply the next steps. Returns false at the end of the source.
  advance(count) {
    return this.alone(async () => {
      const main = this.required(), steps = [];
      while (steps.length < count) {
        const inputs = await this.inputsAt(main.position + steps.length);
        if (inputs === null) break;
        steps.push(inputs);
      }
      if (!steps.length) {
        this.messages.say(this.inputs.source ? "The input has ended: choose another one, or rewind." : "Choose an input first.");
        return false;
      }
      this.ahead = undefined;
      const varied = this.other && (await this.vary(steps));
      const [same] = await Promise.all([main.apply(steps), varied && this.other.apply(varied)]);
      this.compare(same, steps.length);
      this.paint();
      return true;
    });
  }

  required() {
    if (!this.main) throw new Error("There is no session: open a new one.");
    return this.main;
  }

  // One thing after another, for all buttons.
  alone(task) {
    const result = (this.last ?? Promise.resolve()).then(task);
    this.last = result.catch(() => {});
    return result;
  }

  // After a rewind the same steps come again, and their outputs must be the same.
  compare(same, count) {
    if (!this.replay) return;
    this.replay.same += same;
    this.replay.steps += Math.min(count, Math.max(0, this.replay.end - (this.main.position - count)));
    if (this.main.position < this.replay.end) return;
    this.messages.say(`${this.replay.same} of ${this.replay.steps} repeated steps gave the same outputs, bit for bit.`, "good");
    this.replay = undefined;
  }

  // What the fork gets in place of the session's own inputs.
  async vary(steps) {
    const kind = kindOf(this.model);
    if (typeof kind === "number") return steps.map((values) => Array.from(values, (value) => value + Number(this.offset.value)));
    if (kind === "bytes") return steps.slice(0, 1).map(() => likeliest(this.other.outputs.get(this.other.position) ?? this.main.outputs.get(this.other.position) ?? [0]));
    return Promise.all(steps.map(async (_, i) => (await this.inputs.source.next(this.other.position + i + 37)) ?? steps[i]));
  }

  // ── experiments ────────────────────────────────────────────────────────────────────────────────

  async fork() {
    const other = await this.main.fork();
    if (this.other) await this.other.session.close();
    this.other = other;
    this.mark("fork");
    this.messages.say(`Forked at position ${other.position}: session ${other.session.id} continues from the same state.`);
    this.paint();
  }

  async snapshot() {
    this.saved = { bytes: await this.main.same.snapshot(), position: this.main.position };
    this.rewindButton.disabled = false;
    this.mark("snapshot");
    this.messages.say(`Snapshot at position ${this.saved.position}: ${this.saved.bytes.length} bytes.`);
    this.paint();
  }

  async rewind() {
    const end = this.main.position;
    await this.main.rewind(this.saved.bytes);
    await this.other?.session.close();
    this.other = undefined; // it was a fork of what is undone
    this.marks = this.marks.filter(({ label }) => label === "snapshot");
    this.replay = end > this.main.position ? { end, same: 0, steps: 0 } : undefined;
    this.ahead = undefined;
    this.messages.say(`Back at position ${this.main.position}, from ${end}.`);
    this.paint();
  }

  async repeat() {
    const { position } = this.main;
    if (!this.main.inputs.has(position - 1)) throw new Error("There is no last step yet.");
    const again = await this.main.repeat();
    const answer = again.same ? "the same answer, bit for bit" : "another answer";
    const unmoved = again.position === position;
    this.messages.say(`Step ${position} sent again: ${answer}; the session is ${unmoved ? "still" : "now"} at position ${again.position}.`, again.same && unmoved ? "good" : "error");
  }

  // Outputs become inputs, in a fork that is closed afterwards: the session itself stays where it is.
  async forecast() {
    const steps = Math.max(1, Math.min(400, Math.floor(Number(this.horizon.value)) || 1));
    const last = this.main.outputs.get(this.main.position);
    if (!last) throw new Error("There is no output yet: make a step first.");
    const ahead = await this.main.fork();
    ahead.outputs.set(ahead.position, last);
    this.ahead = ahead;
    for (let i = 0; i < steps; i++) {
      const output = ahead.outputs.get(ahead.position);
      await ahead.apply([kindOf(this.model) === "bytes" ? likeliest(output) : output]);
      this.paint();
    }
    await ahead.session.close();
    this.messages.say(`${steps} steps ahead of position ${this.main.position}; the session itself has not moved.`);
  }

  feedsBack() {
    const kind = kindOf(this.model), [output, ...others] = this.model.outputs;
    if (others.length || !output.time) return false;
    return kind === "bytes" ? output.shape.join() === "256" : output.shape.join() === this.model.inputs[0].shape.join() && typeof kind === "number";
  }

  mark(label) {
    this.marks = [...this.marks.filter((mark) => mark.label !== label), { x: this.main.position, label }];
  }

  // ── drawing ────────────────────────────────────────────────────────────────────────────────────

  paint() {
    this.dirty = true;
  }

  animate() {
    if (!this.visible || this.drawing) return;
    this.drawing = true;
    requestAnimationFrame(() => {
      this.drawing = false;
      const hovered = this.stage.hovered;
      if (this.main && (this.dirty || hovered !== this.drawn)) {
        this.dirty = false;
        this.drawn = hovered;
        this.stage.draw({ main: this.main, fork: this.other, forecast: this.ahead }, this.marks);
        this.describe();
      }
      this.animate();
    });
    if (performance.now() > (this.asked ?? 0) + 1000 && this.playing) this.askBatches();
  }

  // Rows in the calls of this model in the last second or so.
  async askBatches() {
    this.asked = performance.now();
    const found = await scrape().catch(() => undefined);
    const labels = { model: this.model.name, version: this.model.version };
    if (found && this.scraped) this.rows = quantile(since(this.scraped, found, "unroll_batch_rows", labels), 0.5);
    this.scraped = found;
  }

  describe() {
    const sorted = [...this.main.seconds].sort((a, b) => a - b);
    const facts = {
      Position: number(this.main.position, 9),
      "Answer within": sorted.length ? `${duration(sorted[sorted.length >> 1])} (median)` : "–",
      "Rows in a batch": Number.isFinite(this.rows) ? number(Math.ceil(this.rows), 2) : "–",
      Input: this.inputs.source?.name ?? "–",
      Id: h("code", {}, this.main.session.id),
    };
    this.section.dataset.position = this.main.position;
    this.facts.replaceChildren(...Object.entries(facts).map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
  }
}

const likeliest = (logits) => {
  const found = probabilities(logits);
  return found.indexOf(Math.max(...found));
};

function zeros(specs) {
  const zero = (dtype, shape) => (shape.length ? Array.from({ length: shape[0] }, () => zero(dtype, shape.slice(1))) : dtype === "bool" ? false : 0);
  return specs.length ? Object.fromEntries(specs.map(({ name, dtype, shape }) => [name, zero(dtype, shape)])) : undefined;
}
