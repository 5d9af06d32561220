// The turns of a chat, and the requests that they become.
//
// A turn is {question, media, truth: the right answer or null, answer: its text once it has ended, body: what was sent}.

import { call, events } from "./api.js";

export const turns = [];
let begin = 0; // of the present chat among them

/** The turns of the present chat that have an answer. Others are shown, and not sent again. */
export const answered = () => turns.slice(begin).filter((turn) => turn.answer);

/** Turns from here on are a new chat. */
export function beginChat() { begin = turns.length; }

/** All media of some turns, which each later question sends again. */
export const mediaOf = (some) => some.flatMap((turn) => turn.media);

/** OpenAI's messages: the answered turns, and a new one. */
export function messagesOf(before, turn) {
  const past = before.flatMap((one) => [userMessage(one), { role: "assistant", content: one.answer }]);
  return [...past, userMessage(turn)];
}

/** A question as a message: its media, then its text. */
export function userMessage(turn) {
  const media = turn.media.map((medium) => (medium.kind === "video"
    ? { type: "video_url", video_url: { url: medium.url } }
    : { type: "image_url", image_url: { url: medium.url } }));
  return { role: "user", content: [...media, { type: "text", text: turn.question }] };
}

/** The options in a form: its number fields by name, empty ones left out. */
export function samplingOf(form) {
  const fields = [...form.elements].filter((field) => field.name && field.value !== "");
  return Object.fromEntries(fields.map((field) => [field.name, Number(field.value)]));
}

/**
 * Streams an answer: `onText` gets each new text, and whether it is reasoning. Returns all that came.
 *
 * @returns {Promise<{text, ids, logprobs, timeline, usage, reason}>}
 * @throws {Failure}
 * @throws {DOMException} AbortError, if `signal` stopped it
 */
export async function streamAnswer(body, { signal, onText = () => {} } = {}) {
  const answer = { text: "", ids: [], logprobs: [], timeline: null, usage: null, reason: null };
  const asked = { ...body, stream: true, stream_options: { include_usage: true }, timeline: true };
  for await (const event of events(await call("/v1/chat/completions", { body: asked, signal }))) {
    answer.usage = event.usage ?? answer.usage;
    answer.timeline = event.timeline ?? answer.timeline;
    const [choice] = event.choices;
    if (!choice) continue;
    answer.ids.push(...(choice.token_ids ?? []));
    answer.logprobs.push(...(choice.logprobs?.content ?? []));
    answer.reason = choice.finish_reason ?? answer.reason;
    const { content, reasoning } = choice.delta;
    if (reasoning) onText(reasoning, true);
    if (content) {
      answer.text += content;
      onText(content, false);
    }
  }
  return answer;
}
