// The models: inputs, outputs and state of each, and its measured parity.

import { facts, figure, h, number, shape, size, slotName, table } from "./dom.mjs";

export class ModelsView {
  constructor(section, client) {
    this.section = section;
    this.client = client;
  }

  async show() {
    const models = await this.client.models();
    const refused = (await this.bundles()).filter(({ state, reason }) => state !== "READY" && reason);
    const many = models.length === 1 ? "one model" : `${models.length} models`;
    this.section.replaceChildren(
      h("h1", {}, "Models"),
      h("p", { class: "lead" }, `This server has ${many}. Each was compared with PyTorch when it was loaded.`),
      ...refused.map(({ name, version, reason }) =>
        h("p", { class: "notice" }, h("b", {}, name), version && ` version ${version} is not served`, `: ${reason}`),
      ),
      ...models.map(card),
    );
  }

  // All versions in the repository, including those that are not served.
  async bundles() {
    const answer = await fetch("v2/repository/index", { method: "POST", headers: this.client.headers });
    return answer.ok ? answer.json() : [];
  }
}

function card(model) {
  const at = encodeURIComponent(model.name);
  return h(
    "article",
    { class: "card", "aria-labelledby": `model-${model.name}` },
    h(
      "div",
      { class: "card-head" },
      h("h2", { id: `model-${model.name}` }, model.name),
      h("span", { class: "tag" }, `version ${model.version}`),
      model.streamable
        ? h("span", { class: "tag good" }, "streams")
        : h("span", { class: "tag warn" }, "sequences only"),
      model.streamable ? h("a", { class: "button primary", href: `#playground/${at}` }, "Play") : null,
      h("a", { class: "button", href: `#lattice/${at}` }, "Lattice"),
    ),
    model.streamable ? null : h("p", { class: "notice" }, model.not_streamable_because),
    h(
      "div",
      { class: "columns" },
      h("div", {}, h("h3", {}, "Inputs and outputs"), tensors(model)),
      h("div", {}, h("h3", {}, `State: ${number(model.state_size)} values`), layout(model)),
      h("div", {}, h("h3", {}, "Parity with PyTorch float64"), parity(model)),
    ),
    h("dl", { class: "facts" }, facts(about(model))),
  );
}

function tensors(model) {
  const row = (kind, tensor, note) => [h("td", { class: "soft" }, kind), h("code", {}, tensor.name), shape(tensor) + note];
  const note = ({ time, limit, rate }) =>
    time === false ? ", of the last step" : limit ? `, below ${limit}` : rate ? `, ${number(rate)} values a second` : "";
  return table([
    ...model.inputs.map((tensor) => row("in", tensor, note(tensor))),
    ...model.static.map((tensor) => row("in, once", tensor, "")),
    ...model.outputs.map((tensor) => row("out", tensor, note(tensor))),
  ]);
}

// The state row as a bar; the width of each slice is its share.
function layout(model) {
  const bar = h("div", { class: "row-bar", role: "img", "aria-label": "the pieces of the state row" });
  for (const slot of model.state) {
    const piece = h("span", {
      class: `kind-${slot.kind}`,
      title: `${slotName(slot, model.state)}, ${slot.size} values`,
    });
    piece.style.flexGrow = slot.size;
    bar.append(piece);
  }
  const rows = model.state.map((slot) => [
    h("td", {}, h("i", { class: `swatch kind-${slot.kind}` }), slotName(slot, model.state)),
    figure(slot.size > 1 ? `${slot.offset} … ${slot.offset + slot.size - 1}` : slot.offset),
  ]);
  return h("div", {}, bar, h("div", { class: "scrolls" }, table(rows)));
}

// Each output's difference as a share of its tolerance.
function parity(model) {
  const rows = Object.entries(model.parity).map(([output, difference]) => {
    const allowed = model.tolerance[output];
    const meter = h("meter", {
      min: 0,
      max: 1,
      high: 0.8,
      value: difference / allowed,
      "aria-label": `${output}: share of what is allowed`,
    });
    return [h("code", {}, output), figure(number(difference)), meter, figure(`of ${number(allowed)}`, "soft")];
  });
  const exact = model.bit_exact ? "On the CPU, chunking and batching change no bit." : "";
  const stable =
    model.stability === 0
      ? "What else was in a batch changed no bit."
      : `What else was in a batch changed results by at most ${number(model.stability)}.`;
  return h("div", {}, table(rows), h("p", { class: "soft" }, `${exact} ${stable}`));
}

function about(model) {
  const versions = model.versions.map((version) =>
    version === model.current_version ? `${version} (current)` : version,
  );
  return {
    Versions: versions.join(", "),
    Bundle: size(model.bundle_bytes),
    Runs: `${model.device}, ${model.precision}`,
    "Sessions open": number(model.sessions),
    Digest: h("code", { title: model.digest }, model.digest.slice(0, 12)),
  };
}
