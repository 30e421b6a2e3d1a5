// Sources of a session's inputs. A source has `name` and `next(i)`: the inputs of step i, null at the end; may be async.

import { sizeOf } from "./dom.mjs";

// The kind of playground for a model.
export function kindOf(model) {
  const [first] = model.inputs;
  if (model.inputs.length > 1) return "other";
  const values = sizeOf(first);
  if (first.dtype === "int64" && values === 1 && first.limit === 256) return "bytes";
  if (first.dtype !== "float32") return "other";
  return values;
}

// Values of a fixed list of steps.
export function listed(name, steps) {
  return { name, length: steps.length, next: (i) => steps[i] ?? null };
}

// A quiet signal for every input: two slow waves and a little noise, reproducible.
export function signal(model) {
  const noise = (i, j) => (((Math.sin(i * 12.9898 + j * 78.233) * 43758.5453) % 1) + 1) % 1;
  const tensor = (spec, i) => {
    return Array.from({ length: sizeOf(spec) }, (_, j) => {
      const wave = Math.sin(i / 9 + j) + 0.4 * Math.sin(i / 2.7 + 2 * j) + 0.3 * (noise(i, j) - 0.5);
      if (spec.dtype === "bool") return wave > 0;
      if (spec.dtype === "float32") return wave;
      return Math.floor(noise(i, j) * Math.min(spec.limit ?? 2, 2 ** 20));
    });
  };
  return {
    name: "a generated signal",
    length: Infinity,
    next: (i) =>
      model.inputs.length === 1
        ? tensor(model.inputs[0], i)
        : Object.fromEntries(model.inputs.map((spec) => [spec.name, tensor(spec, i)])),
  };
}

// The columns of a CSV file that are numeric in every row: [{name, values}]. Lines that start with # are comments.
export function columnsOf(text) {
  const rows = text
    .split(/\r?\n/)
    .filter((row) => row.trim() && !row.startsWith("#"))
    .map((row) => row.split(/[,;\t]/));
  if (!rows.length) throw new Error("The file has no rows.");
  const headed = rows[0].some((cell) => cell.trim() !== "" && Number.isNaN(Number(cell)));
  const names = headed ? rows.shift() : rows[0].map((_, i) => `column ${i + 1}`);
  const columns = names.map((name, i) => ({
    name: name.trim(),
    values: rows.map((row) => (row[i]?.trim() ? Number(row[i]) : NaN)),
  }));
  return columns.filter(({ values }) => values.length && values.every(Number.isFinite));
}

// A CSV file; its first numeric columns are the inputs.
export function fromCsv(name, text, width, chosen) {
  const columns = columnsOf(text);
  const used = chosen ? columns.filter((column) => chosen.includes(column.name)) : columns.slice(0, width);
  if (used.length < width) {
    const has = columns.length ? `it has ${columns.map((column) => column.name).join(", ")}` : "it has none";
    throw new Error(
      `The model takes ${width} value${width > 1 ? "s" : ""} a step, so the file needs as many columns of numbers; ${has}.`,
    );
  }
  const steps = used[0].values.map((_, i) => used.map(({ values }) => values[i]));
  return listed(`${name}: ${used.map((column) => column.name).join(", ")}`, steps);
}

export async function co2() {
  const answer = await fetch("page/co2.csv");
  if (!answer.ok) throw new Error("The example's measurements are not installed with this server.");
  return {
    ...fromCsv("CO₂ at Mauna Loa, weekly", await answer.text(), 1, ["ppm"]),
    name: "CO₂ at Mauna Loa, weekly, ppm",
  };
}

export function fromText(text) {
  const bytes = new TextEncoder().encode(text);
  return listed("text", Array.from(bytes));
}

const AS_HEARD = { echoCancellation: false, noiseSuppression: false, autoGainControl: false };

// Frames from the microphone, `width` samples each, at `rate` samples per second, in real time.
export async function microphone(width, rate) {
  if (!navigator.mediaDevices)
    throw new Error("Browsers permit the microphone only on https pages and on this machine.");
  const media = await navigator.mediaDevices.getUserMedia({ audio: AS_HEARD });
  const audio = new AudioContext({ sampleRate: rate });
  await audio.audioWorklet.addModule("page/frames.mjs");
  const node = new AudioWorkletNode(audio, "frames", { processorOptions: { width } });
  const frames = [],
    waiting = [];
  node.port.onmessage = ({ data }) => {
    if (waiting.length) waiting.shift()(data);
    else if (frames.push(data) > 50) frames.shift(); // buffer at most about a second
  };
  audio.createMediaStreamSource(media).connect(node);
  return {
    name: `the microphone, ${width} of ${rate.toLocaleString("en")} samples a second in a step`,
    length: Infinity,
    live: true,
    next: () => (frames.length ? frames.shift() : new Promise((resolve) => waiting.push(resolve))),
    stop() {
      for (const track of media.getTracks()) track.stop();
      for (const resolve of waiting) resolve(null);
      audio.close();
    },
  };
}
