// A client of the WebSocket stream, for browsers and Node 22, that resumes its session after a broken connection.
//
//   const session = new Session("ws://127.0.0.1:8000", "co2");
//   const forecasts = await session.steps(new Float32Array([371.2, 371.5]), 2);

export class Session {
  // One session of a model with one float32 input and one output per step, bound to handle 0.
  constructor(url, model) {
    this.id = crypto.randomUUID();
    this.position = 0;
    this.address = `${url}/v1/models/${model}/stream`;
  }

  // values: Float32Array of `steps` steps, one after another. Returns the outputs likewise.
  async steps(values, steps) {
    const frame = new ArrayBuffer(24 + values.byteLength);
    const head = new DataView(frame);
    head.setUint8(0, 1); // type: steps
    head.setUint32(4, 1, true); // entries
    head.setUint32(12, steps, true);
    head.setBigUint64(16, BigInt(this.position), true);
    new Float32Array(frame, 24).set(values);
    const reply = await this.exchange(frame);
    if (typeof reply === "string") throw new Error(reply);
    this.position = Number(new DataView(reply).getBigUint64(16, true));
    return new Float32Array(reply, 24);
  }

  // End the session.
  async close() {
    await this.exchange(JSON.stringify({ op: "close", handles: [0] }));
  }

  // Send and wait for the reply; resend if the connection breaks: the position shows whether it was applied.
  async exchange(message) {
    for (;;) {
      if (this.socket?.readyState === WebSocket.OPEN) {
        const reply = await this.ask(message);
        if (reply !== null) return reply;
      } else {
        await this.connect();
      }
    }
  }

  async connect() {
    this.socket = new WebSocket(this.address);
    this.socket.binaryType = "arraybuffer";
    await new Promise((resolve, reject) => {
      this.socket.onopen = resolve;
      this.socket.onerror = () => reject(new Error(`no connection to ${this.address}`));
    });
    const mode = this.position ? "resume" : "either"; // the answer to the first try may have been lost
    const wanted = { handle: 0, session_id: this.id, mode };
    const reply = await this.ask(JSON.stringify({ op: "open", sessions: [wanted] }));
    const error = reply && JSON.parse(reply).sessions[0].error;
    if (error) throw new Error(JSON.stringify(error));
  }

  // The next message; null if the connection broke, for example after a server's closing message.
  ask(message) {
    return new Promise((resolve) => {
      this.socket.onmessage = ({ data }) => {
        if (typeof data !== "string" || JSON.parse(data).op !== "closing") resolve(data);
      };
      this.socket.onerror = this.socket.onclose = () => resolve(null);
      this.socket.send(message);
    });
  }
}
