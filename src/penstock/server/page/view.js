// One request looked at closely: on its way with its progress and unfinished pictures, or done, with all that made it.

import { urlOf } from "./api.js";
import { $, announce, el, plural, seconds } from "./elements.js";
import { titleOf } from "./form.js";

const TINY = 256; // pictures with shorter sides are shown larger, with their pixels as they are
const STAGES = { encode: "Reading the prompt", denoise: "Making it", decode: "Decoding", save: "Writing the file" };

const UNSHOWN = ["prompt", "width", "height", "seed", "partial_images"]; // the size says it, or the pictures do

let ticking = 0;

/** Show a run; what is returned is called whenever something of it is new. */
export function showRun(run, onCancel) {
  const pictures = el("div", { class: "pictures" }, el("div", { class: "waiting" }));
  const { width, height } = run.asked;
  pictures.firstChild.style.aspectRatio = width && height ? `${width} / ${height}` : "1";
  const stage = el("span"), time = el("span", { class: "quiet" });
  const bar = el("progress", { max: 1, "aria-label": "Progress" });
  const cancel = el("button", { type: "button", id: "cancel", onclick: onCancel }, "Cancel");
  const line = el("div", { class: "bar" }, el("div", {}, stage, time), bar);
  replace(pictures, line, words(run.asked.prompt), el("div", { class: "actions" }, cancel));

  const tick = () => (time.textContent = seconds(run.elapsedS));
  ticking = setInterval(tick, 200);
  tick();
  return function update() {
    stage.textContent = wordsOf(run);
    announce(run.state === "running" ? STAGES[run.stage] ?? "" : wordsOf(run));
    if (run.state === "queued") bar.removeAttribute("value");
    else bar.value = run.share;
    cancel.disabled = run.state === "cancelling";
    run.partials.forEach((source, item) => {
      while (pictures.children.length <= item) pictures.append(el("figure", {}, el("img", { alt: "" })));
      if (pictures.children[item].className === "waiting") pictures.children[item].replaceWith(el("figure", {}, el("img", { alt: "" })));
      const image = pictures.children[item].firstChild;
      if (image.src !== source) image.src = source;
      image.alt = `Unfinished picture ${item + 1}`;
      image.onload = () => sharpen(image);
    });
  };
}

/** What a run is doing, in words. */
function wordsOf(run) {
  if (run.state === "cancelling") return "Cancelling";
  if (run.state === "lost") return "The server does not answer; asking again";
  if (run.state === "queued") return run.ahead ? `Waiting for ${plural(run.ahead, "request")} before it` : "Waiting to begin";
  const item = run.count > 1 ? ` (${run.item + 1} of ${run.count})` : "";
  const step = run.stage === "denoise" && run.total ? `, step ${run.step} of ${run.total}` : "";
  return `${STAGES[run.stage] ?? "Beginning"}${step}${item}`;
}

/** Show a job that is over. `actions` are the buttons that go with it: {label: function}. */
export function showJob(job, actions) {
  const files = job.files.filter((file) => file.role === "result");
  const poster = job.files.find((file) => file.role === "thumbnail");
  const pictures = el("div", { class: "pictures" }, ...files.map((file) => figure(job, file, poster)));
  const buttons = Object.entries(actions).map(([label, onclick]) => el("button", { type: "button", onclick }, label));
  const trouble = job.error && el("p", { class: "trouble" }, job.error.message);
  replace(files.length ? pictures : null, trouble, words(job.prompt), settingsOf(job), el("div", { class: "actions" }, ...buttons));
}

function figure(job, file, poster) {
  const name = `${job.id}-${file.item}.${file.name.split(".").pop()}`;
  const kind = file.media_type.split("/")[0];
  const link = el("a", { download: name, href: urlOf(file) }, "Download");
  const player = { controls: true, loop: kind === "video", playsinline: true, preload: "metadata", "aria-label": job.prompt };
  const media =
    kind === "image"
      ? el("img", { src: urlOf(file), alt: job.prompt || "The picture", onload: (event) => sharpen(event.target) })
      : el(kind, { src: urlOf(file), poster: kind === "video" && poster ? urlOf(poster) : null, ...player });
  const seed = file.seed == null ? null : el("span", {}, `seed ${file.seed}`);
  return el("figure", {}, media, el("figcaption", {}, seed, link));
}

/** All that was asked for, beside the prompt. */
function settingsOf(job) {
  const pairs = { ...job.arguments, size: job.size, seconds: job.seconds };
  const isShown = ([name, value]) => value != null && value !== "" && !UNSHOWN.includes(name);
  const rows = Object.entries(pairs).filter(isShown);
  if (job.timings?.total_s) rows.push(["took", seconds(job.timings.total_s)]);
  rows.push(["made", new Date(job.created_at * 1000).toLocaleString()]);
  const text = (value) => (typeof value === "object" ? JSON.stringify(value) : String(value));
  return el("dl", { class: "settings" }, ...rows.map(([name, value]) =>
    el("div", {}, el("dt", {}, titleOf(name).toLowerCase()), el("dd", {}, text(value)))));
}

export function sharpen(image) {
  image.classList.toggle("tiny", Math.max(image.naturalWidth, image.naturalHeight) < TINY);
}

export function showNothing() {
  replace(el("p", { class: "empty quiet" }, "What you make appears here."));
}

const words = (prompt) => (prompt ? el("p", { class: "prompt" }, prompt) : null);

function replace(...nodes) {
  const hadFocus = $("view").contains(document.activeElement);
  clearInterval(ticking);
  $("view").replaceChildren(...nodes.filter(Boolean));
  if (hadFocus) $("view").querySelector("button")?.focus();
}
