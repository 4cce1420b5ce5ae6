// The status page: asks for status.json once a second and shows it.
//
// Rules:
// 1. What comes from the daemon is inserted as text (textContent), never as markup: errors come from outside.
// 2. Nothing is guessed: without an answer the page says since when, and keeps what it knew, paler.
// 3. A node is written only when its text changes, so that a selection or a screen reader is not disturbed.

import { merge, newest, showCharts } from "./charts.js";
import { byId, count, dateTime, exact, make, mark, size, span, timeOfDay, write } from "./text.js";

const INTERVAL = 1000; // ms between two questions
const PATIENCE = 3000; // ms without an answer that are normal
const TIMEOUT = 5000; // ms until a question is given up

// ---- what the daemon says

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
    ["producer", String(ledger.producer || "none yet"), ledger.producer ? "id" : ""],
    ["epoch", count(ledger.epoch)],
    ["sequence", count(ledger.sequence)],
    ["clients' batches", count(ledger.relayed)],
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

/** Of a consumer: where each partition stands, in place of a producer's ledger and journal. */
function showStream({ stream }) {
  byId("stream-card").hidden = !stream;
  byId("producer-cards").hidden = Boolean(stream);
  list(byId("stream"), (stream ?? []).map((each) => {
    if (!each.owned) return [`partition ${each.partition}`, "read by another consumer, or by none", "off"];
    const filled = each.max_bytes > 0 ? `, ${size(each.bytes)} of ${size(each.max_bytes)}` : "";
    const text = `applied ${count(each.position)}, ${count(each.lag)} behind${filled}`;
    return [`partition ${each.partition}`, each.fault ? `${text}: ${each.fault}` : text, each.fault ? "bad" : ""];
  }));
}

/** Errors with equal ones as one, where the newest of them stands: {at, from, class, text, times}. */
function kinds(errors) {
  const found = new Map();
  for (const error of errors) {
    const name = JSON.stringify([error.class, error.text]);
    const kind = found.get(name) ?? { ...error, times: 0 };
    kind.times++;
    kind.from = error.at;
    found.set(name, kind);
  }
  return [...found.values()];
}

function showErrors({ errors, now }) {
  const node = byId("errors");
  const state = JSON.stringify(errors);
  if (node.shown !== state) {
    node.shown = state;
    node.replaceChildren(...kinds(errors).map((error) => {
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
  showStream(status);
  showErrors(status);
  showConfig(status);
  showCharts(status);
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
  const since = newest();
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
if (!document.hidden) ask();
