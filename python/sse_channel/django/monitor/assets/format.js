/** Numbers for people, with a no-break space before the unit. */

export const NOTHING = "–";
const grouped = new Intl.NumberFormat("en");

/** `value` with the largest unit that leaves it at 1 or more; the units are in ascending order. */
function withUnit(value, units) {
  let [unit, size] = units[0];
  for (const [name, least] of units) if (value >= least * 0.9995) [unit, size] = [name, least];
  const shown = value / size;
  const isWhole = shown >= 99.95 || (size === 1 && Number.isInteger(shown));
  return `${shown.toFixed(isWhole ? 0 : 1)}${unit && "\u00a0"}${unit}`;
}

const powers = (units) => units.map((unit, index) => [unit, 1000 ** index]);
const TIMES = [["µs", 1e-6], ["ms", 1e-3], ["s", 1], ["min", 60], ["h", 3600], ["d", 86_400]];

/** Something that is counted: 1,003. */
export function count(value) {
  return value < 99_999.5 ? grouped.format(Math.round(value)) : rate(value);
}

/** Something a second: 50.1 k. */
export function rate(value) {
  return withUnit(value, powers(["", "k", "M", "G"]));
}

/** 9.1 MB. */
export function bytes(value) {
  return withUnit(Math.round(value), powers(["B", "kB", "MB", "GB", "TB"]));
}

/** 1.1 ms; `value` is in seconds. */
export function duration(value) {
  return value === 0 ? "0\u00a0s" : withUnit(value, TIMES);
}

/** The same for an axis, whose values are round. */
export function onAxis(format) {
  return (value) => format(value).replace(/\.0(?!\d)/, "");
}

/** `format`, also for what is not known. */
export function orNothing(format) {
  return (value) => (value === null || value === undefined ? NOTHING : format(value));
}

export function plural(number, one, many = `${one}s`) {
  return `${count(number)} ${number === 1 ? one : many}`;
}
