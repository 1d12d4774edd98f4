// The page put together: what is asked for, on its way and made; keys of the keyboard; the key of the server.

import { get, hasKey, keepKey } from "./api.js";
import { $, announce } from "./elements.js";
import * as form from "./form.js";
import * as gallery from "./gallery.js";
import * as machine from "./machine.js";
import { Run, UNFINISHED } from "./run.js";
import * as view from "./view.js";

const AT_ONCE = 4; // that are followed: browsers keep few connections to a server

const runs = []; // on their way, the newest last
let model = null;
let isBeginning = false;
let shown = null; // the run or the id of the job that is looked at
let updateView = () => {};

// ---- making

function make() {
  const asked = model && form.read();
  if (!asked) return;
  const run = new Run(model.kind, asked, onChange);
  run.before = shown;
  look(run);
  if (matchMedia("(max-width: 52rem)").matches) $("view").scrollIntoView({ block: "nearest" });
  follow(run);
}

async function follow(run) {
  const before = () => runs.slice(0, runs.indexOf(run)).filter((one) => !one.isOver);
  const ended = (one) => new Promise((resolve) => one.abort.signal.addEventListener("abort", resolve));
  runs.push(run);
  run.ask().catch(() => run.abort.abort()); // at once, so that it is made whatever becomes of this page
  while (before().length >= AT_ONCE && !run.abort.signal.aborted) {
    onChange(run);
    await Promise.race([...before(), run].map(ended));
  }
  await run.go();
  runs.splice(runs.indexOf(run), 1);
  askMachine();
  document.title = "penstock";
  if (run.state === "cancelled") return gone(run);
  if (run.error) refused(run);
  if (run.job) gallery.put(run.job, pick);
  if (run.job && shown === run) pick(run.id);
  if (run.state === "completed") announce("Done.");
}

function onChange(run) {
  if (run.stage !== run.lastStage) askMachine();
  run.lastStage = run.stage;
  if (run === runs.at(-1)) document.title = run.isOver ? "penstock" : `${Math.round(100 * run.share)} % penstock`;
  if (run === shown) updateView();
  if (run.complaint) complain(run.complaint);
  if (!run.id || run.isOver) return;
  if (!gallery.jobOf(run.id)) gallery.put({ id: run.id, prompt: run.asked.prompt, status: "in_progress", files: [] }, pick);
  gallery.advance(run.id, run.share);
}

/** Something that was asked for was not done; nothing else has changed. */
function complain(error) {
  form.showError(null, error.message);
  announce(error.message);
}

/** A request that the server did not take, or that failed on its way. */
function refused(run) {
  if (run.error.status === 401) askKey(run.error);
  form.showError(run.error.param, run.error.message);
  announce(run.error.message);
  if (run.job || shown !== run) return;
  if (gallery.jobOf(run.before)) pick(run.before);
  else leave();
}

function gone(run) {
  announce("Cancelled.");
  if (run.job?.files.length) {
    gallery.put(run.job, pick);
    if (shown === run) pick(run.id);
    return;
  }
  if (run.id) gallery.remove(run.id);
  if (shown === run) leave();
}

// ---- looking

function look(run) {
  shown = run;
  updateView = view.showRun(run, () => run.cancel());
  gallery.mark(run.id);
  updateView();
}

function leave() {
  shown = null;
  view.showNothing();
  if (document.activeElement === document.body) $("make").focus();
}

function pick(id) {
  const run = runs.find((one) => one.id === id);
  if (run) return look(run);
  const job = gallery.jobOf(id);
  shown = id;
  gallery.mark(id);
  view.showJob(job, {
    "Use these settings": () => form.fill(settingsOf(job)),
    Delete: ({ target: button }) => {
      if (button.dataset.isSure) return remove(job);
      button.dataset.isSure = "yes";
      button.textContent = "Delete for good";
    },
  });
}

/** What a job was made with, by the names of the form's fields: whoever asked may have said size and seconds. */
function settingsOf(job) {
  const asked = { ...job.arguments, seed: job.seed };
  const [width, height] = /^\d+x\d+$/.test(asked.size ?? "") ? asked.size.split("x").map(Number) : [];
  if (width) Object.assign(asked, { width, height });
  const frames = job.files.find((file) => file.role === "result")?.facts.num_frames;
  if (asked.seconds && frames) asked.num_frames ??= frames;
  return asked;
}

async function remove(job) {
  try {
    await get(`v1/jobs/${job.id}`, { method: "DELETE" });
  } catch (error) {
    if (error.status !== 404) return complain(error);
  }
  gallery.remove(job.id);
  announce("Deleted.");
  if (shown === job.id) leave();
}

// ---- the beginning

async function begin() {
  if (isBeginning || $("key-dialog").open) return;
  isBeginning = true;
  try {
    const [models, config] = await Promise.all([get("v1/models"), get("v1/config")]);
    const described = models.data[0].description;
    if (!model && described) {
      model = described;
      form.build(model);
      $("make").disabled = false;
      $("model").textContent = `${models.data[0].id} \u00b7 ${model.pipeline}`;
      $("field-prompt")?.focus();
    }
    machine.describe(config);
    for (const job of (await gallery.load(pick)).reverse()) {
      const isKnown = runs.some((run) => run.id === job.id);
      if (!isKnown && UNFINISHED.includes(job.status)) follow(Run.of(job, onChange));
    }
  } catch (error) {
    if (error.status === 401) askKey(error);
    else $("form-error").textContent = error.message;
  }
  isBeginning = false;
}

function askKey(error) {
  $("key-error").textContent = hasKey() ? error.message : "";
  if (!$("key-dialog").open) $("key-dialog").showModal();
}

$("key-form").addEventListener("submit", () => {
  keepKey($("key").value);
  $("key-dialog").close();
  begin();
});
$("form").addEventListener("submit", (event) => {
  event.preventDefault();
  make();
});
$("more").addEventListener("click", () => gallery.load(pick, gallery.last()));
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !event.repeat) make();
  if (event.key === "Escape" && !$("key-dialog").open) {
    if ($("machine").open) $("machine").open = false;
    else runs.at(-1)?.cancel();
  }
});

const askMachine = machine.watch((health) => {
  if (!model && health?.groups?.some((group) => ["idle", "busy"].includes(group.state))) begin();
});
begin();
