// The chat: what is being written, the samples beside it, and the turns above it.

import { callJson, Failure } from "./api.js";
import { TurnView } from "./answer.js";
import { answered, beginChat, mediaOf, messagesOf, samplingOf, streamAnswer, turns } from "./conversation.js";
import { announce, byId, el, show } from "./dom.js";
import { checkMedia, hasCamera, mediumOf, mediumOfSample, mediumOfUri, onFiles, takePicture, thumbnail } from "./media.js";
import { turnEnded, turnsForgotten } from "./subject.js";

let info = {};
let look = () => {};
// truth: {question, answer} of a drawn picture, as long as it is alone; anew: whether the question begins a new chat
let draft = { media: [], truth: null, anew: false };
let running = null; // the AbortController of the answer that comes

/** Wires the view; `openView(name, turn)` opens another one on a turn. */
export function startChat(serverInfo, openView) {
  info = serverInfo;
  look = openView;
  byId("composer").addEventListener("submit", (event) => { event.preventDefault(); ask(); });
  byId("question").addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    ask();
  });
  byId("sampling").addEventListener("submit", (event) => event.preventDefault());
  byId("stop").addEventListener("click", () => running?.abort());
  byId("clear").addEventListener("click", clear);
  byId("files").addEventListener("change", (event) => {
    attachFiles([...event.target.files]);
    event.target.value = "";
  });
  const sees = info.video !== false; // a model of text alone takes neither
  document.querySelector("label[for=files]").hidden = byId("files").hidden = !sees;
  if (!sees) {
    byId("question").placeholder = "Ask something";
    byId("welcome").textContent = "Nothing is asked yet.";
  }
  byId("camera").hidden = !sees || !hasCamera();
  byId("camera").addEventListener("click", () => attempt(async () => attach(await takePicture())));
  byId("draw").hidden = !info.demo;
  byId("draw").addEventListener("click", () => attempt(draw));
  onFiles(() => sees && !byId("view-chat").hidden && !document.querySelector("dialog[open]"), attachFiles);
  showSamples();
}

/** Runs what the user asked for; its failure becomes a sentence above the buttons. */
async function attempt(action) {
  show(byId("composer-error"), "");
  try {
    await action();
  } catch (error) {
    if (!(error instanceof Failure)) throw error;
    show(byId("composer-error"), error.message);
  }
}

function showSamples() {
  const samples = info.samples ?? [];
  byId("samples-box").hidden = !samples.length;
  byId("samples").replaceChildren(...samples.map((sample) => el("li", {},
    el("button", { type: "button", onclick: () => attempt(() => takeSample(sample)) },
      el("img", { src: sample.url, alt: "", loading: "lazy" }), el("span", {}, sample.question)))));
}

async function takeSample(sample) {
  const medium = await mediumOfSample(sample);
  checkMedia(info, [], [medium]);
  setDraft({ media: [medium], truth: null, anew: true }, sample.question);
}

/** A new picture, whose question has one right answer. */
async function draw() {
  const drawn = await callJson("/page/draw", { body: {} });
  const medium = mediumOfUri(drawn.image, "drawn picture");
  setDraft({ media: [medium], truth: { question: drawn.question, answer: drawn.answer }, anew: true }, drawn.question);
}

function setDraft(next, question) {
  draft = next;
  byId("question").value = question;
  showDraft();
  byId("question").focus();
}

function attachFiles(files) {
  return attempt(async () => {
    // sizes are known before the files are read
    const sizes = files.map((file) => ({ kind: file.type.split("/")[0], name: file.name, bytes: file.size }));
    checkMedia(info, present(), sizes);
    for (const file of files) attach(await mediumOf(file, file.name));
  });
}

function attach(medium) {
  if (!medium) return;
  checkMedia(info, present(), [medium]);
  draft = { ...draft, media: [...draft.media, medium], truth: null };
  showDraft();
  announce(`Attached: ${medium.name}`);
}

/** The media that the next question sends. */
const present = () => [...(draft.anew ? [] : mediaOf(answered())), ...draft.media];

function showDraft() {
  byId("attached").replaceChildren(...draft.media.map((medium, index) => el("li", {}, thumbnail(medium, "small"),
    el("button", {
      type: "button", class: "remove", "aria-label": `Remove ${medium.name}`, title: "Remove",
      onclick: () => {
        draft = { ...draft, media: draft.media.filter((_, other) => other !== index), truth: null };
        showDraft();
        byId("question").focus();
      },
    }, "×"))));
}

function clear() {
  running?.abort();
  turns.length = 0;
  beginChat();
  turnsForgotten();
  byId("turns").replaceChildren();
  byId("welcome").hidden = false;
  setDraft({ media: [], truth: null, anew: false }, "");
  show(byId("composer-error"), "");
  announce("A new chat.");
}

async function ask() {
  const question = byId("question").value.trim();
  if (running || (!question && !draft.media.length)) return;
  if (!byId("sampling").reportValidity()) return;
  show(byId("composer-error"), "");
  const { media, truth, anew } = draft;
  if (anew) beginAnew();
  const before = answered();
  const turn = {
    question, media, answer: null, all: [...mediaOf(before), ...media],
    truth: truth?.question === question ? truth.answer : null,
  };
  turn.body = { model: info.model, messages: messagesOf(before, turn), ...samplingOf(byId("sampling")) };
  const view = new TurnView(turn, info, look);
  turns.push(turn);
  byId("welcome").hidden = true;
  byId("turns").append(view.element);
  setDraft({ media: [], truth: null, anew: false }, "");
  view.element.scrollIntoView({ block: "end" });
  await run(turn, view);
}

function beginAnew() {
  if (answered().length) byId("turns").append(el("p", { class: "divider" }, "A new chat: what is above is not sent again."));
  beginChat();
}

async function run(turn, view) {
  running = new AbortController();
  showRunning(true);
  let text = "";
  try {
    const answer = await streamAnswer(turn.body, {
      signal: running.signal,
      onText: (piece, isReasoning) => {
        text += isReasoning ? "" : piece;
        follow(() => view.add(piece, isReasoning));
      },
    });
    turn.answer = answer.text;
    follow(() => view.end(answer));
    turnEnded(turn);
  } catch (error) {
    turn.answer = text || null;
    if (text && turns.includes(turn)) turnEnded(turn);
    if (error.name === "AbortError") view.stopped();
    else if (error instanceof Failure) view.failed(error.message);
    else throw error;
    if (!text && turns.includes(turn)) giveBack(turn);
  } finally {
    running = null;
    showRunning(false);
  }
}

/** A question that got no answer can be asked again without typing it again. */
function giveBack(turn) {
  if (byId("question").value || draft.media.length) return;
  const truth = turn.truth === null ? null : { question: turn.question, answer: turn.truth };
  setDraft({ media: turn.media, truth, anew: false }, turn.question);
}

function showRunning(is) {
  const focused = document.activeElement;
  byId("stop").hidden = !is;
  byId("send").hidden = is;
  if (focused === byId("stop") || focused === byId("send")) byId("question").focus();
}

/** Keeps the end of the page in view while it grows, if it was in view before. */
function follow(grow) {
  const page = document.scrollingElement;
  const atEnd = page.scrollHeight - page.scrollTop - page.clientHeight < 80;
  grow();
  if (atEnd) page.scrollTop = page.scrollHeight;
}
