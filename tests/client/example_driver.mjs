// Drives examples/stream.mjs: one session per stream, for a model with one input and one output.
import { createInterface } from "node:readline";
import { Session } from "../../examples/stream.mjs";

let address, sessions = {};
const known = ["start", "open", "step", "steps", "close"];

async function apply({ session: name, values }, single) {
  const rows = single ? [values] : values;
  const session = sessions[name];
  const outputs = await session.steps(new Float32Array(rows.flat().map((value) => value ?? Number.NaN)), rows.length);
  const lists = Array.from(outputs, (value) => [value]);
  return { outputs: single ? lists[0] : lists, position: session.position };
}

const operations = {
  start({ url }) {
    for (const session of Object.values(sessions)) session.socket?.close();
    [address, sessions] = [url.replace("http", "ws"), {}];
    return {};
  },
  async open({ session: name, model }) {
    const session = (sessions[name] = new Session(address, model));
    while (session.socket?.readyState !== WebSocket.OPEN) await session.connect(); // as its exchange does
    return { id: session.id, position: session.position };
  },
  step: (command) => apply(command, true),
  steps: (command) => apply(command, false),
  close: async ({ session }) => (await sessions[session].close(), {}),
};

async function outcome(command) {
  const { over, id, static: fixed, durability, model } = command;
  if (!known.includes(command.do) || over === "rest") return { unsupported: command.do };
  if (id ?? fixed ?? durability ?? (model === "tensors" || undefined)) return { unsupported: "such an open" };
  try {
    return { ok: await operations[command.do](command) };
  } catch (error) {
    if (error.constructor !== Error) throw error;
    return { error: { code: error.message.startsWith("{") ? JSON.parse(error.message).code : "connection_failed" } };
  }
}

for await (const line of createInterface({ input: process.stdin })) console.log(JSON.stringify(await outcome(JSON.parse(line))));
process.exit();
