// A client for Unroll servers, for browsers and Node 20 or newer, without dependencies. Types: unroll.d.mts.
//
//   import { Client } from "./unroll.mjs";
//   const client = new Client("http://127.0.0.1:8000");
//   const session = await client.session("co2");
//   const forecast = await session.step([371.2]);
//
// Every step carries its session's position, so the server applies it once, however often it is sent. The client
// retries requests that may succeed later, and resumes sessions after a broken connection.

const RAW = "application/octet-stream";
const STEPS = 1, OUTPUTS = 2, ROLLED = 3;
// The longest delay of a timer, in milliseconds.
const LONGEST_WAIT = 2 ** 31 - 1;
// The close code for a stream that pages of this origin may not open.
const FORBIDDEN = 4403;
const HEADER_BYTES = 8, ENTRY_BYTES = 16;
// Limits on the entries and bytes of a frame.
const MOST_ENTRIES = 2048, MOST_BYTES = 4 * 2 ** 20;
// Limits on the sessions and characters of a control message.
const MOST_SPECS = 1000, MOST_CHARACTERS = 2 ** 18;
// Milliseconds before the first retry, and the longest pause.
const FIRST_PAUSE = 50, LONGEST_PAUSE = 2000;

const ARRAYS = { float32: Float32Array, int32: Int32Array, int64: BigInt64Array, bool: Uint8Array };

// The server refused a request, or failed on it. `code` is stable; errors about positions have `expected`.
export class ServerError extends Error {
  constructor({ code = "unknown", detail, error, ...members }, status = 0) {
    const text = detail ?? error ?? "no explanation was given";
    super(`${code}: ${text}`);
    this.name = "ServerError";
    Object.assign(this, members, { code, detail: text, status, retryAfter: members.retry_after });
  }

  // Whether a retry may succeed. A stream signals it with `retry_after`.
  get isForNow() {
    const { code, status, retry_after: after } = this;
    if (status === 0) return after !== undefined || code === "deadline_exceeded";
    return [429, 502, 503, 504].includes(status) && code !== "model_unavailable";
  }
}

// No server answered before the client gave up. The step may have been applied: send it again.
export class ConnectionFailed extends Error {
  name = "ConnectionFailed";
  isForNow = true;
}

// An array does not fit the model; nothing was sent.
export class InvalidInput extends TypeError {
  name = "InvalidInput";
}

// Some sessions of one call failed; the steps of the rest were applied. `errors` is a Map by index.
export class SomeFailed extends Error {
  name = "SomeFailed";
  constructor(errors, outputs) {
    const [[index, first]] = errors;
    super(`${errors.size} of the sessions failed, the one at index ${index} with ${first.message}`);
    Object.assign(this, { errors, outputs });
  }
}

// The error for an answer that did not come from Unroll.
const foreign = (status) => new ServerError({ code: "unexpected_answer", detail: "this answer did not come from Unroll" }, status);

// The pauses between retries of one request, in milliseconds.
class Retries {
  constructor(retryFor) {
    this.count = 0;
    this.retryFor = retryFor;
  }

  // Wait until the next retry. Raises the error if a retry would fail again, or it is time to give up.
  async after(error) {
    if (!error.isForNow || !(await this.pause(error.retryAfter))) throw error;
  }

  // Wait; returns false immediately if it is time to give up.
  async pause(retryAfter) {
    const now = performance.now();
    this.deadline ??= now + this.retryFor;
    const backoff = Math.min(FIRST_PAUSE * 2 ** this.count, LONGEST_PAUSE) * (0.5 + Math.random() / 2);
    const wait = retryAfter === undefined ? backoff : 1000 * retryAfter + backoff / 10;
    this.count += 1;
    if (now + wait > this.deadline) return false;
    await new Promise((resolve) => setTimeout(resolve, wait));
    return true;
  }
}

// Await a promise with a time limit. Raises ConnectionFailed if it takes longer.
function within(milliseconds, promise, address) {
  let timer;
  const late = new Promise((_, reject) => {
    timer = setTimeout(() => reject(new ConnectionFailed(`no answer from ${address} in time`)), milliseconds);
  });
  return Promise.race([promise, late]).finally(() => clearTimeout(timer));
}

export class Client {
  // url: http:// or https://. apiKey: sent as a Bearer token. headers: sent with every request. timeout: milliseconds
  // per attempt. retryFor: milliseconds to keep retrying. fetch, WebSocket: replacements for the global ones.
  constructor(url, { apiKey, headers = {}, timeout = 60_000, retryFor = 60_000, ...own } = {}) {
    if (!(timeout > 0 && timeout <= LONGEST_WAIT)) {
      throw new InvalidInput(`timeout must be a number of milliseconds, more than 0 and at most ${LONGEST_WAIT}, not ${timeout}`);
    }
    if (!(Number.isFinite(retryFor) && retryFor >= 0)) {
      throw new InvalidInput(`retryFor must be a finite number of milliseconds, 0 or more, not ${retryFor}`);
    }
    this.url = new URL(url).href.replace(/\/+$/, "");
    this.headers = apiKey === undefined ? { ...headers } : { ...headers, authorization: `Bearer ${apiKey}` };
    this.timeout = timeout;
    this.retryFor = retryFor;
    this.fetch = own.fetch ?? globalThis.fetch.bind(globalThis);
    this.WebSocket = own.WebSocket ?? globalThis.WebSocket;
    this.versions = new Map();
  }

  // The server's models, in the newest version of each.
  async models() {
    return (await this.ask("GET", "/v1/models")).json;
  }

  // The description of one model, `name` or `name:version`, cached by version.
  async model(reference) {
    if (this.versions.has(reference)) return this.versions.get(reference);
    const { json } = await this.ask("GET", modelPath(reference));
    this.versions.set(`${json.name}:${json.version}`, json);
    return json;
  }

  // Run whole sequences, each from the model's initial state: arrays of T time steps, or {input: array}.
  async sequences(model, inputs, { static: fixed } = {}) {
    if (fixed && fixed.length !== inputs.length) throw new InvalidInput("give static inputs for each sequence");
    const served = await this.model(model);
    const given = inputs.map((values) => flatInputs(served, values, null));
    return Promise.all(given.map((sequence, row) => this.sequence(served, sequence, fixed?.[row])));
  }

  async sequence({ name, version, inputs, outputs, static: wanted }, { arrays, steps }, fixed) {
    const path = `${modelPath(`${name}:${version}`)}/sequences`;
    if (!wanted.length && !fixed) {
      const { bytes } = await this.ask("POST", path, join(arrays), { "content-type": RAW, "unroll-steps": steps });
      return named(splitOutputs({ outputs }, bytes, 0, steps), outputs);
    }
    const firsts = Object.fromEntries(Object.entries(fixed ?? {}).map(([key, value]) => [key, [value]]));
    const { json } = await this.ask("POST", path, { inputs: listsOf(arrays, inputs, [1, steps]), static: firsts });
    return named(tensorsOf(json.outputs, outputs), outputs);
  }

  // Open a session, or attach to one. mode: new, resume or either. snapshot: a Uint8Array to start from.
  async session(model, { id, mode = "new", durability, static: fixed, snapshot } = {}) {
    if (mode !== "new") {
      if (id === undefined) throw new InvalidInput(`mode ${mode} needs an id`);
      try {
        return await this.attach(model, id);
      } catch (error) {
        if (mode === "resume" || error.code !== "session_unknown") throw error;
      }
    }
    const chosen = id ?? randomId();
    const body = { session_id: chosen, durability, static: fixed, snapshot: snapshot && base64(snapshot) };
    const start = snapshot?.length >= 48 ? Number(view(snapshot).getBigUint64(40, true)) : 0;
    try {
      const { json } = await this.ask("POST", `${modelPath(model)}/sessions`, body);
      return await this.sessionOf(json);
    } catch (error) {
      const mine = error.code === "session_exists" && error.repeated && error.position === start;
      if (!mine && !(error.code === "session_exists" && mode === "either")) throw error;
      return this.attach(model, chosen);
    }
  }

  async attach(model, id) {
    return this.sessionOf((await this.ask("GET", sessionPath(model, id))).json);
  }

  async sessionOf(info) {
    const model = await this.model(`${info.model}:${info.model_version}`);
    return new Session(this, model, info, info.durability === "client" ? fromBase64(info.snapshot) : undefined);
  }

  // A WebSocket for the steps of many sessions.
  async stream(model) {
    const served = await this.model(model);
    if (served.streamable) return new Stream(this, model, served);
    throw new ServerError({ code: "not_streamable", detail: served.not_streamable_because }, 422);
  }

  // Send a request until it has its final answer: {bytes, json, headers, repeated}. Raises ServerError.
  async ask(method, path, body, headers) {
    const retries = new Retries(this.retryFor);
    for (;;) {
      const repeated = retries.count > 0;
      try {
        const answer = await this.send(method, path, body, headers, AbortSignal.timeout(this.timeout));
        const { headers: received } = answer, type = received.get("content-type") ?? "";
        if (type.includes("json")) return { json: await this.receive(answer.json()), headers: received, repeated };
        if (type !== RAW) throw foreign(answer.status);
        return { bytes: new Uint8Array(await this.receive(answer.arrayBuffer())), headers: received, repeated };
      } catch (error) {
        await retries.after(Object.assign(error, { repeated }));
      }
    }
  }

  // Send a request once. Returns a successful answer. Raises ServerError or ConnectionFailed.
  async send(method, path, body, headers, signal) {
    const json = body !== undefined && !(body instanceof Uint8Array);
    const options = {
      method,
      redirect: "manual",
      body: json ? JSON.stringify(body) : body,
      headers: { ...this.headers, ...(json ? { "content-type": "application/json" } : {}), ...headers },
      signal,
    };
    const answer = await this.receive(this.fetch(this.url + path, options));
    if (answer.ok) return answer;
    const { status, type } = answer;
    if (type === "opaqueredirect" || (status >= 300 && status < 400)) {
      const where = answer.headers.get("location") ?? "another URL";
      throw new ServerError({ code: `http_${status || 308}`, detail: `redirected to ${where}: use that URL` }, status || 308);
    }
    const isJson = answer.headers.get("content-type")?.includes("json");
    const document = isJson ? await this.receive(answer.json()) : { code: `http_${status}` };
    const refusal = new ServerError(document, status);
    const after = Number.parseFloat(answer.headers.get("retry-after"));
    refusal.retryAfter = Number.isNaN(after) ? undefined : after;
    throw refusal;
  }

  // The response to a request. Raises ConnectionFailed.
  async receive(promise) {
    try {
      return await promise;
    } catch (error) {
      throw new ConnectionFailed(`${this.url} did not answer: ${error.message}`, { cause: error });
    }
  }

  // Yield the server-sent events of a POST as [name, document]. Raises ServerError or ConnectionFailed.
  async *events(path, body) {
    const stop = new AbortController();
    const inTime = (promise) => within(this.timeout, promise, this.url);
    try {
      const answer = await inTime(this.send("POST", path, body, {}, stop.signal));
      if (!answer.headers.get("content-type")?.startsWith("text/event-stream")) throw foreign(answer.status);
      const reader = answer.body.getReader(), decoder = new TextDecoder();
      let text = "", part;
      while (!(part = await inTime(this.receive(reader.read()))).done) {
        const events = (text + decoder.decode(part.value, { stream: true })).split("\n\n");
        text = events.pop();
        for (const event of events) {
          const [, name, data] = /^event: (.*)\ndata: (.*)$/.exec(event);
          yield [name, JSON.parse(data)];
        }
      }
      throw new ConnectionFailed(`the answer of ${this.url} was cut off`);
    } finally {
      stop.abort(); // stopping early also ends it on the server
    }
  }
}

// What sessions have in common, over HTTP and on a stream.
class Steps {
  // Apply one time step: an array, nested or flat, or {input: array}. Returns the outputs, flat.
  step(values) {
    return this.apply(values, 1);
  }

  // Apply T time steps.
  steps(values) {
    return this.apply(values, null);
  }

  // Apply a step for each item of a synchronous or asynchronous iterator; yields its outputs.
  async *stream(items) {
    for await (const values of items) yield await this.step(values);
  }
}

// One session. Its steps are applied exactly once and in order, whatever fails in between; calls are serialised.
export class Session extends Steps {
  constructor(client, model, info, sealed) {
    super();
    this.client = client;
    this.model = model;
    this.id = info.session_id;
    this.position = info.position;
    this.durability = info.durability;
    this.path = sessionPath(`${model.name}:${model.version}`, this.id);
    this.sealed = sealed; // the sealed snapshot, if this client holds the state
    this.last = Promise.resolve(); // the previous call
    this.lastOutputs = undefined; // the outputs of the last time step, if known
  }

  // Run an operation after the previous ones.
  run(task) {
    const result = this.last.then(task);
    this.last = result.catch(() => {});
    return result;
  }

  async apply(values, wanted) {
    const inputs = flatInputs(this.model, values, wanted);
    return this.run(() => this.send(inputs));
  }

  // Feed outputs back as inputs on the server: yields {position, inputs, outputs} for each time step, see
  // docs/rollout.md. on: fork, which runs on a copy of the state, or session. inputs: time steps to run first; the last
  // one is yielded, too. outputs: the last time step's outputs, instead of inputs; by default the session's last ones.
  async *rollout(steps, options) {
    const { sealed } = this;
    if (options?.on === "session" && sealed) throw new InvalidInput("a client-held state can only be rolled out on a fork");
    const rollout = await this.run(async () => new Rollout(this, this.model, steps, options));
    const body = { ...rollout.members, snapshot: this.sealed && base64(this.sealed) };
    let retries = new Retries(this.client.retryFor);
    while (!rollout.complete) {
      rollout.restart();
      try {
        for await (const [name, data] of this.client.events(`${this.path}/rollout`, body)) {
          if (name === "error") throw new ServerError(data, data.status);
          if (name === "end") {
            rollout.end(data.position);
            break;
          }
          const fed = tensorsOf(data.inputs, this.model.inputs);
          for (const step of rollout.steps(data.position, fed, tensorsOf(data.outputs, this.model.outputs))) {
            retries = new Retries(this.client.retryFor);
            yield step;
          }
        }
      } catch (error) {
        await retries.after(error);
      }
    }
  }

  // Adopt the session's position on the server.
  refresh() {
    return this.run(async () => {
      if (this.sealed) return this.position;
      const { position } = (await this.client.ask("GET", this.path)).json;
      if (position !== this.position) this.lastOutputs = undefined;
      return (this.position = position);
    });
  }

  // Open a second session in the same state.
  fork(id = randomId()) {
    return this.run(async () => {
      const forked = await this.copy(id);
      forked.lastOutputs = this.lastOutputs;
      return forked;
    });
  }

  async copy(id) {
    if (this.sealed) return this.reopen(id, unsealed(this.sealed));
    try {
      return await this.client.sessionOf((await this.client.ask("POST", `${this.path}/fork`, { session_id: id })).json);
    } catch (error) {
      if (!(error.code === "session_exists" && error.repeated && error.position === this.position)) throw error;
      return this.client.attach(this.model.name, id);
    }
  }

  // Get state and position as a Uint8Array.
  snapshot() {
    return this.run(async () =>
      this.sealed ? unsealed(this.sealed) : (await this.client.ask("GET", `${this.path}/state`)).bytes,
    );
  }

  // Restore the state of a snapshot. Returns the position.
  rewind(snapshot) {
    return this.run(async () => {
      if (this.sealed) {
        const earlier = await this.reopen(this.id, snapshot);
        [this.sealed, this.position] = [earlier.sealed, earlier.position];
      } else {
        const answer = await this.client.ask("PUT", `${this.path}/state`, snapshot, { "content-type": RAW });
        this.position = answer.json.position;
      }
      this.lastOutputs = undefined;
      return this.position;
    });
  }

  // End the session on the server. A session that is already closed is not an error.
  close() {
    return this.run(async () => {
      if (this.sealed) return;
      try {
        await this.client.ask("DELETE", this.path);
      } catch (error) {
        const gone = error.repeated && [404, 410].includes(error.status);
        if (error.code !== "session_closed" && !gone) throw error;
      }
    });
  }

  reopen(id, snapshot) {
    return this.client.session(`${this.model.name}:${this.model.version}`, { id, durability: "client", snapshot });
  }

  async send({ arrays, steps }) {
    const headers = { "content-type": RAW, "unroll-position": this.position, "unroll-steps": steps };
    if (this.sealed) headers["unroll-snapshot-length"] = this.sealed.length;
    const content = join(this.sealed ? [this.sealed, ...arrays] : arrays);
    const answer = await this.client.ask("POST", `${this.path}/steps`, content, headers);
    const begin = this.sealed ? number(answer, "unroll-snapshot-length") : 0;
    const end = number(answer, "unroll-position");
    const outputs = splitOutputs(this.model, answer.bytes, begin, steps);
    this.lastOutputs = outputsAt(this.model, outputs, steps - 1);
    if (this.sealed) this.sealed = answer.bytes.slice(0, begin);
    this.position = end;
    return named(outputs, this.model.outputs);
  }
}

// A rollout without I/O: its request, and how many of its time steps were yielded.
class Rollout {
  // session: an HTTP or stream session, which advances when a rollout on it has ended.
  constructor(session, model, steps, { map, on = "fork", inputs, outputs } = {}) {
    const given = inputs === undefined ? undefined : flatInputs(model, inputs, null);
    const fed = outputs === undefined ? session.lastOutputs : tensorsOf(outputs, model.outputs);
    const { position } = session;
    Object.assign(this, { session, model, complete: false, yielded: position + (given ? given.steps - 1 : 0) });
    this.members = {
      steps,
      map: typeof map === "string" ? { kind: map } : map,
      on,
      position,
      inputs: given && listsOf(given.arrays, model.inputs, [given.steps]),
      outputs: given || !fed ? undefined : listsOf(fed, model.outputs, []),
    };
  }

  // Start over, before the request is sent for the first time or again.
  restart() {
    this.reached = this.members.position;
  }

  // Yield the new steps of an event, which ends at position `end`; of the given ones, only the last.
  *steps(end, fed, made) {
    const { model, reached: begin } = this;
    this.reached = end;
    this.last = outputsAt(model, made, end - begin - 1);
    const timed = model.outputs.every(({ time }) => time); // an output without time has one value per event
    for (let position = Math.max(timed ? begin : end - 1, this.yielded) + 1; position <= end; position++) {
      this.yielded = position;
      const row = position - begin - 1;
      yield {
        position,
        inputs: named(model.inputs.map((spec, i) => rowOf(fed[i], spec, row)), model.inputs),
        outputs: named(outputsAt(model, made, row), model.outputs),
      };
    }
  }

  end(position) {
    this.complete = true;
    if (this.members.on === "session") Object.assign(this.session, { position, lastOutputs: this.last });
  }
}

// Many sessions of one model over one WebSocket. After a broken connection, a new one resumes them.
export class Stream {
  constructor(client, reference, model) {
    if (!client.WebSocket) throw new Error("there is no WebSocket: use Node 22, or pass { WebSocket } to the client");
    this.client = client;
    this.model = model;
    this.url = `ws${client.url.slice(4)}${modelPath(reference)}/stream`;
    this.places = new Map(); // handle -> StreamSession
    this.controls = []; // unanswered control messages, in order: [call, handles]
    this.opening = new Set(); // unfinished calls that open sessions
    this.nextHandle = 0;
  }

  // Open sessions or attach to open ones, given by number or ids. Raises the first refusal. With batchRows, a session's
  // `batchRows` is the batch size of its last steps; steps are then sent as JSON.
  async open(sessions = 1, { mode = "new", durability, static: fixed, batchRows = false } = {}) {
    const ids = typeof sessions === "number" ? Array.from({ length: sessions }, randomId) : sessions;
    const specs = ids.map((id) => ({ handle: this.nextHandle++, session_id: id, mode, durability, static: fixed }));
    const call = new ControlCall("open", specs);
    this.opening.add(call);
    try {
      await this.exchange(call);
    } catch (error) {
      this.opening.delete(call);
      throw error;
    }
    let refused;
    const opened = [], others = [];
    this.opening.delete(call);
    for (const { handle } of specs) {
      const item = call.items.get(handle);
      if (item.error) {
        refused ??= item.error;
        continue;
      }
      const session = new StreamSession(this, item, batchRows);
      this.places.set(handle, session);
      const foreign = mode === "new" && item.position; // the repeated message attached to an existing session
      (foreign ? others : opened).push(session);
      if (foreign) refused ??= new ServerError({ code: "session_exists", detail: `session ${session.id} is open` });
    }
    if (refused) {
      await this.end(mode === "new" ? "close" : "detach", opened);
      await this.end("detach", others);
      throw refused;
    }
    return opened;
  }

  // Apply one time step to each session, in one message: an array per session. Returns an array of outputs per session.
  step(sessions, inputs) {
    return this.apply(sessions, inputs, 1);
  }

  // Apply T time steps to each session; T may differ.
  steps(sessions, inputs) {
    return this.apply(sessions, inputs, null);
  }

  // End the sessions on the server.
  closeSessions(sessions) {
    return this.end("close", sessions);
  }

  async end(op, sessions) {
    if (!sessions.length) return;
    const call = new ControlCall(op, sessions.map(({ handle }) => ({ handle })));
    await this.exchange(call);
    for (const session of sessions) {
      this.places.delete(session.handle);
      session.lose(session.lost ?? new ServerError({ code: "session_closed", detail: `session ${session.id} was closed` }));
    }
    for (const { error } of call.items.values()) {
      const gone = !error || error.code.startsWith("session_") || error.code === "malformed_request";
      if (!gone) throw error;
    }
  }

  // End all sessions, and the connection.
  async close() {
    await this.closeSessions([...this.places.values()]);
    this.disconnect();
  }

  // Close the connection; the sessions stay open on the server, and the next call resumes them.
  disconnect() {
    const socket = this.socket;
    this.socket = this.connected = undefined;
    socket?.then((open) => ((open.onmessage = null), open.close()), () => {});
  }

  async apply(sessions, inputs, wanted) {
    if (sessions.length !== inputs.length) throw new InvalidInput("give inputs for each session");
    if (new Set(sessions).size !== sessions.length) throw new InvalidInput("each session may be stepped once in a call");
    const foreign = sessions.some((session) => !session.lost && this.places.get(session.handle) !== session);
    if (foreign) throw new InvalidInput("a session belongs to another stream");
    const given = inputs.map((values) => flatInputs(this.model, values, wanted));
    const before = sessions.map((session) => session.last);
    let end;
    const busy = new Promise((resolve) => (end = resolve));
    for (const session of sessions) session.last = busy;
    await Promise.all(before);
    const call = new StepsCall(this.model, sessions, given);
    try {
      await this.exchange(call);
      call.advance(); // only here: a caller that never gets the outputs must send the steps again
    } finally {
      for (const session of sessions) if (session.call === call) session.call = undefined;
      if (call.unanswered.size) this.disconnect(); // late answers must not be mistaken for those of the next call
      end();
    }
    return call.result();
  }

  // Yield the steps of a rollout, retrying after a broken connection.
  async *rollOut(rollout) {
    const { session } = rollout;
    if (session.underway) throw new InvalidInput(`session ${session.id} already has a rollout: end that one first`);
    session.underway = rollout;
    let retries = new Retries(this.client.retryFor);
    try {
      while (!rollout.complete) {
        let failure;
        try {
          await this.attempt(rollout, session); // returns once there is something for the caller
        } catch (error) {
          failure = error;
        }
        while (rollout.ready.length) {
          retries = new Retries(this.client.retryFor);
          yield rollout.take();
        }
        failure ??= rollout.refused;
        rollout.refused = undefined;
        if (failure) await retries.after(failure);
      }
    } finally {
      session.underway = undefined;
      this.stop(rollout);
    }
  }

  // End a rollout early.
  stop({ complete, socket, session: { handle } }) {
    if (complete || !socket || socket.broken || socket !== this.connected) return;
    this.controls.push([new ControlCall("stop", [{ handle }]), [handle]]);
    socket.send(JSON.stringify({ op: "stop", handle }));
  }

  // The rollout that an answer belongs to, unless that was stopped.
  rolling(handle) {
    if (this.controls.some(([call, handles]) => call.op === "stop" && handles.includes(handle))) return undefined;
    this.controls = this.controls.filter(([call, handles]) => !(call instanceof Rollout && handles.includes(handle)));
    return this.places.get(handle)?.underway;
  }

  // Send on the connection, and wait until the call is settled. A connection that breaks is dropped.
  async attempt(call, session) {
    let socket;
    try {
      socket = await (this.socket ??= this.connect());
      if (session?.lost) throw session.lost;
      await this.send(socket, call);
    } catch (error) {
      const isMine = socket === undefined || (await this.socket?.catch(() => undefined)) === socket;
      if (error instanceof ConnectionFailed && isMine) this.disconnect(); // another call may have reconnected already
      throw error;
    }
  }

  // Send and wait for all answers; retry temporary refusals and broken connections.
  async exchange(call) {
    const retries = new Retries(this.client.retryFor);
    while (!call.complete) {
      call.begin();
      try {
        await this.attempt(call);
      } catch (error) {
        await retries.after(error);
        continue;
      }
      if (call.complete) return;
      if (!(await retries.pause(call.retryAfter))) return call.giveUp();
      if (call.op === "close") this.disconnect(); // the server has unbound the handle: reconnecting binds it again
    }
  }

  // Connect, and resume the sessions.
  async connect() {
    // Browsers send no headers with a WebSocket; Node does.
    const { headers } = this.client;
    const withHeaders = globalThis.process?.versions?.node && Object.keys(headers).length;
    const options = withHeaders ? { headers } : await this.protocols();
    const socket = new this.client.WebSocket(this.url, options);
    socket.binaryType = "arraybuffer";
    socket.waiting = new Set();
    this.controls = [];
    this.connected = socket;
    const opened = new Promise((resolve, reject) => {
      socket.onopen = resolve;
      socket.onerror = socket.onclose = () => reject(new ConnectionFailed(`no connection to ${this.url}`));
    });
    await within(this.client.timeout, opened, this.url).catch((error) => (socket.close(), Promise.reject(error)));
    socket.onerror = socket.onclose = ({ code, reason }) => {
      socket.broken = new ConnectionFailed(`the connection to ${this.url} broke`);
      if (code === FORBIDDEN) socket.broken = new ServerError({ code: "forbidden", detail: reason }, 403);
      for (const reject of [...socket.waiting]) reject(socket.broken);
    };
    socket.onmessage = ({ data }) => this.receive(data);
    for (const call of this.opening) call.askAgain();
    try {
      await this.resume(socket);
    } catch (error) {
      socket.onmessage = null;
      socket.close();
      throw error;
    }
    return socket;
  }

  // With an API key, a browser sends a ticket instead of the header.
  async protocols() {
    if (!this.client.headers.authorization) return [];
    const { json } = await this.client.ask("POST", "/v1/tickets");
    return ["unroll.v1", `unroll.ticket.${json.ticket}`];
  }

  async resume(socket) {
    const living = [...this.places.values()].filter((place) => !place.lost);
    const specs = living.map(({ handle, id }) => ({ handle, session_id: id, mode: "resume" }));
    const call = new ControlCall("open", specs);
    await this.send(socket, call);
    if (call.again.size) {
      const asked = { retryAfter: call.retryAfter };
      throw Object.assign(new ConnectionFailed("the server asks to come again"), asked);
    }
    for (const [handle, { error }] of call.items) if (error) this.places.get(handle)?.lose(error);
  }

  // Send a call and wait until it is settled. Raises ConnectionFailed.
  async send(socket, call) {
    if (socket.broken) throw socket.broken;
    if (call.settled) return;
    let fail;
    const settled = new Promise((resolve, reject) => {
      call.onSettled = resolve;
      socket.waiting.add((fail = reject));
    });
    try {
      for (const [message, handles] of call.messages(socket)) {
        if (handles) this.controls.push([call, handles]);
        socket.send(message);
      }
      await within(this.client.timeout, settled, this.url);
    } finally {
      socket.waiting.delete(fail);
      call.onSettled = undefined;
    }
  }

  receive(data) {
    if (typeof data !== "string") return this.receiveOutputs(data);
    const message = JSON.parse(data);
    if (["opened", "closed", "detached", "stopped"].includes(message.op)) {
      while (this.controls[0]?.[0] instanceof Rollout) this.controls.shift(); // rollouts sent before it have started
      const [call, handles] = this.controls.shift() ?? [];
      const items = message.sessions ?? handles.map((handle) => ({ handle }));
      call?.receive(items.map((item) => (item.error ? { ...item, error: new ServerError(item.error) } : item)));
    }
    const place = this.places.get(message.handle);
    if (message.op === "outputs") {
      if (place) place.batchRows = message.batch_rows;
      place?.call?.receive(place, message.position, tensorsOf(message.outputs, this.model.outputs));
    }
    if (message.op === "rolled") this.rolling(message.handle)?.end();
    if (message.op !== "error") return;
    const error = new ServerError(message);
    if (message.rollout) return this.rolling(message.handle)?.fail(error);
    if ("position" in message) return place?.call?.fail(place, error);
    const [call, handles] = this.controls.shift() ?? [];
    if (call instanceof Rollout) return call.fail(error);
    if (call) return call.receive(handles.map((handle) => ({ handle, error })));
    for (const each of this.places.values()) each.call?.fail(each, error); // a refused frame, none of it was applied
  }

  receiveOutputs(buffer) {
    const head = new DataView(buffer);
    const rolled = head.getUint8(0) === ROLLED;
    if (!rolled && head.getUint8(0) !== OUTPUTS) return;
    const count = head.getUint32(4, true);
    const entries = Array.from({ length: count }, (_, i) => {
      const at = HEADER_BYTES + ENTRY_BYTES * i;
      return [head.getUint32(at, true), head.getUint32(at + 4, true), Number(head.getBigUint64(at + 8, true))];
    });
    const next = reader(buffer, HEADER_BYTES + ENTRY_BYTES * count);
    const { inputs, outputs } = this.model;
    const tensors = entries.map(() => []);
    for (const spec of rolled ? [...inputs, ...outputs] : outputs) {
      entries.forEach(([, steps], i) => tensors[i].push(next(spec, steps)));
    }
    entries.forEach(([handle, , end], i) => {
      if (rolled) this.rolling(handle)?.receive(end, tensors[i].slice(0, inputs.length), tensors[i].slice(inputs.length));
      else this.places.get(handle)?.call?.receive(this.places.get(handle), end, tensors[i]);
    });
  }
}

// A session on a stream.
export class StreamSession extends Steps {
  constructor(stream, { handle, session_id, position, durability }, inJson) {
    super();
    Object.assign(this, { handle, position, durability, id: session_id });
    this.streamOf = stream;
    this.inJson = inJson;
    this.last = Promise.resolve(); // the previous call
  }

  async apply(values, wanted) {
    try {
      return (await this.streamOf.apply([this], [values], wanted))[0];
    } catch (error) {
      throw error instanceof SomeFailed ? error.errors.get(0) : error;
    }
  }

  // As Session.rollout. Other sessions of the stream may be stepped in between.
  async *rollout(steps, options) {
    await this.last;
    yield* this.streamOf.rollOut(new StreamRollout(this, this.streamOf.model, steps, options));
  }

  close() {
    return this.streamOf.closeSessions([this]);
  }

  lose(error) {
    this.lost = error;
    this.call?.fail(this, error);
    this.underway?.fail(error);
  }
}

// A rollout on a stream. ready: steps that the caller has not taken yet. socket: the connection it runs on.
class StreamRollout extends Rollout {
  ready = [];

  get settled() {
    return this.ready.length > 0 || this.complete || this.refused !== undefined;
  }

  *messages(socket) {
    if (this.socket === socket) return;
    this.socket = socket;
    this.restart();
    const { handle } = this.session;
    yield [JSON.stringify({ op: "rollout", handle, ...this.members }), [handle]];
  }

  receive(end, fed, made) {
    this.ready.push(...this.steps(end, fed, made));
    if (this.settled) this.onSettled?.();
  }

  // Take the next step. The session advances with the last one; a caller that stops earlier does not see it.
  take() {
    const step = this.ready.shift();
    this.advance();
    return step;
  }

  end() {
    this.complete = true;
    this.advance();
    this.onSettled?.();
  }

  advance() {
    if (this.complete && !this.ready.length) super.end(this.reached);
  }

  fail(error) {
    this.socket = undefined;
    this.refused = error;
    this.onSettled?.();
  }
}

// A request about several sessions, each with its own answer.
class Call {
  again = new Map(); // the temporary refusals, by key

  constructor(keys) {
    this.unanswered = new Set(keys);
  }

  get settled() {
    return this.unanswered.size === 0;
  }

  get complete() {
    return this.settled && this.again.size === 0;
  }

  get retryAfter() {
    return Math.max(...[...this.again.values()].map((error) => error.retryAfter ?? 0));
  }

  begin() {
    for (const key of this.again.keys()) this.unanswered.add(key);
    this.again.clear();
  }

  // Record a refusal; a temporary one is retried.
  refuse(key, error) {
    if (error.isForNow) this.again.set(key, error);
    else this.refused(key, error);
    this.answer(key);
  }

  answer(key) {
    this.unanswered.delete(key);
    if (this.settled) this.onSettled?.();
  }

  giveUp() {
    for (const [key, error] of this.again) this.refused(key, error);
    this.again.clear();
  }
}

class ControlCall extends Call {
  items = new Map(); // the server's answers, by handle

  constructor(op, specs) {
    super(specs.map(({ handle }) => handle));
    Object.assign(this, { op, specs, sent: false });
  }

  // A repeated message may already have been processed.
  *messages() {
    const specs = this.specs.filter(({ handle }) => this.unanswered.has(handle));
    const texts = specs.map((spec) => {
      const again = this.sent && spec.mode === "new" ? { ...spec, mode: "either" } : spec;
      return [spec.handle, this.op === "open" ? JSON.stringify(again) : String(spec.handle)];
    });
    this.sent = true;
    const name = this.op === "open" ? "sessions" : "handles";
    for (const part of parts(texts, MOST_SPECS, MOST_CHARACTERS, ([, text]) => text.length)) {
      const list = part.map(([, text]) => text).join(", ");
      yield [`{"op": "${this.op}", "${name}": [${list}]}`, part.map(([handle]) => handle)];
    }
  }

  // Count opened sessions as unanswered again, because their connection is gone.
  askAgain() {
    for (const [handle, { error }] of this.items) {
      if (error) continue;
      this.items.delete(handle);
      this.unanswered.add(handle);
    }
  }

  receive(items) {
    for (const item of items) {
      if (item.error) {
        this.refuse(item.handle, item.error);
      } else {
        this.items.set(item.handle, item);
        this.answer(item.handle);
      }
    }
  }

  refused(handle, error) {
    this.items.set(handle, { handle, error });
  }
}

class StepsCall extends Call {
  errors = new Map(); // errors by index

  constructor(model, sessions, given) {
    super(sessions);
    this.model = model;
    this.outputs = new Array(sessions.length);
    const entry = (session, index) => [session, { ...given[index], index, handle: session.handle, position: session.position }];
    this.entries = new Map(sessions.map(entry));
    for (const session of sessions) {
      session.call = this;
      if (session.lost) this.fail(session, session.lost);
    }
  }

  // The unanswered steps, in frames or as JSON.
  *messages() {
    const sessions = [...this.unanswered];
    for (const session of sessions.filter(({ inJson }) => inJson)) yield [this.text(this.entries.get(session))];
    const entries = sessions.filter(({ inJson }) => !inJson).map((session) => this.entries.get(session));
    const size = ({ arrays }) => arrays.reduce((sum, array) => sum + array.byteLength, 0);
    for (const part of parts(entries, MOST_ENTRIES, MOST_BYTES, size)) yield [this.frame(part)];
  }

  text({ handle, position, arrays, steps }) {
    const inputs = listsOf(arrays, this.model.inputs, [steps]);
    return JSON.stringify({ op: "steps", handle, position, inputs, batch_rows: true });
  }

  frame(entries) {
    const head = new DataView(new ArrayBuffer(HEADER_BYTES + ENTRY_BYTES * entries.length));
    head.setUint8(0, STEPS);
    head.setUint32(4, entries.length, true);
    entries.forEach(({ handle, steps, position }, i) => {
      const at = HEADER_BYTES + ENTRY_BYTES * i;
      head.setUint32(at, handle, true);
      head.setUint32(at + 4, steps, true);
      head.setBigUint64(at + 8, BigInt(position), true);
    });
    return join([head, ...this.model.inputs.flatMap((_, tensor) => entries.map(({ arrays }) => arrays[tensor]))]);
  }

  receive(session, end, outputs) {
    const entry = this.entries.get(session);
    if (!this.unanswered.has(session) || end !== entry.position + entry.steps) return;
    const lastOutputs = outputsAt(this.model, outputs, entry.steps - 1); // a copy: the caller may modify the outputs
    entry.reached = { position: end, lastOutputs };
    this.outputs[entry.index] = named(outputs, this.model.outputs);
    this.answer(session);
  }

  advance() {
    for (const [session, { reached }] of this.entries) Object.assign(session, reached);
  }

  result() {
    if (this.errors.size) throw new SomeFailed(this.errors, this.outputs);
    return this.outputs;
  }

  fail(session, error) {
    if (this.unanswered.has(session)) this.refuse(session, error);
  }

  refused(session, error) {
    this.errors.set(this.entries.get(session).index, error);
  }
}

// Split into lists of at most `most` items and a limited total size, unless a single item exceeds it.
function* parts(items, most, room, sizeOfItem) {
  let part = [], used = 0;
  for (const item of items) {
    const size = sizeOfItem(item);
    if (part.length === most || (part.length && used + size > room)) {
      yield part;
      [part, used] = [[], 0];
    }
    part.push(item);
    used += size;
  }
  if (part.length) yield part;
}

// ── arrays ───────────────────────────────────────────────────────────────────────────────────────

// Convert inputs to flat typed arrays, one per tensor. wanted: the number of time steps; null for any number.
function flatInputs(model, values, wanted) {
  const several = model.inputs.length > 1;
  const byName = !Array.isArray(values) && !ArrayBuffer.isView(values) && typeof values === "object" && values !== null;
  if (several && !byName) throw new InvalidInput(`${model.name} takes ${names(model)}: give an object with these names`);
  if (byName && Object.keys(values).sort().join() !== model.inputs.map(({ name }) => name).sort().join()) {
    throw new InvalidInput(`${model.name} takes ${names(model)}, not ${Object.keys(values).join(", ")}`);
  }
  let steps = wanted;
  const arrays = model.inputs.map((spec) => {
    const array = flat(byName ? values[spec.name] : values, spec);
    const size = sizeOf(spec);
    const count = array.length / size;
    if (!Number.isInteger(count) || count === 0 || count !== (steps ?? count)) {
      throw new InvalidInput(
        `${spec.name} has ${array.length} values; ${model.name} takes ${size} per time step, ` +
          (steps === null ? "for one step or more" : `for ${steps} step${steps === 1 ? "; steps() takes several" : "s"}`),
      );
    }
    steps = count;
    return array;
  });
  return { arrays, steps };
}

const names = (model) => model.inputs.map(({ name }) => name).join(", ");

// Convert a nested, flat or typed array to a typed array of the tensor's dtype.
function flat(values, spec) {
  const Kind = ARRAYS[spec.dtype];
  if (values instanceof Kind) return values.slice(); // the caller may reuse its array
  const list = ArrayBuffer.isView(values) ? [...values] : [values].flat(Infinity);
  for (const value of list) {
    const fits = {
      float32: typeof value === "number",
      int32: Number.isInteger(value) && value === (value | 0),
      int64: typeof value === "bigint" || Number.isSafeInteger(value),
      bool: typeof value === "boolean",
    }[spec.dtype];
    if (!fits) throw new InvalidInput(`${spec.name} must contain values of type ${spec.dtype} only, not ${String(value)}`);
  }
  return Kind.from(spec.dtype === "int64" ? list.map(BigInt) : list);
}

// Flatten the tensors of a JSON value: one value, or {name: value}.
const tensorsOf = (value, specs) => specs.map((spec) => flat(specs.length === 1 ? value : value[spec.name], spec));

// The outputs of one time step.
const outputsAt = (model, arrays, row) => model.outputs.map((spec, i) => rowOf(arrays[i], spec, spec.time ? row : 0));

// One time step of a flat tensor.
const rowOf = (array, spec, row) => array.slice(row * sizeOf(spec), (row + 1) * sizeOf(spec));

// Convert a flat tensor to JSON. leading: the axes in front of its shape.
function listOf(array, spec, leading) {
  return nested(spec.dtype === "bool" ? Array.from(array, Boolean) : array, [...leading, ...spec.shape]);
}

// Convert tensors to JSON: one value, or {name: value}.
const listsOf = (arrays, specs, leading) => named(arrays.map((array, i) => listOf(array, specs[i], leading)), specs);

function nested(array, [length, ...shape]) {
  if (length === undefined) return plain(array[0]);
  const size = array.length / length;
  return Array.from({ length }, (_, i) => nested(array.slice(i * size, (i + 1) * size), shape));
}

// Convert a value to JSON.
function plain(value) {
  if (typeof value !== "bigint") return value;
  if (!Number.isSafeInteger(Number(value))) throw new InvalidInput(`${value} is too large for JSON: use a session`);
  return Number(value);
}

const sizeOf = (spec) => spec.shape.reduce((product, length) => product * length, 1);

const bytesOf = (spec, steps) => (spec.time ? steps : 1) * sizeOf(spec) * ARRAYS[spec.dtype].BYTES_PER_ELEMENT;

// Reads consecutive flat tensors.
function reader(buffer, begin) {
  return (spec, steps) => {
    const end = begin + bytesOf(spec, steps);
    const array = new ARRAYS[spec.dtype](buffer.slice(begin, end));
    begin = end;
    return array;
  };
}

function splitOutputs({ outputs }, bytes, begin, steps) {
  if (bytes?.length !== outputs.reduce((sum, spec) => sum + bytesOf(spec, steps), begin)) throw foreign(200);
  const next = reader(bytes.buffer, begin);
  return outputs.map((spec) => next(spec, steps));
}

// A header of an answer. Raises ServerError if it is missing.
function number({ headers }, name) {
  const value = headers.get(name);
  if (!/^\d+$/.test(value)) throw foreign(200);
  return Number(value);
}

// A single array, or {output: array} for several.
function named(arrays, specs) {
  return specs.length === 1 ? arrays[0] : Object.fromEntries(specs.map((spec, i) => [spec.name, arrays[i]]));
}

function join(parts) {
  const joined = new Uint8Array(parts.reduce((sum, part) => sum + part.byteLength, 0));
  let at = 0;
  for (const part of parts) {
    joined.set(new Uint8Array(part.buffer, part.byteOffset, part.byteLength), at);
    at += part.byteLength;
  }
  return joined;
}

// ── paths and bytes ──────────────────────────────────────────────────────────────────────────────

const modelPath = (model) => `/v1/models/${encodeURIComponent(model).replaceAll("%3A", ":")}`;
const sessionPath = (model, id) => `${modelPath(model)}/sessions/${encodeURIComponent(id)}`;
const randomId = () => base64(globalThis.crypto.getRandomValues(new Uint8Array(16))).replace(/[+/=]/g, "_");
const view = (bytes) => new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
const base64 = (bytes) => btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
const fromBase64 = (text) => Uint8Array.from(atob(text), (character) => character.charCodeAt(0));

// The snapshot within a sealed one: between a 12-byte header with the id (its length is byte 6) and the signature.
const unsealed = (sealed) => sealed.slice(12 + sealed[6], -32);
