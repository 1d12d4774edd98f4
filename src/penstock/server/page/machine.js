// What the machine is doing: asked gently, less often while nothing happens, never while nobody looks.

import { $, bytes, el, plural } from "./elements.js";

const BUSY_MS = 2000;
const IDLE_MS = 6000;
const SOON_MS = 300;

let setup = ""; // what the model runs on, in words

/** Ask from now on; `onAnswer` hears each answer. What is returned asks soon. */
export function watch(onAnswer) {
  let timer = 0;
  async function ask() {
    clearTimeout(timer);
    if (document.hidden) return;
    const health = await fetch(new URL("health", document.baseURI)).then((answer) => answer.json(), () => null);
    show(health);
    onAnswer(health);
    timer = setTimeout(ask, health && lampOf(health) === "idle" ? IDLE_MS : BUSY_MS);
  }
  document.addEventListener("visibilitychange", ask);
  ask();
  return () => {
    clearTimeout(timer);
    timer = setTimeout(ask, SOON_MS);
  };
}

/** Take from the server's configuration what is worth to be seen here. */
export function describe({ version, effective }) {
  const { device, dtype, offload } = effective ?? {};
  setup = [device, dtype, offload && offload !== "none" && `${offload} offload`, `penstock ${version}`].filter(Boolean).join(", ");
}

function lampOf({ groups = [] }) {
  const states = new Set(groups.map((group) => group.state));
  return ["busy", "idle", "starting", "restarting"].find((state) => states.has(state)) ?? "bad";
}

function show(health) {
  const lamp = health ? lampOf(health) : "bad";
  document.querySelector(".lamp").className = `lamp ${lamp}`;
  const words = { busy: "working", idle: "idle", starting: "loading the model", restarting: "restarting", bad: "not working" };
  const queue = health?.queue_depth ? `, ${plural(health.queue_depth, "request")} waiting` : "";
  const speed = health?.steps_per_s ? `, ${health.steps_per_s.toFixed(1)} steps/s` : "";
  $("machine-line").textContent = health ? words[lamp] + queue + (lamp === "busy" ? speed : "") : "the server does not answer";
  $("machine-sheet").replaceChildren(...(health?.groups ? sheet(health) : []));
}

function sheet({ groups, queue_depth: waiting = 0, max_queue: places, steps_per_s: speed }) {
  const rows = groups.flatMap((group) =>
    group.ranks.map((rank) =>
      row("td", `${group.number}`, `${rank.rank}`, rank.state === "alive" ? group.state : rank.state,
        bytes(rank.device_bytes), bytes(rank.host_bytes), `${group.num_restarts}`)));
  const head = row("th", "Replica", "Rank", "State", "Device memory", "Host memory", "Restarts");
  const messages = groups.filter((group) => group.message).map((group) => el("p", { class: "error" }, group.message));
  const room = places ? ` (room for ${places})` : "";
  const line = `${plural(waiting, "request")} waiting${room}${speed ? `, ${speed.toFixed(1)} steps per second` : ""}`;
  return [el("p", {}, line), el("p", { class: "quiet" }, setup), el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows)), ...messages];
}

const row = (tag, ...cells) => el("tr", {}, ...cells.map((cell) => el(tag, tag === "th" ? { scope: "col" } : {}, cell)));
