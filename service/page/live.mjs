// Live figures from /metrics, once a second while this view is visible.

import { colour, duration, explain, facts, figure, h, number, size, table } from "./dom.mjs";
import { drawLines, fresh } from "./plot.mjs";
import { quantile, scrape, since } from "./prometheus.mjs";

const SECONDS = 120;
// Seconds over which quantiles are computed; a shorter time has too few counts.
const WINDOW = 15;
const PHASES = {
  unroll_request_seconds: "HTTP request",
  unroll_batch_seconds: "Call of the model",
  unroll_store_exchange_seconds: "Exchange with the store",
};

export class LiveView {
  constructor(section, client) {
    this.section = section;
    this.client = client;
    this.scrapes = [];
    this.points = { steps: [], requests: [], sessions: [], queue: [] };
    document.addEventListener("visibilitychange", () => this.poll());
  }

  show() {
    this.visible = true;
    this.build();
    this.poll();
  }

  hide() {
    this.visible = false;
    clearTimeout(this.timer);
  }

  build() {
    const chart = (title, key, what) => {
      const canvas = h("canvas", { role: "img", "aria-label": what });
      this[key] = { canvas, value: h("b", {}, "–") };
      return h("div", { class: "card" }, h("h2", {}, title, " ", this[key].value), canvas);
    };
    this.phases = h("div");
    this.numbers = h("dl", { class: "facts" });
    this.errors = h("div");
    this.store = h("div");
    this.problem = h("div");
    this.section.replaceChildren(
      h("h1", {}, "Live"),
      h(
        "p",
        { class: "lead" },
        "This server now, from its own ",
        h("a", { href: "metrics" }, "metrics"),
        ", once a second while you look.",
      ),
      this.problem,
      h(
        "div",
        { class: "charts" },
        chart("Steps a second", "throughput", "steps a second, over the last two minutes"),
        chart("Sessions", "sessions", "open sessions, over the last two minutes"),
        chart("Waiting or running", "queue", "chunks in flight, over the last two minutes"),
        chart("Rows in a batch", "batches", "calls of the model by rows, over the last two minutes"),
      ),
      h(
        "div",
        { class: "charts" },
        h(
          "div",
          { class: "card" },
          h("h2", {}, "Time by phase"),
          this.phases,
          h("p", { class: "soft" }, `Of the last ${WINDOW} seconds, from histograms: exact to a bucket.`),
        ),
        h("div", { class: "card" }, h("h2", {}, "Since the start"), this.numbers),
        h("div", { class: "card" }, h("h2", {}, "Errors by code"), this.errors),
        h("div", { class: "card" }, h("h2", {}, "Store"), this.store),
      ),
    );
  }

  async poll() {
    clearTimeout(this.timer);
    if (!this.visible || document.hidden) return;
    const began = performance.now();
    try {
      this.add(await scrape(this.client.headers));
      this.problem.replaceChildren();
    } catch (error) {
      this.problem.replaceChildren(h("p", { class: "notice error", role: "alert" }, explain(error)));
    }
    clearTimeout(this.timer);
    if (this.visible) this.timer = setTimeout(() => this.poll(), Math.max(200, 1000 - (performance.now() - began)));
  }

  add(now) {
    const before = this.scrapes.at(-1);
    this.scrapes = [...this.scrapes.filter(({ at }) => at > now.at - WINDOW), now];
    const x = now.at;
    const rate = (name) =>
      before ? Math.max(0, (now.sum(name) - before.sum(name)) / (now.at - before.at)) : undefined;
    const put = (key, value) => {
      if (value === undefined) return;
      this.points[key] = [...this.points[key].filter(([at]) => at > x - SECONDS), [x, value]];
    };
    put("steps", rate("unroll_steps_total"));
    put("sessions", now.sum("unroll_sessions"));
    put("queue", now.sum("unroll_chunks_in_flight"));
    this.draw(now);
  }

  draw(now) {
    const span = [-SECONDS, 0];
    const chart = ({ canvas, value }, points, text) => {
      const shifted = points.map(([at, y]) => [at - now.at, y]);
      drawLines(canvas, {
        lines: [{ points: shifted, colour: colour("accent"), width: 2 }],
        span,
        height: 150,
        zero: true,
      });
      value.textContent = points.length ? text(points.at(-1)[1]) : "–";
    };
    chart(this.throughput, this.points.steps, (value) => number(Math.round(value)));
    chart(this.sessions, this.points.sessions, (value) => number(value));
    chart(this.queue, this.points.queue, (value) => number(value));
    const rows = since(this.scrapes.length > 1 ? this.scrapes[0] : undefined, now, "unroll_batch_rows");
    this.batches.value.textContent = Number.isFinite(quantile(rows, 0.5))
      ? `${Math.ceil(quantile(rows, 0.5))} (median)`
      : "–";
    drawBars(this.batches.canvas, rows);
    this.list(now);
  }

  list(now) {
    const first = this.scrapes[0],
      seconds = now.at - first.at;
    const phases = Object.entries(PHASES).filter(([name]) => now.select(`${name}_bucket`).length);
    const rows = phases.map(([name, title]) => {
      const counts = since(first, now, name),
        total = counts.reduce((sum, [, count]) => sum + count, 0);
      const rate = seconds ? number(total / seconds, 3) : "–";
      return [title, figure(rate), ...[0.5, 0.99].map((share) => figure(duration(quantile(counts, share))))];
    });
    this.phases.replaceChildren(table(rows, ["Phase", "a second", "p50", "p99"]));
    const counted = {
      Steps: now.sum("unroll_steps_total"),
      "Sessions opened": now.sum("unroll_sessions_opened_total"),
      "Retries answered": now.sum("unroll_replayed_total"),
      "Refused for lack of room": now.sum("unroll_refused_total"),
      Streams: now.sum("unroll_streams"),
      "Sessions spilled": now.sum("unroll_sessions_spilled"),
    };
    for (const [code, count] of now.by("unroll_sessions_gone_total", "code")) counted[code.replace("_", " ")] = count;
    for (const name of Object.keys(counted)) counted[name] = number(counted[name], 9);
    this.numbers.replaceChildren(...facts(counted));
    const failed = [...now.by("unroll_failed_total", "code")].filter(([, count]) => count);
    for (const [status, count] of now.by("unroll_requests_total", "status"))
      if (status >= "400") failed.push([`HTTP ${status}`, count]);
    this.errors.replaceChildren(failed.length ? byName(failed) : h("p", { class: "soft" }, "None so far."));
    this.store.replaceChildren(storeOf(now));
  }
}

const byName = (rows) =>
  table(rows.map(([name, value]) => [h("code", {}, name), figure(typeof value === "number" ? number(value, 9) : value)]));

function storeOf(now) {
  if (!now.select("unroll_store_up").length)
    return h("p", { class: "soft" }, "None: sessions are lost when the process ends.");
  const rows = [["answers", now.sum("unroll_store_up") ? "yes" : "no"]];
  for (const [outcome, count] of now.by("unroll_store_commits_total", "outcome"))
    rows.push([`commits ${outcome}`, count]);
  for (const [kind, bytes] of now.by("unroll_store_bytes", "kind")) rows.push([kind, size(bytes)]);
  return byName(rows);
}

// Counts of a histogram as bars, one per bucket.
function drawBars(canvas, counts) {
  const area = fresh(canvas, 150);
  if (!area) return;
  const { context, left, right, height } = area,
    most = Math.max(1, ...counts.map(([, count]) => count));
  const width = (right - left) / Math.max(1, counts.length),
    bottom = height - 24;
  context.textAlign = "center";
  counts.forEach(([bound, count], i) => {
    const tall = (count / most) * (bottom - 14),
      x = left + i * width;
    context.fillStyle = colour(count ? "accent" : "line");
    context.fillRect(x + 1.5, bottom - Math.max(tall, 1), width - 3, Math.max(tall, 1));
    context.fillStyle = colour("soft");
    if (i % 2 === 0) context.fillText(bound === Infinity ? "more" : String(bound), x + width / 2, bottom + 16);
  });
}
