// One request on its way: asked, followed step by step, cancelled. It is a job of the server, and goes on without the page.

import { ApiError, call, events, get } from "./api.js";

const PARTIALS = 2;
const AGAIN_MS = 1000;
export const UNFINISHED = ["queued", "in_progress"];

export class Run {
  /** `asked` holds the API's names; `onChange(run)` is called whenever something is new. */
  constructor(kind, asked, onChange) {
    Object.assign(this, { kind, asked, onChange, id: null, job: null, error: null, complaint: null, state: "queued" });
    Object.assign(this, { stage: "queue", step: 0, total: 0, item: 0, share: 0, ahead: null, partials: [] });
    this.count = asked.n ?? 1;
    this.begunMs = performance.now();
    this.abort = new AbortController();
  }

  /** A request that this page, before it was loaded again, or somebody else with the same key has made. */
  static of(job, onChange) {
    const run = new Run(job.kind, { ...job.arguments, prompt: job.prompt }, onChange);
    run.begunMs -= Date.now() - 1000 * job.created_at;
    return Object.assign(run, { id: job.id, job, asking: Promise.resolve() });
  }

  get isOver() {
    return ["completed", "failed", "cancelled"].includes(this.state);
  }

  get elapsedS() {
    return ((this.endMs ?? performance.now()) - this.begunMs) / 1000;
  }

  /** Carry it out; returns when it is over, well or not. */
  async go() {
    let error = await this.#attempt();
    while (this.id && (error ? error.code === "unreachable" : UNFINISHED.includes(this.job?.status))) {
      if (this.state !== "cancelling") this.state = "lost"; // the connection broke; the job may go on
      this.onChange(this);
      await new Promise((resolve) => setTimeout(resolve, AGAIN_MS));
      error = await this.#attempt();
    }
    const isCancelled = this.state === "cancelling" || (error ?? this.job?.error)?.code === "cancelled";
    this.state = isCancelled ? "cancelled" : error ? "failed" : (this.job?.status ?? "cancelled");
    this.error = isCancelled ? null : error;
    this.endMs = performance.now();
    this.abort.abort();
    this.onChange(this);
  }

  /** Ask where that is not done, and follow; then look at the job. Returns what went wrong, if anything. */
  async #attempt() {
    let error = null;
    try {
      await this.ask();
      await this.#follow();
    } catch (caught) {
      if (caught.name !== "AbortError" && !(caught instanceof ApiError)) throw caught;
      error = caught;
    }
    if (this.id) this.job = this.ended ?? await get(`v1/jobs/${this.id}`).catch(() => null); // it was deleted, or nobody answers
    return error;
  }

  /** End it; what is finished of it stays, and becomes its job. */
  async cancel() {
    if (this.isOver || this.state === "cancelling") return;
    const before = this.state;
    this.state = "cancelling";
    this.onChange(this);
    try {
      await this.asking?.catch(() => {}); // what it is called is not known before
      if (this.id) this.ended = await get(`v1/jobs/${this.id}/cancel`, { method: "POST" });
      if (this.ended && !this.ended.files.length) await call(`v1/jobs/${this.id}`, { method: "DELETE" });
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      if (error.status !== 404) return this.#goOn(before, error); // 404: somebody else was faster
    }
    this.abort.abort();
  }

  /** It could not be cancelled, and goes on. */
  #goOn(state, error) {
    if (!this.isOver) this.state = state;
    this.complaint = error;
    this.onChange(this);
    this.complaint = null;
  }

  /** Ask for it; returns once the server has it. Called again, it is asked for once. */
  ask() {
    return (this.asking ??= this.#ask());
  }

  async #ask() {
    const isImage = this.kind === "image";
    const path = !isImage ? "v1/videos" : this.asked.image ? "v1/images/edits" : "v1/images/generations";
    const fields = isImage ? { ...this.asked, detach: true, partial_images: PARTIALS } : this.asked;
    const job = await get(path, { method: "POST", body: bodyOf(fields, isImage ? "image" : "input_reference") });
    this.id = job.id;
    this.onChange(this);
  }

  async #follow() {
    const answer = await call(`v1/jobs/${this.id}/events`, { signal: this.abort.signal });
    for await (const { name, data } of events(answer)) {
      if (name === "partial_image") this.#setPartial(data);
      if (name === "queued") Object.assign(this, { state: "queued", ahead: data.position });
      if (name === "progress") {
        const { stage, step, total, item, progress } = data;
        if (this.state !== "cancelling") this.state = "running";
        Object.assign(this, { stage, step, total, item, share: progress / 100 });
      }
      this.onChange(this);
    }
  }

  #setPartial({ b64_json: picture, output_format: format = "png", item = 0 }) {
    this.partials[item] = `data:image/${format};base64,${picture}`;
    this.onChange(this);
  }
}

/** What is asked for as it is sent: JSON, or with a picture a form, where `picture` is its field. */
function bodyOf({ image, ...fields }, picture) {
  if (!image) return fields;
  const form = new FormData();
  form.append(picture, image);
  for (const [name, value] of Object.entries(fields)) {
    const isWhole = value instanceof File || typeof value !== "object";
    form.append(name, isWhole ? value : JSON.stringify(value));
  }
  return form;
}
