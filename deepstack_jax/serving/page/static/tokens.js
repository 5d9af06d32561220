// The token view: how surprised the model was by each token, what else it thought likely, and which experts it chose.

import { callJson, Failure } from "./api.js";
import { streamAnswer } from "./conversation.js";
import { el, roving, show } from "./dom.js";
import { expertMap } from "./experts.js";
import { count, percent } from "./format.js";
import { SubjectBar } from "./subject.js";

const SURPRISE = [0.5, 1.5, 3, 6]; // bits at which the next class begins
const CLASSES = ["expected", "likely", "open", "surprising", "very surprising"];
const MAX_TOKENS = 200;

/** Builds the view; the function that it returns is called when the view is opened, with a turn to look at or null. */
export function startTokens(info, place) {
  const view = new View(info);
  place.append(el("h2", {}, "Tokens"), el("p", { class: "lead" },
    "Each token is marked by its surprise, the bits of –log₂ of its probability: the line under it grows with it. " +
    "Choose a token to see what else was likely there."), view.element);
  if (!info.research) {
    view.element.before(el("p", { class: "off" },
      "The prompt's tokens and the chosen experts are switched off: start the server with --research to switch them on."));
  }
  return (turn) => view.open(turn);
}

/** The class of a probability: 0 for an expected token, 4 for a very surprising one. */
export function surpriseOf(probability) {
  const bits = -Math.log2(Math.max(probability, 1e-30));
  return SURPRISE.filter((edge) => bits >= edge).length;
}

class View {
  constructor(info) {
    this.info = info;
    this.bar = new SubjectBar(info, "Show", (error) => this.refresh(error));
    this.error = el("p", { class: "error", role: "alert", hidden: true });
    this.status = el("p", { class: "note", role: "status" });
    this.text = el("div", { class: "tokens", role: "group", "aria-label": "Tokens; the arrow keys move between them" });
    this.detail = el("div", { class: "token-detail" });
    this.shown = null; // the subject whose tokens are shown
    this.number = 0;
    this.element = el("div", {}, this.bar.element, this.error, this.status, legend(),
      el("div", { class: "columns" }, this.text, this.detail));
  }

  open(turn) {
    if (turn) this.bar.choose(turn);
    if (!this.bar.isOn(this.shown)) this.refresh();
  }

  /** Asks again, at temperature 0, and shows the tokens of the answer; with --research those of the prompt too. */
  async refresh(error = null) {
    const mine = this.number += 1;
    show(this.error, "");
    try {
      if (error) throw error;
      const subject = await this.bar.current();
      if (!subject) throw new Failure("there is nothing to look at: ask something in the chat first");
      this.shown = subject;
      this.status.textContent = "The model answers…";
      const answer = await streamAnswer(bodyOf(this.info, subject));
      if (mine !== this.number) return;
      if (this.info.research) this.status.textContent = "The model runs again over prompt and answer…";
      const found = this.info.research
        ? fromResearch(await callJson("/research/tokens", { body: { messages: subject.messages, answer_ids: answer.ids } }))
        : fromLogprobs(answer);
      if (mine === this.number) this.#show(found);
    } catch (failure) {
      this.status.textContent = "";
      if (!(failure instanceof Failure)) throw failure;
      show(this.error, failure.message);
    }
  }

  #show({ tokens, answerStart, experts }) {
    this.status.textContent = `${count(answerStart, "token")} of the prompt, ${count(tokens.length - answerStart, "token")} of the answer.`;
    this.experts = experts;
    const buttons = [];
    const button = (token) => {
      const one = tokenButton(token, () => this.#choose(token, one));
      buttons.push(one);
      return one;
    };
    const part = (name, from, to) => (from === to ? null : el("section", {}, el("h3", {}, name),
      el("p", { class: "run" }, runsOf(tokens.slice(from, to)).map((run) => (run.length === 1 ? button(run[0]) : visualRun(run, button))))));
    this.text.replaceChildren(...[part("Prompt", 0, answerStart), part("Answer", answerStart, tokens.length)].filter(Boolean));
    roving(this.text, buttons);
    this.detail.replaceChildren(el("p", { class: "note" }, "No token is chosen."));
    const first = tokens[answerStart];
    if (first) this.#choose(first, buttons[answerStart]);
  }

  #choose(token, button) {
    this.text.querySelector("[aria-pressed=true]")?.setAttribute("aria-pressed", "false");
    button.setAttribute("aria-pressed", "true");
    this.detail.replaceChildren(
      el("h3", {}, `Token ${token.place}: `, el("code", {}, visible(token.text))),
      el("p", { class: "note" }, tell(token)),
      token.alternatives?.length ? alternatives(token) : el("p", { class: "note" }, "There is no prediction for this token."),
      ...(this.experts ? expertMap(this.experts, token.place) : []));
  }
}

function bodyOf(info, subject) {
  return {
    model: info.model, messages: subject.messages, temperature: 0, seed: 0, max_tokens: MAX_TOKENS,
    logprobs: true, top_logprobs: 5, return_token_ids: true,
  };
}

function fromResearch(found) {
  const tokens = found.tokens.map((token, place) => ({
    ...token, place, probability: found.probability[place], alternatives: found.alternatives[place],
  }));
  return { tokens, answerStart: found.answer_start, experts: found };
}

function fromLogprobs(answer) {
  const tokens = answer.logprobs.map((one, place) => ({
    id: answer.ids[place], text: one.token, visual: false, place, probability: Math.exp(one.logprob),
    alternatives: one.top_logprobs.map((other) => ({ text: other.token, probability: Math.exp(other.logprob) })),
  }));
  return { tokens, answerStart: 0, experts: null };
}

/** Visual tokens in a row are one run; each other token is a run of its own. */
function runsOf(tokens) {
  const runs = [];
  for (const token of tokens) {
    if (token.visual && runs.at(-1)?.[0].visual) runs.at(-1).push(token);
    else runs.push([token]);
  }
  return runs;
}

function visualRun(run, button) {
  return el("details", { class: "visual" }, el("summary", {}, count(run.length, "visual token")), run.map(button));
}

function tokenButton(token, onclick) {
  const level = token.probability === null || token.visual ? null : surpriseOf(token.probability);
  return el("button", {
    type: "button", class: `token ${level === null ? "" : `s${level}`}`, "aria-pressed": "false", onclick,
    "aria-label": level === null ? visible(token.text) : `${visible(token.text)}, ${CLASSES[level]}`,
  }, visible(token.text));
}

/** Spaces at the ends and line breaks as signs. */
function visible(text) {
  const shown = text.replace(/\n/g, "⏎").replace(/\t/g, "⇥").replace(/^ | $/g, "·");
  return shown || "(empty)";
}

function tell(token) {
  if (token.probability === null || token.probability === undefined) return `id ${token.id}`;
  const bits = -Math.log2(Math.max(token.probability, 1e-30));
  return `id ${token.id}, probability ${percent(token.probability)}, surprise ${Math.abs(bits).toFixed(2)} bits (${CLASSES[surpriseOf(token.probability)]})`;
}

function alternatives(token) {
  const rows = token.alternatives.map((one) => el("li", { class: one.text === token.text ? "taken" : "" },
    el("code", {}, visible(one.text)), el("meter", { min: 0, max: 1, value: one.probability, "aria-hidden": "true" }),
    el("span", { class: "figure" }, percent(one.probability)), one.text === token.text ? el("span", { class: "note" }, "taken") : null));
  return el("ol", { class: "likeliest", "aria-label": "The likeliest tokens here" }, rows);
}

function legend() {
  return el("ul", { class: "legend", "aria-label": "Surprise" }, CLASSES.map((name, level) =>
    el("li", {}, el("span", { class: `token s${level}`, "aria-hidden": "true" }, "ab"),
      `${name} (${level ? `from ${SURPRISE[level - 1]}` : `below ${SURPRISE[0]}`} bits)`)));
}
