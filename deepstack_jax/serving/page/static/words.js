// The difference of two texts, word by word.

import { el } from "./dom.js";

/**
 * Each word and sign of `text` with whether `base` has it too, by a longest common subsequence: [[space, word, same], ...].
 */
export function compareWords(base, text) {
  const [a, b] = [base, text].map((each) => [...each.matchAll(/(\s*)([\p{L}\p{N}]+|[^\s\p{L}\p{N}])/gu)]);
  const same = (i, j) => a[i][2] === b[j][2];
  // lengths[i][j]: of the longest subsequence common to a from i on and b from j on
  const lengths = Array.from({ length: a.length + 1 }, () => new Uint32Array(b.length + 1));
  for (let i = a.length - 1; i >= 0; i -= 1) {
    for (let j = b.length - 1; j >= 0; j -= 1) {
      lengths[i][j] = same(i, j) ? lengths[i + 1][j + 1] + 1 : Math.max(lengths[i + 1][j], lengths[i][j + 1]);
    }
  }
  const words = [];
  for (let i = 0, j = 0; j < b.length;) {
    if (i < a.length && same(i, j)) {
      words.push([b[j][1], b[j][2], true]);
      i += 1;
      j += 1;
    } else if (i < a.length && lengths[i + 1][j] >= lengths[i][j + 1]) {
      i += 1;
    } else {
      words.push([b[j][1], b[j][2], false]);
      j += 1;
    }
  }
  return words;
}

/** A paragraph of `text` in which words that `base` does not have at their place are marked. */
export function markedText(base, text) {
  const parts = compareWords(base, text).flatMap(([space, word, same]) => [space, same ? word : el("mark", {}, word)]);
  return el("p", { class: "text" }, parts);
}
