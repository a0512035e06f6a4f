/** Numbers for people, with a no-break space before the unit. */

export const NOTHING = "–";
const grouped = new Intl.NumberFormat("en");
const clock = new Intl.DateTimeFormat("en", { timeStyle: "medium", hourCycle: "h23" });

/** `value` with the largest unit that leaves it at 1 or more; the units are in ascending order. */
function withUnit(value, units, digits = 1) {
  let [unit, size] = units[0];
  for (const [name, least] of units) if (value >= least * 0.9995) [unit, size] = [name, least];
  const shown = value / size;
  const isWhole = shown >= 99.95 || (size === 1 && Number.isInteger(shown));
  const isTiny = shown > 0 && shown < 0.095; // 0.04 is not 0
  const text = isTiny ? shown.toPrecision(1) : shown.toFixed(isWhole ? 0 : digits);
  return unit ? `${text}\u00a0${unit}` : text;
}

const powers = (units) => units.map((unit, index) => [unit, 1000 ** index]);
const TIMES = [["µs", 1e-6], ["ms", 1e-3], ["s", 1], ["min", 60], ["h", 3600], ["d", 86_400]];

/** Something that is counted: 1,003. */
export function count(value, digits) {
  return value < 99_999.5 ? grouped.format(Math.round(value)) : rate(value, digits);
}

/** Something a second: 50.1 k. */
export function rate(value, digits) {
  return withUnit(value, powers(["", "k", "M", "G"]), digits);
}

/** 9.1 MB. */
export function bytes(value, digits) {
  return withUnit(Math.round(value), powers(["B", "kB", "MB", "GB", "TB"]), digits);
}

/** 1.1 ms; `value` is in seconds. */
export function duration(value, digits) {
  return value === 0 ? "0\u00a0s" : withUnit(value, TIMES, digits);
}

/** 18:02:51. */
export function time(t) {
  return clock.format(t);
}

/** `format` for an axis, whose values are round: 2.5 k, 1.25 k, 1 k. */
export function onAxis(format) {
  return (value) => format(value, 2).replace(/(\.\d*?)0+(?!\d)/, "$1").replace(/\.(?!\d)/, "");
}

/** `format`, also for what is not known. */
export function orNothing(format) {
  return (value) => (value === null || value === undefined ? NOTHING : format(value));
}

export function plural(number, one, many = `${one}s`) {
  return `${count(number)} ${number === 1 ? one : many}`;
}

/** Text of anybody's, without the characters that control how the text around it is shown. */
export function plain(text) {
  return text.replace(/[\p{Cc}\u200e\u200f\u2028-\u202e\u2066-\u2069]/gu, "\ufffd");
}
