// What was made before, and what is being made: one tile for each, the newest first.

import { get, urlOf } from "./api.js";
import { $, el } from "./elements.js";
import { sharpen } from "./view.js";

const PAGE = 24;
const tiles = new Map(); // id -> {tile, job}

/** Fetch the newest jobs, or with `after` those that are older. */
export async function load(onPick, after = null) {
  const { data, has_more: hasMore } = await get(`v1/jobs?limit=${PAGE}${after ? `&after=${after}` : ""}`);
  for (const job of data) put(job, onPick, true);
  $("more").hidden = !hasMore;
  return data;
}

export const last = () => [...tiles].find(([, { tile }]) => !tile.nextElementSibling)?.[0];
export const jobOf = (id) => tiles.get(id)?.job;

/** Put a job into the gallery, or show what is new of one that is there. */
export function put(job, onPick, atEnd = false) {
  const known = tiles.get(job.id);
  const state = job.error?.code === "cancelled" ? "cancelled" : job.status.replace("_", " ");
  const button = el("button", { type: "button", onclick: () => onPick(job.id) }, face(job, state));
  button.setAttribute("aria-label", `${job.prompt || "no prompt"}: ${state}`);
  button.setAttribute("aria-current", known?.tile.firstChild.getAttribute("aria-current") ?? "false");
  const tile = el("li", {}, button);
  if (known) known.tile.replaceWith(tile);
  else $("gallery")[atEnd ? "append" : "prepend"](tile);
  tiles.set(job.id, { tile, job });
}

function face(job, state) {
  const picture = job.files.find((file) => file.role === "thumbnail") ?? job.files.find((file) => file.media_type.startsWith("image/"));
  if (!picture) return el("span", { class: `state ${job.status}` }, job.files.length ? "sound" : state);
  const image = el("img", { alt: "", loading: "lazy", src: urlOf(picture), onload: (event) => sharpen(event.target) });
  const count = job.files.filter((file) => file.role === "result").length;
  const mark = job.kind === "video" ? "\u25b6" : count > 1 ? count : null;
  const faces = document.createDocumentFragment();
  faces.append(image, ...(mark ? [el("span", { class: "mark" }, String(mark))] : []));
  return faces;
}

/** Show how far a job is. */
export function advance(id, share) {
  const face = tiles.get(id)?.tile.querySelector(".state");
  if (face) face.textContent = `${Math.round(100 * share)} %`;
}

/** Mark the tile of the job that is looked at. */
export function mark(id) {
  for (const [key, { tile }] of tiles) tile.firstChild.setAttribute("aria-current", String(key === id));
}

/** Take a job out; where it had the focus, its neighbour's tile gets it. */
export function remove(id) {
  const found = tiles.get(id);
  if (!found) return;
  const hadFocus = [found.tile, $("view")].some((place) => place.contains(document.activeElement));
  if (hadFocus) (found.tile.nextElementSibling ?? found.tile.previousElementSibling)?.firstChild.focus();
  found.tile.remove();
  tiles.delete(id);
}
