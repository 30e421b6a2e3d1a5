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

  // values: a Float32Array with the values of `steps` consecutive steps. Returns the outputs likewise.
  async steps(values, steps) {
    const frame = new ArrayBuffer(24 + values.byteLength);
    const head = new DataView(frame);
    head.setUint8(0, 1); // type: steps
    head.setUint32(4, 1, true); // entries
    head.setUint32(12, steps, true);
    head.setBigUint64(16, BigInt(this.position), true);
    new Float32Array(frame, 24).set(values);
    const reply = await this.exchange(frame, this.position + steps);
    if (typeof reply === "string") throw new Error(reply);
    this.position = Number(new DataView(reply).getBigUint64(16, true));
    return new Float32Array(reply, 24);
  }

  // End the session.
  async close() {
    await this.exchange(JSON.stringify({ op: "close", handles: [0] }));
  }

  // Send and wait for the reply; resend if the connection breaks. The position prevents a second application.
  async exchange(message, end) {
    for (;;) {
      if (this.socket?.readyState === WebSocket.OPEN) {
        const reply = await this.ask(message, end);
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
    const mode = this.position ? "resume" : "either"; // the answer to the first attempt may have been lost
    const wanted = { handle: 0, session_id: this.id, mode };
    const reply = await this.ask(JSON.stringify({ op: "open", sessions: [wanted] }));
    const error = reply && JSON.parse(reply).sessions[0].error;
    if (error) throw new Error(JSON.stringify(error));
  }

  // Wait for the reply: outputs up to the position `end`, or text; null if the connection broke.
  ask(message, end) {
    return new Promise((resolve, reject) => {
      this.socket.onmessage = ({ data }) => {
        const isReply =
          typeof data === "string"
            ? ["error", "opened", "closed"].includes(JSON.parse(data).op)
            : Number(new DataView(data).getBigUint64(16, true)) === end;
        if (isReply) resolve(data);
      };
      this.socket.onclose = ({ code }) => (code === 1009 ? reject(new Error("the message is too large")) : resolve(null));
      this.socket.onerror = () => resolve(null);
      this.socket.send(message);
    });
  }
}
