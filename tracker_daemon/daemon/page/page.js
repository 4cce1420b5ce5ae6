// The status page: asks for status.json once a second and shows it.
//
// Rules:
// 1. What comes from the daemon is inserted as text (textContent), never as markup: errors come from outside.
// 2. Nothing is guessed: without an answer the page says since when, and keeps what it knew, paler.
// 3. A node is written only when its text changes, so that a selection or a screen reader is not disturbed.
// 4. Samples are kept by column as they come; units are converted where they are printed.

const INTERVAL = 1000; // ms between two questions
const PATIENCE = 3000; // ms without an answer that are normal
const TIMEOUT = 5000; // ms until a question is given up
const WINDOW = 300; // s that a chart shows
const ROW = 30; // s between two rows of the table
const HEIGHT = 100; // of a chart, in its own units; its width is WINDOW
const DASH = "\u2013";

// ---- numbers as text

const grouped = new Intl.NumberFormat("en-US", { maximumFractionDigits: 0 });
const tenths = new Intl.NumberFormat("en-US", { minimumFractionDigits: 1, maximumFractionDigits: 1 });
const exact = new Intl.NumberFormat("en-US", { maximumFractionDigits: 20 });
const digits = (value, most) => String(Number(value.toPrecision(most)));

const count = (value) => grouped.format(value);
const rate = (value) => (value === 0 || value >= 100 ? grouped : tenths).format(value);

/** Seconds as 0.42 ms, 4.2 ms, 42 ms, 1.25 s or 75 s. */
function duration(seconds) {
  const ms = seconds * 1000;
  if (ms === 0) return "0 ms";
  if (ms < 1) return `${ms.toFixed(2)} ms`;
  if (ms < 9.95) return `${ms.toFixed(1)} ms`;
  if (ms < 999.5) return `${ms.toFixed(0)} ms`;
  return seconds < 9.995 ? `${seconds.toFixed(2)} s` : seconds < 99.95 ? `${seconds.toFixed(1)} s` : `${count(seconds)} s`;
}

/** Bytes as 512 B, 12.0 KiB or 3.4 MiB. */
function size(bytes) {
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
function span(seconds) {
  const whole = Math.max(0, Math.floor(seconds));
  const [d, h, m, s] = [Math.floor(whole / 86400), Math.floor(whole / 3600) % 24, Math.floor(whole / 60) % 60, whole % 60];
  if (d) return `${count(d)} d ${h} h`;
  if (h) return `${h} h ${m} min`;
  return m ? `${m} min ${s} s` : `${s} s`;
}

const two = (value) => String(value).padStart(2, "0");

/** An instant (s since 1970) as the reader's time of day. */
function timeOfDay(at) {
  const date = new Date(at * 1000);
  return `${two(date.getHours())}:${two(date.getMinutes())}:${two(date.getSeconds())}`;
}

/** An instant with its date, in the reader's zone. */
function dateTime(at) {
  const date = new Date(at * 1000);
  return `${date.getFullYear()}-${two(date.getMonth() + 1)}-${two(date.getDate())} ${timeOfDay(at)}`;
}

/** A number on an axis: short, and exact for the steps that axes have. */
const short = (value) => (value >= 1e6 ? `${digits(value / 1e6, 3)} M` : value >= 1e4 ? `${digits(value / 1e3, 3)} k` : digits(value, 3));
const shortDuration = (seconds) => (seconds >= 1 ? `${digits(seconds, 3)} s` : `${digits(seconds * 1000, 3)} ms`);

// ---- the document

const byId = (id) => document.getElementById(id);

function write(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

function mark(node, name, value) {
  if (node.getAttribute(name) !== value) node.setAttribute(name, value);
}

/** Make an element; children are nodes, or strings, which become text. */
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

function draw(tag, attributes) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

// ---- samples

const COLUMNS = ["accepted", "applied", "queue_threads", "queue_calls", "flush_p50", "flush_p99", "commit_lag_p99"];
let samples = empty();

function empty() {
  return Object.fromEntries(["at", ...COLUMNS].map((name) => [name, []]));
}

/** Add an answer's samples: they follow the last one known, or replace all. Throws when they are no samples. */
function merge(history) {
  const follows = history.since !== null && history.since === samples.at.at(-1);
  const merged = empty();
  for (const name of Object.keys(merged)) {
    if (!Array.isArray(history[name]) || history[name].length !== history.at.length) throw new Error(`no column ${name}`);
    merged[name] = follows ? samples[name].concat(history[name]) : history[name];
  }
  const first = merged.at.findIndex((at) => at >= merged.at.at(-1) - WINDOW);
  if (first > 0) for (const name of Object.keys(merged)) merged[name] = merged[name].slice(first);
  samples = merged;
}

// ---- charts

const CHARTS = [
  {
    id: "rates", title: "Calls", unit: "per second", format: rate, axis: short, least: 10,
    series: [{ name: "accepted", column: "accepted" }, { name: "applied", column: "applied" }],
  },
  {
    id: "queue", title: "Queue", unit: "not yet committed", format: count, axis: short, least: 10,
    series: [{ name: "calls", column: "queue_calls" }, { name: "threads", column: "queue_threads" }],
  },
  {
    id: "flush", title: "Flush latency", unit: "begin to commit", format: duration, axis: shortDuration, least: 0.001,
    series: [{ name: "p99", column: "flush_p99" }, { name: "p50", column: "flush_p50" }],
  },
  {
    id: "lag", title: "Commit lag", unit: "oldest call to commit", format: duration, axis: shortDuration, least: 0.001,
    series: [{ name: "p99", column: "commit_lag_p99" }],
  },
];

// The moment that is read in all charts at once: an instant, or null for the newest. Where a pointer rests on a chart, as
// a share of its width, samples move below it; a moment chosen by keys moves with its sample.
let moment = null;
let pointed = null;

const known = (values) => values.filter((value) => value !== null);
const peak = (values) => known(values).reduce((a, b) => Math.max(a, b), 0);
const print = (chart, value) => (value === null || value === undefined ? DASH : chart.format(value));

/** The smallest round number that is not below *value*: its axis ends there. */
function roundUp(value, least) {
  if (value <= least) return least;
  const power = 10 ** Math.floor(Math.log10(value));
  const steps = [1, 1.5, 2, 3, 4, 5, 6, 8, 10];
  return Number(((steps.find((step) => step * power >= value * (1 - 1e-9)) ?? 10) * power).toPrecision(3));
}

/** The points of a line as SVG path data, one run for each stretch without a gap; *close* makes areas of the runs. */
function path(at, values, top, close) {
  const end = at.at(-1);
  const x = (i) => (WINDOW - (end - at[i])).toFixed(2);
  const y = (i) => (HEIGHT * (1 - values[i] / top)).toFixed(2);
  const parts = [];
  for (let i = 0; i < values.length; i++) {
    if (values[i] === null) continue;
    const first = i;
    let run = `M${x(i)} ${y(i)}`;
    while (i + 1 < values.length && values[i + 1] !== null) {
      i++;
      run += `L${x(i)} ${y(i)}`;
    }
    // A point alone is a line of no length, which the round caps make a dot.
    if (first === i && !close) run += "h0";
    if (close) run += `L${x(i)} ${HEIGHT}L${x(first)} ${HEIGHT}Z`;
    parts.push(run);
  }
  return parts.join("");
}

/** Make a chart's figure and return how to draw it: lines over WINDOW seconds, the newest at the right edge. */
function lineChart(chart) {
  const id = (part) => `${chart.id}-${part}`;
  const when = make("span", { class: "when" }, "now");
  const readings = chart.series.map((series, number) => {
    const value = make("span", { class: "value", id: id(series.name) }, DASH);
    const note = make("span", { class: "note" }, "\u00a0");
    const key = make("span", { class: `key key-${number}` });
    return { series, value, note, node: make("div", { class: "reading" }, make("span", { class: "name" }, key, series.name), note, value) };
  });
  const svg = draw("svg", { viewBox: `0 0 ${WINDOW} ${HEIGHT}`, preserveAspectRatio: "none", "aria-hidden": "true" });
  for (let x = 60; x < WINDOW; x += 60) svg.append(draw("path", { class: "grid", d: `M${x} 0V${HEIGHT}` }));
  for (const y of [0, HEIGHT / 2, HEIGHT]) svg.append(draw("path", { class: "grid", d: `M0 ${y}H${WINDOW}` }));
  const area = draw("path", { class: "area" });
  const lines = chart.series.map((_, number) => draw("path", { class: `line line-${number}`, id: id(`line-${number}`) }));
  const hair = draw("path", { class: "hair" });
  const dots = chart.series.map((_, number) => draw("path", { class: `dot line-${number}` }));
  svg.append(area, ...lines.toReversed(), hair, ...dots);
  const axis = ["top", "middle", "bottom"].map((place) => make("span", { class: place }));
  const plot = make("div", {
    class: "plot", id: id("plot"), role: "slider", tabindex: "0", "aria-orientation": "horizontal",
    "aria-labelledby": `${id("title")} ${id("unit")}`, "aria-describedby": `${id("summary")} charts-hint`,
    "aria-valuemin": String(-WINDOW), "aria-valuemax": "0", "aria-valuenow": "0", "aria-valuetext": "now",
  });
  plot.append(svg);
  const summary = make("p", { class: "hint", id: id("summary") });
  const figure = make("figure", { class: "card chart", id: chart.id },
    make("figcaption", {}, make("h3", { id: id("title") }, chart.title), make("span", { class: "unit", id: id("unit") }, chart.unit), when),
    make("div", { class: "readings" }, ...readings.map(({ node }) => node)),
    make("div", { class: "frame" }, make("div", { class: "axis", "aria-hidden": "true" }, ...axis), plot,
      make("div", { class: "times", "aria-hidden": "true" }, ...["\u22125 min", "\u22124", "\u22123", "\u22122", "\u22121", "now"].map((text) => make("span", {}, text)))),
    summary);

  function show(status) {
    const { at } = samples;
    const top = roundUp(Math.max(...chart.series.map(({ column }) => peak(samples[column]))), chart.least);
    [top, top / 2, 0].forEach((value, place) => write(axis[place], value ? chart.axis(value) : "0"));
    lines.forEach((line, number) => mark(line, "d", path(at, samples[chart.series[number].column], top, false)));
    mark(area, "d", path(at, samples[chart.series[0].column], top, true));
    const i = indexOf(moment);
    const x = i < 0 ? 0 : WINDOW - (at.at(-1) - at[i]);
    mark(hair, "d", moment === null || i < 0 ? "" : `M${x.toFixed(2)} 0V${HEIGHT}`);
    dots.forEach((dot, number) => {
      const value = i < 0 ? null : samples[chart.series[number].column][i];
      mark(dot, "d", moment === null || value === null ? "" : `M${x.toFixed(2)} ${(HEIGHT * (1 - value / top)).toFixed(2)}h0`);
    });
    for (const { series, value, note } of readings) {
      const values = samples[series.column];
      write(value, i < 0 ? DASH : print(chart, values[i]));
      const limit = status?.queue_limit;
      if (series.column === "queue_threads" && limit) {
        const share = i < 0 ? 0 : values[i] / limit;
        write(note, `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} % of ${count(limit)}`);
        mark(note, "data-level", share >= 0.8 ? "warn" : "");
      } else {
        write(note, known(values).length ? `max ${chart.format(peak(values))}` : "\u00a0");
      }
    }
    write(when, moment === null || i < 0 ? "now" : `${timeOfDay(at[i])}, ${span(Math.round(at.at(-1) - at[i]))} ago`);
    mark(figure, "data-reading", String(moment !== null));
    write(summary, readings.map(({ series }) => describe(chart, series)).join("; "));
    // While the newest is shown a slider that speaks every second would drown all else: it speaks when it is moved.
    if (moment !== null && i >= 0) tell(i);
  }

  function tell(i) {
    const { at } = samples;
    const values = chart.series.map(({ name, column }) => `${name} ${print(chart, samples[column][i])}`);
    mark(plot, "aria-valuenow", String(Math.round(at[i] - at.at(-1))));
    mark(plot, "aria-valuetext", `${timeOfDay(at[i])}: ${values.join(", ")}`);
  }

  function follow(event) {
    const box = plot.getBoundingClientRect();
    pointed = Math.min(1, Math.max(0, (event.clientX - box.left) / box.width));
    showCharts();
  }

  function letGo() {
    pointed = moment = null;
    showCharts();
    const last = samples.at.length - 1;
    if (last >= 0) tell(last);
  }

  plot.addEventListener("pointermove", follow);
  plot.addEventListener("pointerdown", follow);
  plot.addEventListener("pointerleave", letGo);
  plot.addEventListener("pointercancel", letGo);
  plot.addEventListener("blur", letGo);
  plot.addEventListener("focus", () => samples.at.length && tell(Math.max(0, indexOf(moment))));
  plot.addEventListener("keydown", (event) => {
    const last = samples.at.length - 1;
    const i = indexOf(moment);
    const goals = {
      ArrowLeft: i - 1, ArrowDown: i - 1, ArrowRight: i + 1, ArrowUp: i + 1,
      PageDown: i - ROW, PageUp: i + ROW, Home: 0, End: last,
    };
    if (event.altKey || event.ctrlKey || event.metaKey || last < 0) return;
    if (event.key === "Escape") {
      letGo();
    } else if (event.key in goals) {
      pointed = null;
      moment = samples.at[Math.min(last, Math.max(0, goals[event.key]))];
      showCharts();
    } else {
      return;
    }
    event.preventDefault();
  });
  return { figure, show };
}

/** The sample nearest to an instant. */
function nearest(instant) {
  return samples.at.reduce((best, at) => (Math.abs(at - instant) < Math.abs(best - instant) ? at : best), samples.at[0]);
}

/** The place of an instant among the samples; the newest for null, the oldest for one that has left the window. */
function indexOf(instant) {
  if (instant === null) return samples.at.length - 1;
  const found = samples.at.findIndex((at) => at >= instant);
  return found < 0 ? samples.at.length - 1 : found;
}

/** A series in words. */
function describe(chart, { name, column }) {
  const values = known(samples[column]);
  if (!values.length) return `${name}: nothing in the last 5 minutes`;
  const least = values.reduce((a, b) => Math.min(a, b));
  return `${name}: now ${print(chart, samples[column].at(-1))}, from ${print(chart, least)} to ${print(chart, peak(values))}`;
}

const charts = CHARTS.map(lineChart);

function showCharts() {
  if (pointed !== null && samples.at.length) moment = nearest(samples.at.at(-1) - WINDOW * (1 - pointed));
  for (const chart of charts) chart.show(status);
  if (byId("table").open) showTable();
}

function showTable() {
  const columns = CHARTS.flatMap((chart) => chart.series.map((series) => ({ chart, series, name: `${chart.title}, ${series.name}` })));
  const table = byId("table");
  if (!table.querySelector("th")) {
    table.querySelector("thead").append(make("tr", {}, ...["Time", ...columns.map(({ name }) => name)].map((name) => make("th", { scope: "col" }, name))));
  }
  const rows = [];
  for (let i = samples.at.length - 1; i >= 0; i -= Math.max(1, Math.round(ROW / (status?.history.interval || 1)))) {
    const cells = columns.map(({ chart, series, name }) => make("td", { "data-name": name }, print(chart, samples[series.column][i])));
    rows.push(make("tr", {}, make("th", { scope: "row" }, timeOfDay(samples.at[i])), ...cells));
  }
  table.querySelector("tbody").replaceChildren(...rows);
}

// ---- everything else

const STATES = { ready: "Ready", not_ready: "Not ready", draining: "Draining" };
let status = null;

function showState(label, state) {
  write(byId("state"), label);
  mark(byId("state"), "data-state", state);
  const title = `${label} \u00b7 tracker_daemon`;
  if (document.title !== title) document.title = title;
}

function notice(node, text) {
  node.hidden = !text;
  write(node, text || "");
}

function showTotals({ totals }) {
  for (const name of ["accepted", "applied", "dead_lettered", "lost", "rejected", "pending"]) write(byId(name), count(totals[name]));
  mark(byId("dead_lettered"), "data-level", totals.dead_lettered ? "warn" : "");
  mark(byId("rejected"), "data-level", totals.rejected ? "warn" : "");
  mark(byId("lost"), "data-level", totals.lost ? "bad" : "");
  const differs = totals.accepted - totals.applied - totals.dead_lettered - totals.lost - totals.pending;
  write(byId("verdict"), differs ? `does not add up: ${count(differs)}` : "adds up");
  mark(byId("verdict"), "data-level", differs ? "bad" : "good");
}

/** Names and values of a list, made anew only when they changed. *rows*: [name, text, level]. */
function list(node, rows) {
  const state = JSON.stringify(rows);
  if (node.shown === state) return;
  node.shown = state;
  node.replaceChildren(...rows.map(([name, text, level]) => make("div", {}, make("dt", {}, name), make("dd", { "data-level": level || "" }, text))));
}

function showLedger({ ledger }) {
  list(byId("ledger"), [
    ["producer", String(ledger.producer)],
    ["epoch", count(ledger.epoch)],
    ["sequence", count(ledger.sequence)],
    ["regressions", count(ledger.regressions), ledger.regressions ? "warn" : ""],
    ["fenced", ledger.fenced ? "yes: another process has taken over, nothing is written" : "no", ledger.fenced ? "bad" : ""],
  ]);
}

function showJournal({ journal }) {
  list(byId("journal"), journal === null ? [["journal", "none: what is pending lives in memory only"]] : [
    ["directory", String(journal.directory)],
    ["size", size(journal.bytes)],
    ["segments", count(journal.segments)],
    ["degraded", journal.degraded ? "yes: what is accepted now lives in memory only" : "no", journal.degraded ? "bad" : ""],
  ]);
}

/** Errors with equal ones in a row as one: {at, from, class, text, times}. */
function runs(errors) {
  const found = [];
  for (const error of errors) {
    const last = found.at(-1);
    if (last && last.class === error.class && last.text === error.text) {
      last.times++;
      last.from = error.at;
    } else {
      found.push({ ...error, from: error.at, times: 1 });
    }
  }
  return found;
}

function showErrors({ errors, now }) {
  const node = byId("errors");
  const state = JSON.stringify(errors);
  if (node.shown !== state) {
    node.shown = state;
    node.replaceChildren(...runs(errors).map((error) => {
      const age = make("span", { class: "age" });
      age.at = error.at;
      const times = error.times > 1 ? `${count(error.times)} times since ${timeOfDay(error.from)}` : "";
      return make("li", {},
        make("span", { class: "stamp" }, make("time", { datetime: new Date(error.at * 1000).toISOString() }, dateTime(error.at)), age),
        make("span", { class: "class" }, String(error.class)),
        make("div", {}, make("span", { class: "text", dir: "auto" }, String(error.text)), make("span", { class: "again" }, times)));
    }));
    if (!errors.length) node.append(make("li", { class: "none" }, "None."));
  }
  for (const age of node.querySelectorAll(".age")) write(age, `${span(now - age.at)} ago`);
}

function showConfig({ config }) {
  const text = (value) => {
    if (value === null) return "unset";
    return typeof value === "number" ? exact.format(value) : Array.isArray(value) ? value.join("\n") : String(value);
  };
  list(byId("config"), Object.entries(config).map(([name, value]) => [name, text(value), value === null ? "off" : ""]));
}

/** Take an answer. Throws when it is none; what could be shown is shown. */
function take(answer) {
  merge(answer.history);
  status = answer;
  showState(STATES[status.state] ?? String(status.state), status.state);
  notice(byId("reason"), status.state !== "ready" && status.reason ? String(status.reason) : "");
  mark(byId("reason"), "data-level", status.state === "not_ready" ? "bad" : "warn");
  write(byId("version"), String(status.version));
  write(byId("clients"), `${count(status.clients)} ${status.clients === 1 ? "client" : "clients"}`);
  write(byId("uptime"), `up ${span(status.now - status.started_at)}`);
  mark(byId("uptime"), "title", `since ${dateTime(status.started_at)}`);
  write(byId("clock"), timeOfDay(status.now));
  showTotals(status);
  showLedger(status);
  showJournal(status);
  showErrors(status);
  showConfig(status);
  showCharts();
}

// ---- asking

let answered = performance.now(); // when an answer came last
let resumed = answered; // when the page was last shown
let failure = null; // why the last question has no answer
let timer = 0;
let asking = false;

async function ask() {
  if (asking) return;
  asking = true;
  clearTimeout(timer);
  const began = performance.now();
  const since = samples.at.at(-1);
  try {
    const url = since === undefined ? "status.json" : `status.json?since=${since}`;
    const answer = await fetch(url, { cache: "no-store", signal: AbortSignal.timeout(TIMEOUT) });
    if (!answer.ok) throw new Error(`HTTP ${answer.status}`);
    take(await answer.json());
    answered = performance.now();
    failure = null;
  } catch (error) {
    failure = reasonOf(error);
  }
  asking = false;
  showSilence();
  if (!document.hidden) timer = setTimeout(ask, Math.max(0, began + INTERVAL - performance.now()));
}

/** Why a question failed, in words that do not depend on the browser. */
function reasonOf(error) {
  if (error.name === "TimeoutError" || error.name === "AbortError") return "it takes too long";
  if (error.message.startsWith("HTTP ")) return error.message;
  if (error.message === "Failed to fetch" || error.name === "NetworkError" || /network|fetch|load failed/i.test(error.message)) return "not reachable";
  return `not understood: ${error.message}`;
}

function showSilence() {
  if (document.hidden) return;
  const now = performance.now();
  const silent = failure !== null || now - Math.max(answered, resumed) > PATIENCE;
  document.documentElement.classList.toggle("silent", silent);
  const why = failure === null ? "" : ` (${failure})`;
  const known = status === null ? "" : ` What follows is of ${timeOfDay(status.now)}.`;
  notice(byId("silence"), silent ? `No answer for ${span((now - answered) / 1000)}${why}.${known}` : "");
  if (silent) showState("No answer", "silent");
}

document.addEventListener("visibilitychange", () => {
  clearTimeout(timer);
  if (document.hidden) return;
  resumed = performance.now();
  ask();
});
setInterval(showSilence, 1000);
byId("grid").append(...charts.map(({ figure }) => figure));
byId("table").addEventListener("toggle", () => byId("table").open && showTable());
showCharts();
if (!document.hidden) ask();
