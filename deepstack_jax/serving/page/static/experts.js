// The experts that the router chose for one token, layer by layer.

import { el, svg, table } from "./dom.js";
import { count, number } from "./format.js";

const WIDEST = 640; // pixels of the experts of one layer
const LABEL = 26;

/** The map of a token, and the same as a table; `found` is the answer of `/research/tokens`. */
export function expertMap(found, place) {
  const [chosen, weights] = [found.top_k[place], found.weights[place]];
  if (!found.experts || !chosen?.length) return [el("p", { class: "note" }, "This model has no experts.")];
  const name = `Experts: ${count(chosen[0].length, "expert")} of ${found.experts} in each of ${count(found.layers, "layer")}`;
  return [
    el("h3", {}, name),
    el("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Map of the experts" }, drawing(found, chosen, weights)),
    el("p", { class: "note" }, "A row per layer, a column per expert; the darker a square, the larger the expert's weight."),
    el("details", {}, el("summary", {}, "As a table"), expertTable(chosen, weights)),
  ];
}

function drawing(found, chosen, weights) {
  const size = Math.max(5, Math.min(14, Math.floor(WIDEST / found.experts)));
  const [width, height] = [found.experts * size, chosen.length * size];
  const most = Math.max(...weights.flat());
  const every = Math.ceil(14 / size);
  const squares = chosen.flatMap((experts, layer) => experts.map((expert, rank) => svg("rect", {
    class: "chosen", x: LABEL + expert * size + 0.5, y: layer * size + 0.5, width: size - 1, height: size - 1,
    "fill-opacity": (0.25 + 0.75 * (weights[layer][rank] / most)).toFixed(3),
  }, svg("title", {}, `layer ${layer}, expert ${expert}: weight ${number(weights[layer][rank])}`))));
  const labels = chosen.map((_, layer) => (layer % every ? null
    : svg("text", { x: LABEL - 4, y: layer * size + Math.min(size, 12) - 1, "text-anchor": "end" }, layer)));
  return svg(
    "svg", {
      class: "experts", width: LABEL + width + 1, height: height + 1, role: "img",
      "aria-label": `Which experts were chosen in ${chosen.length} layers; the table below has the numbers`,
    },
    svg("rect", { class: "field", x: LABEL, y: 0, width, height }),
    lines(found.experts, chosen.length, size),
    squares, labels,
  );
}

function lines(experts, layers, size) {
  const across = Array.from({ length: layers + 1 }, (_, layer) => `M${LABEL} ${layer * size + 0.5}h${experts * size}`);
  const down = Array.from({ length: experts + 1 }, (_, expert) => `M${LABEL + expert * size + 0.5} 0v${layers * size}`);
  return svg("path", { class: "rules", d: [...across, ...down].join("") });
}

function expertTable(chosen, weights) {
  const rows = chosen.map((experts, layer) => [
    `layer ${layer}`, experts.map((expert, rank) => `${expert} (${number(weights[layer][rank])})`).join(", "),
  ]);
  return table("Experts and their weights", ["layer", "experts"], rows);
}
