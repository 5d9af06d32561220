// Pictures and videos of a question: from files, drops, the clipboard, the camera, samples and the server's drawings.
//
// A medium is {kind: "image" | "video", name, url: a data URI, bytes: what the server counts, its decoded length}.

import { call, Failure } from "./api.js";
import { byId, el } from "./dom.js";
import { bytes, count } from "./format.js";

/** Reads a File or Blob; a name that says what it is helps in error messages. */
export async function mediumOf(blob, name) {
  const kind = blob.type.split("/")[0];
  if (kind !== "image" && kind !== "video") {
    throw new Failure(`the file ${name} is neither a picture nor a video: attach a file of another kind`);
  }
  return { kind, name, url: await dataUri(blob), bytes: blob.size };
}

function dataUri(blob) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(new Failure("the file can't be read: check that it is still there"));
    reader.readAsDataURL(blob);
  });
}

/** A medium of a data URI that the server made. */
export function mediumOfUri(url, name) {
  const base64 = url.slice(url.indexOf(",") + 1);
  const padding = base64.endsWith("==") ? 2 : base64.endsWith("=") ? 1 : 0;
  return { kind: url.startsWith("data:video") ? "video" : "image", name, url, bytes: (base64.length / 4) * 3 - padding };
}

/** Fetches a sample of `/page/info`. */
export async function mediumOfSample(sample) {
  const response = await call(sample.url);
  return mediumOf(await response.blob(), sample.name);
}

/**
 * Refuses media that the server would refuse: `added` are sizes and kinds, which are known before a file is read, and
 * `present` are the media of the conversation, which every question sends again.
 *
 * @throws {Failure}
 */
export function checkMedia(info, present, added) {
  const items = present.length + added.length;
  if (info.max_items && items > info.max_items) {
    throw new Failure(`that makes ${count(items, "picture")} and videos, and the server takes ${info.max_items} per ` +
      "request: attach fewer, or start a new chat");
  }
  const size = (media) => media.reduce((sum, medium) => sum + medium.bytes, 0);
  const [before, more] = [size(present), size(added)];
  if (info.max_bytes && before + more > info.max_bytes) {
    const names = added.map((medium) => medium.name).join(", ");
    const rest = before ? ` beside the ${bytes(before)} that this chat has already` : "";
    throw new Failure(`too large: ${names} has ${bytes(more)}${rest}, and the server takes ${bytes(info.max_bytes)} per ` +
      "request. Attach a smaller file, or start the server with a larger --max-bytes");
  }
}

/** A small view of a medium. */
export function thumbnail(medium, size = "") {
  const described = medium.kind === "video" ? `Video: ${medium.name}` : medium.name;
  if (medium.kind === "image") return el("img", { src: medium.url, alt: described, class: `thumb ${size}` });
  return el("video", { src: medium.url, class: `thumb ${size}`, controls: true, preload: "metadata", "aria-label": described });
}

/** Whether the browser lets this page ask for the camera: on HTTPS or loopback only. */
export const hasCamera = () => Boolean(navigator.mediaDevices?.getUserMedia);

/** Lets the user take a picture; null if they cancel. */
export async function takePicture() {
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ video: true });
  } catch {
    throw new Failure("the camera can't be used: allow it in the browser, and check that no other program has it");
  }
  const [dialog, video] = [byId("camera-dialog"), byId("camera-video")];
  video.srcObject = stream;
  dialog.showModal();
  try {
    const take = await new Promise((resolve) => {
      byId("camera-take").onclick = () => resolve(true);
      byId("camera-cancel").onclick = dialog.oncancel = () => resolve(false);
    });
    return take ? await mediumOf(await frameOf(video), "camera.png") : null;
  } finally {
    dialog.close();
    video.srcObject = null;
    stream.getTracks().forEach((track) => track.stop());
  }
}

function frameOf(video) {
  const canvas = el("canvas", { width: video.videoWidth, height: video.videoHeight });
  canvas.getContext("2d").drawImage(video, 0, 0);
  return new Promise((resolve) => { canvas.toBlob(resolve, "image/png"); });
}

/** Calls `take` with the files that are dropped anywhere or pasted while `active()`. */
export function onFiles(active, take) {
  const holdsFiles = (transfer) => [...(transfer?.types ?? [])].includes("Files");
  const mark = (on) => document.body.classList.toggle("dropping", on);
  document.addEventListener("dragover", (event) => {
    if (!active() || !holdsFiles(event.dataTransfer)) return;
    event.preventDefault();
    mark(true);
  });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) mark(false); });
  document.addEventListener("drop", (event) => {
    mark(false);
    if (!active() || !holdsFiles(event.dataTransfer)) return;
    event.preventDefault();
    take([...event.dataTransfer.files]);
  });
  document.addEventListener("paste", (event) => {
    if (!active() || !event.clipboardData?.files.length) return;
    event.preventDefault();
    take([...event.clipboardData.files]);
  });
}
