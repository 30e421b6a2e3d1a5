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
  /** The shape of one time step. */
  shape: number[];
  /** True for one value per time step, false for a single value after the last. */
  time: boolean;
  /** Values per second, for an input that carries a signal. */
  rate?: number | null;
}

/** A version of a model, as described by its server. */
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
  /** Milliseconds per attempt, above 0; 60,000 by default. */
  timeout?: number;
  /** Milliseconds to keep retrying a request; 60,000 by default. 0 disables retries. */
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

/** How to compute an input from an output, see docs/rollout.md. */
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
  /** One map, or one per input by name. */
  map: "identity" | "argmax" | InputMap | Record<string, InputMap>;
  /** fork, the default, runs on a copy of the state; session runs on the session, which advances at the end. */
  on?: "fork" | "session";
  /** Time steps to run first. */
  inputs?: Inputs;
  /** Outputs of the last time step, instead of inputs. */
  outputs?: Inputs;
}

/** A time step of a rollout. */
export interface RolledStep {
  position: number;
  inputs: Outputs;
  outputs: Outputs;
}

/** A client for one server, or for several behind one address. */
export class Client {
  constructor(url: string | URL, options?: ClientOptions);
  models(): Promise<Model[]>;
  model(reference: string): Promise<Model>;
  /** Run whole sequences, each from the model's initial state. */
  sequences(model: string, inputs: Inputs[], options?: { static?: Record<string, unknown>[] }): Promise<Outputs[]>;
  session(model: string, options?: SessionOptions): Promise<Session>;
  /** A WebSocket for the steps of many sessions. */
  stream(model: string): Promise<Stream>;
}

/** One session. Its steps are applied exactly once and in order; calls are serialised. */
export class Session {
  readonly id: string;
  readonly model: Model;
  readonly durability: Durability;
  /** The number of time steps consumed, as far as this client knows. */
  readonly position: number;
  step(values: Inputs): Promise<Outputs>;
  steps(values: Inputs): Promise<Outputs>;
  stream(items: Iterable<Inputs> | AsyncIterable<Inputs>): AsyncGenerator<Outputs>;
  /** Feed outputs back as inputs on the server. Stopping early ends the rollout there, too. */
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
      /** Set the sessions' `batchRows` to the batch size of their last steps, which are then sent as JSON. */
      batchRows?: boolean;
    },
  ): Promise<StreamSession[]>;
  /** Apply one time step to each session, in one message. Raises SomeFailed. */
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
  /** The batch size of the last steps, if requested; null if their answer came from the replay cache. */
  readonly batchRows?: number | null;
  step(values: Inputs): Promise<Outputs>;
  steps(values: Inputs): Promise<Outputs>;
  stream(items: Iterable<Inputs> | AsyncIterable<Inputs>): AsyncGenerator<Outputs>;
  /** As `Session.rollout`. Other sessions of the stream may be stepped in between. */
  rollout(steps: number, options: RolloutOptions): AsyncGenerator<RolledStep>;
  close(): Promise<void>;
}

/** The server refused a request, or failed on it. */
export class ServerError extends Error {
  /** The stable error code, such as "position_gap". */
  readonly code: string;
  /** The HTTP status; 0 over a stream. */
  readonly status: number;
  readonly detail: string;
  /** For errors about positions, the position of the next step. */
  readonly expected?: number;
  readonly [member: string]: unknown;
}

/** No server answered before the client gave up. Send the same step again. */
export class ConnectionFailed extends Error {}

/** An array does not fit the model; nothing was sent. */
export class InvalidInput extends TypeError {}

/** Some sessions of one call failed; the steps of the rest were applied. */
export class SomeFailed extends Error {
  readonly errors: Map<number, ServerError>;
  readonly outputs: (Outputs | undefined)[];
}
