// Prints what the JavaScript client gets from a server, as JSON. Arguments: the module's file, the URL, the inputs.
import { pathToFileURL } from "node:url";

const [module, url, given] = process.argv.slice(2);
const { Client, InvalidInput, SomeFailed } = await import(pathToFileURL(module));
const { x, a, b, voice, retryFor, only } = JSON.parse(given);
const client = new Client(url, { retryFor, timeout: 2000 });

const rows = (values, width) => {
  const list = Array.from(values);
  return Array.from({ length: list.length / width }, (_, i) => list.slice(i * width, (i + 1) * width));
};

// Steps a session: two single steps, a chunk, and the rest as a stream.
async function live(session, width = 2) {
  const outputs = [];
  outputs.push(...rows(await session.step(x[0]), width), ...rows(await session.step(new Float32Array(x[1])), width));
  outputs.push(...rows(await session.steps(x.slice(2, 4)), width));
  for await (const y of session.stream(x.slice(4))) outputs.push(...rows(y, width));
  return outputs;
}

async function refusal(call) {
  try {
    await call();
  } catch (error) {
    return error.code ?? error.constructor.name;
  }
  return "none";
}

const scenarios = {
  async sessions() {
    const found = {};
    for (const durability of ["memory", "stored", "client"]) {
      const session = await client.session("lstm", { durability });
      found[durability] = [await live(session), session.position, await session.refresh()];
      await session.close();
      await session.close();
    }
    return found;
  },
  async copies() {
    const found = [];
    for (const durability of ["memory", "client"]) {
      const session = await client.session("lstm", { durability });
      await session.steps(x.slice(0, 3));
      const saved = await session.snapshot();
      const other = await session.fork();
      const again = await client.session("lstm", { durability, snapshot: saved });
      const rest = x.slice(3);
      found.push(rows(await session.steps(rest), 2), rows(await other.steps(rest), 2), rows(await again.steps(rest), 2));
      found.push(await session.rewind(saved));
      found.push(rows(await session.steps(rest), 2));
    }
    return found;
  },
  async tensors() {
    const session = await client.session("two");
    const { level, slope } = await session.steps({ a, b });
    const [whole] = await client.sequences("two", [{ a, b }]);
    const [spoken] = await client.sequences("voices", [voice.x], { static: [voice.static] });
    const talking = await client.session("voices", { static: voice.static });
    const tokens = await client.session("tokens");
    return {
      level: rows(level, 1), slope: rows(slope, 2), whole: rows(whole.slope, 2), spoken: rows(spoken, 2),
      talked: rows(await talking.steps(voice.x), 2), last: Array.from((await client.sequences("last", [x]))[0]),
      token: (await tokens.step(3)).length + (await tokens.steps([3n, 4n])).length,
      refused: await refusal(() => client.sequences("voices", [voice.x], { static: [] })),
    };
  },
  async stream() {
    const stream = await client.stream("lstm");
    const sessions = await stream.open(20);
    const lives = await Promise.all(sessions.map((session) => live(session)));
    const together = await stream.step(sessions, sessions.map(() => x[0]));
    const positions = sessions.map(({ position }) => position);
    stream.disconnect();
    const after = await sessions[3].step(x[1]);
    await stream.close();
    return { lives, together: together.map((y) => Array.from(y)), positions, after: Array.from(after) };
  },
  async rollouts() {
    const plain = ({ position, inputs, outputs }) => [position, Array.from(inputs, Number), Array.from(outputs)];
    const roll = async (session, steps, options) => {
      const found = [];
      for await (const step of session.rollout(steps, options)) found.push(plain(step));
      return found;
    };
    const map = { kind: "columns", columns: [{ from: 1 }, { from: 0, scale: -0.7, offset: 0.1 }, { constant: 0.5 }] };
    const forks = [];
    for (const durability of ["memory", "client"]) {
      const session = await client.session("lstm", { durability });
      await session.steps(x);
      const copy = await session.fork();
      forks.push(await roll(session, 4, { map }), await roll(copy, 4, { map }));
      forks.push((await roll(await client.session("lstm", { durability }), 4, { map, inputs: x })).slice(1));
    }
    const session = await client.session("lstm");
    await session.steps(x);
    const applied = [...(await roll(session, 2, { map, on: "session" })), ...(await roll(session, 2, { map, on: "session" }))];
    const tokens = await client.session("tokens");
    await tokens.step(3);
    const drawn = await roll(tokens, 5, { map: { kind: "sample", seed: 6, temperature: 1.5 } });
    for await (const step of tokens.rollout(4096, { map: "argmax" })) if (step.position > 0) break;
    const refused = [
      await refusal(() => roll(session, 3, { map: "identity" })),
      await refusal(() => roll(session, 3, { map, inputs: [1] })),
    ];
    return { forks, applied, position: applied.at(-1)[0], drawn, refused };
  },
  async streamRollouts() {
    const plain = ({ position, inputs, outputs }) => [position, Array.from(inputs, Number), Array.from(outputs)];
    const map = { kind: "columns", columns: [{ from: 1 }, { from: 0, scale: -0.7, offset: 0.1 }, { constant: 0.5 }] };
    const stream = await client.stream("lstm");
    const [one, two, other] = await stream.open(3);
    await stream.steps([one, two], [x, x]);
    const roll = async (session, steps, options) => {
      const found = [];
      for await (const step of session.rollout(steps, options)) {
        found.push(plain(step));
        if (options.breaks && found.length % 2 === 1) stream.disconnect();
        if (options.between) await other.step(x[0]);
      }
      return found;
    };
    const found = await Promise.all([roll(one, 4, { map, between: true }), roll(two, 4, { map, breaks: true })]);
    for await (const step of one.rollout(4096, { map })) if (step.position > 0) break;
    found.push(await roll(one, 4, { map }));
    found.push((await roll(other, 4, { map: { kind: "columns", columns: [{ constant: 1 }, { constant: 2 }, { constant: 3 }] }, inputs: x })).length);
    found.push([...(await roll(one, 2, { map, on: "session", breaks: true })), ...(await roll(one, 2, { map, on: "session" }))]);
    const after = Array.from(await one.step(x[0]));
    const refused = [
      await refusal(() => roll(one, 3, { map: "identity" })), await refusal(() => roll(one, 3, { map, inputs: [1] })),
      await refusal(() => roll(one, 0, { map })),
    ];
    await one.close();
    refused.push(await refusal(() => roll(one, 3, { map })));
    for (const wrong of [Infinity, Number.NaN, -1, "1s"]) {
      for (const name of ["timeout", "retryFor"]) refused.push(await refusal(() => new Client(url, { [name]: wrong })));
    }
    return { found, after, position: one.position, refused };
  },
  async refusals() {
    const session = await client.session("lstm", { id: "a/b ö" });
    const stream = await client.stream("lstm");
    const [one, two] = await stream.open(2);
    await (await client.session("lstm", { id: two.id, mode: "resume" })).close();
    const failed = await stream.step([one, two], [x[0], x[0]]).catch((error) => error);
    const other = await client.session("lstm", { id: "a/b ö", mode: "either" });
    await other.step(x[0]);
    const found = [
      failed instanceof SomeFailed && failed.errors.get(1).code, failed.outputs[0].length, await refusal(() => two.step(x[0])),
      await refusal(() => session.step(x[1])), await refusal(() => session.step([1, 2])),
      await refusal(() => session.step([1, 2, "3"])), await refusal(() => session.step([1, 2, Number.NaN])),
      await refusal(() => session.steps([])), await refusal(() => client.session("lstm", { id: "a/b ö" })),
      await refusal(() => client.session("nothing")), await refusal(() => client.session("lstm", { id: "c", mode: "resume" })),
      await refusal(() => client.session("whole")), await refusal(() => session.step({ y: [1, 2, 3] })),
      await refusal(() => new Client("http://127.0.0.1:1", { retryFor: 50 }).models()),
    ];
    await stream.close();
    await session.close();
    return found;
  },
};

const result = {};
for (const name of only) result[name] = await scenarios[name]();
console.log(JSON.stringify(result));
process.exit(0);
