// Calls of the server: the API key, errors as sentences, and answers as server-sent events.

import { sentence } from "./format.js";

let key = ""; // of this tab: it is written nowhere else, and a reload forgets it
let askForKey = async () => null;
let keyChanged = () => {};
let asking = null;

/** What went wrong, as a sentence; `status` is HTTP's, 0 if there was no answer. */
export class Failure extends Error {
  constructor(message, status = 0, code = null) {
    super(sentence(message));
    this.status = status;
    this.code = code;
  }
}

/** Takes the function that asks the user, which gets a sentence and returns the key or null, and one to call after it. */
export function onKeyNeeded(ask, changed) {
  askForKey = ask;
  keyChanged = changed;
}

/** Asks for the key at once; calls that wait for one share the question. */
export async function changeKey(message) {
  asking ??= askForKey(message).finally(() => { asking = null; });
  const given = await asking;
  if (given === null) return false;
  if (key !== given) {
    key = given;
    keyChanged();
  }
  return true;
}

export const hasKey = () => key !== "";

/**
 * The response of an endpoint, whose status is 2xx: GET without a body, else POST of JSON.
 *
 * A server that needs a key is given one: the user is asked until it fits, unless `ask` is false.
 *
 * @throws {Failure}
 * @throws {DOMException} AbortError, if `signal` stopped it
 */
export async function call(path, { body, signal, ask = true } = {}) {
  for (;;) {
    const used = key;
    const response = await send(path, body, signal, used);
    if (response.ok) return response;
    const failure = await failureOf(response);
    if (response.status !== 401 || !ask) throw failure;
    if (key !== used) continue; // another call was given a key in the meantime
    const why = used ? "The server does not know this key: type another one." :
      "This server answers only with an API key.";
    if (!await changeKey(why)) throw new Failure("the server needs an API key: ask again to type one", 401);
  }
}

/** As `call`, for the JSON of the answer. */
export async function callJson(path, options) {
  return (await call(path, options)).json();
}

async function send(path, body, signal, used) {
  const headers = used ? { authorization: `Bearer ${used}` } : {};
  if (body !== undefined) headers["content-type"] = "application/json";
  const options = { headers, signal, cache: "no-store", credentials: "omit" };
  try {
    return await fetch(path, body === undefined ? options : { ...options, method: "POST", body: JSON.stringify(body) });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("the server can't be reached: check that it is running, and ask again");
  }
}

async function failureOf(response) {
  let error = {};
  try {
    error = (await response.json()).error ?? {};
  } catch { /* not JSON: a proxy's page, or nothing */ }
  const reason = error.message || `the server answered ${response.status} ${response.statusText}`.trim();
  return new Failure(reason, response.status, error.code);
}

/**
 * The JSON of each event of a stream.
 *
 * @throws {Failure} the server reports an error, or the connection breaks before the end
 */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let held = "";
  try {
    for (;;) {
      const { value, done } = await read(reader);
      if (done) throw new Failure("the connection broke before the answer's end: ask again");
      const parts = (held + value).split(/\r?\n\r?\n/);
      held = parts.pop();
      for (const part of parts) {
        const data = dataOf(part);
        if (data === "[DONE]") return;
        if (data) yield checked(JSON.parse(data));
      }
    }
  } finally {
    reader.cancel().catch(() => {}); // the server stops the request when nobody reads
  }
}

async function read(reader) {
  try {
    return await reader.read();
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Failure("the connection broke before the answer's end: ask again");
  }
}

function dataOf(part) {
  const lines = part.split(/\r?\n/).filter((line) => line.startsWith("data:"));
  return lines.map((line) => line.slice(5).replace(/^ /, "")).join("\n");
}

function checked(event) {
  if (event.error) throw new Failure(event.error.message ?? "the server failed", 500, event.error.code);
  return event;
}
