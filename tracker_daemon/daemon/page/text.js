// Numbers as text, and text into the document: as text only, and only where it changed.

// ---- numbers as text

const grouped = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const tenths = new Intl.NumberFormat("en-US", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
export const exact = new Intl.NumberFormat("en-US", { maximumFractionDigits: 20 });
const digits = (value, most) => String(Number(value.toPrecision(most)));

export const count = (value) => grouped.format(value);
export const rate = (value) => (value === 0 || value >= 100 ? grouped : tenths).format(value);

/** Seconds as 0.42 ms, 4.2 ms, 42 ms, 1.25 s or 75 s. */
export function duration(seconds) {
  const ms = seconds * 1000;
  if (ms === 0) return "0 ms";
  if (ms < 1) return `${ms.toFixed(2)} ms`;
  if (ms < 9.95) return `${ms.toFixed(1)} ms`;
  if (ms < 999.5) return `${ms.toFixed(0)} ms`;
  return seconds < 9.995 ? `${seconds.toFixed(2)} s` : seconds < 99.95 ? `${seconds.toFixed(1)} s` : `${count(seconds)} s`;
}

/** Bytes as 512 B, 12.0 KiB or 3.4 MiB. */
export function size(bytes) {
  if (bytes < 1024) return `${count(bytes)} B`;
  const units = ["KiB", "MiB", "GiB", "TiB"];
  let value = bytes / 1024;
  while (value >= 1023.95 && units.length > 1) {
    value /= 1024;
    units.shift();
  }
  return `${tenths.format(value)} ${units[0]}`;
}

/** A span of seconds in its two largest units. */
export function span(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const [d, h, m, s] = [Math.floor(whole / 86400), Math.floor(whole / 3600) % 24, Math.floor(whole / 60) % 60, whole % 60];
  if (d) return `${count(d)} d ${h} h`;
  if (h) return `${h} h ${m} min`;
  return m ? `${m} min ${s} s` : `${s} s`;
}

const two = (value) => String(value).padStart(2, "0");

/** An instant (s since 1970) as the reader's time of day. */
export function timeOfDay(at) {
  const date = new Date(at * 1000);
  return `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
}

/** An instant with its date, in the reader's zone. */
export function dateTime(at) {
  const date = new Date(at * 1000);
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} ${timeOfDay(at)}`;
}

/** A number on an axis: short, and exact for the steps that axes have. */
export const short = (value) => (value >= 1e6 ? `${digits(value / 1e6, 3)} M` : value >= 1e4 ? `${digits(value / 1e3, 3)} k` : digits(value, 3));
export const shortDuration = (seconds) => (seconds >= 1 ? `${digits(seconds, 3)} s` : `${digits(seconds * 1000, 3)} ms`);

// ---- the document

export const byId = (id) => document.getElementById(id);

export function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function mark(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

/** Make an element; children are nodes, or strings, which become text. */
export function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export function draw(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}
