// One session on the stream, and its history: inputs, outputs, and the state after each step.

// Offsets of the position and the row in a snapshot.
const POSITION_AT = 40,
  ROW_AT = 52;

export function readSnapshot(bytes) {
  const position = Number(new DataView(bytes.buffer, bytes.byteOffset).getBigUint64(POSITION_AT, true));
  return {
    position,
    row: new Float32Array(bytes.buffer.slice(bytes.byteOffset + ROW_AT, bytes.byteOffset + bytes.length - 16)),
  };
}

export class Trace {
  // session: on the stream; same: the same session over HTTP, for operations that streams lack.
  constructor(stream, session, same) {
    Object.assign(this, { stream, session, same });
    this.start = session.position;
    this.inputs = new Map(); // by the position before the step
    this.outputs = new Map(); // by the position after it
    this.columns = []; // [position before, position after, state row]
    this.seconds = [];
  }

  static async open(stream, options) {
    const [session] = await stream.open(1, { ...options, batchRows: true });
    return Trace.of(stream, session);
  }

  static async of(stream, session) {
    const reference = `${stream.model.name}:${stream.model.version}`;
    return new Trace(stream, session, await stream.client.session(reference, { mode: "resume", id: session.id }));
  }

  get position() {
    return this.session.position;
  }

  // Apply steps, and read the resulting state. Returns how many steps were already applied in an earlier pass, and how
  // many of those gave the same outputs.
  apply(steps) {
    return (this.applied = this.run(steps));
  }

  async run(steps) {
    const before = this.position,
      started = performance.now();
    const several = steps.length > 1;
    const joined = several ? joinSteps(this.stream.model, steps) : steps[0];
    const outputs = await (several ? this.session.steps(joined) : this.session.step(joined));
    this.seconds.push((performance.now() - started) / 1000);
    if (this.seconds.length > 200) this.seconds.shift();
    const rows = splitOutputs(this.stream.model, outputs, steps.length);
    const seen = { steps: 0, same: 0 };
    steps.forEach((inputs, i) => {
      this.inputs.set(before + i, inputs);
      if (!rows[i]) return;
      const known = this.outputs.get(before + i + 1);
      seen.steps += known !== undefined;
      seen.same += known !== undefined && rows[i].every((value, j) => value === known[j]);
      this.outputs.set(before + i + 1, rows[i]);
    });
    const { position, row } = readSnapshot(await this.same.snapshot());
    if (position === this.position) this.columns.push([before, position, row]);
    return seen;
  }

  // Send the last step once more, as after a lost answer.
  async repeat() {
    const position = this.position,
      given = this.inputs.get(position - 1);
    this.session.position = position - 1; // as for a client that got no answer
    try {
      const outputs = await this.session.step(given);
      const known = this.outputs.get(position);
      return {
        same: splitOutputs(this.stream.model, outputs, 1)[0].every((value, j) => value === known[j]),
        position: await this.same.refresh(),
      };
    } finally {
      this.session.position = position;
    }
  }

  async rewind(snapshot) {
    this.session.position = await this.same.rewind(snapshot);
    this.columns = this.columns.filter(([, last]) => last <= this.position);
  }

  async fork() {
    const { id } = await this.same.fork();
    const [session] = await this.stream.open([id], { mode: "resume" });
    return Trace.of(this.stream, session);
  }
}

// Combine the inputs of several steps into one call.
export function joinSteps(model, steps) {
  if (model.inputs.length === 1) return steps;
  return Object.fromEntries(model.inputs.map(({ name }) => [name, steps.map((step) => step[name])]));
}

// The outputs of each step, all tensors of a step in one array. If a tensor exists only for the last step, earlier steps
// have none.
function splitOutputs(model, outputs, steps) {
  const tensors = model.outputs.length === 1 ? [outputs] : model.outputs.map(({ name }) => outputs[name]);
  const all = model.outputs.every(({ time }) => time);
  return Array.from({ length: steps }, (_, i) =>
    !all && i < steps - 1
      ? undefined
      : model.outputs.flatMap(({ time }, tensor) => {
          const values = tensors[tensor],
            size = time ? values.length / steps : values.length;
          return Array.from(time ? values.subarray(i * size, (i + 1) * size) : values, Number);
        }),
  );
}
