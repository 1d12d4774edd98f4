// What to make: fields from the pipeline's own signature, their values, and errors at the field they are about.

import { $, el } from "./elements.js";

const TITLES = {
  prompt: "Prompt", negative_prompt: "What to avoid", image: "Picture to begin from", mask: "Mask", width: "Width",
  height: "Height", num_inference_steps: "Steps", guidance_scale: "Guidance", n: "How many", seed: "Seed",
  num_frames: "Frames", fps: "Frames per second", output_format: "File format",
};
const OWN = ["num_images_per_prompt", "num_videos_per_prompt", "num_waveforms_per_prompt", "generator", "frame_rate"];
const FIRST = ["width", "height", "num_frames", "fps", "num_inference_steps", "guidance_scale", "n", "seed"];

/** What people call an argument. */
export const titleOf = (name) => TITLES[name] ?? name.replaceAll("_", " ");

const fields = new Map(); // name -> {kind, control, error}

/** How a value of this JSON schema is asked for; where there is none, its default tells. */
function kindOf(schema, fallback) {
  const all = [schema, ...(schema.anyOf ?? schema.oneOf ?? [])];
  if (all.some((one) => one.enum)) return "choice";
  const types = all.flatMap((one) => one.type ?? []);
  if (!types.length) types.push(typeof fallback);
  return ["boolean", "string", "integer", "number"].findLast((type) => types.includes(type)) ?? "json";
}

function control(name, kind, schema, hint) {
  const shared = { id: `field-${name}`, name, "aria-describedby": `hint-${name} error-${name}` };
  if (kind === "long") return el("textarea", { ...shared, rows: name === "prompt" ? 3 : 2, enterkeyhint: "go" });
  if (kind === "file") return el("input", { ...shared, type: "file", accept: "image/*" });
  if (kind === "choice" || kind === "boolean") {
    const { enum: named } = [schema, ...(schema.anyOf ?? [])].find((one) => one.enum) ?? { enum: ["true", "false"] };
    const choices = named.filter((one) => one !== null);
    const words = { true: "yes", false: "no" };
    const options = choices.map((one) => el("option", { value: one }, words[one] ?? String(one)));
    return el("select", shared, el("option", { value: "" }, `${words[hint] ?? hint} (default)`), ...options);
  }
  const isNumber = kind === "integer" || kind === "number";
  const bounds = { min: schema.minimum, max: schema.maximum, step: kind === "integer" ? schema.multipleOf ?? 1 : "any" };
  return el("input", { ...shared, type: isNumber ? "number" : "text", placeholder: hint, ...(isNumber && bounds) });
}

function field(name, { kind, schema = {}, placeholder = "", hint = "" }) {
  const node = control(name, kind, schema, placeholder);
  const error = el("p", { class: "error", id: `error-${name}` });
  fields.set(name, { kind, control: node, error });
  node.addEventListener("input", () => clearError(name));
  const under = el("p", { class: "quiet hint", id: `hint-${name}`, hidden: !hint }, hint);
  return el("div", { class: `field ${kind}` }, el("label", { for: node.id }, titleOf(name)), node, under, error);
}

const shown = (value) => (value == null ? "none" : typeof value === "object" ? JSON.stringify(value) : String(value));

/** The fields that a pipeline has, with what happens where they are left empty. */
function described(model) {
  const all = new Map();
  const size = (value) => ({ kind: "integer", schema: { multipleOf: model.size_multiple }, placeholder: shown(value) });
  for (const side of ["width", "height"]) {
    if (model.parameters[side]) all.set(side, size(model[`default_${side}`] ?? "as the picture"));
  }
  for (const [name, about] of Object.entries(model.parameters)) {
    const isSayable = Object.keys(about.type).length || about.default != null; // what is neither, JSON cannot hold
    if (about.is_picture || !isSayable || OWN.includes(name) || all.has(name) || name === "prompt") continue;
    const kind = name === "negative_prompt" ? "long" : kindOf(about.type, about.default);
    const own = model[`default_${name === model.frames_argument ? "num_frames" : name}`];
    const placeholder = about.is_required ? "needed" : shown(model.defaults[name] ?? own ?? about.default);
    all.set(name, { kind, schema: about.type, placeholder });
  }
  if (model.default_frame_rate) all.set("fps", { kind: "number", placeholder: shown(model.default_frame_rate) });
  if (model.kind === "image") all.set("output_format", { kind: "choice", schema: { enum: ["jpeg", "webp"] }, placeholder: "png" });
  if (model.kind === "image") all.set("n", { kind: "integer", schema: { minimum: 1 }, placeholder: "1" });
  return all.set("seed", { kind: "integer", schema: { minimum: 0 }, placeholder: "a new one" });
}

/** Put the fields of a pipeline on the page. */
export function build(model) {
  fields.clear();
  const known = described(model);
  const take = (name) => {
    const found = known.get(name);
    known.delete(name);
    return found ? [field(name, found)] : [];
  };
  const hint = model.prompt_grammar && `Knows: ${model.prompt_grammar}`;
  const prompt = model.parameters.prompt ? [field("prompt", { kind: "long", hint })] : [];
  const pictures = [model.accepts_image && "image", model.kind === "image" && model.accepts_mask && "mask"].filter(Boolean);
  const top = [...prompt, ...take("negative_prompt"), ...pictures.map((name) => field(name, { kind: "file" }))];
  const grid = el("div", { class: "grid" }, ...FIRST.flatMap(take));
  const rest = [...known.keys()].flatMap(take);
  const more = rest.length && el("details", { id: "rest" }, el("summary", {}, "More options"), el("div", { class: "grid" }, ...rest));
  $("fields").replaceChildren(...top, grid, ...(more ? [more] : []));
}

function valueOf({ kind, control: node }) {
  if (kind === "file") return node.files[0];
  if (node.validity.badInput) throw new Error("That is not a number. Give one, or leave it empty.");
  const text = kind === "long" ? node.value.trim() : node.value;
  if (text === "") return undefined;
  if (kind === "integer" || kind === "number") return Number(text);
  if (kind === "boolean") return text === "true";
  if (kind !== "json") return text;
  try {
    return JSON.parse(text);
  } catch {
    throw new Error('That is not JSON. Lists look like [1, 2], texts like "this".');
  }
}

/** What is asked for, by the API's names; fields left empty are left out. Null where a field cannot be read. */
export function read() {
  clearErrors();
  const asked = {};
  let isGood = true;
  for (const [name, one] of fields) {
    try {
      const value = valueOf(one);
      if (value !== undefined) asked[name] = value;
    } catch (error) {
      showError(name, error.message, isGood);
      isGood = false;
    }
  }
  return isGood ? asked : null;
}

/** Set the fields to what was asked for another time; what that left out is left empty. */
export function fill(asked) {
  clearErrors();
  for (const [name, { kind, control: node }] of fields) {
    const value = asked[name];
    if (kind === "file") continue;
    node.value = value == null ? "" : kind === "json" ? JSON.stringify(value) : String(value);
    if (node.value) node.closest("details")?.setAttribute("open", "");
  }
  [...fields.values()][0]?.control.focus();
}

function clearError(name) {
  const { control: node, error } = fields.get(name);
  error.textContent = "";
  node.removeAttribute("aria-invalid");
}

export function clearErrors() {
  $("form-error").textContent = "";
  [...fields.keys()].forEach(clearError);
}

/** Show an error at the field that it names, or under the form where it names none; the field gets the focus. */
export function showError(param, message, takesFocus = true) {
  const aliases = { size: "width", num_images: "n", frame_rate: "fps", num_images_per_prompt: "n" };
  const name = [param, aliases[param], /^[a-z_]*/.exec(param ?? "")[0]].find((one) => fields.has(one));
  if (!name) {
    $("form-error").textContent = message;
    return;
  }
  const { control: node, error } = fields.get(name);
  error.textContent = message;
  node.setAttribute("aria-invalid", "true");
  node.closest("details")?.setAttribute("open", "");
  if (!takesFocus) return;
  node.focus();
  error.scrollIntoView({ block: "nearest" });
}
