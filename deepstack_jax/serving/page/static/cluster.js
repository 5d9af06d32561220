// The cluster: its nodes and what happened, asked for every second while it can be seen.

import { changeKey, callJson, Failure } from "./api.js";
import { announce, el, show } from "./dom.js";
import { age, bytes, count, number, percent } from "./format.js";

const EVERY_MS = 1000;
const STATES = {
  ready: ["✓", "good"], loading: ["…", "waiting"], draining: ["↓", "waiting"],
  unreachable: ["✗", "bad"], unhealthy: ["✗", "bad"],
};

/** Builds the view; the function that it returns is called when the view is opened. */
export function startCluster(place) {
  const view = new View(place);
  document.addEventListener("visibilitychange", () => view.wake());
  return () => view.wake();
}

class View {
  constructor(place) {
    this.place = place;
    this.error = el("p", { class: "error", role: "alert", hidden: true });
    this.keyButton = el("button", { type: "button", hidden: true, onclick: () => this.#giveKey() }, "Type the API key");
    this.nodes = el("div", { class: "nodes" });
    this.events = el("ol", { class: "events" });
    this.none = el("p", { class: "note" }, "Nothing has happened yet.");
    this.states = new Map();
    this.before = new Map(); // name of a node: its last transfer and when
    this.polling = false;
    place.append(el("h2", {}, "Cluster"), this.error, this.keyButton, this.nodes, el("h3", {}, "Events"), this.none, this.events);
  }

  /** Polls from here on, as long as the view can be seen. */
  async wake() {
    if (this.polling) return;
    this.polling = true;
    while (!this.place.hidden && !document.hidden) {
      await this.#poll();
      if (!this.keyButton.hidden) break;
      await new Promise((resolve) => { setTimeout(resolve, EVERY_MS); });
    }
    this.polling = false;
  }

  async #giveKey() {
    this.keyButton.hidden = true;
    await changeKey("The state of the cluster is shown only with an API key.");
    this.wake();
  }

  async #poll() {
    try {
      const cluster = await callJson("/cluster", { ask: false });
      show(this.error, "");
      this.#show(cluster);
    } catch (failure) {
      if (!(failure instanceof Failure)) throw failure;
      show(this.error, failure.status ? failure.message : "The server can't be reached: what is below may be old.");
      this.keyButton.hidden = failure.status !== 401;
    }
  }

  #show(cluster) {
    this.nodes.replaceChildren(...cluster.nodes.map((node) => this.#card(node, cluster.time)));
    const named = new Set(cluster.nodes.map((node) => node.name));
    for (const name of this.states.keys()) if (!named.has(name)) this.states.delete(name);
    this.none.hidden = cluster.events.length > 0;
    const events = [...cluster.events].sort((a, b) => a.seconds_ago - b.seconds_ago);
    this.events.replaceChildren(...events.map((event) => el("li", {},
      el("span", { class: "figure" }, `${age(event.seconds_ago)} ago`), el("strong", {}, event.node), el("span", {}, event.what))));
  }

  #card(node, time) {
    const [sign, mood] = STATES[node.state] ?? ["?", "waiting"];
    const before = this.states.get(node.name);
    if (before !== undefined && before !== node.state) announce(`${node.name} is ${node.state}.`);
    this.states.set(node.name, node.state);
    return el(
      "article", { class: `node ${mood}`, "data-name": node.name, "data-state": node.state, "aria-label": node.name },
      el("h3", {}, node.name, node.self ? el("span", { class: "note" }, " this node") : null),
      el("p", { class: "state" }, el("strong", { class: "badge" }, `${sign} ${node.state}`),
        ` ${node.role}${node.since_seconds === null ? "" : `, for ${age(node.since_seconds)}`}`),
      node.reason ? el("p", { class: "reason" }, node.reason) : null,
      el("dl", {}, this.#figures(node, time).map(([name, value]) => [el("dt", {}, name), el("dd", {}, value)])),
    );
  }

  /** What is known of a node; what is not known is left out. */
  #figures(node, time) {
    const given = (value, shown) => (value === null || value === undefined ? null : shown());
    const { prefix_cache: prefix, encoder_cache: rows, transfer } = node;
    return [
      ["in flight", given(node.in_flight, () => number(node.in_flight))],
      ["queue", given(node.queue, () => number(node.queue))],
      ["slots", given(node.slots, () => share(node.slots_used, node.slots))],
      ["pages", given(node.pages, () => share(node.pages_used, node.pages))],
      ["prefix cache", given(prefix, () => `${hits(prefix, "token")}, ${count(prefix.pages, "page")}`)],
      ["encoder cache", given(rows, () => `${hits(rows, "picture")}, ${number(rows.entries)} kept in ${bytes(rows.bytes)}`)],
      ["transferred", given(transfer, () => bytes(transfer.bytes))],
      ["transfer rate", given(transfer, () => this.#rate(node.name, transfer, time))],
      ["requests", given(node.requests, () => number(node.requests))],
      ["failures", given(node.failures, () => number(node.failures))],
    ].filter(([, value]) => value !== null);
  }

  /** Bytes per second now, and while something was transferred. */
  #rate(name, transfer, time) {
    const last = this.before.get(name);
    this.before.set(name, { bytes: transfer.bytes, time });
    const now = last && time > last.time ? (transfer.bytes - last.bytes) / (time - last.time) : 0;
    const mean = transfer.seconds ? `, ${bytes(transfer.bytes / transfer.seconds)}/s in transfers` : "";
    return `${bytes(Math.max(0, now))}/s now${mean}`;
  }
}

function share(used, of) {
  return el("span", {}, el("meter", { min: 0, max: Math.max(of, 1), value: used ?? 0, "aria-hidden": "true" }), ` ${used ?? "?"} of ${of}`);
}

const hits = (cache, what) => (cache.queries ? `${percent(cache.hits / cache.queries)} of ${count(cache.queries, what)} found` : "not asked yet");
