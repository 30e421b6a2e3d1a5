// Figures of the server, parsed from Prometheus's text format.

const SAMPLE = /^([a-z_:][\w:]*)(?:\{(.*)\})? (\S+)/i;
const LABEL = /(\w+)="((?:[^"\\]|\\.)*)"/g;
const ESCAPED = { n: "\n", '"': '"', "\\": "\\" };

// [{name, labels, value}], in the order of the text.
export function parse(text) {
  const samples = [];
  for (const row of text.split("\n")) {
    const found = SAMPLE.exec(row);
    if (!found) continue;
    const labels = {};
    for (const [, name, value] of (found[2] ?? "").matchAll(LABEL))
      labels[name] = value.replace(/\\(.)/g, (_, c) => ESCAPED[c] ?? c);
    samples.push({ name: found[1], labels, value: found[3] === "+Inf" ? Infinity : Number(found[3]) });
  }
  return samples;
}

export class Scrape {
  constructor(text, at) {
    this.at = at;
    this.samples = parse(text);
  }

  select(name) {
    return this.samples.filter((sample) => sample.name === name);
  }

  sum(name) {
    return this.select(name).reduce((total, { value }) => total + value, 0);
  }

  // Sums by the value of one label, as a Map.
  by(name, label) {
    const sums = new Map();
    for (const sample of this.select(name))
      sums.set(sample.labels[label], (sums.get(sample.labels[label]) ?? 0) + sample.value);
    return sums;
  }

  // Non-cumulative counts of a histogram: [[upper bound, count], …].
  counts(name) {
    const sums = new Map();
    for (const { labels: own, value } of this.select(`${name}_bucket`)) {
      const bound = own.le === "+Inf" ? Infinity : Number(own.le);
      sums.set(bound, (sums.get(bound) ?? 0) + value);
    }
    const sorted = [...sums].sort(([a], [b]) => a - b);
    return sorted.map(([bound, total], i) => [bound, total - (sorted[i - 1]?.[1] ?? 0)]);
  }
}

// The counts between two scrapes; all counts if there is no earlier one.
export function since(earlier, later, name) {
  const before = new Map(earlier?.counts(name));
  return later.counts(name).map(([bound, count]) => [bound, count - (before.get(bound) ?? 0)]);
}

// A quantile of a histogram, interpolated within its bucket; NaN if the histogram is empty.
export function quantile(counts, share) {
  const total = counts.reduce((sum, [, count]) => sum + count, 0);
  if (!total) return NaN;
  let rest = share * total,
    lower = 0;
  for (const [bound, count] of counts) {
    if (rest <= count && count) return bound === Infinity ? lower : lower + ((bound - lower) * rest) / count;
    rest -= count;
    lower = bound;
  }
  return lower;
}

export async function scrape(headers) {
  const answer = await fetch("metrics", { headers });
  if (!answer.ok) throw new Error((await answer.json()).detail);
  return new Scrape(await answer.text(), performance.now() / 1000);
}
