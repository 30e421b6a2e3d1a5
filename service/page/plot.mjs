// Lines and heat maps on canvases that share one horizontal axis: positions of a session.

import { colour, number } from "./dom.mjs";

// Space left of the axis for labels; equal in all canvases, so that their columns are aligned.
const GUTTER = 60;
const RIGHT = 8;

// The cleared context of a canvas at the screen's resolution. Null while the canvas is hidden.
export function fresh(canvas, height) {
  const width = canvas.clientWidth,
    ratio = devicePixelRatio || 1;
  if (!width) return null;
  canvas.style.height = `${height}px`;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    [canvas.width, canvas.height] = [Math.round(width * ratio), Math.round(height * ratio)];
  }
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  context.clearRect(0, 0, width, height);
  context.font = "12px system-ui, sans-serif";
  return { context, width, height, left: GUTTER, right: width - RIGHT };
}

// Round values that divide a range into about `count` parts.
export function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  const first = Math.ceil(low / step) * step;
  return Array.from({ length: Math.max(0, Math.floor((high - first) / step + 1e-9) + 1) }, (_, i) => first + i * step);
}

// lines: [{points: [[x, y]], colour, dash?, width?}]; marks: [{x, label}]. span: [first x, last x]. floor: minimum top of y.
export function drawLines(canvas, { lines, span, marks = [], height = 230, zero = false, format = number, at }) {
  const area = fresh(canvas, height);
  if (!area) return;
  const { context, left, right } = area,
    top = 12,
    bottom = height - 24;
  const visible = lines.map(({ points }) => points.filter(([x]) => x >= span[0] - 1 && x <= span[1] + 1));
  let low = zero ? 0 : Infinity,
    high = zero ? 0 : -Infinity;
  for (const points of visible) for (const [, y] of points) [low, high] = [Math.min(low, y), Math.max(high, y)];
  if (!(low <= high)) [low, high] = [0, 1];
  const pad = (high - low) * 0.07 || Math.abs(high) * 0.01 || 0.5;
  [low, high] = [zero ? 0 : low - pad, high + pad];
  const x = (value) => left + ((value - span[0]) / (span[1] - span[0] || 1)) * (right - left);
  const y = (value) => bottom - ((value - low) / (high - low)) * (bottom - top);
  context.strokeStyle = colour("line");
  context.fillStyle = colour("soft");
  context.lineWidth = 1;
  context.textAlign = "right";
  context.textBaseline = "middle";
  for (const value of ticks(low, high, 4)) {
    line(context, [
      [left, y(value)],
      [right, y(value)],
    ]);
    context.fillText(format(value, 6), left - 8, y(value));
  }
  context.textAlign = "center";
  context.textBaseline = "top";
  for (const value of ticks(span[0], span[1], 6))
    if (Number.isInteger(value)) context.fillText(String(value), x(value), bottom + 8);
  for (const { x: where, label } of marks) {
    if (where < span[0] || where > span[1]) continue;
    context.strokeStyle = context.fillStyle = colour("third");
    context.setLineDash([4, 4]);
    line(context, [
      [x(where), top],
      [x(where), bottom],
    ]);
    context.setLineDash([]);
    context.textAlign = x(where) > (left + right) / 2 ? "right" : "left";
    context.fillText(label, x(where) + (context.textAlign === "left" ? 5 : -5), top);
  }
  context.save();
  context.beginPath();
  context.rect(left, 0, right - left, height);
  context.clip();
  lines.forEach((series, i) => {
    context.strokeStyle = series.colour;
    context.lineWidth = series.width ?? 1.75;
    context.setLineDash(series.dash ?? []);
    line(
      context,
      visible[i].map(([a, b]) => [x(a), y(b)]),
    );
  });
  context.restore();
  context.setLineDash([]);
  if (at !== undefined) crosshair(area, x(at), top, bottom);
}

function line(context, points) {
  context.lineJoin = "round";
  context.beginPath();
  points.forEach(([x, y], i) => (i ? context.lineTo(x, y) : context.moveTo(x, y)));
  context.stroke();
  if (points.length === 1) context.strokeRect(points[0][0] - 1, points[0][1] - 1, 2, 2);
}

function crosshair({ context }, x, top, bottom) {
  context.strokeStyle = colour("soft");
  context.lineWidth = 1;
  line(context, [
    [x, top],
    [x, bottom],
  ]);
}

// The position under the pointer.
export function positionAt(canvas, event, span) {
  const box = canvas.getBoundingClientRect();
  const share = (event.clientX - box.left - GUTTER) / (box.width - GUTTER - RIGHT);
  return share < 0 || share > 1 ? undefined : Math.round(span[0] + share * (span[1] - span[0]));
}

// Shades from cold through the background to warm, as bytes of red, green and blue.
function shades() {
  const [cold, none, warm] = ["cold", "card", "warm"].map((name) => rgb(colour(name)));
  return Array.from({ length: 256 }, (_, i) => {
    const value = i / 127.5 - 1,
      end = value < 0 ? cold : warm,
      share = Math.abs(value) ** 0.8;
    return none.map((channel, j) => Math.round(channel + (end[j] - channel) * share));
  });
}

const rgb = (hex) => [1, 3, 5].map((at) => parseInt(hex.slice(at, at + 2), 16));

// Columns of values, one per position. columns: [[first position, last position, Float32Array]]; a column covers the
// positions after the previous one. slot: {offset, size}. scale: the value of the warmest shade.
export function drawHeat(canvas, { columns, slot, span, scale, label, at }) {
  const unit = slot.size > 64 ? 1 : slot.size > 24 ? 3 : 6;
  const area = fresh(canvas, Math.max(28, slot.size * unit));
  if (!area) return;
  const { context, left, right, height } = area;
  const count = Math.max(1, Math.ceil(span[1] - span[0])),
    table = shades();
  const image = new ImageData(count, slot.size);
  for (const [first, last, row] of columns) {
    for (let position = Math.max(first + 1, span[0] + 1); position <= Math.min(last, span[1]); position++) {
      for (let unitIndex = 0; unitIndex < slot.size; unitIndex++) {
        const value = Math.max(-1, Math.min(1, row[slot.offset + unitIndex] / scale));
        const shade = table[Math.round((value + 1) * 127.5)];
        const where = 4 * (unitIndex * count + position - span[0] - 1);
        image.data[where] = shade[0];
        image.data[where + 1] = shade[1];
        image.data[where + 2] = shade[2];
        image.data[where + 3] = 255;
      }
    }
  }
  const small = new OffscreenCanvas(count, slot.size);
  small.getContext("2d").putImageData(image, 0, 0);
  context.imageSmoothingEnabled = false;
  context.drawImage(small, left, 0, right - left, height);
  context.strokeStyle = colour("line");
  context.strokeRect(left - 0.5, 0.5, right - left, height - 1);
  context.fillStyle = colour("soft");
  context.textAlign = "right";
  context.textBaseline = "middle";
  const [where, kind] = label.split(/ · (?=[^·]*$)/);
  context.fillText(kind ?? where, left - 8, height / 2 + (kind ? 8 : 0));
  if (kind) context.fillText(where, left - 8, height / 2 - 8);
  if (at !== undefined) crosshair(area, left + ((at - span[0]) / (span[1] - span[0])) * (right - left), 0, height);
}
