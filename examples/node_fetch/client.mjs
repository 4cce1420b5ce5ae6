// A client of tracker-daemon for Node 18 or newer: plain fetch, no packages. Each call counts once, whatever fails
// between here and the database, for as long as this process lives.
//
//     import { TrackerClient } from "./client.mjs";
//     const tracker = new TrackerClient("http://127.0.0.1:8080", { tokenFile: "/etc/tracker-daemon/token" });
//     tracker.recordTurn("t-1", { agentName: "billing", tokens: 812, cost: "0.0041" });   // false: full, not taken
//     await tracker.flush();                                                              // all is in the database
//
// As a program it sends the calls on its standard input, one JSON object a line:
//
//     node client.mjs http://127.0.0.1:8080 token < calls.ndjson

import { randomUUID } from "node:crypto";
import { readFile, realpath } from "node:fs/promises";
import { createInterface } from "node:readline";
import { setTimeout as sleep } from "node:timers/promises";
import { fileURLToPath } from "node:url";

export class TrackerClient {
  #waiting = [];
  #sending = null;
  // What the daemon knows this client by. A process that shall go on where a killed one stopped would have to keep
  // both, and the request in hand, in a file.
  #producer = randomUUID();
  #sequence = 0;

  // url: http://HOST:PORT. tokenFile: its first line is the bearer token, or null. maxWaiting: calls held here at
  // most. maxRequest: calls in a request. Told: onSent(calls) of those in the database, onRetry(error) of each try that
  // failed, onRefused(line, error) of each call that the daemon will never take.
  constructor(url, { tokenFile = null, maxWaiting = 100_000, maxRequest = 1_000, ...told } = {}) {
    Object.assign(this, { url, tokenFile, maxWaiting, maxRequest, onRefused: console.error, ...told });
  }

  ensureConversation(threadId) {
    return this.call({ call: "ensure_conversation", thread_id: threadId });
  }

  // cost: a string keeps every digit; a number counts as JSON.stringify prints it.
  recordTurn(threadId, { agentName = null, tokens = 0, cost = 0 } = {}) {
    return this.call({ call: "record_turn", thread_id: threadId, agent_name: agentName, tokens, cost });
  }

  resolve(threadId, resolutionType) {
    return this.call({ call: "resolve", thread_id: threadId, resolution_type: resolutionType });
  }

  // Takes a call; false when there is no room for it. It never waits.
  call(fields) {
    if (this.#waiting.length >= this.maxWaiting) return false;
    // `at`: the moment of the call, however late the daemon hears of it.
    this.#waiting.push(JSON.stringify({ at: new Date().toISOString(), ...fields }));
    this.#start();
    return true;
  }

  // Resolves when every call taken until now is in the database, or refused.
  async flush() {
    while (this.#waiting.length || this.#sending) await this.#start();
  }

  get waiting() {
    return this.#waiting.length;
  }

  #start() {
    // One request in flight: what is called meanwhile goes into the next one.
    this.#sending ??= this.#run().finally(() => (this.#sending = null));
    return this.#sending;
  }

  async #run() {
    await null; // so that calls made in one go share a request
    while (this.#waiting.length) {
      const lines = this.#waiting.slice(0, this.maxRequest);
      const refused = await this.#send(lines.join("\n"), this.#sequence + 1);
      if (refused === null) {
        // Only now: until it is answered the same lines go under the same number.
        this.#sequence += 1;
        this.#waiting.splice(0, lines.length);
        this.onSent?.(lines.length);
      } else {
        // Nothing of the request was taken: those that are wrong are left out, and the rest goes again.
        lines.forEach((line, i) => refused.has(i + 1) && this.onRefused(line, refused.get(i + 1)));
        this.#waiting.splice(0, lines.length, ...lines.filter((_, i) => !refused.has(i + 1)));
      }
    }
  }

  // Sends one request until it is answered; the daemon knows a repeat by its number and does not count it again.
  // Resolves with null, or with the error of each line that is wrong, by its number.
  async #send(body, sequence) {
    for (let tries = 0; ; tries += 1) {
      let seconds = Math.min(5, 0.05 * 2 ** tries);
      try {
        const headers = { "tracker-producer": this.#producer, "tracker-sequence": String(sequence) };
        if (this.tokenFile !== null) {
          // At every try: the token may have been replaced.
          const [token] = (await readFile(this.tokenFile, "utf8")).split("\n");
          headers.authorization = `Bearer ${token.trim()}`;
        }
        const signal = AbortSignal.timeout(60_000);
        const answer = await fetch(`${this.url}/v1/calls`, { method: "POST", headers, body, signal });
        const text = await answer.text(); // an answer cut off is an error as well
        if (answer.ok) return null;
        const { errors } = answer.status === 400 ? JSON.parse(text) : {};
        if (errors) return new Map(errors.map(({ line, error }) => [line, error]));
        const asked = Number(answer.headers.get("retry-after"));
        if (asked > 0) seconds = asked;
        throw new Error(`the daemon answered ${answer.status}: ${text}`);
      } catch (error) {
        this.onRetry?.(error);
      }
      await sleep(seconds * 1_000);
    }
  }
}

async function main(url, tokenFile = null) {
  const tracker = new TrackerClient(url, {
    tokenFile,
    maxRequest: 100,
    onRefused: (line, error) => {
      console.error(`refused: ${error}: ${line}`);
      process.exitCode = 1;
    },
    onRetry: (error) => console.error(`again: ${error.message} ${error.cause?.code ?? ""}`),
    onSent: (calls) => console.log(JSON.stringify({ sent: calls })),
  });
  for await (const line of createInterface({ input: process.stdin })) {
    while (!tracker.call(JSON.parse(line))) await tracker.flush();
  }
  await tracker.flush();
}

if (process.argv[1] && (await realpath(process.argv[1])) === fileURLToPath(import.meta.url)) {
  const given = process.argv.slice(2);
  if (given.length < 1 || given.length > 2 || !/^https?:\/\//.test(given[0])) {
    console.error("usage: node client.mjs http://HOST:PORT [TOKEN_FILE] < calls.ndjson");
    process.exit(2);
  }
  await main(...given);
}
