// The timeline of an answer: a lane for each node, a bar for each span, a line for each transfer between lanes.

import { el, roving, svg, table } from "./dom.js";
import { bytes, count, duration, number } from "./format.js";

const STAGES = ["prepare", "queue", "encode", "transfer", "prefill", "decode"];
const [ROW, GAP, PAD, LABEL, TOP, AXIS] = [16, 2, 7, 84, 15, 18]; // pixels

/** The figure of a timeline: summary, drawing, legend, and the same as a table. */
export function timelineFigure(timeline) {
  const nodes = timeline.nodes.length ? timeline.nodes : [{ name: "this node", role: "" }];
  const spans = timeline.spans.map((span) => ({ ...span, node: Math.min(span.node, nodes.length - 1) }));
  const detail = el("p", { class: "detail", "aria-hidden": "true" }, "Point at a bar for its numbers.");
  const place = el("div", { class: "drawing" });
  const draw = (width) => place.replaceChildren(drawing(timeline, nodes, spans, width, detail));
  let drawn = 0;
  new ResizeObserver(([entry]) => {
    const width = Math.floor(entry.contentRect.width);
    if (width && width !== drawn) draw(drawn = width);
  }).observe(place);
  return el(
    "figure", { class: `timeline ${timeline.split ? "split" : "whole"}` },
    el("figcaption", {}, el("strong", { class: "badge" }, timeline.split ? `split over ${nodes.length} nodes` : "whole, on one node"),
      ` ${summary(timeline, spans)}`),
    place, detail, legend(spans),
    el("details", {}, el("summary", {}, "As a table"), spanTable(nodes, spans)),
  );
}

/** What happened, in figures. */
export function summary(timeline, spans = timeline.spans) {
  const parts = [duration(timeline.total_ms)];
  const first = firstToken(spans);
  if (first !== null) parts.push(`first token after ${duration(first)}`);
  parts.push(count(timeline.completion_tokens, "token"));
  if (timeline.tokens_per_second) parts.push(`${number(timeline.tokens_per_second)} tokens/s`);
  parts.push(`${timeline.cached_tokens} of ${count(timeline.prompt_tokens, "prompt token")} cached`);
  if (timeline.split) parts.push(`${bytes(timeline.bytes_on_wire)} on the wire`);
  const both = overlap(spans, ["encode", "transfer"], ["prefill", "decode"]);
  if (both >= 0.05) parts.push(`${duration(both)} of vision beside language`);
  return parts.join(" · ");
}

function firstToken(spans) {
  const ends = spans.filter((span) => span.stage === "prefill").map((span) => span.end_ms);
  return ends.length ? Math.max(...ends) : null;
}

/** Milliseconds in which a stage of `some` and one of `others` ran at once. */
export function overlap(spans, some, others) {
  const [ours, theirs] = [some, others].map((stages) => union(spans.filter((span) => stages.includes(span.stage))));
  let total = 0;
  for (const [begin, end] of ours) {
    for (const [from, to] of theirs) total += Math.max(0, Math.min(end, to) - Math.max(begin, from));
  }
  return total;
}

function union(spans) {
  const merged = [];
  for (const { begin_ms: begin, end_ms: end } of [...spans].sort((a, b) => a.begin_ms - b.begin_ms)) {
    const last = merged.at(-1);
    if (last && begin <= last[1]) last[1] = Math.max(last[1], end);
    else merged.push([begin, end]);
  }
  return merged;
}

/** Puts spans that overlap into rows of their lane: [{y, height, rows}] of lanes, and each span's row. */
function layOut(nodes, spans) {
  const rowOf = new Map();
  let y = TOP;
  const lanes = nodes.map((node, index) => {
    const ends = [];
    for (const span of spans.filter((one) => one.node === index).sort((a, b) => a.begin_ms - b.begin_ms)) {
      let row = ends.findIndex((end) => end <= span.begin_ms);
      if (row < 0) row = ends.length;
      ends[row] = span.end_ms;
      rowOf.set(span, row);
    }
    const height = Math.max(1, ends.length) * (ROW + GAP) + 2 * PAD;
    const lane = { node, y, height };
    y += height + GAP;
    return lane;
  });
  return { lanes, rowOf, bottom: y };
}

function drawing(timeline, nodes, spans, width, detail) {
  const { lanes, rowOf, bottom } = layOut(nodes, spans);
  const end = Math.max(timeline.total_ms, ...spans.map((span) => span.end_ms), 0.001);
  const x = (ms) => LABEL + (Math.max(0, ms) / end) * (width - LABEL - 8);
  const bars = spans.map((span) => bar(span, lanes[span.node], rowOf.get(span), x));
  const group = svg("g", { role: "group", "aria-label": "Spans; the arrow keys move between them" }, bars);
  const told = (index) => { detail.textContent = tell(spans[index], nodes); };
  bars.forEach((one, index) => one.addEventListener("pointerenter", () => told(index)));
  roving(group, bars, told);
  const first = firstToken(spans);
  return svg(
    "svg", { width, height: bottom + AXIS, viewBox: `0 0 ${width} ${bottom + AXIS}`, role: "group", "aria-label": "Timeline" },
    lanes.map((lane) => laneOf(lane, width)),
    ticks(end, x, bottom, width),
    spans.filter((span) => span.stage === "transfer").map((span) => wire(span, lanes, rowOf.get(span), x)),
    group,
    first === null ? null : svg("g", { class: "first-token", "aria-hidden": "true" },
      svg("line", { x1: x(first), x2: x(first), y1: 2, y2: bottom }),
      x(first) < width - 70 ? svg("text", { x: x(first) + 3, y: 10 }, "first token")
        : svg("text", { x: x(first) - 3, y: 10, "text-anchor": "end" }, "first token")),
  );
}

function laneOf({ node, y, height }, width) {
  return svg("g", { class: `lane ${node.role}`, "aria-hidden": "true" },
    svg("rect", { x: 0, y, width, height, rx: 3 }),
    svg("text", { x: 6, y: y + height / 2 + 4 }, node.name));
}

function bar(span, lane, row, x) {
  const [left, right] = [x(span.begin_ms), x(span.end_ms)];
  const [y, width] = [lane.y + PAD + row * (ROW + GAP), Math.max(2, right - left)];
  const fits = width > 6.6 * span.stage.length + 6;
  return svg("g", { class: `span ${span.stage}`, role: "img", "aria-label": tell(span, [lane.node], 0) },
    svg("rect", { x: left, y, width, height: ROW, rx: 2 }),
    fits ? svg("text", { x: left + 4, y: y + 12, "aria-hidden": "true" }, span.stage) : null);
}

/** The rows of a transfer go from one lane to another at its end. */
function wire(span, lanes, row, x) {
  const other = lanes.find((lane, index) => index !== span.node && (lane.node.role === "language") !== (lanes[span.node].node.role === "language"));
  if (!other) return null;
  const [here, at] = [lanes[span.node], x(span.end_ms)];
  const middle = here.y + PAD + row * (ROW + GAP) + ROW / 2;
  const to = other.y > here.y ? other.y + 3 : other.y + other.height - 3;
  return svg("line", { class: "wire", x1: at, x2: at, y1: middle, y2: to, "aria-hidden": "true" });
}

function ticks(end, x, bottom, width) {
  const raw = end / (width > 500 ? 5 : 3);
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= raw);
  const marks = [];
  for (let ms = 0; ms < end * 0.86; ms += step) {
    marks.push(svg("line", { x1: x(ms), x2: x(ms), y1: TOP, y2: bottom }), svg("text", { x: x(ms) + 2, y: bottom + 13 }, duration(ms)));
  }
  return svg("g", { class: "ticks", "aria-hidden": "true" }, marks);
}

/** A span in words. */
function tell(span, nodes, index = span.node) {
  const parts = [`${nodes[index].name}: ${span.label || span.stage}`, duration(span.end_ms - span.begin_ms),
    `from ${duration(span.begin_ms)} to ${duration(span.end_ms)}`];
  if (span.bytes) parts.push(bytes(span.bytes));
  if (span.tokens) parts.push(count(span.tokens, "token"));
  return parts.join(", ");
}

function legend(spans) {
  const present = STAGES.filter((stage) => spans.some((span) => span.stage === stage));
  return el("ul", { class: "legend", "aria-label": "Stages" },
    present.map((stage) => el("li", {}, el("span", { class: `swatch ${stage}` }), stage)));
}

function spanTable(nodes, spans) {
  const rows = [...spans].sort((a, b) => a.begin_ms - b.begin_ms).map((span) => [
    span.label || span.stage, nodes[span.node].name, duration(span.begin_ms), duration(span.end_ms),
    duration(span.end_ms - span.begin_ms), span.bytes ? bytes(span.bytes) : "–", span.tokens ? number(span.tokens) : "–",
  ]);
  return table("What happened when", ["stage", "node", "from", "to", "took", "bytes", "tokens"], rows);
}
