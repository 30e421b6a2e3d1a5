// Uses of unroll.mjs that its types must accept, and uses that they must reject. Compiled, but never run.
import {
  Client, ConnectionFailed, InvalidInput, ServerError, Session, SomeFailed, Stream, StreamSession,
} from "../../client/unroll.mjs";
import type { Model, Outputs, Values } from "../../client/unroll.mjs";

const client = new Client(new URL("http://127.0.0.1:8000"), { retryFor: 1000, headers: { "x-tenant": "a" }, fetch, WebSocket });
const models: Model[] = await client.models();
const shape: number[] = models[0].inputs[0].shape;
const [whole]: Outputs[] = await client.sequences("co2", [[[371.2], [371.5]], new Float32Array(4)], { static: [{ place: 1 }] });

const session: Session = await client.session("co2", { mode: "either", id: "station-1", durability: "client" });
const forecast: Outputs = await session.step([371.2]);
const level: Values = (forecast as Record<string, Values>).level;
for await (const outputs of session.stream([[1], [2]])) console.log(outputs, level, whole, shape);
for await (const rolled of session.rollout(12, { map: { kind: "columns", columns: [{ from: 0 }, { constant: 1 }] } })) {
  console.log(rolled.position, rolled.outputs);
}
const fork = await session.fork("other");
const saved: Uint8Array = await session.snapshot();
const position: number = (await fork.rewind(saved)) + (await session.refresh());

const stream: Stream = await client.stream("co2");
const opened: StreamSession[] = await stream.open(["a", "b"], { mode: "resume" });
const together: Outputs[] = await stream.step(opened, [[1], { x: [2n, true] }]);
await stream.closeSessions(opened);
stream.disconnect();

try {
  await session.close();
} catch (error) {
  if (error instanceof ServerError) console.log(error.code.length, error.expected ?? position, error.status + 1, together);
  if (error instanceof SomeFailed) console.log(error.errors.get(0)?.detail, error.outputs.length);
  if (error instanceof ConnectionFailed || error instanceof InvalidInput) console.log(error.message);
}

// @ts-expect-error: milliseconds are numbers
new Client("http://127.0.0.1:8000", { timeout: "1s" });
// @ts-expect-error: there is no such mode
await client.session("co2", { mode: "open" });
// @ts-expect-error: a stream has no client-held sessions
await stream.open(1, { durability: "client" });
// @ts-expect-error: the position is read-only
session.position = 3;
// @ts-expect-error: sampling needs a seed
session.rollout(12, { map: { kind: "sample" } });
// @ts-expect-error: text is not an input
await session.step("371.2");
