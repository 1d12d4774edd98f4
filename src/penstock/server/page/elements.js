// Elements, and the words for numbers that several parts of the page show.

export const $ = (id) => document.getElementById(id);

/** Make an element. Texts are set as texts: nothing that anybody wrote is ever read as HTML. */
export function el(tag, props = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(props)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child != null && child !== ""));
  return node;
}

/** Say something to those who listen to the page instead of looking at it. */
export function announce(text) {
  if ($("live").textContent !== text) $("live").textContent = text;
}

export function bytes(count) {
  if (count == null) return "";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let index = 0;
  for (; count >= 1000 && index < units.length - 1; index++) count /= 1024;
  return `${count < 10 && index > 0 ? count.toFixed(1) : Math.round(count)} ${units[index]}`;
}

export function seconds(value) {
  if (value < 60) return `${value.toFixed(1)} s`;
  return `${Math.floor(value / 60)} min ${String(Math.floor(value % 60)).padStart(2, "0")} s`;
}

export const plural = (count, word) => `${count} ${word}${count === 1 ? "" : "s"}`;
