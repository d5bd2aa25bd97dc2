// How figures are written, and small helpers for the page's elements.

export const NONE = "–";

export function element(id) {
  return document.getElementById(id);
}

// Names, ids and errors come from elsewhere: they are set as text, never as markup.
export function make(tag, className, text) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  return node;
}

// Text that stays the same is not set again: screen readers would read it out, and a selection would be lost.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function count(number) {
  return number.toLocaleString("en");
}

export function plural(number, word) {
  return `${count(number)} ${word}${number === 1 ? "" : "s"}`;
}

export function bytes(number) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (number >= 1000 && unit < units.length - 1) {
    number /= 1000;
    unit += 1;
  }
  return `${number.toFixed(unit && number < 100 ? 1 : 0)} ${units[unit]}`;
}

export function milliseconds(ms) {
  if (ms >= 100_000) return `${(ms / 1000).toFixed(0)} s`;
  if (ms >= 10_000) return `${(ms / 1000).toFixed(1)} s`;
  if (ms >= 9.95) return `${count(Math.round(ms))} ms`;
  return `${ms.toFixed(ms < 1 ? 2 : 1)} ms`;
}

export function percent(part, whole) {
  return whole ? `${((100 * part) / whole).toFixed(0)} %` : NONE;
}

// Of a counter, per second; null at first, and after the counter was reset.
export function rate(now, before, seconds) {
  return before === undefined || now < before || !seconds ? null : (now - before) / seconds;
}

export function shownRate(value, format) {
  return value === null ? NONE : format(value);
}
