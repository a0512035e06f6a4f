/** The monitor's page: it shows what its stream tells. All names are untrusted: text, no HTML. */

import { ChartGroup } from "./chart-group.js";
import { TimeChart } from "./chart.js";
import * as format from "./format.js";
import { Samples } from "./samples.js";
import { SharedEventSource } from "./shared-event-source.js";
import { Table, set, write } from "./table.js";

const { NOTHING, bytes, count, duration, onAxis, orNothing, plain, plural, rate, time } = format;
const STALE_MS = 3500; // without a sample, which should come each second
const KINDS = {
  socket: "offloaded: held without Python",
  stream: "held open by Python",
  queue: "listeners of the project's own",
};
const ORDINARY = ["closed", "left", "exit"]; // reasons to go that are nothing to worry about
const WORTH_A_LOOK = ["revoked", "overflow", "timeout", "flood", "abandoned"];

const find = (selector) => document.querySelector(selector);
const colored = (color) => {
  const swatch = document.createElement("i");
  swatch.style.background = `var(${color})`;
  return swatch;
};
const clientsOf = (clients) => Object.keys(KINDS).reduce((sum, k) => sum + (clients[k] ?? 0), 0);
const kindsOf = (clients) =>
  Object.keys(KINDS)
    .filter((kind) => clients[kind])
    .map((kind) => `${count(clients[kind])} ${kind}`)
    .join(" · ");

// --- Charts ---------------------------------------------------------------------------

const group = new ChartGroup({ onCursor: (t) => showLegends(t) });
const ofSeries = (color, value, more = {}) => ({ color, value: (s) => value(s.series), ...more });
const counted = (color, rateOf, name) => ({
  ...{ color, name, isCounted: true },
  value: ({ series, seconds }) => rateOf(series) * seconds,
});

const lineOf = (key, color, name) => ({
  isFilled: true,
  series: [ofSeries(color, (series) => series[key], { name })],
});

const charts = {
  clients: {
    type: "area",
    least: 5,
    format: count,
    series: Object.entries(KINDS).map(([name, title]) =>
      ofSeries(`--${name}`, ({ clients }) => clients[name] ?? 0, { name, title }),
    ),
  },
  events: { ...lineOf("events", "--socket", "published"), least: 5 },
  deliveries: { ...lineOf("deliveries", "--stream", "delivered"), least: 5 },
  delay: {
    scale: "log",
    least: 0.001,
    format: duration,
    series: ["p50", "p90", "p99"].map((name) =>
      ofSeries(`--${name}`, ({ delay }) => delay?.[name], { name }),
    ),
  },
  disconnects: { type: "bars", least: 5, bucket: 5000, format: count, series: [] },
  drops: {
    type: "bars",
    least: 5,
    bucket: 10_000,
    format: count,
    series: [counted("--bad", (s) => s.dropped, "events")],
  },
  lag: { ...lineOf("lag", "--lag", "worst process"), least: 0.01, format: duration },
};

for (const [name, view] of Object.entries(charts)) {
  view.format ??= rate;
  const options = { ...view, format: onAxis(view.format) };
  view.chart = group.add(new TimeChart(find(`[data-chart="${name}"]`), options));
  view.legend = find(`[data-legend="${name}"]`);
  view.hint = find(`[data-hint="${name}"]`);
  buildLegend(view);
}

/** The reasons that were seen, ordinary ones first: they are at the bottom of the bars. */
function reasonSeries(list) {
  const seen = (key) => new Set(list.flatMap(({ series }) => Object.keys(series[key] ?? {})));
  const gone = seen("disconnected");
  const known = [...ORDINARY, ...WORTH_A_LOOK];
  const others = [...gone].filter((reason) => !known.includes(reason)).sort();
  const series = [...known.filter((reason) => gone.has(reason)), ...others].map((name) => {
    const color = known.includes(name) ? `--${name}` : "--other";
    return counted(color, ({ disconnected }) => disconnected?.[name] ?? 0, name);
  });
  for (const [index, name] of [...seen("refused")].sort().entries()) {
    const color = `--refused-${(index % 2) + 1}`;
    series.push(counted(color, ({ refused }) => refused?.[name] ?? 0, `refused: ${name}`));
  }
  return series;
}

function buildLegend({ chart, legend }) {
  const items = chart.series.map(({ name, color, title }) => {
    const [item, label, value] = ["li", "span", "b"].map((tag) => document.createElement(tag));
    label.textContent = plain(name);
    if (title) item.title = title;
    item.append(colored(color), label, value);
    return item;
  });
  legend.replaceChildren(...items);
}

/** The values at `t`; without one the newest, and of what is counted the sum of five minutes. */
function showLegends(t) {
  const { newest } = samples;
  for (const { chart, legend, hint, format, bucket } of Object.values(charts)) {
    const isCounted = chart.series.every((series) => series.isCounted);
    const point = t === null ? null : chart.at(t);
    const values = chart.series.map((series, index) => {
      if (t !== null) return point?.values[index];
      return isCounted ? chart.total(index) : newest && series.value(newest);
    });
    for (const [index, value] of values.entries()) {
      write(legend.children[index].lastChild, orNothing(format)(value));
    }
    const span = t === null ? "in five minutes" : `${bucket / 1000} s from ${time(point?.t ?? t)}`;
    write(hint, isCounted ? span : t === null ? "now" : time(point?.t ?? t));
  }
}

// --- Figures --------------------------------------------------------------------------

const peakOf = (key) => Math.max(...samples.list.map(({ series }) => series[key]));

/** For each: the raw value, how it is written, a remark, and whether it is to alarm. */
const figures = {
  clients: ({ clients }) => ({ value: clientsOf(clients), as: count, note: kindsOf(clients) }),
  events: ({ events }) => ({ value: events, as: rate, note: `at most ${rate(peakOf("events"))}` }),
  deliveries: (s) => ({
    value: s.deliveries,
    as: rate,
    note: `at most ${rate(peakOf("deliveries"))}`,
  }),
  bytes: (s) => ({
    value: s.bytes,
    as: bytes,
    note: s.deliveries ? `${bytes(s.bytes / s.deliveries)} a delivery` : "nothing delivered",
  }),
  delay: ({ delay }) => ({
    value: delay?.p99 ?? null,
    as: duration,
    note: delay ? `half within ${duration(delay.p50)}` : "nothing delivered",
  }),
  drops: () => {
    const value = Math.round(charts.drops.chart.total(0));
    const last = [...samples.list].reverse().find(({ series }) => series.dropped > 0);
    const ago = last && Math.round((samples.newest.t - last.t) / 1000);
    const note = value === 0 ? "none" : ago === 0 ? "just now" : `last one ${duration(ago)} ago`;
    return { value, as: count, note, isAlarm: value > 0 };
  },
  processes: ({ processes }) => {
    const rows = latest?.processes ?? [];
    const silent = rows.filter(isSilent).length;
    const lost = rows.filter((row) => !isSilent(row) && troubleOf(row)).length;
    const words = [silent && `${silent} silent`, lost && `${lost} without the bus`].filter(Boolean);
    const note = rows.length ? words.join(", ") || "all answer" : "";
    return { value: processes, as: count, note, isAlarm: words.length > 0 };
  },
};

const sparks = {
  clients: { series: [ofSeries("--socket", ({ clients }) => clientsOf(clients))] },
  events: charts.events,
  deliveries: charts.deliveries,
  bytes: lineOf("bytes", "--stream"),
  delay: { series: [ofSeries("--p99", ({ delay }) => delay?.p99)], least: 0.001 },
  drops: charts.drops,
  processes: lineOf("processes", "--lag"),
};
for (const [name, options] of Object.entries(sparks)) {
  const canvas = find(`[data-spark="${name}"]`);
  const spark = new TimeChart(canvas, { isFilled: true, ...options, isBare: true });
  sparks[name] = group.add(spark, false);
}

function showFigures({ series }) {
  for (const [name, figure] of Object.entries(figures)) {
    const { value, as, note, isAlarm } = figure(series);
    const element = find(`[data-figure="${name}"]`);
    const [number, unit] = orNothing(as)(value).split("\u00a0");
    const text = unit ? `${number}\u00a0${unit}` : number;
    if (element.textContent !== text) {
      element.replaceChildren(number);
      if (unit) {
        const small = document.createElement("small");
        small.textContent = `\u00a0${unit}`;
        element.append(small);
      }
    }
    set(element.dataset, "value", String(value ?? ""));
    element.toggleAttribute("data-alert", Boolean(isAlarm));
    write(find(`[data-note="${name}"]`), note);
  }
}

// --- Tables ---------------------------------------------------------------------------

const isSilent = ({ silent }) => silent > 0;

/** One without streams has nothing to answer. */
const holdsStreams = ({ clients }) => Boolean(clients.socket || clients.stream);

/** What is wrong with a process, in words; empty if nothing is. */
function troubleOf({ silent, bus }) {
  const troubles = [];
  if (silent > 0) troubles.push(`silent for ${duration(Math.max(1, Math.round(silent)))}`);
  if (bus?.connected === false) troubles.push("bus lost");
  return troubles.join(", ");
}

const alarming = (text, isAlarm, cell) => {
  cell.toggleAttribute("data-alert", isAlarm);
  return text;
};
const dropped = (row, cell) => alarming(rate(row.dropped), row.dropped > 0, cell);
const named = (text, cell) => {
  const shown = plain(text ?? NOTHING);
  set(cell, "title", shown);
  return shown;
};

function putBar({ clients, most }, cell) {
  if (!cell.firstChild) {
    const bar = document.createElement("div");
    bar.className = "bar";
    bar.role = "img";
    bar.append(...Object.keys(KINDS).map((kind) => colored(`--${kind}`)));
    cell.append(bar);
  }
  const bar = cell.firstChild;
  for (const [index, kind] of Object.keys(KINDS).entries()) {
    const part = bar.children[index];
    set(part, "hidden", !clients[kind]);
    set(part.style, "width", `${Math.round((1000 * (clients[kind] ?? 0)) / (most || 1)) / 10}%`);
  }
  const words = kindsOf(clients) || "no clients";
  set(bar, "ariaLabel", words);
  set(bar, "title", words);
}

const tables = {
  processes: new Table(
    find("#processes"),
    [
      ({ host, process }) => plain(`${host} · ${process}`),
      (row) => troubleOf(row) || (holdsStreams(row) ? "answers" : "no streams"),
      ({ clients }) => count(clientsOf(clients)),
      (row) => rate(row.events),
      (row) => rate(row.deliveries),
      (row) => bytes(row.bytes),
      dropped,
      ({ bus }) => orNothing(duration)(bus?.lag),
      ({ bus }) => orNothing(count)(bus?.waiting),
      ({ memory }) => orNothing(bytes)(memory),
    ],
    (row) => {
      if (isSilent(row)) return "silent";
      return troubleOf(row) ? "lost" : holdsStreams(row) ? "good" : "idle";
    },
  ),
  channels: new Table(find("#channels"), [
    ({ name }, cell) => named(name, cell),
    putBar,
    ({ clients }) => count(clientsOf(clients)),
    (row) => rate(row.events),
    (row) => rate(row.deliveries),
    (row) => bytes(row.bytes),
    dropped,
  ]),
  slowest: new Table(find("#slowest"), [
    ({ client, host }) => plain(`${host} · ${client}`),
    ({ behind }, cell) => alarming(duration(behind), behind >= 1, cell),
    ({ frames }) => count(frames),
    (row) => orNothing(bytes)(row.bytes),
    ({ kind }) => kind,
    ({ channels }, cell) => named(channels.join(", "), cell),
    ({ user }, cell) => named(user, cell),
    ({ address }, cell) => named(address, cell),
    ({ seconds }) => duration(seconds),
  ]),
};

function showTables({ processes, channels, more_channels: more, slowest }) {
  const most = Math.max(...channels.map(({ clients }) => clientsOf(clients)));
  const rows = { processes, channels: channels.map((row) => ({ ...row, most })), slowest };
  for (const [id, table] of Object.entries(tables)) {
    table.show(rows[id]);
    find(`#${id}-empty`).hidden = rows[id].length > 0;
    find(`#${id}`).hidden = rows[id].length === 0;
  }
  write(find("#channels-hint"), more ? `and ${plural(more, "further channel")}` : "");
}

// --- State ----------------------------------------------------------------------------

let latest = null; // the newest event `sample` that has figures
let trouble = null; // why there are no newer ones
let heard = 0; // when it came
let request = 0;

/** The state of the stream, its words, and what is to be said about it at length. */
function stateNow() {
  const { readyState, status } = source;
  const answer = status ? ` (${status})` : "";
  if (readyState === SharedEventSource.CLOSED) {
    const way = [401, 403].includes(status)
      ? "Log in as a member of the staff, then load this page again."
      : "Load this page again to connect anew.";
    return ["refused", "Refused", `The stream was refused${answer}. ${way}`];
  }
  if (readyState === SharedEventSource.CONNECTING) {
    const state = latest || status ? "Reconnecting" : "Connecting";
    const isFailure = status && status !== 200;
    const why = isFailure ? `The stream cannot be had${answer}; it is tried again.` : "";
    return ["connecting", state, latest ? why : why || "Connecting to the stream."];
  }
  if (trouble) return ["stale", "No figures", trouble];
  if (!latest) return ["connecting", "Waiting", "Connected. Waiting for the first sample."];
  const silence = Date.now() - heard;
  if (silence < STALE_MS) return ["live", "Live", ""];
  return ["stale", `No sample for ${duration(Math.round(silence / 1000))}`, ""];
}

function showState() {
  const [state, words, notice] = stateNow();
  set(document.body.dataset, "state", state);
  write(find("#state"), words);
  write(find("#notice"), notice);
  find("#notice").hidden = notice === "";
  const clients = latest && clientsOf(latest.series.clients);
  const mark = state === "live" ? "" : `(${words}) `;
  const what = latest ? `${plural(clients, "client")} · ` : "";
  if (document.title !== `${mark}${what}sse_channel`) document.title = `${mark}${what}sse_channel`;
}

function show() {
  request = 0;
  const { list, newest } = samples;
  if (!newest) return;
  const { disconnects } = charts;
  const reasons = reasonSeries(list);
  const namesOf = (series) => series.map(({ name }) => name).join();
  if (namesOf(reasons) !== namesOf(disconnects.chart.series)) {
    disconnects.chart.series = reasons;
    buildLegend(disconnects);
  }
  const views = Object.values(charts).map(({ chart }) => chart);
  for (const chart of [...views, ...Object.values(sparks)]) chart.samples = list;
  showFigures(newest);
  showLegends(group.cursor);
  if (latest) {
    const hosts = new Set(latest.processes.map(({ host }) => host)).size;
    const processes = plural(latest.processes.length, "process", "processes");
    write(find("#bus"), named(latest.bus, find("#bus")));
    write(find("#place"), `${plural(hosts, "host")}, ${processes}`);
    showTables(latest);
  }
  const shown = find("#time");
  write(shown, time(newest.t));
  shown.dateTime = new Date(newest.t).toISOString();
}

/** Once for all that came; nothing while nobody sees it. */
function plan() {
  request ||= requestAnimationFrame(show);
}

const streamURL = new URL("stream", document.baseURI).href;
const samples = new Samples(`sse_channel monitor ${streamURL}`, () => {
  if (!latest) group.sync(samples.newest.t);
  plan();
});
const source = new SharedEventSource(streamURL);
source.addEventListener("history", ({ data }) => {
  samples.merge(JSON.parse(data).samples);
  if (!latest && samples.newest) group.sync(samples.newest.t);
  plan();
});
source.addEventListener("sample", ({ data }) => {
  const sample = JSON.parse(data);
  heard = Date.now();
  trouble = sample.trouble;
  if (sample.series) {
    latest = sample;
    samples.add(sample);
    group.sync(sample.t);
  }
  showState();
  plan();
});
source.addEventListener("open", showState);
source.addEventListener("error", showState);
setInterval(showState, 1000);
showState();
