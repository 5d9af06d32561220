// What the DeepStack and the token views look at: a turn of the chat, a sample, or a picture that the server draws.
//
// A subject is {title, key: what it was made of, question, messages, media: those of all messages in their order}.

import { callJson } from "./api.js";
import { userMessage } from "./conversation.js";
import { el } from "./dom.js";
import { mediumOfSample, mediumOfUri } from "./media.js";

const asked = []; // turns that were answered, the latest first
const bars = [];

/** A turn of the chat has been answered. */
export function turnEnded(turn) {
  asked.unshift(turn);
  bars.forEach((bar) => bar.choose(turn));
}

/** The chat began anew. */
export function turnsForgotten() {
  asked.length = 0;
  bars.forEach((bar) => bar.refresh());
}

function ofTurn(turn) {
  return { title: `Chat: ${turn.question}`, key: turn, question: turn.question, messages: turn.body.messages, media: turn.all };
}

async function ofSample(sample) {
  const media = [await mediumOfSample(sample)];
  return alone(`Sample: ${sample.question}`, sample.url, sample.question, media);
}

function alone(title, key, question, media) {
  return { title, key, question, media, messages: [userMessage({ question, media })] };
}

/** Chooses a subject and lets its question be changed; calls `onChange` with each one that the user chooses. */
export class SubjectBar {
  constructor(info, action, onChange) {
    this.info = info;
    this.onChange = onChange;
    this.drawn = [];
    this.chosen = null; // the key of a subject
    this.pick = el("select", { onchange: () => this.#choose(this.#choices()[this.pick.selectedIndex].key) });
    this.question = el("input", { type: "text", autocomplete: "off" });
    this.element = el("form", { class: "subject", onsubmit: (event) => { event.preventDefault(); this.onChange(); } },
      el("label", {}, "Look at ", this.pick),
      el("label", { class: "wide" }, "Question ", this.question),
      info.demo ? el("button", { type: "button", onclick: () => this.#draw().catch((error) => this.onChange(error)) }, "Draw me a new one") : null,
      el("button", { class: "primary" }, action));
    bars.push(this);
    this.refresh();
  }

  /** Whether a subject is the chosen one. */
  isOn(subject) { return subject !== null && subject.key === this.chosen; }

  /** Looks at a turn of the chat, without calling `onChange`. */
  choose(turn) {
    this.chosen = turn;
    this.refresh();
    this.question.value = turn.question;
  }

  /** The subject, with the question as it is written now. */
  async current() {
    const choice = this.#choices().find(({ key }) => key === this.chosen);
    if (!choice) return null;
    const subject = await choice.make();
    const question = this.question.value.trim() || subject.question;
    if (question === subject.question) return subject;
    const last = subject.messages.at(-1);
    const content = last.content.map((part) => (part.type === "text" ? { ...part, text: question } : part));
    return { ...subject, question, messages: [...subject.messages.slice(0, -1), { ...last, content }] };
  }

  /** Shows what there is to choose from now. */
  refresh() {
    const choices = this.#choices();
    this.pick.replaceChildren(...choices.map(({ title }) => el("option", {}, title.length > 60 ? `${title.slice(0, 59)}…` : title)));
    const index = choices.findIndex(({ key }) => key === this.chosen);
    if (index < 0 && choices.length) {
      this.chosen = choices[0].key;
      this.question.value = choices[0].question;
    }
    this.pick.selectedIndex = Math.max(0, index);
  }

  #choices() {
    const samples = (this.info.samples ?? []).map((sample) => ({
      key: sample.url, title: `Sample: ${sample.question}`, question: sample.question, make: () => ofSample(sample),
    }));
    const chats = asked.map(ofTurn);
    return [...[...this.drawn, ...chats].map((subject) => ({ ...subject, make: async () => subject })), ...samples];
  }

  #choose(key) {
    this.chosen = key;
    this.question.value = this.#choices().find((choice) => choice.key === key).question;
    this.onChange();
  }

  async #draw() {
    const drawn = await callJson("/page/draw", { body: {} });
    const key = {};
    this.drawn.unshift(alone(`Drawn: ${drawn.question}`, key, drawn.question, [mediumOfUri(drawn.image, "drawn picture")]));
    this.chosen = key;
    this.refresh();
    this.#choose(key);
  }
}
