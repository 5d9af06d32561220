// One turn of the chat as it is shown: the question with its media, the answer as it comes, and what can be done with it.

import { announce, el, show } from "./dom.js";
import { asCurl, asJson, asPython } from "./copying.js";
import { count } from "./format.js";
import { thumbnail } from "./media.js";
import { timelineFigure } from "./timeline.js";

/** The view of a turn; `look(view, turn)` opens another view on it. */
export class TurnView {
  constructor(turn, info, look) {
    this.turn = turn;
    this.info = info;
    this.look = look;
    this.text = el("p", { class: "text" });
    this.reasoning = el("p", { class: "text" });
    this.thoughts = el("details", { class: "reasoning", hidden: true }, el("summary", {}, "Reasoning"), this.reasoning);
    this.note = el("p", { class: "error", role: "alert", hidden: true });
    this.after = el("div", { class: "after" });
    this.answer = el("div", { class: "answer", "aria-busy": "true" }, this.thoughts, this.text, this.note, this.after);
    this.element = el(
      "article", { class: "turn", "aria-label": turn.question },
      el("div", { class: "asked" },
        turn.media.length ? el("div", { class: "media" }, turn.media.map((medium) => thumbnail(medium))) : null,
        el("p", { class: "text" }, turn.question)),
      this.answer,
    );
  }

  /** Shows the next text. Screen readers get the whole answer at its end, not each token. */
  add(text, isReasoning) {
    const place = isReasoning ? this.reasoning : this.text;
    place.append(text);
    if (isReasoning) this.thoughts.hidden = false;
  }

  /** The answer has ended; `answer` is what `streamAnswer` returned. */
  end(answer) {
    this.#done();
    if (answer.reason === "length") show(this.note, `The answer was cut off after ${count(answer.usage?.completion_tokens ?? 0, "token")}: raise Max tokens, or ask for less.`);
    if (this.turn.truth !== null) this.after.append(truthOf(this.turn));
    if (answer.timeline) this.after.append(timelineFigure(answer.timeline));
    this.after.append(this.#buttons());
    announce(`Answer: ${this.text.textContent || "empty"}`);
  }

  /** The user stopped the answer. */
  stopped() {
    this.#done();
    this.after.append(el("p", { class: "note" }, "Stopped."), this.#buttons());
    announce("The answer was stopped.");
  }

  /** There is no answer, or no more of it, with the reason as a sentence. */
  failed(message) {
    this.#done();
    show(this.note, message);
  }

  #done() {
    this.answer.setAttribute("aria-busy", "false");
    this.answer.classList.add("done");
  }

  #buttons() {
    const { body } = this.turn; // the model's name may have become known with the key
    const text = (make) => make({ ...body, model: this.info.model }, location.origin, this.info.needs_key);
    const copy = (name, make) => el("button", {
      type: "button", class: "quiet", "aria-label": `Copy as ${name}`,
      onclick: (event) => copyText(text(make), event.currentTarget),
    }, name);
    const open = (view, name) => el("button", { type: "button", class: "quiet", onclick: () => this.look(view, this.turn) }, name);
    return el("div", { class: "actions" },
      el("span", { class: "note" }, "Copy as"), copy("curl", asCurl), copy("Python", asPython), copy("JSON", asJson),
      el("span", { class: "push" }),
      this.turn.all.length ? open("deepstack", "See its DeepStack") : null, open("tokens", "See its tokens"));
  }
}

/** The truth beside the answer: equal or not, in words and in colour. */
function truthOf(turn) {
  const right = turn.answer.trim() === turn.truth.trim();
  return el("p", { class: `truth ${right ? "right" : "wrong"}` },
    el("strong", {}, right ? "✓ right" : "✗ wrong"), " The truth: ", el("q", {}, turn.truth));
}

async function copyText(text, button) {
  const name = button.textContent;
  let done = true;
  try {
    await navigator.clipboard.writeText(text);
  } catch { // no clipboard without HTTPS
    const area = el("textarea", { class: "hidden", "aria-hidden": "true" });
    area.value = text;
    button.after(area);
    area.select();
    done = document.execCommand("copy");
    area.remove();
    button.focus();
  }
  button.textContent = done ? "copied" : "not allowed";
  announce(done ? `Copied as ${name}.` : "The browser does not allow copying.");
  setTimeout(() => { button.textContent = name; }, 1500);
}
