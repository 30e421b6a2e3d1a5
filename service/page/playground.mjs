// The playground: a session of a model, stepped over a stream, with its state as it evolves.

import { Messages, button, choice, duration, facts, h, modelChoice, number } from "./dom.mjs";
import { Experiments } from "./experiments.mjs";
import { Inputs } from "./inputs.mjs";
import { Stage } from "./stage.mjs";
import { Statics } from "./statics.mjs";
import { Trace } from "./trace.mjs";

// Steps per message, and messages per second.
const SPEEDS = {
  "5 steps a second": [1, 5],
  "20 steps a second": [1, 20],
  "60 steps a second": [1, 60],
  "chunks of 16 steps": [16, 30],
};
const DURABILITY = {
  memory: "It is in the memory of this server: lost when the process ends, and then reported as unknown.",
  stored: "It is in the store: it survives a restart, and another server with the same store can continue it.",
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
    const model =
      models.find(({ name }) => name === wanted) ??
      (wanted ? undefined : (models.find(({ name }) => name === "co2") ?? models[0]));
    if (!model)
      throw new Error(wanted ? `There is no model ${wanted} that streams.` : "No model of this server streams.");
    this.visible = true;
    if (this.model?.digest !== model.digest) await this.use(model, models);
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
    this.stage = new Stage(model);
    this.experiments = new Experiments(this);
    this.statics = new Statics(model.static, () => this.messages.attempt(() => this.alone(() => this.restart())));
    this.inputs = new Inputs(model, (source) => this.setSource(source), this.messages);
    this.durability = h(
      "select",
      {},
      h("option", { value: "" }, "the server's default"),
      h("option", {}, "memory"),
      h("option", {}, "stored"),
    );
    this.badge = h("p", { class: "badge" });
    this.facts = h("dl", { class: "facts" });
    this.section.replaceChildren(
      h("div", { class: "title" }, h("h1", {}, "Playground"), modelChoice(models, model, "playground")),
      h(
        "div",
        { class: "playground" },
        h(
          "div",
          { class: "shown" },
          this.stage.element,
          h(
            "div",
            { class: "below" },
            this.sessionCard(),
            h("div", { class: "card" }, h("h2", {}, "What happened"), this.messages.element),
          ),
        ),
        h("div", { class: "asked" }, this.transport(), this.experiments.element),
      ),
    );
    await this.alone(async () => {
      await this.inputs.begin();
      await this.restart();
    });
  }

  transport() {
    this.play = button("Play", () => (this.playing ? this.pause() : this.start()), { class: "primary" });
    this.speed = choice("Speed", Object.keys(SPEEDS));
    this.speed.value = "20 steps a second";
    const one = button("Step", () => this.messages.attempt(() => this.advance(1)));
    return h(
      "div",
      { class: "card transport" },
      h("div", { class: "controls" }, this.play, one, this.speed),
      this.inputs.element,
    );
  }

  sessionCard() {
    const fresh = button("New session", () => this.messages.attempt(() => this.alone(() => this.restart())));
    return h(
      "div",
      { class: "card" },
      h("h2", {}, "Session"),
      this.facts,
      this.badge,
      this.statics.element,
      h("div", { class: "controls" }, fresh, h("label", {}, "kept in", this.durability)),
    );
  }

  // ── the session ────────────────────────────────────────────────────────────────────────────────

  async restart() {
    const stream = await this.client.stream(`${this.model.name}:${this.model.version}`);
    let main;
    try {
      main = await Trace.open(stream, {
        durability: this.durability.value || undefined,
        static: this.statics.values(),
      });
    } catch (error) {
      stream.disconnect();
      throw error;
    }
    await this.end();
    Object.assign(this, { stream, main });
    this.setSource(this.inputs.source);
    const { durability } = this.main.session;
    this.badge.replaceChildren(DURABILITY[durability] ?? `Its durability is ${durability}.`);
    this.paint();
  }

  // Close the open sessions. If a stream cannot be closed, its sessions expire.
  async end() {
    const { stream, main } = this;
    if (main) this.pause(); // otherwise the user pressed play while the first session is opening
    this.main = this.stream = undefined;
    delete this.section.dataset.position;
    this.experiments?.reset();
    await main?.applied?.catch(() => {}); // the state is still being read
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
        const [steps, rate] = SPEEDS[this.speed.value],
          began = performance.now();
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
      const main = this.required(),
        steps = [];
      while (steps.length < count) {
        const inputs = await this.inputsAt(main.position + steps.length);
        if (inputs === null) break;
        steps.push(inputs);
      }
      if (!steps.length) {
        this.messages.say(
          this.inputs.source
            ? "The input has ended: choose another one, or rewind."
            : "There is no input yet: choose a file, press Listen, or choose another input.",
        );
        return false;
      }
      const [seen] = await Promise.all([main.apply(steps), this.experiments.advance(steps)]);
      this.experiments.compare(seen);
      this.paint();
      return true;
    });
  }

  required() {
    if (!this.main) throw new Error("There is no session: open a new one.");
    return this.main;
  }

  // Runs the tasks of all buttons one at a time.
  alone(task) {
    const result = (this.last ?? Promise.resolve()).then(task);
    this.last = result.catch(() => {});
    return result;
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
        const { fork, forecast, marks } = this.experiments;
        this.stage.draw({ main: this.main, fork, forecast }, marks);
        this.describe();
      }
      this.animate();
    });
  }

  describe() {
    const sorted = [...this.main.seconds].sort((a, b) => a - b);
    const known = {
      Position: number(this.main.position, 9),
      "Answer within": sorted.length ? `${duration(sorted[sorted.length >> 1])} (median)` : "–",
      "Rows in its batch": this.main.session.batchRows ?? "–",
      Input: this.inputs.source?.name ?? "–",
      Id: h("code", {}, this.main.session.id),
    };
    this.section.dataset.position = this.main.position;
    this.facts.replaceChildren(...facts(known));
  }
}
