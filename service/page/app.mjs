// The page: one view at a time, chosen by the address behind #, such as #playground/co2.

import { Client } from "./unroll.mjs";
import { explain, h } from "./dom.mjs";

const VIEWS = {
  models: async () => (await import("./models.mjs")).ModelsView,
  playground: async () => (await import("./playground.mjs")).PlaygroundView,
  live: async () => (await import("./live.mjs")).LiveView,
  lattice: async () => (await import("./lattice.mjs")).LatticeView,
};
const base = new URL(".", document.baseURI);
const KEY = "unroll.key";
const client = new Client(base, { retryFor: 5000, apiKey: sessionStorage.getItem(KEY) ?? undefined });
const views = {};

async function show() {
  const asked = location.hash;
  const [name, model] = decodeURIComponent(asked.slice(1)).split("/");
  const chosen = name in VIEWS ? name : "models";
  for (const section of document.querySelectorAll("main > section")) section.hidden = section.id !== chosen;
  for (const link of document.querySelectorAll("header nav a[href^='#']")) {
    const here = link.getAttribute("href") === `#${chosen}`;
    here ? link.setAttribute("aria-current", "page") : link.removeAttribute("aria-current");
  }
  for (const [other, view] of Object.entries(views)) if (other !== chosen) view.hide?.();
  const section = document.getElementById(chosen);
  document.title = `${section.id[0].toUpperCase()}${section.id.slice(1)} – Unroll`;
  try {
    const View = await VIEWS[chosen]();
    if (location.hash !== asked) return; // the user has chosen another view
    views[chosen] ??= new View(section, client);
    await views[chosen].show(model);
  } catch (error) {
    delete views[chosen];
    if (error.code === "unauthenticated") return section.replaceChildren(keyForm(error));
    const again = h("a", { href: location.hash, onclick: (event) => (event.preventDefault(), show()) }, "Try again");
    section.replaceChildren(h("p", { class: "notice error", role: "alert" }, explain(error), " ", again));
  }
}

// Asks for the API key if the server has keys; it is kept while this tab is open.
function keyForm(error) {
  const field = h("input", { id: "key", type: "password", autocomplete: "off", required: true });
  const use = (event) => {
    event.preventDefault();
    sessionStorage.setItem(KEY, field.value);
    client.headers.authorization = `Bearer ${field.value}`;
    show();
  };
  return h(
    "form",
    { class: "card", onsubmit: use },
    h("p", { role: "alert" }, explain(error)),
    h("label", { for: "key" }, "API key "),
    field,
    h("button", {}, "Use this key"),
  );
}

addEventListener("hashchange", show);
show();
