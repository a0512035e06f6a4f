/** What an axis reaches from and to, and its ticks: { low, high, ticks }. */

/** The least of 1, 2, 2.5, 5 times a power of ten that is not below `value`. */
function roundUp(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= value * 0.999);
}

/** From 0 to what holds all `values`, and `least`. */
export function linearAxis(values, least) {
  const most = Math.max(least, ...values);
  const step = roundUp(most / 4.6);
  const count = Math.ceil(most / step - 0.001);
  const ticks = Array.from({ length: count + 1 }, (_, index) => index * step);
  return { low: 0, high: count * step, ticks };
}

/** Two decades or more; `low` and `high` are exponents of ten. What is not above 0 has no place. */
export function logAxis(values, least) {
  const known = values.filter((value) => value > 0);
  const low = Math.floor(Math.log10(Math.min(...(known.length ? known : [least]))));
  const high = Math.max(low + 2, Math.ceil(Math.log10(Math.max(least, ...known))));
  const ticks = Array.from({ length: high - low + 1 }, (_, index) => 10 ** (low + index));
  return { low, high, ticks };
}
