// Numbers and sentences as people read them.

const SMALL = new Intl.NumberFormat("en", { maximumSignificantDigits: 3 });
const WHOLE = new Intl.NumberFormat("en", { maximumFractionDigits: 0 });

/** Three digits where they matter: 0.0123, 4.56, 1,235. */
export const number = (value) => (Math.abs(value) < 1000 ? SMALL : WHOLE).format(value);

/** "1 token", "2,000 tokens". */
export const count = (value, what) => `${WHOLE.format(value)} ${what}${value === 1 ? "" : "s"}`;

/** Milliseconds, or seconds from one on. */
export const duration = (ms) => (ms < 1000 ? `${number(ms)} ms` : `${number(ms / 1000)} s`);

/** Seconds as an age: "12 s", "3 min", "2 h". */
export function age(seconds) {
  if (seconds < 120) return `${Math.round(seconds)} s`;
  return seconds < 7200 ? `${Math.round(seconds / 60)} min` : `${Math.round(seconds / 3600)} h`;
}

/** Bytes in decimal units, as networks count them. */
export function bytes(value) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) {
    value /= 1000;
    unit += 1;
  }
  return `${number(value)} ${units[unit]}`;
}

/** A probability: "97.1 %", "< 0.01 %". */
export const percent = (value) => (value > 0 && value < 1e-4 ? "< 0.01 %" : `${number(100 * value)} %`);

/** A message with a capital letter and a full stop. */
export function sentence(text) {
  const trimmed = String(text).trim();
  if (!trimmed) return "";
  const begun = /^--/.test(trimmed) ? trimmed : trimmed[0].toUpperCase() + trimmed.slice(1);
  return /[.!?]$/.test(begun) ? begun : `${begun}.`;
}
