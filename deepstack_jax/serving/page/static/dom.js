// Builders of elements. Text goes into text nodes only: nothing that a model or a server says can become markup.

const SVG = "http://www.w3.org/2000/svg";

/** An element with attributes, listeners ("onclick": function) and children (nodes or text; empty ones are left out). */
export function el(name, attributes = {}, ...children) {
  return complete(document.createElement(name), attributes, children);
}

/** As `el`, for elements of SVG. */
export function svg(name, attributes = {}, ...children) {
  return complete(document.createElementNS(SVG, name), attributes, children);
}

function complete(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Shows a text in an element, or hides the element where there is none. */
export function show(element, text) {
  element.textContent = text || "";
  element.hidden = !text;
}

/** Tells users of screen readers. A text that repeats is told again. */
export function announce(text) {
  const place = byId("announcer");
  place.textContent = "";
  requestAnimationFrame(() => { place.textContent = text; });
}

/** A table with a caption; cells are texts or nodes, and the first of each row is its heading. */
export function table(caption, headings, rows) {
  return el(
    "table", {},
    el("caption", {}, caption),
    el("thead", {}, el("tr", {}, headings.map((text) => el("th", { scope: "col" }, text)))),
    el("tbody", {}, rows.map(([first, ...rest]) =>
      el("tr", {}, el("th", { scope: "row" }, first), rest.map((cell) => el("td", {}, cell))))),
  );
}

/** Moves focus among elements of which one at a time can be reached with Tab, with the arrow keys, Home and End. */
export function roving(container, items, onEnter = () => {}) {
  let current = 0;
  /** The first item from `index` on that can be seen. */
  const seen = (index, step) => {
    while (items[index] && !items[index].checkVisibility()) index += step;
    return items[index];
  };
  items.forEach((item, index) => {
    item.setAttribute("tabindex", index === 0 ? "0" : "-1");
    item.addEventListener("focus", () => {
      items[current].setAttribute("tabindex", "-1");
      current = index;
      item.setAttribute("tabindex", "0");
      onEnter(index);
    });
  });
  container.addEventListener("keydown", (event) => {
    const [next, previous] = [[current + 1, 1], [current - 1, -1]];
    const steps = { ArrowRight: next, ArrowDown: next, ArrowLeft: previous, ArrowUp: previous };
    const to = { ...steps, Home: [0, 1], End: [items.length - 1, -1] }[event.key];
    if (!to) return;
    event.preventDefault();
    seen(...to)?.focus(); // its listener does the rest
  });
}
