// The charts of the last minutes, and the same as a table.
//
// Rules:
// 1. Samples are kept by column as they come, in base units; units are converted where they are printed.
// 2. One kind of chart: lines over WINDOW seconds. A second without an observation is a gap, not a zero; an observation
//    between two gaps is a dot. The figure beside a line is its newest observation, with its age.
// 3. What is read at a moment is read in all charts at once.

import { byId, count, draw, duration, make, mark, rate, short, shortDuration, span, timeOfDay, write } from "./text.js";

const WINDOW = 300; // s that a chart shows
const ROW = 30; // s between two rows of the table, and of a page key
const HEIGHT = 100; // of a chart, in its own units; its width is WINDOW
const DASH = "\u2013";

// ---- samples

const COLUMNS = ["accepted", "applied", "queue_threads", "queue_calls", "flush_p50", "flush_p99", "commit_lag_p99"];
let samples = empty();
let status = null; // the answer that they came with

function empty() {
  return Object.fromEntries(["at", ...COLUMNS].map((name) => [name, []]));
}

/** The instant of the newest sample, undefined before the first. */
export const newest = () => samples.at.at(-1);

/** Add an answer's samples: they follow the last one known, or replace all. Throws when they are no samples. */
export function merge(history) {
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

/** The points of a line that have a gap on either side, as dots. */
function alone(at, values, top) {
  const end = at.at(-1);
  const is = (i) => values[i] !== null && (values[i - 1] ?? null) === null && (values[i + 1] ?? null) === null;
  const dot = (i) => `M${(WINDOW - (end - at[i])).toFixed(2)} ${(HEIGHT * (1 - values[i] / top)).toFixed(2)}h0`;
  return values.map((_, i) => (is(i) ? dot(i) : "")).join("");
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
  const points = chart.series.map((_, number) => draw("path", { class: `alone line-${number}` }));
  const hair = draw("path", { class: "hair" });
  const dots = chart.series.map((_, number) => draw("path", { class: `dot line-${number}` }));
  svg.append(area, ...lines, ...points, hair, ...dots);
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

  function show() {
    const { at } = samples;
    const top = roundUp(Math.max(...chart.series.map(({ column }) => peak(samples[column]))), chart.least);
    [top, top / 2, 0].forEach((value, place) => write(axis[place], value ? chart.axis(value) : "0"));
    lines.forEach((line, number) => mark(line, "d", path(at, samples[chart.series[number].column], top, false)));
    points.forEach((point, number) => mark(point, "d", alone(at, samples[chart.series[number].column], top)));
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
      // What is shown as now is the newest there is: most seconds of a quiet daemon have no flush.
      const last = moment === null ? values.findLastIndex((each) => each !== null) : i;
      const age = last < 0 ? 0 : Math.round(at.at(-1) - at[last]);
      write(value, last < 0 ? DASH : print(chart, values[last]));
      mark(value, "data-level", moment === null && age > 0 ? "off" : "");
      const limit = status?.queue_limit;
      if (series.column === "queue_threads" && limit) {
        const share = i < 0 ? 0 : values[i] / limit;
        write(note, `${(share * 100).toFixed(share < 0.1 ? 1 : 0)} % of ${count(limit)}`);
        mark(note, "data-level", share >= 0.8 ? "warn" : "");
      } else {
        const most = known(values).length ? `max ${chart.format(peak(values))}` : "\u00a0";
        write(note, moment === null && age > 0 ? `${span(age)} ago, ${most}` : most);
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

/** Draw all charts, with what *answer* says beside its samples. */
export function showCharts(answer = status) {
  status = answer;
  if (pointed !== null && samples.at.length) moment = nearest(samples.at.at(-1) - WINDOW * (1 - pointed));
  for (const chart of charts) chart.show();
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

byId("grid").append(...charts.map(({ figure }) => figure));
byId("table").addEventListener("toggle", () => byId("table").open && showTable());
showCharts();
