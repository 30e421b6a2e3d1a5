// Experiments with the playground's session: a fork, a snapshot, a step that is sent twice, a forecast.

import { button, h } from "./dom.mjs";
import { kindOf } from "./sources.mjs";
import { probabilities } from "./stage.mjs";

const MOST_AHEAD = 400;
// A fork without a numeric offset takes its inputs this many steps later in the source.
const ASIDE = 37;

// view: the playground; its `main` is the session. fork and forecast are traces shown together with it.
export class Experiments {
  constructor(view) {
    this.view = view;
    this.kind = kindOf(view.model);
    this.reset();
    const ask = (label, task) =>
      button(label, () => view.messages.attempt(() => view.alone(() => task(view.required()))));
    const field = (label, attributes) => h("input", { type: "number", "aria-label": label, ...attributes });
    this.offset = field("What is added to the fork's input", {
      step: "any",
      value: view.model.name === "co2" ? 1 : 0.5,
    });
    this.horizon = field("Steps of the forecast", { min: 1, max: MOST_AHEAD, value: 52 });
    this.back = ask("Rewind", (main) => this.rewind(main));
    this.back.disabled = true;
    const forecast = ask("Forecast", (main) => this.predict(main));
    forecast.addEventListener("click", () => view.pause(), { capture: true });
    const differs = typeof this.kind === "number" ? h("label", {}, "its input +", this.offset) : null;
    const line = (what, ...controls) =>
      h("div", {}, h("div", { class: "controls" }, controls), h("p", { class: "soft" }, what));
    this.element = h(
      "div",
      { class: "card experiments" },
      h("h2", {}, "Try"),
      line(
        "A second session from the same state",
        ask("Fork", (main) => this.split(main)),
        differs,
      ),
      line(
        "Keep the state; return to it",
        ask("Snapshot", (main) => this.keep(main)),
        this.back,
      ),
      line(
        "As after a lost answer: nothing changes",
        ask("Send the last step again", (main) => this.repeat(main)),
      ),
      this.feedsBack()
        ? line("Outputs fed back as inputs, in a copy of the session", forecast, h("label", {}, "steps", this.horizon))
        : null,
    );
  }

  // Called when there is a new session.
  reset() {
    this.marks = [];
    this.fork = this.forecast = this.saved = this.replay = undefined;
    if (this.back) this.back.disabled = true;
  }

  // Called before the session applies these steps; the fork applies its own variant.
  async advance(steps) {
    this.forecast = undefined;
    await this.fork?.apply(await this.vary(steps));
  }

  async vary(steps) {
    const { position, outputs } = this.fork;
    if (typeof this.kind === "number") {
      return steps.map((values) => Array.from(values, (value) => value + Number(this.offset.value)));
    }
    if (this.kind === "bytes") return [likeliest(outputs.get(position) ?? [0])];
    const { source } = this.view.inputs;
    return Promise.all(steps.map(async (step, i) => (await source.next(position + i + ASIDE)) ?? step));
  }

  // After a rewind, the same steps are repeated, and their outputs must be the same.
  compare({ steps, same }) {
    if (!this.replay) return;
    this.replay.steps += steps;
    this.replay.same += same;
    if (this.view.main.position < this.replay.end) return;
    const found = `${this.replay.same} of ${this.replay.steps} repeated steps gave the same outputs, bit for bit.`;
    this.view.messages.say(found, "good");
    this.replay = undefined;
  }

  async split(main) {
    const before = this.fork;
    this.fork = await main.fork();
    await before?.session.close();
    const { position, session } = this.fork;
    if (main.outputs.has(position)) this.fork.outputs.set(position, main.outputs.get(position));
    this.mark("fork", `Forked at position ${position}: session ${session.id} continues from the same state.`);
  }

  async keep(main) {
    this.saved = await main.same.snapshot();
    this.back.disabled = false;
    this.mark("snapshot", `Snapshot at position ${main.position}: ${this.saved.length} bytes.`);
  }

  async rewind(main) {
    const end = main.position;
    await main.rewind(this.saved);
    await this.fork?.session.close(); // it belongs to the steps being undone
    this.fork = this.forecast = undefined;
    this.marks = this.marks.filter(({ label }) => label === "snapshot");
    this.replay = end > main.position ? { end, same: 0, steps: 0 } : undefined;
    this.view.messages.say(`Back at position ${main.position}, from ${end}.`);
    this.view.paint();
  }

  async repeat(main) {
    const { position } = main;
    if (!main.inputs.has(position - 1)) throw new Error("There is no last step yet.");
    const again = await main.repeat();
    const answer = again.same ? "the same answer, bit for bit" : "another answer";
    const stands = `the session is ${again.position === position ? "still" : "now"} at position ${again.position}`;
    const good = again.same && again.position === position;
    this.view.messages.say(`Step ${position} sent again: ${answer}; ${stands}.`, good ? "good" : "error");
  }

  // The server feeds outputs back as inputs on a copy of the state, so the session itself does not change.
  async predict(main) {
    const { position } = main;
    const last = main.outputs.get(position);
    if (!last) throw new Error("There is no output yet: make a step first.");
    const steps = Math.max(1, Math.min(MOST_AHEAD, Math.floor(Number(this.horizon.value)) || 1));
    const bytes = this.kind === "bytes";
    const ahead = { start: position, position, inputs: new Map(), outputs: new Map([[position, last]]) };
    this.forecast = ahead;
    await main.same.refresh();
    for await (const made of main.same.rollout(steps, { map: bytes ? "argmax" : "identity", outputs: last })) {
      ahead.inputs.set(made.position - 1, bytes ? Number(made.inputs[0]) : Array.from(made.inputs));
      ahead.outputs.set(made.position, Array.from(made.outputs));
      ahead.position = made.position;
      this.view.paint();
    }
    this.view.messages.say(`${steps} steps ahead of position ${position}; the session itself has not moved.`);
  }

  feedsBack() {
    const [output, ...others] = this.view.model.outputs;
    if (others.length || !output.time) return false;
    if (this.kind === "bytes") return output.shape.join() === "256";
    return typeof this.kind === "number" && output.shape.join() === this.view.model.inputs[0].shape.join();
  }

  mark(label, text) {
    this.marks = [...this.marks.filter((mark) => mark.label !== label), { x: this.view.main.position, label }];
    this.view.messages.say(text);
    this.view.paint();
  }
}

const likeliest = (logits) => {
  const found = probabilities(logits);
  return found.indexOf(Math.max(...found));
};
