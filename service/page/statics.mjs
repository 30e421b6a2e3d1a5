// The static inputs of a model, one field each, for opening a session.

import { h, shape, sizeOf } from "./dom.mjs";

export class Statics {
  // specs: the model's static inputs. onChange: called when a value changes.
  constructor(specs, onChange) {
    this.fields = specs.map((spec) => [
      spec,
      h("input", { value: Array(sizeOf(spec)).fill(spec.dtype === "bool" ? "false" : "0").join(", "), onchange: onChange }),
    ]);
    const labels = this.fields.map(([spec, field]) =>
      h("label", {}, h("code", {}, spec.name), ` ${shape(spec)} `, field),
    );
    const about = "Given once, when a session begins; a change opens a new session. Default: zeros.";
    this.element = specs.length
      ? h("fieldset", {}, h("legend", {}, "Static inputs"), h("p", { class: "soft" }, about), labels)
      : null;
  }

  // The values in the form for opening a session; undefined if the model has none.
  values() {
    const read = this.fields.map(([spec, field]) => [spec.name, nested(numbers(spec, field.value), spec.shape)]);
    return read.length ? Object.fromEntries(read) : undefined;
  }
}

function numbers(spec, text) {
  const words = text.split(/[\s,;[\]]+/).filter(Boolean);
  const values = words.map((word) => (spec.dtype === "bool" ? { true: true, false: false }[word] : Number(word)));
  if (values.length !== sizeOf(spec) || values.some((value) => value === undefined || Number.isNaN(value))) {
    const kind = spec.dtype === "bool" ? "true or false" : "a number";
    throw new Error(`${spec.name} takes ${sizeOf(spec)} value${sizeOf(spec) > 1 ? "s" : ""}, each ${kind}: not "${text}".`);
  }
  return values;
}

function nested(values, [length, ...rest]) {
  if (length === undefined) return values[0];
  const size = values.length / length;
  return Array.from({ length }, (_, i) => nested(values.slice(i * size, (i + 1) * size), rest));
}
