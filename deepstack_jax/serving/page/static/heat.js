// Heat maps over the grid of an image's visual tokens: the embeddings, and each DeepStack level.

import { el } from "./dom.js";
import { number } from "./format.js";

const SCALE = [[38, 38, 92], [44, 88, 140], [40, 140, 140], [110, 188, 96], [244, 226, 92]]; // rises in lightness; .scale in views.css
const LEAST = 400; // pixels of a map's longer side

/** A colour of the scale for 0 to 1, as [red, green, blue]. */
export function colorOf(share) {
  const place = Math.max(0, Math.min(1, share)) * (SCALE.length - 1);
  const low = Math.min(Math.floor(place), SCALE.length - 2);
  return SCALE[low].map((from, channel) => Math.round(from + (place - low) * (SCALE[low + 1][channel] - from)));
}

/** The maps of one image or video: one cursor moves over all of them, with the pointer or the arrow keys. */
export class HeatMaps {
  /** `image` is an entry of `/research/rows`; `medium` is what it was made of. */
  constructor(image, medium) {
    this.image = image;
    this.medium = medium;
    [this.frames, this.rows, this.columns] = image.grid;
    [this.frame, this.cursor] = [0, null];
    this.picture = null;
    this.underneath = true;
    this.names = image.norms.map((_, index) => (index === 0 ? "embeddings" : `level ${index - 1}`));
    this.ranges = image.norms.map(rangeOf);
    this.maps = [this.#map("picture", null), ...this.names.map((name, index) => this.#map(name, index))];
    this.readout = el("output", { class: "detail" }, "Point at a token for its numbers, or move with the arrow keys.");
    const { kind, size } = image;
    const what = `${kind}: ${size[0]} × ${size[1]} pixels, ${this.rows} × ${this.columns} visual tokens`;
    this.element = el("div", { class: "heat" },
      el("p", { class: "note" }, this.frames > 1 ? `${what} in each of ${this.frames} frames` : what),
      el("div", { class: "maps" }, this.maps.map((map) => map.element)),
      el("div", { class: "actions" }, this.#frameSlider(),
        el("label", { class: "check" }, el("input", {
          type: "checkbox", checked: true, onchange: (event) => { this.underneath = event.target.checked; this.draw(); },
        }), "picture underneath")),
      this.readout);
    this.ready = this.#load();
  }

  #map(name, index) {
    const box = this.#box();
    const canvas = el("canvas", { width: box.width, height: box.height, "aria-hidden": "true" });
    const range = index === null ? el("span", { class: "note" }, "tokens") : el("span", { class: "note" },
      `norms ${number(this.ranges[index][0])} `, el("span", { class: "scale", "aria-label": "to", role: "img" }), ` ${number(this.ranges[index][1])}`);
    const grid = el("div", {
      class: "grid", tabindex: "0", role: "application", "aria-roledescription": "token grid",
      "aria-label": index === null ? "The picture with its visual tokens" : `Norms of the ${name}`,
      onkeydown: (event) => this.#onKey(event),
      onfocus: () => this.#move(this.cursor ?? [0, 0]),
      onpointermove: (event) => this.#move(this.#tokenAt(event)),
      onpointerdown: (event) => this.#move(this.#tokenAt(event)),
    }, canvas);
    return { index, canvas, layer: el("canvas", { width: box.width, height: box.height }), element: el("figure", {}, el("figcaption", {}, el("strong", {}, name), " ", range), grid) };
  }

  /** Whole device pixels per token, so that tokens are equally large. */
  #box() {
    const cell = Math.max(2, Math.ceil(LEAST / Math.max(this.rows, this.columns)));
    return { cell, width: cell * this.columns, height: cell * this.rows };
  }

  #frameSlider() {
    if (this.frames < 2) return null;
    const shown = el("output", {}, `1 of ${this.frames}`);
    return el("label", {}, "Frame ", el("input", {
      type: "range", min: 1, max: this.frames, value: 1,
      oninput: (event) => {
        this.frame = event.target.value - 1;
        shown.textContent = `${event.target.value} of ${this.frames}`;
        this.ready = this.#load();
      },
    }), shown);
  }

  async #load() {
    try {
      this.picture = this.medium.kind === "video" ? await frameOf(this.medium.url, (this.frame + 0.5) / this.frames)
        : await imageOf(this.medium.url);
    } catch {
      this.picture = null; // a format that the browser doesn't show: the maps stand by themselves
    }
    this.draw();
  }

  /** Draws all maps anew. */
  draw() {
    this.maps.forEach((map) => this.#drawLayer(map));
    this.#show();
  }

  /** Copies the maps, and the cursor over them: large grids take too long to be drawn at each move. */
  #show() {
    const { cell, width, height } = this.#box();
    for (const { canvas, layer } of this.maps) {
      const context = canvas.getContext("2d");
      context.clearRect(0, 0, width, height);
      context.drawImage(layer, 0, 0);
      this.#drawCursor(context, cell);
    }
  }

  #drawLayer({ index, layer }) {
    const { cell, width, height } = this.#box();
    const context = layer.getContext("2d");
    context.globalAlpha = 1;
    context.clearRect(0, 0, width, height);
    if (this.picture && (index === null || this.underneath)) context.drawImage(this.picture, 0, 0, width, height);
    for (let row = 0; row < this.rows; row += 1) {
      for (let column = 0; column < this.columns; column += 1) {
        if (index === null) continue;
        const [low, high] = this.ranges[index];
        const share = high > low ? (this.#norm(index, row, column) - low) / (high - low) : 0;
        context.globalAlpha = this.picture && this.underneath ? 0.72 : 1;
        context.fillStyle = `rgb(${colorOf(share).join(" ")})`;
        context.fillRect(column * cell, row * cell, cell, cell);
      }
    }
    if (index === null) this.#drawGrid(context, cell, width, height);
  }

  #drawGrid(context, cell, width, height) {
    context.globalAlpha = 0.45;
    context.strokeStyle = "#888";
    context.lineWidth = 1;
    context.beginPath();
    for (let row = 1; row < this.rows; row += 1) {
      context.moveTo(0, row * cell + 0.5);
      context.lineTo(width, row * cell + 0.5);
    }
    for (let column = 1; column < this.columns; column += 1) {
      context.moveTo(column * cell + 0.5, 0);
      context.lineTo(column * cell + 0.5, height);
    }
    context.stroke();
  }

  #drawCursor(context, cell) {
    if (!this.cursor) return;
    const [row, column] = this.cursor;
    context.globalAlpha = 1;
    for (const [color, line] of [["#000", 4], ["#fff", 2]]) { // seen on every colour
      context.strokeStyle = color;
      context.lineWidth = line;
      context.strokeRect(column * cell + 1, row * cell + 1, cell - 2, cell - 2);
    }
  }

  #norm(index, row, column) {
    return this.image.norms[index][(this.frame * this.rows + row) * this.columns + column];
  }

  #tokenAt(event) {
    const box = event.currentTarget.firstElementChild.getBoundingClientRect();
    const place = (at, length, count) => Math.max(0, Math.min(count - 1, Math.floor((at / length) * count)));
    return [place(event.clientY - box.top, box.height, this.rows), place(event.clientX - box.left, box.width, this.columns)];
  }

  #onKey(event) {
    const [row, column] = this.cursor ?? [0, 0];
    const to = {
      ArrowUp: [row - 1, column], ArrowDown: [row + 1, column], ArrowLeft: [row, column - 1], ArrowRight: [row, column + 1],
      Home: [row, 0], End: [row, this.columns - 1],
    }[event.key];
    if (!to) return;
    event.preventDefault();
    this.#move([Math.max(0, Math.min(this.rows - 1, to[0])), Math.max(0, Math.min(this.columns - 1, to[1]))]);
  }

  #move([row, column]) {
    if (this.cursor && this.cursor[0] === row && this.cursor[1] === column) return;
    this.cursor = [row, column];
    const norms = this.names.map((name, index) => `${name} ${number(this.#norm(index, row, column))}`);
    this.readout.textContent = `row ${row}, column ${column}: ${norms.join(", ")}`;
    this.#show();
  }
}

/** The least and the largest of many numbers: more than a call may have arguments. */
const rangeOf = (values) => values.reduce(([low, high], value) => [Math.min(low, value), Math.max(high, value)], [Infinity, -Infinity]);

function imageOf(url) {
  const image = new Image();
  image.src = url;
  return image.decode().then(() => image);
}

/** The picture of a video at a share of its length. */
async function frameOf(url, share) {
  const video = el("video", { src: url, muted: true, preload: "auto" });
  const happened = (name) => new Promise((resolve, reject) => {
    video.addEventListener(name, resolve, { once: true });
    video.addEventListener("error", reject, { once: true });
  });
  await happened("loadeddata");
  video.currentTime = share * video.duration;
  await happened("seeked");
  return video;
}
