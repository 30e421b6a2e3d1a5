// Drives unroll.mjs. An example of a driver; see docs/client-conformance.md. Needs Node 22, or 20 with --experimental-websocket.
import { createInterface } from "node:readline";
import { Client, ConnectionFailed, InvalidInput, ServerError, SomeFailed } from "../unroll.mjs";

let client, sessions, streams;
const inJson = process.argv.includes("--json"); // steps of streams

const base64 = (bytes) => Buffer.from(bytes).toString("base64");
const sizeOf = (spec) => spec.shape.reduce((product, length) => product * length, 1);

// null stands for NaN.
function numbers(values) {
  if (Array.isArray(values)) return values.map(numbers);
  if (values !== null && typeof values === "object") {
    return Object.fromEntries(Object.entries(values).map(([name, value]) => [name, numbers(value)]));
  }
  return values ?? Number.NaN;
}

// Flat typed arrays as nested lists, as the commands have them. single: without the time axis.
function lists(specs, tensors, single) {
  const one = (spec) => {
    const values = Array.from(specs.length === 1 ? tensors : tensors[spec.name], Number);
    const step = (begin) => (spec.shape.length ? values.slice(begin, begin + sizeOf(spec)) : values[begin]);
    if (single || !spec.time) return step(0);
    return Array.from({ length: values.length / sizeOf(spec) }, (_, i) => step(i * sizeOf(spec)));
  };
  if (specs.length === 1) return one(specs[0]);
  return Object.fromEntries(specs.map((spec) => [spec.name, one(spec)]));
}

const modelOf = (session) => session.model ?? session.streamOf.model;

async function apply({ session: name, values, at }, single) {
  const session = sessions[name];
  if (at !== undefined) throw new Error("no operation with a position");
  const outputs = await (single ? session.step(numbers(values)) : session.steps(numbers(values)));
  return { outputs: lists(modelOf(session).outputs, outputs, single), position: session.position };
}

const operations = {
  async start({ url, timeout, retry_for, needs }) {
    if (needs.includes("upgrade-headers")) throw new Error("a WebSocket of a browser has no headers of a refusal");
    for (const stream of Object.values(streams ?? {})) stream.disconnect();
    client = new Client(url, { timeout: 1000 * timeout, retryFor: 1000 * retry_for });
    [sessions, streams] = [{}, {}];
    return {};
  },
  async open({ over, session, model, id, mode, durability, static: fixed, snapshot }) {
    const options = { mode, durability, static: fixed };
    if (over === "stream") {
      streams[model] ??= await client.stream(model);
      [sessions[session]] = await streams[model].open(id === undefined ? 1 : [id], { ...options, batchRows: inJson });
    } else {
      const content = snapshot && new Uint8Array(Buffer.from(snapshot, "base64"));
      sessions[session] = await client.session(model, { ...options, id, snapshot: content });
    }
    return { id: sessions[session].id, position: sessions[session].position };
  },
  step: (command) => apply(command, true),
  steps: (command) => apply(command, false),
  async together({ sessions: names, values }) {
    const errors = {};
    const chosen = names.map((name) => sessions[name]);
    const outputs = await streams.toy.step(chosen, numbers(values)).catch((error) => {
      if (!(error instanceof SomeFailed)) throw error;
      for (const [index, { code }] of error.errors) errors[index] = code;
      return error.outputs;
    });
    return { outputs: outputs.map((each) => each && Array.from(each)), positions: chosen.map((each) => each.position), errors };
  },
  async rollout({ session: name, steps, take, map, applies, inputs, between = [] }) {
    const session = sessions[name], rolled = [], outcomes = [];
    const { inputs: given, outputs: made } = modelOf(session);
    const options = { map, on: applies ? "session" : "fork", inputs: inputs && numbers(inputs) };
    for await (const step of session.rollout(steps, options)) {
      const values = { inputs: lists(given, step.inputs, true), outputs: lists(made, step.outputs, true) };
      rolled.push({ position: step.position, ...values });
      if (rolled.length === 1) for (const command of between) outcomes.push(await outcome(command));
      if (rolled.length === take) break;
    }
    return { steps: rolled, position: session.position, between: outcomes };
  },
  async sequence({ model, values, static: fixed }) {
    const [outputs] = await client.sequences(model, [numbers(values)], { static: fixed && [fixed] });
    return { outputs: lists((await client.model(model)).outputs, outputs, false) };
  },
  models: async () => ({ models: (await client.models()).map(({ name }) => name) }),
  refresh: async ({ session }) => ({ position: await sessions[session].refresh() }),
  async fork({ session, as }) {
    sessions[as] = await sessions[session].fork();
    return { id: sessions[as].id, position: sessions[as].position };
  },
  snapshot: async ({ session }) => ({ snapshot: base64(await sessions[session].snapshot()) }),
  rewind: async ({ session, snapshot }) => ({
    position: await sessions[session].rewind(new Uint8Array(Buffer.from(snapshot, "base64"))),
  }),
  close: async ({ session }) => (await sessions[session].close(), {}),
  disconnect: async () => (Object.values(streams).forEach((stream) => stream.disconnect()), {}),
};

async function outcome(command) {
  try {
    return { ok: await operations[command.do](command) };
  } catch (error) {
    const { message } = error;
    if (error instanceof ServerError) return { error: { code: error.code, detail: message } };
    if (error instanceof ConnectionFailed) return { error: { code: "connection_failed", detail: message } };
    if (error instanceof InvalidInput) return { error: { code: "invalid_input", detail: message } };
    if (error.constructor === Error) return { unsupported: message };
    throw error;
  }
}

for await (const line of createInterface({ input: process.stdin })) console.log(JSON.stringify(await outcome(JSON.parse(line))));
process.exit();
