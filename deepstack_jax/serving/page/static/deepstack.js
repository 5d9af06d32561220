// The DeepStack view: what each level adds to the visual tokens, and what the model says without some of the levels.

import { callJson, Failure } from "./api.js";
import { streamAnswer } from "./conversation.js";
import { announce, el, show } from "./dom.js";
import { HeatMaps } from "./heat.js";
import { SubjectBar } from "./subject.js";
import { markedText } from "./words.js";

const MAX_TOKENS = 200; // of an answer in the comparison, where the context allows more

/** Builds the view; the function that it returns is called when the view is opened, with a turn to look at or null. */
export function startDeepStack(info, place) {
  place.append(el("h2", {}, "DeepStack"), el("p", { class: "lead" },
    "The vision encoder gives each visual token an embedding, and some rows more, one per DeepStack level. The decoder " +
    "adds level i to the hidden states after its layer i. The maps show how long these rows are; with a level switched " +
    "off, its rows are zero."));
  const why = unavailable(info);
  if (why) {
    place.append(el("p", { class: "off" }, why));
    return () => {};
  }
  const view = new View(info);
  place.append(view.element);
  return (turn) => view.open(turn);
}

function unavailable(info) {
  if (!info.deepstack_levels) return "This model has no DeepStack levels: open a server with a vision-language model to see them.";
  if (!info.research) return "This view is switched off: start the server with --research to switch it on.";
  return null;
}

class View {
  constructor(info) {
    this.info = info;
    this.shown = null; // the subject whose maps are shown
    this.asked = null; // the subject of the answers
    this.number = 0; // of the latest request for rows: answers of earlier ones are left out
    this.bar = new SubjectBar(info, "Show", (error) => this.refresh(error));
    this.error = el("p", { class: "error", role: "alert", hidden: true });
    this.maps = el("div", { class: "images" });
    this.levels = Array.from({ length: info.deepstack_levels }, (_, level) =>
      el("input", { type: "checkbox", role: "switch", checked: true, id: `level-${level}` }));
    this.answers = el("ol", { class: "answers", "aria-label": "Answers" });
    this.ask = el("button", { class: "primary" }, "Ask with these levels");
    this.all = el("button", { type: "button", onclick: () => this.#run(() => this.askEach()) }, "Switch each off in turn");
    this.element = el("div", {}, this.bar.element, this.error, this.maps,
      el("form", { class: "levels", onsubmit: (event) => { event.preventDefault(); this.#run(() => this.askChosen()); } },
        el("fieldset", {}, el("legend", {}, "Levels"),
          this.levels.map((box, level) => el("label", { class: "check" }, box, `level ${level}`))),
        this.ask, this.all,
        el("button", { type: "button", class: "quiet", onclick: () => this.answers.replaceChildren() }, "Clear")),
      this.answers);
  }

  /** The view is opened, on a turn of the chat if there is one. */
  open(turn) {
    if (turn) this.bar.choose(turn);
    if (!this.bar.isOn(this.shown)) this.refresh();
  }

  /** Shows the maps of the chosen subject. */
  refresh(error = null) {
    if (error) return this.#fail(error);
    return this.#run(async () => {
      const mine = this.number += 1;
      const subject = await this.bar.current();
      if (!subject) throw new Failure("there is nothing to look at: ask about a picture in the chat first");
      const { images } = await callJson("/research/rows", { body: { messages: subject.messages } });
      if (mine !== this.number) return;
      this.shown = subject;
      this.#forgetOthers(subject);
      const parts = images.map((image, index) => new HeatMaps(image, subject.media[index]));
      this.maps.replaceChildren(...(parts.length ? parts.map((part) => part.element) : [el("p", { class: "note" }, "There is no picture in it.")]));
      await Promise.all(parts.map((part) => part.ready));
    });
  }

  /** Asks with the levels that are switched on, beside the answer with all of them. */
  async askChosen() {
    await this.#answersOf([this.levels.map((box) => (box.checked ? 1 : 0))]);
  }

  /** Asks with each level off, and with all of them off. */
  async askEach() {
    const { length } = this.levels;
    const single = this.levels.map((_, off) => Array.from({ length }, (_, level) => (level === off ? 0 : 1)));
    await this.#answersOf([...single, Array(length).fill(0)]);
  }

  async #answersOf(wanted) {
    const subject = await this.bar.current();
    if (!subject) throw new Failure("there is nothing to ask about: ask about a picture in the chat first");
    this.#forgetOthers(subject);
    this.asked = subject;
    const all = Array(this.levels.length).fill(1);
    for (const scales of [all, ...wanted]) await this.#answer(subject, scales, scales === all);
    announce("The answers are below the levels.");
  }

  /** Answers stand beside each other only if they are about the same. */
  #forgetOthers(subject) {
    if (subject.question !== this.asked?.question || subject.key !== this.asked?.key) this.answers.replaceChildren();
  }

  async #answer(subject, scales, isBase) {
    const name = nameOf(scales);
    const known = [...this.answers.children].find((card) => card.dataset.name === name);
    if (known) return;
    const text = el("p", { class: "text", "aria-busy": "true" });
    const card = el("li", { class: `variant ${isBase ? "base" : ""}`, "data-name": name }, el("h3", {}, name), text);
    this.answers.append(card);
    try {
      const body = {
        model: this.info.model, messages: subject.messages, temperature: 0, seed: 0,
        max_tokens: MAX_TOKENS, deepstack_scales: scales,
      };
      const answer = await streamAnswer(body, { onText: (piece) => text.append(piece) });
      if (isBase) this.base = answer.text;
      const same = answer.text === this.base;
      text.replaceWith(markedText(this.base, answer.text));
      if (!isBase) card.append(el("p", { class: "note" }, same ? "the same answer" : "differences are marked"));
    } catch (error) {
      card.remove();
      throw error;
    }
  }

  async #run(action) {
    show(this.error, "");
    this.ask.disabled = this.all.disabled = true;
    try {
      await action();
    } catch (error) {
      this.#fail(error);
    } finally {
      this.ask.disabled = this.all.disabled = false;
    }
  }

  #fail(error) {
    if (!(error instanceof Failure)) throw error;
    show(this.error, error.message);
  }
}

/** "all levels", "without 1, 2" or "none". */
export function nameOf(scales) {
  const off = scales.flatMap((scale, level) => (scale === 0 ? [level] : []));
  if (!off.length) return "all levels";
  return off.length === scales.length ? "no level" : `without level ${off.join(" and ")}`;
}
