/** The values of one tensor, flat: Uint8Array for bool. */
export type Values = Float32Array | Int32Array | BigInt64Array | Uint8Array;
/** Outputs: one tensor, or one by name if the model has several. */
export type Outputs = Values | Record<string, Values>;
/** Inputs of a tensor: flat or nested. */
export type Input = ArrayLike<number | bigint | boolean> | readonly Input[] | number | bigint | boolean;
/** Inputs: one tensor, or one by name if the model has several. */
export type Inputs = Input | Record<string, Input>;
export type Durability = "memory" | "stored" | "client";
export type Mode = "new" | "resume" | "either";

export interface Tensor {
  name: string;
  dtype: "float32" | "int32" | "int64" | "bool";
  /** Of one time step. */
  shape: number[];
  /** One value per time step; false: only the last. */
  time: boolean;
  /** Values per second of an input whose time steps are pieces of a signal. */
  rate?: number | null;
}

/** A version of a model, as its server describes it. */
export interface Model {
  name: string;
  version: string;
  digest: string;
  inputs: Tensor[];
  outputs: Tensor[];
  static: Omit<Tensor, "time">[];
  streamable: boolean;
  not_streamable_because: string | null;
  [member: string]: unknown;
}

export interface ClientOptions {
  /** Sent as a Bearer token. */
  apiKey?: string;
  /** Sent with every request; browsers cannot send them with streams. */
  headers?: Record<string, string>;
  /** Milliseconds for one attempt, more than 0; 60,000. */
  timeout?: number;
  /** Milliseconds for which a request is repeated; 60,000. 0: not at all. */
  retryFor?: number;
  fetch?: typeof globalThis.fetch;
  WebSocket?: typeof globalThis.WebSocket;
}

export interface SessionOptions {
  id?: string;
  mode?: Mode;
  durability?: Durability;
  static?: Record<string, unknown>;
  snapshot?: Uint8Array;
}

/** How the values of one input are made of an output, see docs/rollout.md. */
export type InputMap =
  | { kind: "identity" | "argmax"; output?: string }
  | { kind: "sample"; output?: string; seed: number; temperature?: number; top_k?: number }
  | {
      kind: "columns";
      output?: string;
      columns: (
        | { from: number; scale?: number; offset?: number }
        | { constant: number | boolean }
        | { future: (number | boolean)[] }
      )[];
    };

export interface RolloutOptions {
  /** Of a model with several inputs, one by name. */
  map: "identity" | "argmax" | InputMap | Record<string, InputMap>;
  /** fork: on a copy of the state, the default. session: on the session, applied as a whole at the end. */
  on?: "fork" | "session";
  /** Given time steps that come first. */
  inputs?: Inputs;
  /** Outputs of the last time step, in place of inputs. */
  outputs?: Inputs;
}

/** A time step of a rollout. */
export interface RolledStep {
  position: number;
  inputs: Outputs;
  outputs: Outputs;
}

/** A client of one server, or of several behind one address. */
export class Client {
  constructor(url: string | URL, options?: ClientOptions);
  models(): Promise<Model[]>;
  model(reference: string): Promise<Model>;
  /** Whole sequences, each from the model's initial state. */
  sequences(model: string, inputs: Inputs[], options?: { static?: Record<string, unknown>[] }): Promise<Outputs[]>;
  session(model: string, options?: SessionOptions): Promise<Session>;
  /** One WebSocket for the steps of many sessions. */
  stream(model: string): Promise<Stream>;
}

/** One session. Its steps are applied once and in order; calls wait for each other. */
export class Session {
  readonly id: string;
  readonly model: Model;
  readonly durability: Durability;
  /** Time steps consumed, as far as this client knows. */
  readonly position: number;
  step(values: Inputs): Promise<Outputs>;
  steps(values: Inputs): Promise<Outputs>;
  stream(items: Iterable<Inputs> | AsyncIterable<Inputs>): AsyncGenerator<Outputs>;
  /** Feed outputs back as inputs on the server. Whoever stops early ends it there. */
  rollout(steps: number, options: RolloutOptions): AsyncGenerator<RolledStep>;
  refresh(): Promise<number>;
  fork(id?: string): Promise<Session>;
  snapshot(): Promise<Uint8Array>;
  rewind(snapshot: Uint8Array): Promise<number>;
  close(): Promise<void>;
}

/** Many sessions of one model over one WebSocket. */
export class Stream {
  readonly model: Model;
  open(
    sessions?: number | string[],
    options?: {
      mode?: Mode;
      durability?: "memory" | "stored";
      static?: Record<string, unknown>;
      /** Their `batchRows` says in how large a batch the last steps ran. Their steps then go in JSON. */
      batchRows?: boolean;
    },
  ): Promise<StreamSession[]>;
  /** One time step for each session, in one message. Raises SomeFailed. */
  step(sessions: StreamSession[], inputs: Inputs[]): Promise<Outputs[]>;
  steps(sessions: StreamSession[], inputs: Inputs[]): Promise<Outputs[]>;
  closeSessions(sessions: StreamSession[]): Promise<void>;
  /** End all sessions, and the connection. */
  close(): Promise<void>;
  /** Close the connection only; the next call resumes the sessions. */
  disconnect(): void;
}

/** A session on a stream. */
export class StreamSession {
  readonly id: string;
  readonly durability: "memory" | "stored";
  readonly position: number;
  /** Rows of the batch of the last steps, if it was asked for; null: their answer was kept from before. */
  readonly batchRows?: number | null;
  step(values: Inputs): Promise<Outputs>;
  steps(values: Inputs): Promise<Outputs>;
  stream(items: Iterable<Inputs> | AsyncIterable<Inputs>): AsyncGenerator<Outputs>;
  /** As of a Session. Other sessions of the stream may be stepped in between. */
  rollout(steps: number, options: RolloutOptions): AsyncGenerator<RolledStep>;
  close(): Promise<void>;
}

/** The server refused a request, or failed on it. */
export class ServerError extends Error {
  /** Stable, such as "position_gap". */
  readonly code: string;
  /** HTTP status; 0 over a stream. */
  readonly status: number;
  readonly detail: string;
  /** Of errors about positions: what the session would apply next. */
  readonly expected?: number;
  readonly [member: string]: unknown;
}

/** No server answered for as long as the client repeats. Send the same step again. */
export class ConnectionFailed extends Error {}

/** An array does not fit the model; nothing was sent. */
export class InvalidInput extends TypeError {}

/** Some of the sessions of one call failed; the steps of the others were applied. */
export class SomeFailed extends Error {
  readonly errors: Map<number, ServerError>;
  readonly outputs: (Outputs | undefined)[];
}
